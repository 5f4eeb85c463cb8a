"""Inner tensors computed again: the same gradients, nothing held, no compiler."""

import subprocess
import sys
import weakref

import torch

from sememe.recompute import recomputed

W = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
X = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))


def parts(x, W, seen=None):
    hidden = (x @ W).exp()
    if seen is not None:
        seen.append(weakref.ref(hidden))
    gate = torch.sigmoid(hidden - 1)
    return {"sum": (hidden * gate).sum(), "squares": gate.square().sum(0)}


def test_gradients_are_those_of_the_function_itself():
    grads = []
    for run in (lambda f, *a: f(*a), recomputed):
        x, weights = X.clone().requires_grad_(), W.clone().requires_grad_()
        out = run(parts, x, weights)
        (3 * out["sum"] + out["squares"].prod()).backward()
        grads.append((x.grad, weights.grad, out["sum"].detach()))
    for mine, plain in zip(*grads, strict=True):
        assert torch.equal(mine, plain)


def test_a_gradient_of_one_output_alone():
    x = X.clone().requires_grad_()
    recomputed(parts, x, W)["squares"].sum().backward()
    plain = X.clone().requires_grad_()
    parts(plain, W)["squares"].sum().backward()
    assert torch.equal(x.grad, plain.grad)


def test_one_output_after_the_other():
    """What the first way back leaves over is not mistaken for what the second one needs."""
    grads = []
    for run in (lambda f, *a: f(*a), recomputed):
        x = X.clone().requires_grad_()
        out = run(parts, x, W)
        out["squares"].sum().backward(retain_graph=True)
        out["sum"].backward(retain_graph=True)
        out["sum"].backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_what_the_function_closes_over_gets_its_gradient_in_several_parts():
    weights = W.clone().requires_grad_()
    sums = [recomputed(lambda rows: (rows @ weights).tanh().sum(), rows) for rows in X.split(2)]
    torch.stack(sums).sum().backward()
    plain = W.clone().requires_grad_()
    (X @ plain).tanh().sum().backward()
    torch.testing.assert_close(weights.grad, plain.grad)


def test_inner_tensors_are_let_go_of_until_the_way_back():
    seen: list = []
    x = X.clone().requires_grad_()
    out = recomputed(parts, x, W, seen)
    assert [ref() for ref in seen] == [None]
    out["sum"].backward()
    assert len(seen) == 2 and seen[1]() is None


def test_in_place_changes_within():
    def function(x):
        y = x * 2
        y.mul_(torch.sigmoid(x))
        return y.square().sum()

    x = X.clone().requires_grad_()
    recomputed(function, x).backward()
    plain = X.clone().requires_grad_()
    function(plain).backward()
    assert torch.equal(x.grad, plain.grad)


def test_it_is_computed_again_under_the_autocast_it_was_computed_under():
    """The way back is outside of autocast: without its state, saved tensors would have other dtypes."""
    grads = []
    for run in (lambda f, *a: f(*a), recomputed):
        x, weights = X.clone().requires_grad_(), W.clone().requires_grad_()

        def function(rows, weights=weights):
            assert torch.is_autocast_enabled("cpu")
            return torch.tanh(rows @ weights).square()

        with torch.autocast("cpu", torch.bfloat16):
            found = run(function, x)
        assert found.dtype == torch.bfloat16
        found.sum().backward()
        grads.append((x.grad, weights.grad))
    for mine, plain in zip(*grads, strict=True):
        assert torch.equal(mine, plain)


def test_without_a_gradient_nothing_is_recorded():
    with torch.no_grad():
        out = recomputed(parts, X, W)
    assert not out["sum"].requires_grad and torch.equal(out["sum"], parts(X, W)["sum"])


def test_a_dense_training_step_does_not_load_the_compiler():
    code = """
import sys, torch
from sememe import dictionaries
from sememe.dictionaries import chunks
from sememe.dictionaries.relu import ReLUConfig
chunks.ENTRIES = 10 * 64
dictionary = dictionaries.build(ReLUConfig(d_sae=64, start_density=0), 8, 8)
x = torch.randn(50, 8)
dictionary.initialise(x, x, torch.Generator().manual_seed(0))
dictionary.train().loss(x, x, 0.5).total.backward()
assert dictionary.W_enc.grad.abs().sum() > 0
print("torch._dynamo" in sys.modules)
"""
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "False"
