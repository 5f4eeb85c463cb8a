"""Under test, every annotated shape and type of the package is checked."""

import gc
import os
import sys
from collections.abc import Iterator
from typing import Any

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


OF_NUMBERS = {
    "test_batch_invariance",
    "test_end_to_end",
    "test_evaluate",
    "test_evaluate_refusals",
    "test_experiments",
    "test_fit",
    "test_recipes",
    "test_run",
    "test_together",
    "test_topologies",
    "test_twins",
}
"""Modules whose plots nobody looks at; those of every kind of page are laid out in the others."""


def pytest_runtest_setup() -> None:
    checked.begin()


def pytest_collection_finish() -> None:
    """What is there now stays: the garbage collector, which tests ask for by name, need not walk through it again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """What was kept goes: else triton's library reports every one of its objects as leaked."""
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def plots_are_drawn_but_not_laid_out(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where numbers of reports are looked at: finding room for labels takes half of a report's time."""
    if request.module.__name__ not in OF_NUMBERS:
        yield
        return
    from matplotlib.figure import Figure

    with pytest.MonkeyPatch.context() as patch:
        savefig = Figure.savefig

        def plain(figure: Figure, *arguments: Any, **options: Any) -> None:
            figure.set_layout_engine("none")
            savefig(figure, *arguments, **options)

        patch.setattr(Figure, "savefig", plain)
        yield


@pytest.fixture
def unchecked() -> Iterator[None]:
    """For a test of the error that the package itself raises, as users without the checks meet it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
