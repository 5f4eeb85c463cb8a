"""How long an evaluation takes over the forwards that it cannot do without.

    python benchmarks/bench_evaluate.py [--tokens 16384] [--model smollm2-135m] [--hookpoint resid_post.8]
        [--d-sae 4608] [--store STORE] [--out artifacts/bench/evaluate.json]

The limit: per batch one full forward with its logits, and for each of the five arms (dictionary, zero, mean, pca,
untrained) the layers above the hookpoint with their logits, in the same dtype and batches, timed batch by batch in
turns with the evaluation, so that whatever else the machine does falls on both. The evaluation counts everything but
loading the model: tokenizing, fitting the nulls on a store's rows, encoding, every metric, intervals, pages. The
dictionary is an untrained TopK one; a trained one of the same shape costs the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sememe import figures, metrics, text
from sememe import lm as language_models
from sememe.dictionaries import Site, Sites
from sememe.dictionaries.topk import TopK, TopKConfig
from sememe.evaluate import EvaluateConfig, make_arms
from sememe.harvest import HarvestConfig, harvest
from sememe.lm import LanguageModel, ModelConfig
from sememe.measure import Measured
from sememe.splice import Splicer
from sememe.store import open_store
from sememe.text import TokenPolicy

MUST = {
    "evaluate_over_limit": "<= 1.3",
    "mcs_32768_peak_gb": "<= 2",
    "matching_8192_seconds": "<= 120",
    "matching_32768_peak_gb": "<= 2",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--hookpoint", default="resid_post.8")
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument(
        "--store", type=Path, default=None, help="a store of the hookpoint; made if not given"
    )
    parser.add_argument("--out", type=Path, default=Path("artifacts/bench/evaluate.json"))
    parser.add_argument("--skip-mcs", action="store_true", help="leave out the 32,768 x 32,768 comparison")
    parser.add_argument("--only-matching", action="store_true", help="the comparisons of dictionaries alone")
    options = parser.parse_args()
    if options.only_matching:
        for about in ("twins", "strangers"):
            print(f"matching_8192_seconds, {about}: {matching_seconds(about == 'twins'):.1f}")
        return
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    context = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), **found}
    rows = [row("evaluate_over_limit", found["over_limit"], "ratio", context)]
    rows.append(row("evaluate_pass_over_limit", found["pass_over_limit"], "ratio", context))
    rows.append(row("evaluate_peak_gb", found["peak_gb"], "GB", context))
    if not options.skip_mcs:
        grown, seconds = growth(metrics.mcs)
        rows.append(row("mcs_32768_peak_gb", grown, "GB", {"seconds": seconds, "d": 512, "block": 4096}))
        grown, seconds = growth(metrics.match)
        rows.append(row("matching_32768_peak_gb", grown, "GB", {"seconds": seconds, "d": 512}))
        twins, strangers = matching_seconds(True), matching_seconds(False)
        rows.append(row("matching_8192_seconds", strangers, "s", {"d": 512, "half_of_them_alike": twins}))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=1))
    print(f"{'figure':<28}{'value':>10}  {'must':<8}unit")
    for entry in rows:
        print(f"{entry['name']:<28}{entry['value']:>10.3f}  {entry['must']:<8}{entry['unit']}")
    print(", ".join(f"{k[:-8]} {v:.2f} s" for k, v in found.items() if k.endswith("_seconds")))
    print(f"written to {options.out}")


def matching_seconds(alike: bool) -> float:
    """Of one-to-one matching 8,192 directions with as many: half of them alike, as of two seeds, or none."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(8192, 512, generator=generator) for _ in range(2))
    if alike:
        b[:4096] = a[:4096] + 0.3 * b[:4096]
        b = b[torch.randperm(8192, generator=generator)]
    began = time.perf_counter()
    metrics.match(a, b)
    return time.perf_counter() - began


