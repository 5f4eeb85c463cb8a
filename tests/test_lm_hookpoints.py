"""Hookpoints: every alias on every architecture, against hooks set by hand."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ARCHITECTURES, D_MODEL, MORE, N_LAYERS, VOCAB, tiny_lm

from sememe.errors import HookpointError, ModelError, ShapeError
from sememe.lm import LanguageModel, wrap
from sememe.lm.hookpoints import ALIASES

ALL = {**ARCHITECTURES, **MORE}


@pytest.fixture(scope="module", params=sorted(ALL))
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return tiny_lm(request.param)


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return tiny_lm("llama")


def some_ids(seed: int = 1, batch: int = 2, seq: int = 7) -> torch.Tensor:
    return torch.randint(2, VOCAB, (batch, seq), generator=torch.Generator().manual_seed(seed))


def by_hand(lm: LanguageModel, path: str, side: str, ids: torch.Tensor) -> torch.Tensor:
    """One hook, written out for one module, over a whole forward."""
    seen: list[torch.Tensor] = []

    def before(module, args, kwargs):  # type: ignore[no-untyped-def]
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    def after(module, args, output):  # type: ignore[no-untyped-def]
        seen.append((output[0] if isinstance(output, tuple) else output).clone())

    module = lm.hf.get_submodule(path)
    handle = (
        module.register_forward_pre_hook(before, with_kwargs=True)
        if side == "in"
        else module.register_forward_hook(after)
    )
    with torch.no_grad():
        lm.hf(input_ids=ids, use_cache=False)
    handle.remove()
    assert len(seen) == 1
    return seen[0].reshape(*ids.shape, -1)


def n_hooks(lm: LanguageModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.hf.modules())


def test_every_alias_reads_what_a_hand_set_hook_reads(lm: LanguageModel) -> None:
    ids, parts = some_ids(), ALL[lm.name].parts
    names = [f"{alias}.1" for alias in parts]
    with torch.no_grad():
        together = lm.capture(ids, names)
        for alias, (path, side) in parts.items():
            expected = by_hand(lm, path, side, ids)
            assert torch.equal(together[f"{alias}.1"], expected), alias
            # Alone, with the forward stopped right there; and by its module path.
            assert torch.equal(lm.capture(ids, [f"{alias}.1"])[f"{alias}.1"], expected), alias
            written_out = path + (":in" if side == "in" else "")
            assert torch.equal(lm.capture(ids, [written_out])[written_out], expected), alias
            assert lm.width(f"{alias}.1") == expected.shape[-1]


def test_aliases_are_those_of_the_table(lm: LanguageModel) -> None:
    expected = [f"{a}.{layer}" for a in ALIASES if a in ALL[lm.name].parts for layer in range(N_LAYERS)]
    assert list(lm.hookpoints()) == expected


def test_resid_post_is_output_hidden_states(lm: LanguageModel) -> None:
    ids = some_ids()
    with torch.no_grad():
        states = lm.hf(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        # The state-space model lists no embedding; the others list it first, and the last one normalised.
        first = 0 if lm.name == "mamba" else 1
        for layer in range(N_LAYERS - 1):
            assert torch.equal(
                lm.capture(ids, f"resid_post.{layer}")[f"resid_post.{layer}"], states[layer + first]
            )
            assert torch.equal(
                lm.capture(ids, f"resid_pre.{layer + 1}")[f"resid_pre.{layer + 1}"], states[layer + first]
            )


def test_parts_add_up_to_the_residual() -> None:
    """What the aliases mean, and not only where they are."""
    ids = some_ids()
    for name in (
        "gpt2",
        "gpt_neox",
        "gpt_neox_sequential",
        "llama",
        "mistral",
        "qwen3",
        "opt",
        "phi",
        "falcon",
        "bloom",
    ):
        lm = tiny_lm(name, torch.float64)
        with torch.no_grad():
            got = lm.capture(ids, [f"{a}.1" for a in ALIASES])
            total = got["resid_pre.1"] + got["attn_out.1"] + got["mlp_out.1"]
            assert torch.allclose(total, got["resid_post.1"], rtol=1e-10, atol=1e-10), name
            path, _ = ALL[name].parts["attn_z"]
            assert torch.allclose(lm.hf.get_submodule(path)(got["attn_z.1"]), got["attn_out.1"]), name
            path, _ = ALL[name].parts["mlp_act"]
            assert torch.allclose(lm.hf.get_submodule(path)(got["mlp_act.1"]), got["mlp_out.1"]), name


def test_nothing_after_the_last_hookpoint_is_computed(llama: LanguageModel) -> None:
    ran: list[str] = []
    handles = [
        llama.hf.get_submodule(path).register_forward_hook(lambda *_, path=path: ran.append(path))
        for path in ("model.layers.0", "model.layers.1.mlp", "model.layers.2", "lm_head")
    ]
    llama.capture(some_ids(), ["attn_out.1", "resid_pre.1"])
    assert ran == ["model.layers.0"]
    llama.capture(some_ids(), ["resid_post.1"])
    assert ran == ["model.layers.0"] * 2 + ["model.layers.1.mlp"]
    llama.hidden(some_ids())
    assert "lm_head" not in ran
    for handle in handles:
        handle.remove()


def test_capture_leaves_no_hooks_and_differentiates(lm: LanguageModel) -> None:
    before = n_hooks(lm)
    got = lm.capture(some_ids(), ["resid_pre.1", "resid_post.1"])
    assert got["resid_post.1"].requires_grad
    assert n_hooks(lm) == before
    with torch.inference_mode():
        assert not lm.capture(some_ids(), "resid_post.1")["resid_post.1"].requires_grad
    assert not lm.hf.training


def test_padding_at_the_end_changes_nothing_before_it(lm: LanguageModel) -> None:
    ids = some_ids()
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 4:] = False
    other = ids.clone()
    other[1, 4:] = 5
    with torch.no_grad():
        one = lm.capture(ids, "resid_post.2", mask)["resid_post.2"]
        two = lm.capture(other, "resid_post.2", mask)["resid_post.2"]
    # Not to the bit: a mixture of experts multiplies batches whose size depends on the padding.
    assert torch.allclose(one[mask], two[mask], rtol=1e-5, atol=1e-5)


def test_int32_ids_are_taken(llama: LanguageModel) -> None:
    ids = some_ids()
    assert torch.equal(llama.hidden(ids), llama.hidden(ids.to(torch.int32)))


def test_globs(llama: LanguageModel) -> None:
    assert llama.expand("resid_post.*") == ("resid_post.0", "resid_post.1", "resid_post.2")
    assert llama.expand(["resid_post.[12]", "resid_post.1", "mlp_out.0"]) == (
        "resid_post.1",
        "resid_post.2",
        "mlp_out.0",
    )
    assert llama.expand("resid_*.0") == ("resid_pre.0", "resid_post.0")
    assert llama.expand("model.layers.*.mlp") == tuple(f"model.layers.{i}.mlp" for i in range(3))
    assert llama.expand("model.layers.?.mlp.down_proj:in")[0] == "model.layers.0.mlp.down_proj:in"
    assert llama.expand("*.0")[0] == "resid_pre.0"


def test_layers_of_a_glob_are_in_order_of_number() -> None:
    lm = tiny_lm("llama", num_hidden_layers=12)
    assert lm.expand("resid_post.*")[-3:] == ("resid_post.9", "resid_post.10", "resid_post.11")


def test_replay_layers(llama: LanguageModel) -> None:
    expected = {
        "resid_post.1": 1,
        "resid_pre.1": 0,
        "resid_pre.0": -1,
        "attn_out.2": 1,
        "mlp_act.0": -1,
        "model.layers.2": 2,
        "model.layers.2:in": 1,
        "model.layers.2.self_attn.q_proj": 1,
        "model.embed_tokens": -1,
        "model.norm": 2,
        "lm_head:in": 2,
        "model": 2,
    }
    assert {name: llama.replay_layer(name) for name in expected} == expected


def test_places_outside_the_layers(llama: LanguageModel) -> None:
    ids = some_ids()
    with torch.no_grad():
        got = llama.capture(ids, ["model.embed_tokens", "model.norm", "lm_head:in", "lm_head", "model"])
        out = llama.hf(input_ids=ids, use_cache=False)
        assert torch.equal(got["model.embed_tokens"], llama.hf.model.embed_tokens(ids))
        assert torch.equal(got["model.norm"], llama.hidden(ids))
        assert torch.equal(got["model"], got["lm_head:in"])
        assert torch.equal(got["lm_head"], out.logits)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "resid_pots.1",
            "a hookpoint must be a place in LlamaForCausalLM, got 'resid_pots.1'. Did you mean 'resid_post.1'",
        ),
        (
            "resid_post.3",
            "the layer of resid_post must be in [0, 2] for LlamaForCausalLM, got 3. Use resid_post.2 or lower.",
        ),
        ("mlp_out.-1", "the layer of mlp_out must be in [0, 2] for LlamaForCausalLM, got -1."),
        ("resid_post", "got 'resid_post'. Write resid_post.L with L in [0, 2], or resid_post.* for all."),
        ("resid_post.x", "got 'resid_post.x'. Write resid_post.L"),
        ("model.layers.1.mpl", "Did you mean 'model.layers.1.mlp'"),
        ("model.layers.1.mlp:output", "a hookpoint must be a place in LlamaForCausalLM"),
        ("nothing_*", "a hookpoint must be a place in LlamaForCausalLM, got 'nothing_*'"),
    ],
)
def test_unknown_hookpoints(llama: LanguageModel, name: str, message: str) -> None:
    with pytest.raises(HookpointError) as error:
        llama.capture(some_ids(), [name])
    assert message in str(error.value)


def test_aliases_that_an_architecture_lacks() -> None:
    for name, alias, has in (
        ("mamba", "mlp_out", "It has: resid_pre, resid_post."),
        ("mixtral", "mlp_act", "It has: resid_pre, attn_z, attn_out, mlp_in, mlp_out, resid_post."),
    ):
        with pytest.raises(HookpointError) as error:
            tiny_lm(name).capture(some_ids(), f"{alias}.1")
        assert f"{alias} must be a part of" in str(error.value)
        assert has in str(error.value)


def test_a_hookpoint_the_forward_never_reaches(llama: LanguageModel) -> None:
    with pytest.raises(HookpointError, match=r"must reach every hookpoint.*none at model\.layers"):
        llama.capture(some_ids(), ["model.layers"])


def test_a_hookpoint_without_one_row_per_token() -> None:
    with pytest.raises(HookpointError, match=r"must hold one row of activations per token"):
        tiny_lm("qwen3").capture(some_ids(), ["model.rotary_emb"])


def test_heads_are_joined() -> None:
    lm = tiny_lm("qwen3")
    with torch.no_grad():
        got = lm.capture(some_ids(), "model.layers.1.self_attn.q_norm")["model.layers.1.self_attn.q_norm"]
    assert got.shape == (2, 7, 4 * 8)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (
            torch.tensor([[1, VOCAB]]),
            ModelError,
            f"token ids must be in [0, {VOCAB - 1}] for llama, got {VOCAB}.",
        ),
        (torch.tensor([[1, -2]]), ModelError, "got -2. Tokenize with this model's tokenizer."),
        (
            torch.zeros(1, 49, dtype=torch.long),
            ModelError,
            "must fit the context of 48 tokens of llama, got 49 tokens",
        ),
        (
            torch.zeros(5, dtype=torch.long),
            ShapeError,
            "token ids must be whole numbers of shape (batch, seq)",
        ),
        (torch.zeros(1, 5), ShapeError, "got torch.float32"),
        (torch.zeros(1, 0, dtype=torch.long), ShapeError, "Pass a batch of rows."),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_ids(llama: LanguageModel, ids: torch.Tensor, error: type[Exception], message: str) -> None:
    for call in (llama.hidden, lambda i: llama.capture(i, "resid_post.0"), lambda i: llama.generate(i, 1)):
        with pytest.raises(error) as raised:
            call(ids)
        assert message in str(raised.value)


@pytest.mark.usefixtures("unchecked")
def test_bad_mask(llama: LanguageModel) -> None:
    with pytest.raises(ShapeError, match="the mask must have the shape of the ids"):
        llama.hidden(some_ids(), torch.ones(2, 6))


def test_models_that_cannot_be_read() -> None:
    with pytest.raises(ModelError, match="must be a Hugging Face model with a config, got Linear"):
        wrap_module(torch.nn.Linear(2, 2))
    hf = tiny_lm("llama").hf
    hf.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match="must hold its layers in a ModuleList, got none with 7 members"):
        wrap_module(hf)
    with pytest.raises(ModelError, match="must have an unembedding, got LlamaModel"):
        wrap_module(tiny_lm("llama").hf.model)


def wrap_module(module: torch.nn.Module) -> LanguageModel:
    return LanguageModel(module, None, "broken", "0" * 64)


def test_repr_and_sizes(llama: LanguageModel) -> None:
    assert repr(llama).startswith(
        "LanguageModel('llama', LlamaForCausalLM, n_layers=3, d_model=32, vocab_size=301"
    )
    assert (llama.d_model, llama.n_layers, llama.vocab_size) == (D_MODEL, N_LAYERS, VOCAB)
    assert (llama.dtype, llama.device.type) == (torch.float32, "cpu")
    assert wrap(llama.hf, llama.tokenizer, "again").fingerprint == llama.fingerprint
