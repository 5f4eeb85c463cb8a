"""Harvest against a bare truncated Hugging Face forward of the same layers, dtype and batch, in the same run.

    make bench-harvest

The bare loop runs the model's first layers over the same token rows and throws the result away. Both go over the
same number of contexts in turn; the figure is the median of the ratios of their tokens per second.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import tempfile
from pathlib import Path

import torch
from common import finish, interleaved, ratio, row

from sememe import lm as language_models
from sememe.harvest import HarvestConfig, harvest
from sememe.lm import ModelConfig
from sememe.text import TextConfig, TokenPolicy, fetch, token_blocks

LAYER = 8
FOUR = ("resid_post.2", "resid_post.4", "resid_post.6", f"resid_post.{LAYER}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32_768, help="tokens per measured harvest")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    text, policy = TextConfig(), TokenPolicy()
    fetch(text)
    lm = language_models.load(ModelConfig())
    blocks = list(token_blocks(text, lm.tokenizer, policy, n_tokens=arguments.tokens))
    ids = torch.cat([torch.from_numpy(block.ids).long() for block in blocks])
    bare = lm.hf.model
    layers = bare.layers

    @torch.inference_mode()
    def bare_forward() -> None:
        bare.layers = layers[: LAYER + 1]
        try:
            for start in range(0, len(ids), 16):
                bare(ids[start : start + 16], use_cache=False)
        finally:
            bare.layers = layers

    place = Path(tempfile.mkdtemp(prefix="sememe-bench-"))

    def run(hookpoints: tuple[str, ...]) -> None:
        shutil.rmtree(place, ignore_errors=True)
        config = HarvestConfig(
            out=place / "store",
            text=text,
            policy=policy,
            hookpoints=hookpoints,
            n_tokens=arguments.tokens,
            shard_contexts=128,
        )
        harvest(config, lm=lm)

    # a harvest measures the median norm on its first forwards; over a real text that is nothing, here it would
    # be half of the work, so the bare loop is given those forwards too
    norm_tokens = 8 * 16 * policy.context_length

    @torch.inference_mode()
    def bare_with_norms() -> None:
        bare_forward()
        bare.layers = layers[: LAYER + 1]
        try:
            for start in range(0, min(len(ids), norm_tokens // policy.context_length), 16):
                bare(ids[start : start + 16], use_cache=False)
        finally:
            bare.layers = layers

    times = interleaved(
        {
            "bare": bare_with_norms,
            "one": lambda: run((f"resid_post.{LAYER}",)),
            "four": lambda: run(FOUR),
        },
        arguments.rounds,
    )
    shutil.rmtree(place, ignore_errors=True)
    context = {
        "tokens": arguments.tokens,
        "layer": LAYER,
        "batch": [16, policy.context_length],
        "dtype": str(lm.dtype),
    }
    speed = (arguments.tokens + norm_tokens) / min(times["one"])
    finish(
        "harvest",
        [
            row("harvest_1_over_bare", ratio(times, "bare", "one"), ">= 0.9", "of its tokens/s", **context),
            row("harvest_4_over_bare", ratio(times, "bare", "four"), ">= 0.9", "of its tokens/s", **context),
            row("harvest_tokens_per_second", speed, "", "tokens/s", **context),
            row(
                "harvest_peak_gb",
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
                "",
                "GB, whole process",
                **context,
            ),
        ],
    )


if __name__ == "__main__":
    main()
