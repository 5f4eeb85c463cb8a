"""How much of a planted dictionary each architecture finds: recall (mmcs, planted to learned), l0, fvu.

    make bench-toy

Width 64, 128 planted features, all equally often and 3 in a row on average, 128 latents: none is to spare. 1,500 steps
of 1,024 rows. The same as, for each recipe below,

    sememe toy KIND --planted-d 64 --planted-n-features 128 --planted-n-active 3 --planted-decay 1
                    --d-sae 128 --lr 0.003 --batch-size 1024 --n-tokens 1536000 OPTIONS
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import finish, row

from sememe.dictionaries.sparse_coder import KSVDConfig, ksvd
from sememe.toy import PlantedSource, ToyConfig, recovery
from sememe.train import TrainConfig, train

TOY = {"d": 64, "n_features": 128, "n_active": 3, "decay": 1}
N_STEPS, BATCH = 1500, 1024
MUST = 0.95
N_ROWS = 8192
"""Rows that l0 and fvu are measured on."""


class Recipe(NamedTuple):
    """An architecture with the options that suit the planted data."""

    name: str
    kind: str
    options: dict[str, Any]
    must: float | None = MUST
    """The recall that it must reach; none where its docs page says why not."""


RECIPES = [
    Recipe("topk", "topk", {"k": 3, "dead_after_tokens": 50_000}),
    Recipe("batch_topk", "batch_topk", {"k": 3, "dead_after_tokens": 50_000}),
    Recipe("multi_topk", "multi_topk", {"k": 3, "dead_after_tokens": 50_000}),
    Recipe("abs_topk", "abs_topk", {"k": 3, "dead_after_tokens": 50_000}),
    Recipe("group_max", "group_max", {"k": 4, "dead_after_tokens": 50_000}),
    Recipe("matryoshka", "matryoshka", {"k": 3, "dead_after_tokens": 50_000}, None),
    Recipe("matching_pursuit", "matching_pursuit", {"k": 3}),
    Recipe("mlp_encoder", "mlp_encoder", {"k": 3, "dead_after_tokens": 50_000}),
    Recipe("jumprelu", "jumprelu", {"target_l0": 3}),
    Recipe("relu", "relu", {"l1_coefficient": 0.03}),
    Recipe("relu_steered", "relu", {"l1_coefficient": 0.01, "target_l0": 6, "start_l0": 40}),
    Recipe("relu_norms", "relu", {"l1_coefficient": 0.03, "norm_weighted": True}),
    Recipe("relu_sqrt", "relu", {"l1_coefficient": 0, "sqrt_coefficient": 0.03}),
    Recipe("relu_entropy", "relu", {"l1_coefficient": 0, "entropy_coefficient": 0.3}),
    Recipe("relu_noise", "relu", {"l1_coefficient": 0, "noise": 1.0}, None),
    Recipe("gated", "gated", {"l1_coefficient": 0.05}, None),
    Recipe("gated_annealed", "gated", {"l1_coefficient": 0.01, "target_l0": 4, "start_l0": 40}),
    Recipe("p_anneal", "p_anneal", {"l1_coefficient": 0.03}),
    Recipe("lista", "lista", {"l1_coefficient": 0.03}),
    Recipe("variational", "variational", {"prior_l0": 3}),
    Recipe("tied", "tied", {"l1_coefficient": 0.03}),
    Recipe("tied_annealed", "tied", {"l1_coefficient": 0.01, "target_l0": 6, "start_l0": 40}, None),
]
"""Each in its best known form; the docs page of each kind says what else was tried."""


class Found(NamedTuple):
    """What a run reached."""

    recall: float
    precision: float
    l0: float
    fvu: float
    n_silent: int


def measured(recipe: Recipe, seed: int = 0, **changes: Any) -> Found:
    """Train once, and compare with the truth.

    Args:
        recipe: What to train.
        seed: Decides features, rows and weights.
        changes: Other options of the run, in place of those above.
    """
    source = PlantedSource(ToyConfig(seed=seed, **TOY))
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "out": Path(folder) / "learned",
            "architecture": {"kind": recipe.kind, "d_sae": 128, **recipe.options},
            "n_tokens": N_STEPS * BATCH,
            "batch_size": BATCH,
            "lr": 3e-3,
            "seed": seed,
            "threads": 1,
        }
        dictionary = train(TrainConfig.build(options | changes), source=source)
    x = source.sample(N_ROWS).x
    with torch.no_grad():
        encoded = dictionary.encode(x)
        recon = dictionary.decode(encoded)
    fired = torch.zeros(dictionary.d_sae).index_add(0, encoded.indices.long(), (encoded.acts != 0).float())
    found = recovery(source.planted, dictionary)
    return Found(
        found.recall,
        found.precision,
        float(encoded.l0().double().mean()),
        float((x - recon).square().sum() / (x - x.mean(0)).square().sum()),
        int((fired == 0).sum()),
    )


DEFAULT = [
    (Recipe("topk", "topk", {"k": 5, "auxk": 64, "dead_after_tokens": 20_000}, 0.98), 8_000_000, 3e-3),
    (Recipe("batch_topk", "batch_topk", {"k": 5, "auxk": 64, "dead_after_tokens": 20_000}), 8_000_000, 3e-3),
    (Recipe("jumprelu", "jumprelu", {"target_l0": 5}), 8_000_000, 3e-3),
    (Recipe("relu", "relu", {"l1_coefficient": 0.005, "norm_weighted": True}, 0.95), 4_000_000, 1e-2),
]
"""On the default toy: 256 dimensions, 512 features, 5 active, the rarest in one row of 3,300."""
KSVD_ROWS = 32_768
KSVD_MUST, KSVD_LESS = 0.75, 0.05
"""Recall that K-SVD must reach when told the right number of active features, and what it must lose when told 20."""


def on_the_default_toy(only: list[str] | None = None) -> list[dict[str, Any]]:
    """What is found of it: by each of DEFAULT, and by K-SVD told the right number of active features, and a wrong one.

    Args:
        only: Names of recipes; K-SVD's is ksvd.
    """
    figures = []
    for recipe, n_rows, lr in DEFAULT:
        if only and recipe.name not in only:
            continue
        source = PlantedSource(ToyConfig())
        with tempfile.TemporaryDirectory() as folder:
            options = {
                "out": Path(folder) / "learned",
                "architecture": {"kind": recipe.kind, "d_sae": 512, **recipe.options},
                "n_tokens": n_rows,
                "batch_size": BATCH,
                "lr": lr,
                "threads": 1,
            }
            found = recovery(source.planted, train(TrainConfig.build(options), source=source))
        figures.append(
            row(
                f"toy_default_{recipe.name}",
                found.recall,
                f">= {recipe.must}",
                "mmcs",
                n_rows=n_rows,
                **found._asdict(),
            )
        )
    return figures if only and "ksvd" not in only else figures + by_ksvd(ToyConfig(), 512, KSVD_ROWS, 40)


def by_ksvd(
    toy: ToyConfig, d_sae: int, n_rows: int, n_iterations: int, ks: tuple[int, int] = (5, 20)
) -> list[dict[str, Any]]:
    """K-SVD's recall where it is told how many features are active, and where it is told too many.

    Args:
        toy: The planted data.
        d_sae: Directions.
        n_rows: Rows, all held.
        n_iterations: Rounds.
        ks: The right number of active features, and one too large.
    """
    figures: list[dict[str, Any]] = []
    for k in ks:
        source = PlantedSource(toy)
        coder = ksvd(
            source.next_batch(n_rows).x, KSVDConfig(d_sae=d_sae, k=k, n_iterations=n_iterations)
        ).coder
        found = recovery(source.planted, coder)
        # The second must say that the number matters, as its docs page does: by how much less it finds.
        must = f"<= {figures[0]['value'] - KSVD_LESS:.4f}" if figures else f">= {KSVD_MUST}"
        figures.append(
            row(f"toy_default_ksvd_{k}", found.recall, must, "mmcs", n_rows=n_rows, **found._asdict())
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of recipes")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--default", action="store_true", help="the default toy instead, which takes minutes")
    arguments = parser.parse_args()
    if arguments.default:
        finish("toy_default", on_the_default_toy(arguments.only))
        return
    figures = []
    for recipe in RECIPES:
        if arguments.only and recipe.name not in arguments.only:
            continue
        for seed in range(arguments.seeds):
            found = measured(recipe, seed)
            must = "" if recipe.must is None else f">= {recipe.must:g}"
            context = {name: round(value, 4) for name, value in found._asdict().items()}
            figures.append(row(f"toy_{recipe.name}", found.recall, must, "mmcs", seed=seed, **context))
            print(recipe.name, seed, context, flush=True)
    finish("toy", figures)


if __name__ == "__main__":
    main()
