"""Under test the package's annotations are checked: a wrong shape or type fails, wherever it is given."""

import importlib
import inspect
import pkgutil
from types import FunctionType
from typing import Any

import checked
import jaxtyping
import pytest
import torch
from jaxtyping import TypeCheckError

import sememe
from sememe import kernels, metrics
from sememe.dictionaries import pca
from sememe.encoded import Encoded
from sememe.errors import ShapeError
from sememe.text import TokenPolicy

MODULES = [module.name for module in pkgutil.walk_packages(sememe.__path__, "sememe.")]


def own_functions(name: str) -> list[FunctionType]:
    """The functions that a module defines; jaxtyping leaves asynchronous ones alone."""
    module = importlib.import_module(name)
    found = [f for f in vars(module).values() if inspect.isfunction(f) and f.__module__ == name]
    return [f for f in found if not inspect.iscoroutinefunction(f)]


def is_checked(function: Any) -> bool:
    """Whether jaxtyping's wrapper is around it, below whatever other decorators it has."""
    layer = function
    while hasattr(layer, "__wrapped__"):
        if layer.__globals__["__name__"].startswith("jaxtyping."):
            return True
        layer = layer.__wrapped__
    return False


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_every_module_is_checked_but_those_that_are_compiled(name: str) -> None:
    if name.startswith("sememe.kernels.gpu"):
        pytest.importorskip("triton")
    functions = own_functions(name)
    wrapped = [f.__name__ for f in functions if is_checked(f)]
    assert wrapped == ([] if name in checked.UNCHECKED else [f.__name__ for f in functions])


def test_exempt_modules_are_there() -> None:
    assert set(MODULES) >= checked.UNCHECKED


def test_a_wrong_shape_fails_in_a_function() -> None:
    acts, indices = torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.int32)
    assert kernels.decode(acts, indices, torch.zeros(5, 3), torch.zeros(3)).shape == (2, 3)
    with pytest.raises(TypeCheckError, match="parameter 'b_dec'"):
        kernels.decode(acts, indices, torch.zeros(5, 3), torch.zeros(4))


def test_a_wrong_dtype_fails_in_a_constructor() -> None:
    with pytest.raises(TypeCheckError, match="parameter 'indices'"):
        Encoded(torch.zeros(3), torch.zeros(3), torch.tensor([0, 3]), 7)


def test_a_wrong_type_fails_in_a_method_and_in_a_class_method() -> None:
    with pytest.raises(TypeCheckError, match="parameter 'x'"):
        pca.Moments().update([[1.0, 2.0]])
    with pytest.raises(TypeCheckError, match="parameter 'd_sae'"):
        Encoded.from_topk(torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.int32), "7")


def test_a_wrong_result_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "repeat_interleave", lambda rows, counts, output_size: rows.float())
    encoded = Encoded.from_dense(torch.eye(3))
    with pytest.raises(TypeCheckError, match=r"return value of sememe\.encoded\.Encoded\.row_ids"):
        encoded.row_ids()


def test_an_int_is_a_float_and_self_is_anything() -> None:
    policy = TokenPolicy(max_norm_ratio=3)
    assert policy.replace(context_length=16).context_length == 16
    kernels.adam_step(
        *(torch.zeros(2, 2) for _ in range(4)),
        step=1, lr=1, betas=(0, 0), eps=1, grad_scale=1, unit_norm=False,
    )  # fmt: skip


def test_of_many_calls_the_first_are_checked_and_then_some() -> None:
    def same(x: int) -> int:
        return x

    called = jaxtyping.jaxtyped(typechecker=checked.check)(same)

    def refused() -> bool:
        try:
            return bool(called("text") != "text")
        except TypeCheckError:
            return True

    found = [refused() for _ in range(checked.FIRST + 3 * checked.EVERY)]
    assert all(found[: checked.FIRST]) and sum(found) == checked.FIRST + 3
    checked.begin()
    assert refused(), "each test begins anew"


@pytest.mark.usefixtures("unchecked")
def test_without_the_checks_the_packages_own_error_is_met() -> None:
    with pytest.raises(ShapeError):
        metrics.mcs(torch.zeros(3, 4), torch.zeros(3, 5))
