"""Edits, continuing from the middle, logits and generation."""

from __future__ import annotations

import pytest
import torch
from tiny_models import (
    ARCHITECTURES,
    CONTEXT,
    D_MODEL,
    MORE,
    N_LAYERS,
    VOCAB,
    tiny_hf,
    tiny_lm,
    tiny_tokenizer,
)

from sememe.errors import HookpointError, ModelError, ShapeError
from sememe.lm import LanguageModel, wrap
from sememe.lm.past import Past, Prefix

ALL = {**ARCHITECTURES, **MORE}


@pytest.fixture(scope="module", params=sorted(ALL))
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return tiny_lm(request.param)


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return tiny_lm("llama")


def some_ids(seed: int = 1, batch: int = 2, seq: int = 7) -> torch.Tensor:
    return torch.randint(2, VOCAB, (batch, seq), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def n_hooks(lm: LanguageModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.hf.modules())


# ---- hidden states and logits ---------------------------------------------------------------------------------


def test_hidden_and_logits_are_the_models_own(lm: LanguageModel) -> None:
    ids = some_ids()
    with torch.no_grad():
        expected = lm.hf(input_ids=ids, use_cache=False).logits
        hidden = lm.hidden(ids)
        assert torch.equal(lm.logits(hidden), expected)
        # Chosen rows: the product may round differently, but capping and scaling are there.
        assert torch.allclose(lm.logits(hidden[0, 2:5]), expected[0, 2:5], rtol=1e-4, atol=1e-4)
        assert lm.logits(hidden[1, 6]).shape == (VOCAB,)
    assert "forward" not in lm._layers[0].__dict__


def test_logits_take_more_rows_than_the_context(llama: LanguageModel) -> None:
    many = noise(CONTEXT + 5, D_MODEL)
    with torch.no_grad():
        assert torch.equal(llama.logits(many), llama.hf.lm_head(many))
        assert llama.logits(many[None]).shape == (1, CONTEXT + 5, VOCAB)


def test_capping_matters() -> None:
    lm = tiny_lm("gemma3")
    with torch.no_grad():
        assert lm.logits(100 * lm.hidden(some_ids())).abs().max() <= 3.0


def test_logits_differentiate(llama: LanguageModel) -> None:
    hidden = llama.hidden(some_ids()).detach().requires_grad_()
    llama.logits(hidden)[0, 0, 5].backward()
    assert hidden.grad is not None
    assert torch.allclose(hidden.grad[0, 0], llama.hf.lm_head.weight[5])
    assert hidden.grad[0, 1:].abs().max() == 0


# ---- edits ----------------------------------------------------------------------------------------------------


def test_an_identity_edit_changes_no_bit(lm: LanguageModel) -> None:
    ids, before = some_ids(), n_hooks(lm)
    names = [*lm.hookpoints(), *(path for path, _ in ALL[lm.name].parts.values())]
    with torch.no_grad():
        plain = lm.hidden(ids)
        with lm.edit({name: lambda x: x for name in names}):
            assert torch.equal(lm.hidden(ids), plain)
        with lm.edit(dict.fromkeys(names, torch.clone)):
            assert torch.equal(lm.hidden(ids), plain)
            assert torch.equal(lm.logits(plain), lm.hf(input_ids=ids, use_cache=False).logits)
    assert n_hooks(lm) == before


def test_an_edit_equals_a_hand_set_hook(lm: LanguageModel) -> None:
    ids = some_ids()
    with torch.no_grad():
        plain = lm.hidden(ids)
        for alias, (path, side) in ALL[lm.name].parts.items():
            module, push = lm.hf.get_submodule(path), 0.5

            def before(module, args, kwargs, push=push):  # type: ignore[no-untyped-def]
                return (
                    ((args[0] + push, *args[1:]), kwargs)
                    if args
                    else (
                        args,
                        kwargs | {"hidden_states": kwargs["hidden_states"] + push},
                    )
                )

            def after(module, args, output, push=push):  # type: ignore[no-untyped-def]
                return (output[0] + push, *output[1:]) if isinstance(output, tuple) else output + push

            handle = (
                module.register_forward_pre_hook(before, with_kwargs=True)
                if side == "in"
                else module.register_forward_hook(after)
            )
            expected = lm.hidden(ids)
            handle.remove()
            shapes: list[torch.Size] = []
            with lm.edit({f"{alias}.1": lambda x, shapes=shapes: shapes.append(x.shape) or x + 0.5}):  # type: ignore[func-returns-value]
                assert torch.equal(lm.hidden(ids), expected), alias
            assert not torch.equal(expected, plain), alias
            assert shapes == [torch.Size([2, 7, lm.width(f"{alias}.1")])], alias


def test_outputs_keep_their_structure(llama: LanguageModel) -> None:
    """A Llama attention block returns a tuple, its layer a tensor, its body a named output."""
    seen: list[type] = []
    handles = [
        llama.hf.get_submodule(path).register_forward_hook(lambda m, a, out: seen.append(type(out)))
        for path in ("model.layers.1.self_attn", "model.layers.1", "model")
    ]
    llama.hidden(some_ids())
    for handle in handles:
        handle.remove()
    after: list[type] = []
    with llama.edit(
        {name: lambda x: x * 2 for name in ("model.layers.1.self_attn", "resid_post.1", "model")}
    ):
        handles = [
            llama.hf.get_submodule(path).register_forward_hook(lambda m, a, out: after.append(type(out)))
            for path in ("model.layers.1.self_attn", "model.layers.1", "model")
        ]
        plain = llama.hidden(some_ids())
        for handle in handles:
            handle.remove()
    assert seen == after
    assert seen[0] is tuple
    with llama.edit({"model.layers.1.self_attn": lambda x: x * 2, "resid_post.1": lambda x: x * 2}):
        assert torch.equal(llama.hidden(some_ids()) * 2, plain)


def test_capture_sees_edits_and_edits_nest(llama: LanguageModel) -> None:
    ids = some_ids()
    with torch.no_grad():
        plain = llama.capture(ids, "resid_post.1")["resid_post.1"]
        with llama.edit({"resid_post.1": lambda x: x + 1}), llama.edit({"resid_post.1": lambda x: x * 2}):
            got = llama.capture(ids, ["resid_post.1", "resid_pre.2"])
        assert torch.equal(got["resid_post.1"], (plain + 1) * 2)
        assert torch.equal(got["resid_pre.2"], (plain + 1) * 2)
        with llama.edit({"resid_post.*": lambda x: x * 0}):
            assert llama.hidden(ids).abs().max() == 0
        assert torch.equal(llama.capture(ids, "resid_post.1")["resid_post.1"], plain)


def test_a_captured_value_and_a_given_one_stay_as_they_are() -> None:
    """Falcon adds to its MLP's output in place."""
    lm, ids = tiny_lm("falcon"), some_ids()
    with torch.no_grad():
        alone = lm.capture(ids, "mlp_out.1")["mlp_out.1"]
        assert torch.equal(lm.capture(ids, ["mlp_out.1", "resid_post.2"])["mlp_out.1"], alone)
        given = torch.ones(1, 1, D_MODEL).expand(2, 7, D_MODEL)
        with lm.edit({"mlp_out.1": lambda _: given}):
            lm.hidden(ids)
        assert bool((given == 1).all())


def test_hooks_go_when_something_raises(lm: LanguageModel) -> None:
    before, ids = n_hooks(lm), some_ids()

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    with torch.no_grad():
        plain = lm.hidden(ids)
        with pytest.raises(ZeroDivisionError), lm.edit({"resid_post.1": broken}):
            lm.hidden(ids)
        with pytest.raises(ZeroDivisionError), lm.edit({"resid_post.2": broken}):
            lm.hidden_from(0, noise(2, 7, D_MODEL), ids)
        with (
            pytest.raises(HookpointError),
            lm.edit({"resid_post.0": torch.clone, "resid_post.9": torch.clone}),
        ):
            pass
        with pytest.raises(ZeroDivisionError), lm.edit({"resid_post.1": broken}):
            lm.capture(ids, "resid_post.2")
        assert n_hooks(lm) == before
        assert all("forward" not in layer.__dict__ for layer in lm._layers)
        assert torch.equal(lm.hidden(ids), plain)


def test_an_edit_must_keep_the_shape(llama: LanguageModel) -> None:
    with pytest.raises(ShapeError) as error, llama.edit({"resid_post.1": lambda x: x[:, :-1]}):
        llama.hidden(some_ids())
    assert "an edit of resid_post.1 must keep the shape (2, 7, 32), got (2, 6, 32)." in str(error.value)


def test_float32_edits_of_a_bfloat16_model() -> None:
    lm, ids = tiny_lm("llama", torch.bfloat16), some_ids()
    with torch.no_grad():
        plain = lm.hidden(ids)
        with lm.edit({"resid_post.1": lambda x: x.float()}):
            assert torch.equal(lm.hidden(ids), plain)
    assert plain.dtype == torch.bfloat16


def test_gradients_flow_through_an_edit(lm: LanguageModel) -> None:
    ids, weight = some_ids(), noise(lm.hidden(some_ids()).shape[-1])
    direction = noise(D_MODEL, seed=5).requires_grad_()

    def out(v: torch.Tensor) -> torch.Tensor:
        with lm.edit({"resid_post.0": lambda x: x + v}):
            return (lm.hidden(ids) @ weight).sum()

    (gradient,) = torch.autograd.grad(out(direction), direction)
    layer = lm.hf.get_submodule(ALL[lm.name].parts["resid_post"][0].replace(".1", ".0"))
    handle = layer.register_forward_hook(
        lambda m, a, y: (y[0] + direction, *y[1:]) if isinstance(y, tuple) else y + direction
    )
    (by_hand,) = torch.autograd.grad((lm.hidden(ids) @ weight).sum(), direction)
    handle.remove()
    assert torch.equal(gradient, by_hand)
    assert gradient.abs().min() > 0


def test_the_gradient_of_an_edit_is_the_slope() -> None:
    """Against central differences, in an architecture that keeps float64 throughout."""
    lm, ids, direction = tiny_lm("gpt2", torch.float64), some_ids(), torch.zeros(D_MODEL, dtype=torch.float64)

    def out(v: torch.Tensor) -> torch.Tensor:
        with lm.edit({"mlp_act.1": lambda x: x + v.repeat(4)}):
            return lm.hidden(ids).square().sum() + lm.hidden(ids)[0, 0, 3]

    (gradient,) = torch.autograd.grad(out(direction.requires_grad_()), direction)
    for i in (0, 7):
        step = torch.zeros(D_MODEL, dtype=torch.float64)
        step[i] = 1e-5
        numeric = (out(step) - out(-step)).detach() / 2e-5
        assert torch.allclose(gradient[i], numeric, rtol=1e-6, atol=1e-8)


# ---- from the middle ------------------------------------------------------------------------------------------


def test_hidden_from_equals_the_edited_forward(lm: LanguageModel) -> None:
    ids = some_ids()
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 5:] = False
    x = noise(2, 7, D_MODEL)
    with torch.no_grad():
        for given in (None, mask):
            for layer in range(-1, N_LAYERS):
                place = f"resid_post.{layer}" if layer >= 0 else "resid_pre.0"
                with lm.edit({place: lambda _: x}):
                    expected = lm.hidden(ids, given)
                assert torch.equal(lm.hidden_from(layer, x, ids, given), expected), layer
        # The model's own residual gives the model's own output.
        own = lm.capture(ids, "resid_post.1")["resid_post.1"]
        assert torch.equal(lm.hidden_from(1, own, ids), lm.hidden(ids))
    assert all(lm._can_skip.values())
    assert all("forward" not in layer.__dict__ for layer in lm._layers)


