"""Under test, every annotated shape and type of the package is checked at each call."""

import gc
import os
import sys
from collections.abc import Iterator

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # A core for each worker, before torch counts them: teams of threads that share cores wait for each other.
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if cores:
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import checked
import jaxtyping
import pytest
import torch

assert "sememe" not in sys.modules, "the checks must be there before the package is"
checked.install()

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, so before any test is


def pytest_collection_finish() -> None:
    """What is there now stays: the garbage collector, which tests ask for by name, need not walk through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """For a test of the error that the package itself raises, as users without the checks meet it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
