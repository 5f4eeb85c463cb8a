"""Runs SAEBench's own core evaluation, where it is installed, on a dictionary of ours, without a network.

Its command line loads models and data sets from a hub, then calls `run_evals` with an SAE, a TransformerLens model and
a store of token batches. Those three are given to it here: a dictionary of ours behind `BenchSAE`, a small
HookedTransformer, and the batches. What it measures is compared with what our own metrics say of the same rows.

It wants older packages than Sememe (numpy below 2), so it has an environment of its own, which sees Sememe's packages
behind its own ones; the torchvision that it brings is of another build than torch, and transformers does without:

    make sae-bench-check
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path

import torch

from sememe.metrics import Reconstruction
from sememe.sae_bench import BenchSAE
from sememe.source import IteratorSource, transformer_lens_rows
from sememe.train import TrainConfig, train

D, LAYER, VOCABULARY, CONTEXT = 32, 1, 97, 32
HOOK = f"blocks.{LAYER}.hook_resid_post"


class Batches:
    """What `run_evals` asks of sae_lens' ActivationsStore: token batches, and how activations are normalised."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids, self.at = ids, 0
        self.context_size, self.store_batch_size_prompts = ids.shape[1], 8
        self.normalize_activations = "none"

    def reset_input_dataset(self) -> None:
        self.at = 0

    def get_batch_tokens(self, n: int) -> torch.Tensor:
        self.at += n
        return self.ids[self.at - n : self.at]


def main() -> bool:
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_bench.evals.core.main import calculate_misc_metrics, run_evals
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    about = HookedTransformerConfig(
        n_layers=3,
        d_model=D,
        d_head=8,
        n_heads=4,
        d_mlp=64,
        n_ctx=CONTEXT,
        d_vocab=VOCABULARY,
        act_fn="gelu",
        model_name="tiny",
        init_weights=True,
        seed=0,
    )
    model = HookedTransformer(about).eval()
    ids = torch.randint(3, VOCABULARY, (256, CONTEXT), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as place:
        config = TrainConfig.build(
            {
                "out": Path(place) / "dictionary",
                "architecture": {"kind": "topk", "k": 8, "d_sae": 128},
                "n_tokens": 65_536,
                "batch_size": 256,
            }
        )
        source = IteratorSource(
            lambda: transformer_lens_rows(model, ids.split(16), HOOK, drop=0), buffer_rows=4096
        )
        dictionary = train(config, source=source)
    sae = BenchSAE(dictionary, "tiny", HOOK, context_size=CONTEXT)
    settings = CoreEvalConfig(
        model_name="tiny",
        batch_size_prompts=8,
        n_eval_reconstruction_batches=4,
        n_eval_sparsity_variance_batches=8,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
    )
    store = Batches(ids)
    found, features = run_evals(sae, store, model, settings)
    found["misc_metrics"] = calculate_misc_metrics(features)
    print(json.dumps(found, indent=1))

    rows = torch.cat(list(transformer_lens_rows(model, ids[:64].split(8), HOOK, drop=0)))
    encoded = dictionary.encode(rows)
    close = Reconstruction()
    close.update(rows, dictionary.decode(encoded))
    ours = {"l0": float(encoded.l0().float().mean()), "cossim": float(close.compute()["cosine"].value)}
    theirs = {"l0": found["sparsity"]["l0"], "cossim": found["reconstruction_quality"]["cossim"]}
    ok = all(abs(ours[name] - theirs[name]) < 1e-4 * max(1.0, abs(ours[name])) for name in ours)
    kept = found["model_performance_preservation"]["ce_loss_score"]
    version = importlib.metadata.version("sae-bench")
    print(
        f"sae-bench {version}: ours {ours}, theirs {theirs}, ce_loss_score {kept:.3f}: {'agree' if ok else 'DIFFER'}"
    )
    return ok


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