def test_skipped_layers_do_not_run(llama: LanguageModel) -> None:
    ids, x, ran = some_ids(), noise(2, 7, D_MODEL), []
    llama.hidden_from(1, x, ids)  # the look whether skipping agrees
    handles = [
        llama.hf.model.layers[i].mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i in range(N_LAYERS)
    ]
    llama.hidden_from(1, x, ids)
    assert ran == [2]
    for handle in handles:
        handle.remove()


def test_edits_above_act_and_edits_below_do_not(lm: LanguageModel) -> None:
    ids, x, calls = some_ids(), noise(2, 7, D_MODEL), []

    def below(value: torch.Tensor) -> torch.Tensor:
        calls.append(value)
        return value * 3

    parts = [alias for alias in ALL[lm.name].parts if alias != "resid_pre"]
    with torch.no_grad():
        edits = {f"{alias}.2": lambda v: v * 1.5 for alias in parts}
        with lm.edit({"resid_post.1": lambda _: x}), lm.edit(edits):
            expected = lm.hidden(ids)
        with (
            lm.edit(edits),
            lm.edit({f"{alias}.1": below for alias in parts if alias != "resid_post"}),
            lm.edit({"resid_pre.0": below, "resid_pre.1": below, "resid_post.0": below}),
        ):
            assert torch.equal(lm.hidden_from(1, x, ids), expected)
            assert not calls
        with lm.edit({"resid_pre.2": lambda v: v * 2}):
            doubled = lm.hidden_from(1, x, ids)
        assert torch.equal(doubled, lm.hidden_from(1, x * 2, ids))
        with lm.edit({"resid_post.1": lambda v: v * 2}):
            assert torch.equal(lm.hidden_from(1, x, ids), doubled)
        with lm.edit({"resid_pre.0": lambda v: v * 2}):
            doubled = lm.hidden_from(-1, x, ids)
        assert torch.equal(doubled, lm.hidden_from(-1, x * 2, ids))


