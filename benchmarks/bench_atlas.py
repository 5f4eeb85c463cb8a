"""How long an atlas takes over one truncated forward of the same text, and how much memory it needs.

    python benchmarks/bench_atlas.py [--tokens 1000000] [--wide-tokens 100000] [--model smollm2-135m]
        [--hookpoint resid_post.8]
        [--widths 4608 65536] [--out artifacts/bench/atlas.json]

The forward is timed batch by batch, in turns with the pass, so that whatever else the machine does falls on both.
The pass counts everything: tokenizing, forward, encoding, collecting, direct logits, pairs, neighbours, the map, the
database. Each width runs in a process of its own, whose peak memory is the figure; the width of 4,608 once more on
a tenth of the text, whose peak must be the same. The dictionary is an untrained
TopK one whose encoder is its decoder's transpose; a trained one of the same shape costs the same.

Effects are those of `sememe effects` with its defaults but for removals, on that atlas: contexts read, the unedited
forwards, every ablation and the predictions compared, in milliseconds per 20 examples. `effects_ms_per_latent` is for
all latents, whose examples share contexts; `effects_ms_per_latent_256` for 256 of them, which share few. Each of their
contexts has to go through the model once as far as it is needed, and that alone, timed in turns with the whole, is
`effects_forwards_ms_per_latent` (`_256`): no program can be below it. `effects_over_forwards` (`_256`) is the ratio.

`lexical_seconds_4608` is all of `sememe explain` without a language model, shuffled rules and intervals included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MUST = {
    "atlas_over_forward": "<= 1.5",
    "atlas_peak_gb_4608": "<= 3",
    "atlas_peak_gb_65536": "<= 6",
    "atlas_peak_over_a_tenth_of_the_text": "<= 1.1",
    "effects_ms_per_latent": "<= 150",
    "effects_ms_per_latent_256": "<= 150",
    "lexical_seconds_4608": "<= 120",
}
EFFECTS_WIDTH, N_EFFECTS, SAMPLED = 4608, 20, 24
"""Effects: of the dictionary of that width, so many ablations per latent, timed on one group of contexts in so many."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--wide-tokens", type=int, default=100_000, help="of widths above 4608")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--hookpoint", default="resid_post.8")
    parser.add_argument("--widths", type=int, nargs="+", default=[4608, 65536])
    parser.add_argument("--corpus", nargs="+", default=["default"])
    parser.add_argument("--out", type=Path, default=Path("artifacts/bench/atlas.json"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options)))
        return
    rows = []
    for width in options.widths:
        n_tokens = options.tokens if width <= EFFECTS_WIDTH else options.wide_tokens
        found = in_child(options, width, n_tokens)
        effects = found.pop("effects", {})
        context = {
            "d_sae": width,
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            **found,
        }
        name = "atlas_over_forward" if width == 4608 else f"atlas_over_forward_{width}"
        rows.append(row(name, found["over_forward"], "ratio", context))
        rows.append(row(f"atlas_peak_gb_{width}", found["peak_gb"], "GB", context))
        if width == EFFECTS_WIDTH:
            tenth = in_child(options, width, options.tokens // 10, bare=True)
            grown = found["peak_gb"] / tenth["peak_gb"]
            rows.append(row("atlas_peak_over_a_tenth_of_the_text", grown, "ratio", tenth))
        for name, about in effects.items():
            rows.append(row(name, about["ms_per_latent"], "ms", about | {"cores": os.cpu_count()}))
            limit = about["forwards_ms_per_latent"]
            rows.append(row(name.replace("_ms", "_forwards_ms"), limit, "ms", {}))
            over = about["ms_per_latent"] / limit
            rows.append(row(name.replace("_ms_per_latent", "_over_forwards"), over, "ratio", {}))
        if lexical := found.pop("lexical", {}):
            rows.append(row("lexical_seconds_4608", lexical["seconds"], "s", lexical))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=1))
    print(f"{'figure':<38}{'value':>10}  {'must':<8}unit")
    for entry in rows:
        print(f"{entry['name']:<38}{entry['value']:>10.3f}  {entry['must']:<8}{entry['unit']}")
    for entry in (entry for entry in rows if entry["name"].startswith("atlas_over_forward")):
        seconds = {k: v for k, v in entry["context"].items() if k.endswith("_seconds")}
        print(
            f"d_sae {entry['context']['d_sae']}: "
            + ", ".join(f"{k[:-8]} {v:.2f} s" for k, v in seconds.items())
        )
    print(f"written to {options.out}")


def row(name: str, value: float, unit: str, context: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "value": round(value, 4),
        "must": MUST.get(name, ""),
        "unit": unit,
        "context": context,
    }


