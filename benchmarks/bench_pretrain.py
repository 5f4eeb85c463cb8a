"""Tokens per second of `sememe pretrain` over those of a bare PyTorch loop of the same model.

    make bench-pretrain

The bare loop holds its rows in memory, steps the same Hugging Face model with fused AdamW, clips, and does nothing
else: no reading, no order, no log, no checkpoint. Ours reads its rows from disk and asks for the loss as often as a run
does; what checkpoints take, one a minute, is measured once and counted. Both in turns, in rounds of STEPS steps.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from common import finish, interleaved, ratio, row

from sememe.checkpoint import save_checkpoint
from sememe.lm.build import GPT2Shape, build_causal_lm
from sememe.pretrain import PretrainConfig
from sememe.pretrain.group import joined
from sememe.pretrain.training import Run
from sememe.text import TextConfig, fetch

MUST = 0.8
STEPS = 10
"""Of a round."""


def config_of(folder: Path) -> PretrainConfig:
    """About 3 million parameters: one layer, 256 wide, a vocabulary of 8,192."""
    return PretrainConfig(
        out=folder / "model",
        architecture=GPT2Shape(n_layers=1, d_model=256, n_heads=4),
        text=TextConfig(corpus=("default",)),
        tokenizer_chars=2_000_000,
        context_length=256,
        n_tokens=3_000_000,
        batch_rows=32,
        validation_tokens=10_000,
        n_samples=0,
    )


class Bare:
    """What is written in ten lines."""

    def __init__(self, config: PretrainConfig, run: Run) -> None:
        self.model = build_causal_lm(
            config.architecture,
            vocab_size=len(run.tokenizer),
            context_length=config.context_length,
            end_of_text=0,
            seed=config.seed,
        ).to(run.device)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=config.lr, fused=True)
        n = STEPS * config.batch_rows
        rows = torch.from_numpy(run.train_rows[:n].astype("int64")).to(run.device)
        self.batches, self.dtype, self.clip = rows.split(config.batch_rows), run.dtype, config.clip

    def steps(self) -> None:
        """A round."""
        for rows in self.batches:
            with torch.autocast(rows.device.type, self.dtype, enabled=self.dtype != torch.float32):
                logits = self.model(input_ids=rows, use_cache=False).logits[:, :-1]
            F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, joined("auto") as group:
        config = config_of(Path(folder))
        fetch(config.text)
        run = Run(config, Path(folder), group)
        bare = Bare(config, run)

        def ours() -> None:
            for _ in range(STEPS):
                loss = run._one_step()
            run._finite(loss)

        times = interleaved({"ours": ours, "bare": bare.steps}, arguments.rounds)
        started = time.perf_counter()
        save_checkpoint(run.scratch, run.step, run._state())
        checkpoint = time.perf_counter() - started
        share = checkpoint / config.checkpoint_every_seconds
        tokens = STEPS * config.batch_rows * config.context_length
        context = {
            "parameters": sum(p.numel() for p in run.parameters.values()),
            "tokens_per_second": round(tokens / sorted(times["ours"])[len(times["ours"]) // 2]),
            "checkpoint_seconds": round(checkpoint, 3),
        }
        figures = [
            row(
                "pretrain_over_bare", ratio(times, "bare", "ours") / (1 + share), f">= {MUST}", "x", **context
            )
        ]
    finish("pretrain", figures)


if __name__ == "__main__":
    main()