def test_replay_equals_the_full_forward_at_every_hookpoint(lm: LanguageModel) -> None:
    """How evaluation uses it: one plain forward, then only the layers above for each edit."""
    ids = some_ids()
    with torch.no_grad():
        for alias in ALL[lm.name].parts:
            name = f"{alias}.1"
            start = lm.replay_layer(name)
            residual = lm.capture(ids, f"resid_post.{start}")[f"resid_post.{start}"]
            if start == 1:
                assert alias == "resid_post"
            with lm.edit({name: lambda x: x * 0.3}):
                assert torch.equal(lm.hidden_from(start, residual, ids), lm.hidden(ids)), alias


def test_hidden_from_differentiates(llama: LanguageModel) -> None:
    ids, x = some_ids(), noise(2, 7, D_MODEL).requires_grad_()
    llama.hidden_from(1, x, ids).square().sum().backward()
    with llama.edit({"resid_post.1": lambda _: y}):
        y = x.detach().clone().requires_grad_()
        llama.hidden(ids).square().sum().backward()
    assert x.grad is not None and y.grad is not None
    assert torch.allclose(x.grad, y.grad)


def test_layers_that_share_more_than_the_residual_are_run() -> None:
    """A model whose last layer reads what its first one left behind: skipping would be wrong, and is not done."""

    class Reads(torch.nn.Module):
        def __init__(self, layer: torch.nn.Module, first: torch.nn.Module) -> None:
            super().__init__()
            self.layer, self.left = layer, torch.zeros(())
            first.register_forward_hook(lambda m, a, out: setattr(self, "left", out))
            self.attention_type = getattr(layer, "attention_type", None)

        def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> torch.Tensor:
            return self.layer(hidden_states + self.left, **kwargs)

    hf = tiny_hf("llama")
    hf.model.layers[2] = Reads(hf.model.layers[2], hf.model.layers[0].mlp)
    lm, ids, x = wrap(hf, tiny_tokenizer(), "shares"), some_ids(), noise(2, 7, D_MODEL)
    with torch.no_grad():
        with lm.edit({"resid_post.1": lambda _: x}):
            expected = lm.hidden(ids)
        assert torch.equal(lm.hidden_from(1, x, ids), expected)
        assert lm._can_skip == {1: False}
        with lm.edit({"resid_post.1": lambda v: v * 2}):
            doubled = lm.hidden_from(1, x, ids)
        assert torch.equal(doubled, lm.hidden_from(1, x * 2, ids))


