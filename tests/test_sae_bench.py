"""What SAEBench is given says the same as the dictionary. The real package is asked by scripts/check_sae_bench.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sememe import dictionaries
from sememe.dictionaries import Site, Sites
from sememe.dictionaries.batch_topk import BatchTopKConfig
from sememe.dictionaries.jumprelu import JumpReLUConfig
from sememe.dictionaries.relu import ReLUConfig
from sememe.dictionaries.row_norm import RowNorm
from sememe.dictionaries.topk import TopKConfig
from sememe.errors import FormatError, ShapeError
from sememe.sae_bench import BenchSAE

D, N = 6, 20


def made(config: dictionaries.ArchitectureConfig, hookpoint: str = "resid_post.3") -> dictionaries.Trainable:
    """In training units, with biases of all kinds and decoder rows that are not of norm 1."""
    site = Site(model="owner/tiny", model_fingerprint="f" * 64, hookpoint=hookpoint, start=0, stop=D)
    dictionary = dictionaries.build(config, D, D, Sites(inputs=(site,), outputs=(site,)))
    x = 3 + torch.randn(64, D, generator=torch.Generator().manual_seed(0))
    dictionary.set_scales(x, x)
    dictionary.initialise(x * dictionary.scale_in, x * dictionary.scale_out, torch.Generator().manual_seed(1))
    with torch.no_grad():
        dictionary.get_parameter("b_enc").add_(torch.linspace(-0.2, 0.2, N))
        dictionary.get_parameter("W_dec").mul_(torch.linspace(0.5, 2, N)[:, None])
    return dictionary.eval()


@pytest.mark.parametrize(
    "config",
    [
        TopKConfig(k=3, d_sae=N),
        BatchTopKConfig(k=3, d_sae=N),
        ReLUConfig(d_sae=N),
        JumpReLUConfig(d_sae=N),
    ],
    ids=lambda config: config.kind,
)
def test_dense_encode_and_decode_are_the_dictionarys(config: dictionaries.ArchitectureConfig) -> None:
    dictionary = made(config)
    sae, folded = BenchSAE(dictionary), dictionary.fold()
    x = 3 + torch.randn(2, 5, D)
    acts = sae.encode(x)
    assert acts.shape == (2, 5, N) and bool((acts != 0).any())
    assert torch.allclose(sae(x).reshape(-1, D), folded(x.reshape(-1, D)), atol=1e-5)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(N), atol=1e-6)
    pre_acts = x @ sae.W_enc + sae.b_enc
    assert torch.allclose(acts[acts != 0], pre_acts[acts != 0], atol=1e-4), "before selection they are affine"
    assert sae.W_enc.shape == (D, N) and (sae.cfg.d_in, sae.cfg.d_sae) == (D, N)
    assert (sae.cfg.model_name, sae.cfg.hook_name, sae.cfg.hook_layer) == (
        "owner/tiny",
        "blocks.3.hook_resid_post",
        3,
    )
    assert dataclasses.asdict(sae.cfg) == sae.cfg.to_dict() and sae.cfg.architecture_str == config.kind


def test_a_cast_leaves_what_encodes_in_float32() -> None:
    sae = BenchSAE(made(TopKConfig(k=3, d_sae=N)))
    x = 3 + torch.randn(4, D)
    before = sae.encode(x)
    sae = sae.to(device="cpu", dtype=torch.bfloat16)
    assert sae.dtype == torch.bfloat16 and sae.cfg.dtype == "bfloat16" and sae.cfg.device == "cpu"
    assert torch.equal(sae.encode(x), before.bfloat16()) and sae(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("hookpoint", "hook"),
    [("mlp_act.0", "blocks.0.mlp.hook_post"), ("attn_z.11", "blocks.11.attn.hook_z")],
)
def test_hookpoints_have_their_names_there(hookpoint: str, hook: str) -> None:
    assert BenchSAE(made(TopKConfig(k=3, d_sae=N), hookpoint)).cfg.hook_name == hook
    assert BenchSAE(made(TopKConfig(k=3, d_sae=N)), "other", "blocks.7.hook_mlp_out").cfg.hook_layer == 7


def test_what_it_cannot_take_is_refused() -> None:
    with pytest.raises(FormatError, match=r"model_name and hook_name must be known.*got owner/tiny and None"):
        BenchSAE(made(TopKConfig(k=3, d_sae=N), "gpt_neox.layers.3.attention"))
    with pytest.raises(ShapeError, match=r"d_in must be d_out"):
        BenchSAE(dictionaries.build(TopKConfig(k=1, d_sae=4), 3, 5))


@pytest.mark.parametrize("norm", ["layer", "length"])
def test_a_dictionary_of_normalised_rows_is_refused(norm: str) -> None:
    """Its reconstruction has the row's own centre and spread, which SAEBench's `decode` knows nothing of."""
    normed = RowNorm.around(made(TopKConfig(k=3, d_sae=N)), norm)
    with pytest.raises(
        FormatError,
        match=r"must read rows as they are for SAEBench.*got row_norm, .*centre and spread.*sememe evaluate",
    ):
        BenchSAE(normed, "tiny", "blocks.3.hook_resid_post")


def test_what_reconstructs_otherwise_than_it_is_decoded_there_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind = dictionaries.TRAINABLE["topk"]
    decode = kind.decode
    monkeypatch.setattr(kind, "decode", lambda self, encoded, x=None: 1.01 * decode(self, encoded, x))
    with pytest.raises(
        FormatError,
        match=r"must be what a dictionary reconstructs, to 0\.0001, .*got topk, which differs by 0\.0\d+ of",
    ):
        BenchSAE(made(TopKConfig(k=3, d_sae=N)))
