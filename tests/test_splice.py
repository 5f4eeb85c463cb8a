"""A model run from the middle is, to the bit, the whole model run with the same edits."""

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCAB, tiny_lm

from sememe.splice import Splicer

IDS = torch.randint(0, VOCAB, (3, 11), generator=torch.Generator().manual_seed(0))


def full(lm, replacements, mask=None):
    with lm.edit({name: (lambda x, new=new: new.to(x.dtype)) for name, new in replacements.items()}):
        return lm.hidden(IDS, mask)


@torch.inference_mode()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_hookpoint_of_every_architecture(name: str) -> None:
    lm = tiny_lm(name)
    first, last = "resid_pre.0", "resid_post.2"
    for hookpoint in (first, *(point for point in lm.hookpoints() if point.endswith(".1")), last):
        splicer = Splicer(lm, [hookpoint], [hookpoint])
        run = splicer.base(IDS)
        assert torch.equal(run.hidden, lm.hidden(IDS)), hookpoint
        x = run.activations[hookpoint]
        assert torch.equal(x, lm.capture(IDS, hookpoint)[hookpoint]), hookpoint
        assert torch.equal(splicer.spliced(run, {hookpoint: x}), run.hidden), hookpoint
        changed = {hookpoint: 0.5 * x + 0.1}
        spliced = splicer.spliced(run, changed)
        assert torch.equal(spliced, full(lm, changed)), hookpoint
        assert not torch.equal(spliced, run.hidden), hookpoint
        assert torch.equal(lm.hidden(IDS), run.hidden)  # nothing stays behind


@torch.inference_mode()
@pytest.mark.parametrize(
    "writes",
    [
        ("resid_post.0", "resid_post.1"),
        ("mlp_out.1", "resid_post.0"),
        ("attn_z.1", "mlp_out.2"),
        ("resid_pre.0", "mlp_out.0"),
        ("model.layers.1", "mlp_out.2"),
        ("mlp_in.0", "mlp_out.2"),
    ],
)
def test_several_places_at_once(writes: tuple[str, ...]) -> None:
    lm = tiny_lm("llama")
    splicer = Splicer(lm, writes, writes)
    run = splicer.base(IDS)
    changed = {name: 0.5 * run.activations[name] for name in writes}
    assert torch.equal(splicer.spliced(run, changed), full(lm, changed))
    only = {writes[1]: changed[writes[1]]}  # the other keeps its own
    assert torch.equal(splicer.spliced(run, only), full(lm, only))
    assert torch.equal(splicer.spliced(run, {}), run.hidden)


@torch.inference_mode()
def test_padding_is_passed_on() -> None:
    lm = tiny_lm("llama")
    mask = torch.ones_like(IDS, dtype=torch.bool)
    mask[1, 6:] = False
    splicer = Splicer(lm, ["resid_post.1"], ["resid_post.1"])
    run = splicer.base(IDS, mask)
    changed = {"resid_post.1": run.activations["resid_post.1"] * 2}
    assert torch.equal(splicer.spliced(run, changed)[mask], full(lm, changed, mask)[mask])


def test_layers_below_are_not_run() -> None:
    lm = tiny_lm("llama")
    splicer = Splicer(lm, ["resid_post.1"], ["resid_post.1"])
    run = splicer.base(IDS)
    # The first time, the model is asked whether its layers can be left out.
    splicer.spliced(run, run.activations)
    calls: list[int] = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda *_, i=i: calls.append(i))
        for i, layer in enumerate(lm.hf.model.layers)
    ]
    splicer.spliced(run, run.activations)
    for hook in hooks:
        hook.remove()
    assert calls == [2]


def test_gradients_flow_through_what_is_spliced_in() -> None:
    lm = tiny_lm("llama")
    splicer = Splicer(lm, ["mlp_out.1"], ["mlp_out.1"])
    run = splicer.base(IDS)
    new = run.activations["mlp_out.1"].detach().clone().requires_grad_(True)
    splicer.spliced(run, {"mlp_out.1": new}).square().sum().backward()
    assert new.grad is not None and bool((new.grad != 0).any())