@pytest.mark.usefixtures("unchecked")
def test_hidden_from_bad_input(llama: LanguageModel) -> None:
    ids = some_ids()
    with pytest.raises(HookpointError, match=r"the layer to start from must be in \[-1, 2\], got 3"):
        llama.hidden_from(3, noise(2, 7, D_MODEL), ids)
    with pytest.raises(
        ShapeError, match=r"the residual must be \(batch, seq, d_model\) = \(2, 7, 32\), got \(2, 6, 32\)"
    ):
        llama.hidden_from(1, noise(2, 6, D_MODEL), ids)


# ---- generation -----------------------------------------------------------------------------------------------


def test_cached_generation_edits_as_a_full_recomputation_does(lm: LanguageModel) -> None:
    # The kernels of a mixture of experts take no float64, and the state-space scan goes through float32.
    exact = lm.name not in ("mixtral", "mamba")
    double, ids = tiny_lm(lm.name, torch.float64 if exact else torch.float32), some_ids(seq=5)
    push = noise(D_MODEL).to(double.dtype)
    name = "mlp_out.1" if "mlp_out" in ALL[lm.name].parts else "resid_post.1"
    seen: list[torch.Tensor] = []

    def steer(x: torch.Tensor) -> torch.Tensor:
        return x + push * x.norm(dim=-1, keepdim=True)

    def record(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x

    with double.edit({name: steer}), double.edit({"resid_post.2": record}):
        cached = double.generate(ids, 8, stop_at_eos=False)
        steps = [step.shape[1] for step in seen]
        activations = torch.cat(seen, dim=1)
        assert torch.equal(double.generate(ids, 8, use_cache=False, stop_at_eos=False), cached)
        with torch.no_grad():
            whole = double.capture(cached[:, :-1], "resid_post.2")["resid_post.2"]
    assert steps == [5] + [1] * 7
    narrow = lm.name in ("bloom", "gemma2")  # whose attention's softmax goes through float32
    tolerance = (1e-5 if narrow else 1e-8) if exact else 1e-3
    assert torch.allclose(activations, whole, rtol=tolerance, atol=tolerance)
    assert torch.equal(cached[:, :5], ids)
    assert not torch.equal(double.generate(ids, 8, stop_at_eos=False), cached)


def test_generation_is_seeded_and_leaves_the_random_state(llama: LanguageModel) -> None:
    ids = some_ids()
    state = torch.random.get_rng_state()
    one = llama.generate(ids, 6, temperature=1.0, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(llama.generate(ids, 6, temperature=1.0, seed=1), one)
    assert not torch.equal(llama.generate(ids, 6, temperature=1.0, seed=2), one)
    greedy = llama.generate(ids, 6)
    assert torch.equal(llama.generate(ids, 6, temperature=1.0, top_k=1), greedy)
    assert torch.equal(llama.generate(ids, 6, temperature=1.0, top_p=1e-6), greedy)


def test_generation_does_not_follow_the_models_advice() -> None:
    lm, ids = tiny_lm("llama"), some_ids()
    plain = lm.generate(ids, 8, stop_at_eos=False)
    advice = lm.hf.generation_config
    advice.repetition_penalty, advice.no_repeat_ngram_size = 50.0, 1
    assert torch.equal(lm.generate(ids, 8, stop_at_eos=False), plain)
    assert lm.hf.generation_config is advice
    with torch.no_grad():
        assert int(lm.hf(plain[:1, :-1]).logits[0, -1].argmax()) == int(plain[0, -1])


def test_generation_with_front_padding(llama: LanguageModel) -> None:
    short = some_ids(batch=1, seq=4)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), short], dim=1)
    mask = torch.ones_like(padded, dtype=torch.bool)
    mask[:, :3] = False
    assert torch.equal(llama.generate(padded, 6, mask=mask)[:, 7:], llama.generate(short, 6)[:, 4:])


