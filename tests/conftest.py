"""Under test, every annotated shape and type of the package is checked at each call."""

import sys
from collections.abc import Iterator

import checked
import jaxtyping
import pytest

assert "sememe" not in sys.modules, "the checks must be there before the package is"
checked.install()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """For a test of the error that the package itself raises, as users without the checks meet it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
