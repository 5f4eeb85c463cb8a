"""A model without its weights: the same sizes as the loaded one, from whatever config is at hand, and no network."""

from pathlib import Path

import pytest
import torch
from gguf_world import write_gguf
from tiny_models import ARCHITECTURES, MORE, tiny_hf, tiny_lm
from torch.utils.flop_counter import FlopCounterMode

from sememe.errors import HookpointError
from sememe.lm import ModelConfig, Outline, outline

CONTEXT = 16


def of(name: str) -> Outline:
    return Outline(tiny_hf(name), torch.float32, "cpu")


@pytest.mark.parametrize("name", sorted(ARCHITECTURES | MORE))
def test_every_hookpoint_has_the_width_it_has_in_a_forward(name):
    lm, found = tiny_lm(name), of(name)
    assert (found.n_layers, found.d_model, found.vocab_size) == (lm.n_layers, lm.d_model, lm.vocab_size)
    for point in lm.hookpoints():
        assert found.width(point) == lm.width(point), point
    assert found.n_bytes == sum(p.numel() * p.element_size() for p in lm.hf.parameters())


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "qwen3", "gemma3", "opt", "phi"])
def test_flops_are_those_that_torch_counts(name):
    lm, found = tiny_lm(name), of(name)
    lm.hf.set_attn_implementation("eager")  # the fused one's products are not counted on a CPU
    ids = torch.zeros(2, CONTEXT, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        lm.hf(input_ids=ids, use_cache=False)
    per_token = counter.get_total_flops() / ids.numel()
    counted = found.flops(0, found.n_layers, CONTEXT) + found.head_flops
    # Rotary tables and the like are products too, of a few numbers.
    assert counted == pytest.approx(per_token, rel=0.02)


def test_layers_below_and_above_a_hookpoint():
    found = of("llama")  # three layers
    n = found.n_layers
    assert found.n_layers_read(["resid_post.0"]) == 1
    assert found.n_layers_read(["resid_pre.1", "mlp_out.0"]) == 1
    assert found.n_layers_read([f"resid_post.{n - 1}", "resid_pre.0"]) == n
    assert found.n_layers_above(["resid_post.0"]) == n - 1
    assert found.n_layers_above(["mlp_out.1", "resid_post.1"]) == n - 1
    assert found.flops(0, n, 8) == pytest.approx(found.flops(0, 1, 8) + found.flops(1, n, 8))
    assert found.expand("resid_post.*") == tuple(f"resid_post.{layer}" for layer in range(n))
    with pytest.raises(HookpointError, match=r"resid_post\.0"):
        found.width("resid_pots.0")


def test_only_the_routed_experts_count():
    dense, routed = of("mistral"), of("mixtral")
    experts = (
        3 * dense.d_model * dense.d_inner * 2
    )  # two of four experts are active, each as large as the MLP
    assert routed.flops(0, 1, 0) > dense.flops(0, 1, 0)
    assert routed.flops(0, 1, 0) < dense.flops(0, 1, 0) + 2 * experts


def test_a_folder_needs_its_config_only(tmp_path):
    tiny_hf("llama").config.save_pretrained(tmp_path / "bare")
    found = outline(ModelConfig(model=str(tmp_path / "bare"), dtype="float32"))
    assert found is not None and found.d_model == 32 and found.dtype is torch.float32
    assert found.n_parameters == sum(p.numel() for p in tiny_hf("llama").parameters())


def test_what_is_not_at_hand_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("SEMEME_CACHE", str(tmp_path / "cache"))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "no such thing"}')
    for name in ("smollm2-135m", "nobody/no-such-model", str(tmp_path / "nowhere"), str(broken)):
        assert outline(ModelConfig(model=name)) is None
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    if not torch.cuda.is_available():
        tiny_hf("llama").config.save_pretrained(tmp_path / "bare")
        assert outline(ModelConfig(model=str(tmp_path / "bare"), device="cuda")) is None


def test_a_gguf_file(tmp_path: Path):
    write_gguf(tmp_path / "model.gguf", "llama")
    found, hf = outline(ModelConfig(model=str(tmp_path / "model.gguf"), dtype="float32")), tiny_hf("llama")
    assert found is not None
    assert (found.n_layers, found.d_model) == (hf.config.num_hidden_layers, hf.config.hidden_size)
    assert found.d_inner == hf.config.intermediate_size