def test_generation_with_an_edit_of_the_head(llama: LanguageModel) -> None:
    def only_seven(x: torch.Tensor) -> torch.Tensor:
        out = torch.full_like(x, -1e9)
        out[..., 7] = 0
        return out

    with llama.edit({"lm_head": only_seven}):
        assert llama.generate(some_ids(), 4)[:, 7:].tolist() == [[7] * 4] * 2


def test_generation_past_the_context(llama: LanguageModel) -> None:
    with pytest.raises(
        ModelError, match=f"must fit the context of {CONTEXT} tokens of llama, got {CONTEXT + 7}"
    ):
        llama.generate(some_ids(), CONTEXT)


# ---- going on after some tokens -------------------------------------------------------------------------------


def test_going_on_after_a_prefix_is_the_full_forward(lm: LanguageModel) -> None:
    """Rows that go on after 0, 3 and 5 tokens of two contexts, filled up at their end, edited and captured."""
    ids = some_ids(seq=9)
    rows, lengths, n_new = torch.tensor([0, 1, 0]), torch.tensor([0, 3, 5]), 4
    if not lm.goes_on():
        assert lm.hf.config.model_type == "mamba"
        return
    places = lengths[:, None] + torch.arange(n_new)
    new = ids[rows[:, None], places]
    with torch.no_grad():
        with lm.remembering() as past:
            full = lm.hidden(ids)
        with lm.after(past.prefix(rows, lengths, n_new)):
            found = lm.hidden(new)
            captured = lm.capture(new, ["resid_post.1"])["resid_post.1"]
            assert torch.equal(lm.logits(full), lm.logits(full)), "logits go on from nothing"
        assert torch.allclose(found, full[rows[:, None], places], rtol=1e-3, atol=1e-5)
        whole = lm.capture(ids, ["resid_post.1"])["resid_post.1"]
        assert torch.allclose(captured, whole[rows[:, None], places], rtol=1e-3, atol=1e-5)

        moved = noise(3, n_new, D_MODEL)
        with lm.after(past.prefix(rows, lengths, n_new, first_layer=1 + lm.skips(1))):
            replaced = lm.hidden_from(1, moved, new)
        for i in range(3):
            residual = whole[rows[i]].clone()
            residual[lengths[i] : lengths[i] + n_new] = moved[i]
            end = int(lengths[i]) + n_new
            truth = lm.hidden_from(1, residual[None], ids[rows[i]][None])[0, int(lengths[i]) : end]
            assert torch.allclose(replaced[i], truth, rtol=1e-3, atol=1e-4)
    assert torch.equal(lm.hidden(ids), full), "and nothing of it stays"


def test_a_model_whose_keys_do_not_help_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("llama")
    prefix = Past.prefix

    def wrong(self: Past, rows: torch.Tensor, lengths: torch.Tensor, *rest: int) -> Prefix:
        return prefix(self, rows.flip(0), lengths, *rest)

    monkeypatch.setattr(Past, "prefix", wrong)
    assert not lm.goes_on()