def in_child(options: argparse.Namespace, width: int, n_tokens: int, bare: bool = False) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", "--tokens", str(n_tokens), "--model", options.model]
    command += ["--bare"] * bare
    command += ["--hookpoint", options.hookpoint, "--widths", str(width), "--corpus", *options.corpus]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from sememe import artifact
    from sememe.atlas import DATABASE
    from sememe.dictionaries import Site, Sites
    from sememe.dictionaries.topk import TopK, TopKConfig
    from sememe.interpret import InterpretConfig
    from sememe.interpret.database import write_database
    from sememe.interpret.stream import DOCUMENTS, ROWS, Pass
    from sememe.lm import ModelConfig, load
    from sememe.text import TextConfig, TokenPolicy, fetch

    lm = load(ModelConfig(model=options.model))
    width, d_sae = lm.width(options.hookpoint), options.widths[0]
    site = Site(
        model=lm.name, model_fingerprint=lm.fingerprint, hookpoint=options.hookpoint, start=0, stop=width
    )
    dictionary = TopK(TopKConfig(k=32), width, width, d_sae, Sites(inputs=(site,), outputs=(site,))).eval()
    generator = torch.Generator().manual_seed(0)
    dictionary.initialise(*[torch.randn(1024, width, generator=generator)] * 2, generator)
    config = InterpretConfig(text=TextConfig(corpus=tuple(options.corpus)), n_tokens=options.tokens)
    fetch(config.text)
    seconds = {"text": 0.0, "forward": 0.0, "pass": 0.0, "write": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        run = Pass(config, lm, {"bench": dictionary}, TokenPolicy(), Path(folder))
        run.open()
        with (run.folder / ROWS).open("wb") as rows, (run.folder / DOCUMENTS).open("wb") as documents:
            parts = run.parts(documents)
            began = time.perf_counter()
            warm = next(parts)  # most of the text is read and tokenized before its first row
            seconds["text"] = time.perf_counter() - began
            run.step(warm, rows)  # compiles, and pages everything in; its tokens are not timed
            forward(lm, warm, options.hookpoint)
            n_tokens = 0
            while True:
                began = time.perf_counter()
                part = next(parts, None)
                seconds["text"] += time.perf_counter() - began
                if part is None:
                    break
                turns = [("forward", lambda p=part: forward(lm, p, options.hookpoint))]
                turns.append(("pass", lambda p=part: run.step(p, rows)))
                for name, turn in turns if n_tokens % 2 else reversed(turns):
                    began = time.perf_counter()
                    turn()
                    seconds[name] += time.perf_counter() - began
                n_tokens += part.ids.size
            rows.flush()
            documents.flush()
        began = time.perf_counter()
        made = Path(folder) / "atlas"
        with artifact.building(made, kind="atlas", version=1, config=config, parents={}) as work:
            write_database(work.path / DATABASE, run, run.followed[0], {"d_sae": d_sae})
        run.close()
        seconds["write"] = time.perf_counter() - began
        n_bytes = (made / DATABASE).stat().st_size
        peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        more = d_sae == EFFECTS_WIDTH and not options.bare
        lexical = measure_lexical(made) if more else {}
        effects = measure_effects(made, lm, dictionary) if more else {}
    whole = seconds["text"] + seconds["pass"] + seconds["write"]
    return {
        "over_forward": whole / seconds["forward"],
        "peak_gb": peak_gb,
        "effects": effects,
        "lexical": lexical,
        "collector_gb": run.followed[0].collector.nbytes / 2**30,
        "database_mb": n_bytes / 2**20,
        "n_tokens": n_tokens,
        "tokens_per_second": n_tokens / whole,
        **{f"{name}_seconds": value for name, value in seconds.items()},
    }


def measure_effects(path: Path, lm: Any, dictionary: Any) -> dict[str, dict[str, float]]:
    """Milliseconds per 20 examples, for all latents and for 256 of them."""
    import torch

    from sememe.atlas import open_atlas
    from sememe.downstream import Reruns
    from sememe.effects import EffectsConfig
    from sememe.effects.examples import chosen_latents, groups, read_contexts, read_examples
    from sememe.effects.group import measure as measure_group

    reruns = Reruns(lm, dictionary)
    atlas = open_atlas(path)
    found = {}
    for name, every in (("effects_ms_per_latent", True), ("effects_ms_per_latent_256", False)):
        config = EffectsConfig(atlas=path, every=every, n_top=N_EFFECTS, n_removals=0)
        examples = read_examples(atlas, config, chosen_latents(atlas, config))
        # One of each so many, from those of which little is needed to those that are needed whole.
        whole = list(groups(examples, config.batch_rows, config.n_after, 0))
        some = whole[min(SAMPLED, len(whole)) // 2 :: SAMPLED]
        n_examples, seconds, limit = 0, 0.0, 0.0
        for i, group in enumerate([some[0], *some]):
            began = time.perf_counter()
            inside = examples.take(group.examples)
            contexts = read_contexts(atlas, group)
            measure_group(reruns, config, contexts, group.contexts, inside)
            took = time.perf_counter() - began
            began = time.perf_counter()
            with torch.inference_mode():
                lm.hidden(torch.from_numpy(contexts.ids).to(lm.device))
            if i:  # the first is done twice, and its first time not counted
                seconds += took
                limit += time.perf_counter() - began
                n_examples += len(inside.latent)
        found[name] = {
            "ms_per_latent": 1000 * seconds * N_EFFECTS / n_examples,
            "forwards_ms_per_latent": 1000 * limit * N_EFFECTS / n_examples,
            "n_examples": n_examples,
            "n_contexts": sum(len(group.contexts) for group in some),
            "n_after": config.n_after,
            "threads": torch.get_num_threads(),
        }
    atlas.close()
    return found


def measure_lexical(path: Path) -> dict[str, float]:
    """A rule for every latent, its null, and their scores."""
    from sememe.explain import ExplainConfig, explain

    began = time.perf_counter()
    found = explain(ExplainConfig(atlas=path, out=path.with_name("words")))
    return {"seconds": time.perf_counter() - began, "n_scored": found.summary["n_scored"]}


def forward(lm: Any, part: Any, hookpoint: str) -> None:
    """The limit: the model up to the hookpoint, over the same rows."""
    import torch

    with torch.inference_mode():
        lm.capture(torch.from_numpy(part.ids).to(lm.device, torch.int64), [hookpoint])


if __name__ == "__main__":
    main()