def row(name: str, value: float, unit: str, context: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "value": round(value, 4),
        "must": MUST.get(name, ""),
        "unit": unit,
        "context": context,
    }


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    lm = language_models.load(ModelConfig(model=options.model))
    width = lm.width(options.hookpoint)
    config = EvaluateConfig(
        dictionary=folder / "dictionary", n_tokens=options.tokens, n_fit_rows=options.tokens
    )
    text.fetch(config.text)
    if options.store is None:
        options.store = folder / "store"
        harvest(
            HarvestConfig(
                out=options.store, hookpoints=(options.hookpoint,), n_tokens=options.tokens * 5 // 4
            ),
            lm=lm,
        )
    store = open_store(options.store)
    site = Site(
        model=lm.name,
        model_fingerprint=lm.fingerprint,
        hookpoint=options.hookpoint,
        start=0,
        stop=width,
        max_norm=store.info.hookpoints[options.hookpoint].max_norm,
    )
    sites = Sites(inputs=(site,), outputs=(site,))
    dictionary = TopK(TopKConfig(k=32, d_sae=options.d_sae), width, width, options.d_sae, sites).eval()
    generator = torch.Generator().manual_seed(0)
    dictionary.initialise(*[torch.randn(1024, width, generator=generator)] * 2, generator)
    dictionary(torch.randn(64, width, generator=generator))  # compiles the kernels; kept on disk between runs
    seconds = {"fit": 0.0, "text": 0.0, "pass": 0.0, "report": 0.0, "limit": 0.0}

    began = time.perf_counter()
    arms, _ = make_arms(config, lm, dictionary, sites, TokenPolicy(), store)
    seconds["fit"] = time.perf_counter() - began

    measured = Measured(
        config, lm, Splicer(lm, [options.hookpoint], [options.hookpoint]), sites, TokenPolicy()
    )
    measured.begin(arms)
    parts = measured.parts()
    block, part = next(parts)
    warm = Measured(config, lm, measured.splicer, sites, TokenPolicy())
    warm.begin(arms)
    warm.step(block, part, arms)  # compiles and pages everything in
    limit(lm, block.ids[part], options.hookpoint, len(arms.dictionaries) + 2)
    n_batches = 0
    while True:
        turns = {
            "pass": lambda b=block, p=part: measured.step(b, p, arms),
            "limit": lambda b=block, p=part: limit(
                lm, b.ids[p], options.hookpoint, len(arms.dictionaries) + 2
            ),
        }
        for name in ("pass", "limit") if n_batches % 2 else ("limit", "pass"):
            began = time.perf_counter()
            turns[name]()
            seconds[name] += time.perf_counter() - began
        n_batches += 1
        began = time.perf_counter()
        following = next(parts, None)
        seconds["text"] += time.perf_counter() - began
        if following is None:
            break
        block, part = following

    began = time.perf_counter()
    data = measured.report(arms) | {
        "dictionary": {
            "name": "untrained",
            "fingerprint": "",
            "kind": "topk",
            "d_sae": options.d_sae,
            "model": lm.name,
            "model_fingerprint": lm.fingerprint,
            "inputs": [options.hookpoint],
            "outputs": [options.hookpoint],
        },
        "text": measured.describe_text(""),
    }
    figures.write_pages(folder, {"untrained": data})
    seconds["report"] = time.perf_counter() - began
    whole = seconds["fit"] + seconds["text"] + seconds["pass"] + seconds["report"]
    return {
        "over_limit": whole / seconds["limit"],
        "pass_over_limit": seconds["pass"] / seconds["limit"],
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "n_tokens": measured.n_tokens,
        "tokens_per_second": measured.n_tokens / whole,
        "dtype": str(lm.dtype),
        "batch_rows": config.batch_rows,
        **{f"{name}_seconds": value for name, value in seconds.items()},
    }


@torch.inference_mode()
def limit(lm: LanguageModel, rows: Any, hookpoint: str, n_arms: int) -> None:
    """One full forward, and `n_arms` times the layers above the hookpoint, each with its logits."""
    ids = torch.from_numpy(rows).to(lm.device, torch.int64)
    lm.logits(lm.hidden(ids))
    layer = lm.replay_layer(hookpoint)
    residual = torch.zeros(*ids.shape, lm.d_model, dtype=lm.dtype, device=lm.device)
    residual.normal_()
    for _ in range(n_arms):
        lm.logits(lm.hidden_from(layer, residual, ids))


def growth(compare: Callable[[torch.Tensor, torch.Tensor], Any]) -> tuple[float, float]:
    """Peak memory over what the two dictionaries hold, and the time, of comparing 32,768 with 32,768 latents."""
    a, b = (torch.randn(32_768, 512, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    began = time.perf_counter()
    compare(a, b)
    seconds = time.perf_counter() - began
    return (resident("VmHWM") - before) / 2**20, seconds


def resident(field: str) -> int:
    """A figure of /proc/self/status, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
