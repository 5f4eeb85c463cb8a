"""The CPU path as on other processors: which rough products it takes."""

import contextlib
from collections.abc import Iterator

import pytest

from sememe.kernels.cpu import rough

KINDS = ("int8", "bfloat16", "float32")


@contextlib.contextmanager
def products_in(kind: str) -> Iterator[None]:
    """Rough products in one of KINDS; every processor can do each, if not fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rough, "native_int8", lambda: kind == "int8")
        patch.setattr(rough, "native_bfloat16", lambda: kind != "float32")
        yield
