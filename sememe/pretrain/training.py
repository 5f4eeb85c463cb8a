"""One training run between its checkpoints, and what it writes at the end. Knows models and rows of tokens."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from sememe import artifact
from sememe import lm as language_models
from sememe.checkpoint import load_checkpoint, save_checkpoint
from sememe.errors import ActivationError, ConfigError, MismatchError
from sememe.interrupt import stop_requests
from sememe.lm.build import build_causal_lm, save_causal_lm
from sememe.lm.load import native_dtype
from sememe.pretrain.config import PROMPT_TOKENS, PretrainConfig
from sememe.pretrain.group import Group
from sememe.pretrain.rows import Baselines, baselines, rows_of, tokenizer_of
from sememe.progress import Progress, track
from sememe.text import attributions
from sememe.tracking import Log

__all__ = ["SCRATCH", "Run"]

LOG, RESULTS, SAMPLES = "metrics.jsonl", "results.json", "samples.md"
LOGITS = 2**23
"""Logits of a forward on a CPU: 32 MB in float32, the most that the C library's allocator keeps for the next one."""
SCRATCH = "scratch"
"""Folder for what a finished model does not need: rows, tokenizer, checkpoints."""


class Run:
    """One run between its checkpoints, in one process.

    Args:
        config: What to train.
        folder: The folder that is being made.
        group: The processes that train together; only the first one writes.
    """

    def __init__(self, config: PretrainConfig, folder: Path, group: Group) -> None:
        self.config, self.folder, self.group, self.device = config, folder, group, group.device
        self.scratch = folder / SCRATCH
        self.part = _part(config, group.size)
        self.dtype = (
            native_dtype(self.device.type) if config.dtype == "auto" else getattr(torch, config.dtype)
        )
        if group.first:
            self.scratch.mkdir(exist_ok=True)
            self._read()
        group.told(None)  # the first one has written what the others read now
        if not group.first:
            self._read()
        if config.micro_rows is None and self.device.type == "cpu":
            self.part = self.part._replace(micro_rows=self._at_hand())
        self.model = build_causal_lm(
            config.architecture,
            vocab_size=len(self.tokenizer),
            context_length=config.context_length,
            end_of_text=self.tokenizer.eos_token_id,
            seed=config.seed,
        ).to(self.device)
        self.parameters: dict[str, Tensor] = dict(self.model.named_parameters())
        self.shared = group.shared(self.model)
        self.optimiser = _adamw(self.parameters, config)
        self.step, self.seconds_before, self.started = 0, 0.0, time.monotonic()
        self._order: tuple[int, NDArray[np.int64]] | None = None
        if (saved := load_checkpoint(self.scratch)) is not None:
            self._restore(saved)

    def _read(self) -> None:
        """The tokenizer and the rows: made if they are not there."""
        config = self.config
        self.tokenizer = tokenizer_of(config, self.scratch)
        n_train = config.n_steps * config.batch_rows * config.context_length
        self.train_rows = rows_of(config, self.tokenizer, "train", n_train, self.scratch / "train.bin")
        self.heldout_rows = rows_of(
            config, self.tokenizer, "heldout", config.validation_tokens, self.scratch / "heldout.bin"
        )

    def _at_hand(self) -> int:
        """Rows per forward on a CPU: as many as divide a step and keep their logits below LOGITS. Larger arrays
        are taken from the system and given back at every step, page by page, which took 40% of a step."""
        of_row = self.config.context_length * len(self.tokenizer)
        fitting = (
            n for n in range(self.part.rows, 0, -1) if self.part.rows % n == 0 and n * of_row <= LOGITS
        )
        return next(fitting, 1)

    # -- state -------------------------------------------------------------------------------------

    def _setting(self) -> dict[str, Any]:
        """What the bits depend on besides the state."""
        return {
            "threads": torch.get_num_threads(),
            "device": self.device.type,
            "dtype": str(self.dtype),
            "torch": torch.__version__,
            "processes": self.group.size,
        }

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def _state(self) -> dict[str, Any]:
        moments: dict[str, dict[str, Tensor]] = {"step": {}, "exp_avg": {}, "exp_avg_sq": {}}
        for name, parameter in self.parameters.items():
            for key, value in self.optimiser.state[parameter].items():
                moments[key][name] = value
        return {
            "weights": self.parameters,
            "moments": moments,
            "run": {"step": self.step, "seconds": self._seconds()},
            "setting": self._setting(),
        }

    def _restore(self, saved: dict[str, Any]) -> None:
        if saved["setting"] != self._setting():
            raise MismatchError(
                f"a checkpoint must go on in the setting it was made in ({saved['setting']})",
                str(self._setting()),
                "Set --threads, --device, --dtype and the processes as they were, or pass --fresh to start again.",
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(saved["weights"][name])
                self.optimiser.state[parameter] = {
                    key: saved["moments"][key][name].to(parameter.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        self.step, self.seconds_before = saved["run"]["step"], saved["run"]["seconds"]

    # -- the loop ----------------------------------------------------------------------------------

    def go(self) -> dict[str, Any]:
        """Train to the end, and write the model with what was measured; gives meta.json's extra, {} in the others."""
        config, first = self.config, self.group.first
        marks = {round(config.n_steps * (i + 1) / config.n_validations) for i in range(config.n_validations)}
        base = baselines(self.train_rows, self.heldout_rows, len(self.tokenizer)) if first else None
        validation = math.nan
        row_tokens = config.batch_rows * config.context_length
        with (
            self._log() as log,
            self._progress(row_tokens) as progress,
            stop_requests() as stop,
        ):
            saved_at = time.monotonic()
            while self.step < config.n_steps:
                loss = self._one_step()
                progress.advance(row_tokens)
                values: dict[str, float] = {}
                if self.step % config.log_every == 0 or self.step == config.n_steps:
                    values = {"loss": self._finite(loss), "lr": config.rate(self.step - 1)}
                    progress.note = f"loss {values['loss']:.3f}"
                if self.step in marks:
                    values["validation_loss"] = validation = self._validate()
                if values and log is not None:
                    log.write(
                        self.step, values | {"tokens": self.step * row_tokens, "seconds": self._seconds()}
                    )
                stopping = self.group.anyone(stop.is_set())
                if stopping or time.monotonic() - saved_at >= config.checkpoint_every_seconds:
                    if first:
                        self._check_finite(float(loss))
                        save_checkpoint(self.scratch, self.step, self._state())
                    saved_at = time.monotonic()
                    if stopping:
                        self.group.told(None)  # nobody leaves before the checkpoint is written
                        raise KeyboardInterrupt
            if log is not None:
                log.link("model", config.out)
        if math.isnan(validation):  # resumed after the last step
            validation = self._validate()
        return {} if base is None else self._write(validation, base)

    def _log(self) -> AbstractContextManager[Log | None]:
        if not self.group.first:
            return nullcontext()
        config = self.config
        return Log(
            self.folder / LOG,
            config.track,
            name=config.out.name,
            config=config.resolved(),
            resume_step=self.step if self.step else None,
        )

    def _progress(self, row_tokens: int) -> AbstractContextManager[Progress]:
        n_tokens, done = self.config.n_steps * row_tokens, self.step * row_tokens
        if not self.group.first:
            return nullcontext(Progress("pretrain", n_tokens, "tokens", done))
        return track("pretrain", n_tokens, "tokens", done=done)

    def _one_step(self) -> Tensor:
        """One optimiser step; gives the mean loss per token of this process's rows, still on the device."""
        config, group = self.config, self.group
        rows = self._batch(self.step)
        n_predictions = rows.shape[0] * (rows.shape[1] - 1)
        total = torch.zeros((), device=self.device)
        self.model.train()
        parts = torch.split(rows, self.part.micro_rows)
        for number, part in enumerate(parts, 1):
            with group.quiet(self.shared, unless=number == len(parts)):
                loss = self._loss(part, self.shared) / n_predictions
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        for settings in self.optimiser.param_groups:
            settings["lr"] = config.rate(self.step)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        return total

    def _batch(self, step: int) -> Int[Tensor, "rows ctx"]:
        """This process's rows of a step: every pass has a random order of its own, and a batch may span two passes."""
        n = len(self.train_rows)
        first = step * self.config.batch_rows + self.group.rank * self.part.rows
        places = range(first, first + self.part.rows)
        picked = np.stack([self.train_rows[self._permutation(place // n)[place % n]] for place in places])
        return torch.from_numpy(picked.astype(np.int64)).to(self.device)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng([self.config.seed, epoch]).permutation(len(self.train_rows))
            self._order = (epoch, order)
        return self._order[1]

    def _loss(self, rows: Int[Tensor, "rows ctx"], model: nn.Module) -> Float[Tensor, ""]:
        """The summed loss of every token but a row's first, in nats."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")

    def _finite(self, loss: Tensor) -> float:
        """The mean loss over all processes, which must call this together."""
        return self._check_finite(float(self.group.total(loss.clone())) / self.group.size)

    def _check_finite(self, value: float) -> float:
        if not math.isfinite(value):
            raise ActivationError(
                f"the loss must be finite at step {self.step}",
                value,
                "Lower --lr; the last checkpoint is kept.",
            )
        return value

    @torch.no_grad()
    def _validate(self) -> float:
        """Mean loss per held-out token: summed over all rows, then divided; each process has its share of them."""
        self.model.eval()
        own, size = self.heldout_rows[self.group.rank :: self.group.size], self.part.micro_rows
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for start in range(0, len(own), size):
            rows = torch.from_numpy(own[start : start + size].astype(np.int64)).to(self.device)
            total += self._loss(rows, self.model)
        return float(self.group.total(total)) / (self.heldout_rows.size - len(self.heldout_rows))

    # -- the end -----------------------------------------------------------------------------------

    def _write(self, validation: float, base: Baselines) -> dict[str, Any]:
        config, folder = self.config, self.folder
        for name, parameter in self.parameters.items():
            if not bool(torch.isfinite(parameter).all()):
                raise ActivationError(
                    f"{name} must be finite", "NaN or infinity", "Lower --lr and train again."
                )
        self.model.to("cpu").eval()
        results = {
            "validation_loss": validation,
            "unigram_loss": base.unigram,
            "bigram_loss": base.bigram,
            "perplexity": math.exp(validation),
            "n_parameters": sum(p.numel() for p in self.parameters.values()),
            "vocab_size": len(self.tokenizer),
            "n_train_tokens": config.n_steps * config.batch_rows * config.context_length,
            "n_corpus_tokens": int(self.train_rows.size),
            "n_validation_tokens": int(self.heldout_rows.size),
        }
        artifact.write_json(folder / RESULTS, results)
        (folder / SAMPLES).write_text(self._samples(), encoding="utf-8")
        save_causal_lm(self.model, self.tokenizer, folder)
        return {"results": results, "attributions": [a._asdict() for a in attributions(config.text)]}

    def _samples(self) -> str:
        config = self.config
        lines = [
            "# Samples",
            "",
            "The first tokens of a held-out row, and how the model goes on (temperature 0.8).",
            "",
        ]
        if config.n_samples:
            lm = language_models.wrap(self.model, self.tokenizer, config.out.name)
            prompts = torch.from_numpy(self.heldout_rows[: config.n_samples, :PROMPT_TOKENS].astype(np.int64))
            out = lm.generate(
                prompts, config.sample_tokens, temperature=0.8, seed=config.seed, stop_at_eos=False
            )
            for prompt, row in zip(prompts, out, strict=True):
                text = self.tokenizer.decode(row[PROMPT_TOKENS:])
                lines += [f"> **{_quoted(self.tokenizer.decode(prompt))}**{_quoted(text)}", ""]
        return "\n".join(lines)


def _quoted(text: str) -> str:
    return text.replace("\r", "").replace("\n", "\n> ").replace("<|endoftext|>", " ⏹ ")


class _Part(NamedTuple):
    """What one process does of a step."""

    rows: int
    micro_rows: int


def _part(config: PretrainConfig, n_processes: int) -> _Part:
    if config.batch_rows % n_processes:
        raise ConfigError(
            f"batch_rows must be a multiple of the {n_processes} processes, each of which has its part of a step",
            config.batch_rows,
            "Change batch_rows, or torchrun's --nproc-per-node.",
        )
    rows = config.batch_rows // n_processes
    micro_rows = rows if config.micro_rows is None else min(config.micro_rows, rows)
    if rows % micro_rows:
        raise ConfigError(
            f"micro_rows must divide the {rows} rows of each of the {n_processes} processes",
            micro_rows,
            "Change micro_rows or batch_rows.",
        )
    return _Part(rows, micro_rows)


def _adamw(parameters: dict[str, Tensor], config: PretrainConfig) -> torch.optim.AdamW:
    """Weight decay on matrices only, as GPT-2 and all after it."""
    matrices = [p for p in parameters.values() if p.dim() >= 2]
    vectors = [p for p in parameters.values() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True)
