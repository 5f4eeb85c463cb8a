"""One training run between its checkpoints, and what it writes at the end. Knows models and rows of tokens."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from sememe import artifact
from sememe import lm as language_models
from sememe.checkpoint import load_checkpoint, save_checkpoint
from sememe.errors import ActivationError, ConfigError, MismatchError
from sememe.interrupt import stop_requests
from sememe.lm.build import build_causal_lm, save_causal_lm
from sememe.lm.load import native_dtype
from sememe.pretrain.config import PROMPT_TOKENS, PretrainConfig
from sememe.pretrain.rows import Baselines, baselines, rows_of, tokenizer_of
from sememe.progress import track
from sememe.text import attributions
from sememe.tracking import Log

__all__ = ["SCRATCH", "Run"]

LOG, RESULTS, SAMPLES = "metrics.jsonl", "results.json", "samples.md"
SCRATCH = "scratch"
"""Folder for what a finished model does not need: rows, tokenizer, checkpoints."""


class Run:
    """One run between its checkpoints."""

    def __init__(self, config: PretrainConfig, work: artifact.Work) -> None:
        self.config, self.work = config, work
        self.scratch = work.path / SCRATCH
        self.scratch.mkdir(exist_ok=True)
        self.device = _device(config)
        self.dtype = (
            native_dtype(self.device.type) if config.dtype == "auto" else getattr(torch, config.dtype)
        )
        self.tokenizer = tokenizer_of(config, self.scratch)
        n_train = config.n_steps * config.batch_rows * config.context_length
        self.train_rows = rows_of(config, self.tokenizer, "train", n_train, self.scratch / "train.bin")
        self.heldout_rows = rows_of(
            config, self.tokenizer, "heldout", config.validation_tokens, self.scratch / "heldout.bin"
        )
        self.model = build_causal_lm(
            config.architecture,
            vocab_size=len(self.tokenizer),
            context_length=config.context_length,
            end_of_text=self.tokenizer.eos_token_id,
            seed=config.seed,
        ).to(self.device)
        self.parameters: dict[str, Tensor] = dict(self.model.named_parameters())
        self.optimiser = _adamw(self.parameters, config)
        self.step, self.seconds_before, self.started = 0, 0.0, time.monotonic()
        self._order: tuple[int, NDArray[np.int64]] | None = None
        if (saved := load_checkpoint(self.scratch)) is not None:
            self._restore(saved)

    # -- state -------------------------------------------------------------------------------------

    def _setting(self) -> dict[str, Any]:
        """What the bits depend on besides the state."""
        return {
            "threads": torch.get_num_threads(),
            "device": self.device.type,
            "dtype": str(self.dtype),
            "torch": torch.__version__,
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
                "Set --threads, --device and --dtype as they were, or pass --fresh to start again.",
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
        """Train to the end, and write the model with what was measured; gives meta.json's extra."""
        config = self.config
        marks = {round(config.n_steps * (i + 1) / config.n_validations) for i in range(config.n_validations)}
        base = baselines(self.train_rows, self.heldout_rows, len(self.tokenizer))
        validation = math.nan
        row_tokens = config.batch_rows * config.context_length
        log = Log(
            self.work.path / LOG,
            config.track,
            name=config.out.name,
            config=config.resolved(),
            resume_step=self.step if self.step else None,
        )
        with (
            log,
            track("pretrain", config.n_steps * row_tokens, "tokens", done=self.step * row_tokens) as progress,
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
                if values:
                    log.write(
                        self.step, values | {"tokens": self.step * row_tokens, "seconds": self._seconds()}
                    )
                if stop.is_set() or time.monotonic() - saved_at >= config.checkpoint_every_seconds:
                    self._finite(loss)
                    save_checkpoint(self.scratch, self.step, self._state())
                    saved_at = time.monotonic()
                    if stop.is_set():
                        raise KeyboardInterrupt
            log.link("model", config.out)
        if math.isnan(validation):  # resumed after the last step
            validation = self._validate()
        return self._write(validation, base)

    def _one_step(self) -> Tensor:
        """One optimiser step; gives the mean loss per token, still on the device."""
        config = self.config
        rows = self._batch(self.step)
        n_predictions = rows.shape[0] * (rows.shape[1] - 1)
        total = torch.zeros((), device=self.device)
        self.model.train()
        for part in torch.split(rows, config.micro_rows or config.batch_rows):
            loss = self._loss(part) / n_predictions
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = config.rate(self.step)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        return total

    def _batch(self, step: int) -> Int[Tensor, "rows ctx"]:
        """The rows of a step: every pass has a random order of its own, and a batch may span two passes."""
        n = len(self.train_rows)
        first = step * self.config.batch_rows
        places = range(first, first + self.config.batch_rows)
        picked = np.stack([self.train_rows[self._permutation(place // n)[place % n]] for place in places])
        return torch.from_numpy(picked.astype(np.int64)).to(self.device)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng([self.config.seed, epoch]).permutation(len(self.train_rows))
            self._order = (epoch, order)
        return self._order[1]

    def _loss(self, rows: Int[Tensor, "rows ctx"]) -> Float[Tensor, ""]:
        """The summed loss of every token but a row's first, in nats."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model(input_ids=rows, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")

    def _finite(self, loss: Tensor) -> float:
        value = float(loss)
        if not math.isfinite(value):
            raise ActivationError(
                f"the loss must be finite at step {self.step}",
                value,
                "Lower --lr; the last checkpoint is kept.",
            )
        return value

    @torch.no_grad()
    def _validate(self) -> float:
        """Mean loss per held-out token: summed over all rows, then divided."""
        self.model.eval()
        total, size = 0.0, self.config.micro_rows or self.config.batch_rows
        for start in range(0, len(self.heldout_rows), size):
            rows = torch.from_numpy(self.heldout_rows[start : start + size].astype(np.int64)).to(self.device)
            total += float(self._loss(rows))
        return total / (self.heldout_rows.size - len(self.heldout_rows))

    # -- the end -----------------------------------------------------------------------------------

    def _write(self, validation: float, base: Baselines) -> dict[str, Any]:
        config, folder = self.config, self.work.path
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


def _device(config: PretrainConfig) -> torch.device:
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device must be one that torch finds here", "cuda", "Use cpu or auto.")
    return torch.device(config.device)


def _adamw(parameters: dict[str, Tensor], config: PretrainConfig) -> torch.optim.AdamW:
    """Weight decay on matrices only, as GPT-2 and all after it."""
    matrices = [p for p in parameters.values() if p.dim() >= 2]
    vectors = [p for p in parameters.values() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True)
