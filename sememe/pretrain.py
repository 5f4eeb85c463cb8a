"""The verb that trains a small language model from scratch on a text, as a standard Hugging Face folder.

    text -> tokenizer -> rows of tokens on disk -> model -> AdamW -> folder that `sememe.lm.load` opens

Killed at any moment and started again, it goes on from its last checkpoint with the same bits. Knows how a
model is trained; how one is built is in `sememe.lm.build`. Knows nothing about dictionaries.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from sememe import artifact
from sememe import lm as language_models
from sememe.checkpoint import load_checkpoint, save_checkpoint
from sememe.config import Config
from sememe.errors import ActivationError, ConfigError, MismatchError, TextError
from sememe.interrupt import stop_requests
from sememe.lm.build import GPT2Shape, Shape, build_causal_lm, load_tokenizer, save_causal_lm, train_tokenizer
from sememe.lm.load import native_dtype
from sememe.progress import track
from sememe.text import TextConfig, TokenPolicy, attributions, documents, fetch, fingerprint, token_blocks
from sememe.tracking import Log, Tracker

__all__ = ["Baselines", "PretrainConfig", "baselines", "pretrain"]

VERSION = 1
LOG, RESULTS, SAMPLES = "metrics.jsonl", "results.json", "samples.md"
SCRATCH = "scratch"
N_BASELINE_ROWS = 20_000_000  # tokens counted for the n-gram baselines: their counts must fit in memory
PROMPT_TOKENS = 8


class PretrainConfig(Config):
    """Which model to train, on what, and for how long."""

    not_identity: ClassVar[frozenset[str]] = frozenset(
        {"out", "checkpoint_every_seconds", "track", "log_every", "threads"}
    )

    out: Path = Path("artifacts/model")
    """The folder to make."""
    architecture: Shape = GPT2Shape()
    """The model's layers."""
    text: TextConfig = TextConfig()
    """The corpus."""
    tokenizer: str | None = None
    """A tokenizer's folder or hub name; a byte-level BPE is trained on the corpus if not given."""
    vocab_size: int | None = Field(default=None, ge=257)
    """Tokens of the BPE, 8192 if not given; only without `tokenizer`."""
    tokenizer_chars: int | None = Field(default=None, ge=1)
    """Characters of the corpus from which the BPE is trained, 20,000,000 if not given; only without `tokenizer`."""
    context_length: int = Field(default=256, ge=2)
    """Tokens per row, and the model's longest context."""
    n_tokens: int = Field(default=20_000_000, ge=1)
    """Tokens to train on; the corpus is passed over as often as that takes, in a new order each time."""
    batch_rows: int = Field(default=32, ge=1)
    """Rows per optimiser step."""
    micro_rows: int | None = Field(default=None, ge=1)
    """Rows per forward, whose gradients are added up to a step; batch_rows if not given."""
    lr: float = Field(default=2e-3, gt=0)
    """Peak learning rate."""
    lr_floor: float = Field(default=0.1, ge=0, le=1)
    """Where the cosine ends, as a share of the peak."""
    warmup: float = Field(default=0.03, ge=0, le=1)
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay of matrices; biases and norms have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of Adam's moments."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the products (weights stay float32). auto: bfloat16 where the device multiplies it natively."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the CUDA device if there is one, else the CPU."""
    validation_tokens: int = Field(default=100_000, ge=1)
    """Held-out tokens on which the validation loss is measured."""
    n_validations: int = Field(default=5, ge=1)
    """Times the validation loss is measured, evenly over the run; the last is at its end."""
    n_samples: int = Field(default=4, ge=0)
    """Continuations of held-out texts to write down at the end."""
    sample_tokens: int = Field(default=64, ge=1)
    """Length of each."""
    seed: int = Field(default=0, ge=0)
    """Of the weights, the order of the rows, and the samples."""
    log_every: int = Field(default=20, ge=1)
    """Steps between lines of metrics.jsonl."""
    checkpoint_every_seconds: float = Field(default=60.0, ge=0)
    """Wall-clock time between checkpoints."""
    track: tuple[Tracker, ...] = ()
    """Trackers that get the metrics too: tensorboard, wandb, trackio."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; all cores if not given."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for option in ("vocab_size", "tokenizer_chars"):
            if self.tokenizer is not None and getattr(self, option) is not None:
                raise ConfigError(
                    f"{option} must be left out with an existing tokenizer",
                    self.tokenizer,
                    f"Drop {option} or tokenizer.",
                )
        if self.micro_rows is not None and self.batch_rows % self.micro_rows:
            raise ConfigError(
                f"micro_rows must divide batch_rows={self.batch_rows}", self.micro_rows, "Change one of them."
            )
        if self.n_samples and PROMPT_TOKENS + self.sample_tokens > self.context_length:
            raise ConfigError(
                f"sample_tokens must be <= context_length - {PROMPT_TOKENS} = {self.context_length - PROMPT_TOKENS}",
                self.sample_tokens,
                "Lower sample_tokens, raise context_length, or set n_samples to 0.",
            )
        return self

    @property
    def n_steps(self) -> int:
        """Optimiser steps."""
        return max(1, self.n_tokens // (self.batch_rows * self.context_length))

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rise = self.warmup * self.n_steps
        if step < rise:
            return self.lr * (step + 1) / max(rise, 1.0)
        share = (step - rise) / max(self.n_steps - rise, 1.0)
        return self.lr * (self.lr_floor + (1 - self.lr_floor) * 0.5 * (1 + math.cos(math.pi * share)))


def pretrain(config: PretrainConfig, *, fresh: bool = False) -> artifact.Artifact:
    """Train a language model, or open it if it is there.

    Args:
        config: Which, on what, for how long.
        fresh: Replace whatever stands at config.out.
    Returns:
        The folder: a Hugging Face model with its tokenizer, `results.json`, `samples.md` and `metrics.jsonl`.
        `sememe.lm.load` takes it, and its `extra` holds the losses.
    Raises:
        ConfigError: an option is out of range.
        TextError: the corpus gives less than one row.
        ActivationError: the loss is NaN or infinite; the last good checkpoint is kept.
        MismatchError: another model, or a checkpoint of another set-up, stands at config.out.
    """
    fetch(config.text)
    parents = {"text": fingerprint(config.text)}
    identity = artifact.identity_of("model", VERSION, config, parents)
    if not fresh and (done := artifact.find(config.out, "model", identity)):
        return done
    threads = torch.get_num_threads()
    try:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        with artifact.building(
            config.out,
            kind="model",
            version=VERSION,
            config=config,
            parents=parents,
            resumable=True,
            fresh=fresh,
            leave_out=(SCRATCH,),
        ) as work:
            work.extra = _Run(config, work).go()
    finally:
        torch.set_num_threads(threads)
    return artifact.load(config.out, "model")


# -- text ------------------------------------------------------------------------------------------


def _tokenizer(config: PretrainConfig, scratch: Path) -> Any:
    """The tokenizer of this run: trained once, then read back."""
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer)
    folder = scratch / "tokenizer"
    if not folder.is_dir():
        aside = scratch / "tokenizer.tmp"
        trained = train_tokenizer(_some_texts(config), config.vocab_size or 8192)
        trained.save_pretrained(aside)
        aside.rename(folder)
    return load_tokenizer(str(folder))


def _some_texts(config: PretrainConfig) -> Iterator[str]:
    left = config.tokenizer_chars or 20_000_000
    for document in documents(config.text, split="train"):
        if left <= 0:
            return
        yield document.text[:left]
        left -= len(document.text)


def _rows(
    config: PretrainConfig, tokenizer: Any, split: Literal["train", "heldout"], n_tokens: int, path: Path
) -> NDArray[Any]:
    """Rows of token ids, memory-mapped from a file that is complete or absent."""
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    if not path.is_file():
        policy = TokenPolicy(context_length=config.context_length, drop_positions=0)
        aside = path.with_suffix(".tmp")
        with aside.open("wb") as file:
            for block in token_blocks(config.text, tokenizer, policy, split=split, n_tokens=n_tokens):
                full = block.attention_mask.all(axis=1)  # the last row of a corpus may not be full
                file.write(np.ascontiguousarray(block.ids[full], dtype).tobytes())
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    if path.stat().st_size == 0:
        raise TextError(
            f"the {split} text must fill a row of {config.context_length} tokens",
            "less",
            "Give more text or lower context_length.",
        )
    return np.memmap(path, dtype, mode="r").reshape(-1, config.context_length)


class Baselines(NamedTuple):
    """Losses in nats per token of models that know next to nothing."""

    unigram: float
    """Each token by its frequency (one is added to every count)."""
    bigram: float
    """Each token by the one before it, smoothed by Witten and Bell's rule."""


def baselines(
    train_rows: Int[np.ndarray, "rows ctx"], heldout_rows: Int[np.ndarray, "n ctx"], vocab_size: int
) -> Baselines:
    """N-gram losses on the held-out rows, on the same predictions as the model's: all but a row's first token.

    Source: Witten & Bell 1991, method C: p(b|a) = (c(ab) + t(a) p(b)) / (c(a) + t(a)), where t(a) is the number
    of different tokens seen after a.
    """
    rows = train_rows[: max(1, N_BASELINE_ROWS // train_rows.shape[1])].astype(np.int64)
    test = heldout_rows.astype(np.int64)
    counts = np.bincount(rows[:, 1:].ravel(), minlength=vocab_size) + 1
    unigram = counts / counts.sum()
    pairs, pair_counts = np.unique(
        rows[:, :-1].ravel() * vocab_size + rows[:, 1:].ravel(), return_counts=True
    )
    first = pairs // vocab_size
    n_after = np.bincount(first, weights=pair_counts, minlength=vocab_size)
    n_types = np.bincount(first, minlength=vocab_size)
    before, after = test[:, :-1].ravel(), test[:, 1:].ravel()
    keys = before * vocab_size + after
    place = np.minimum(np.searchsorted(pairs, keys), len(pairs) - 1)
    seen = np.where(pairs[place] == keys, pair_counts[place], 0)
    base = unigram[after]
    weight = n_after[before] + n_types[before]
    bigram = np.where(weight > 0, (seen + n_types[before] * base) / np.maximum(weight, 1), base)
    return Baselines(float(-np.log(base).mean()), float(-np.log(bigram).mean()))


# -- training --------------------------------------------------------------------------------------


class _Run:
    """One run between its checkpoints."""

    def __init__(self, config: PretrainConfig, work: artifact.Work) -> None:
        self.config, self.work = config, work
        self.scratch = work.path / SCRATCH
        self.scratch.mkdir(exist_ok=True)
        self.device = _device(config)
        self.dtype = (
            native_dtype(self.device.type) if config.dtype == "auto" else getattr(torch, config.dtype)
        )
        self.tokenizer = _tokenizer(config, self.scratch)
        n_train = config.n_steps * config.batch_rows * config.context_length
        self.train_rows = _rows(config, self.tokenizer, "train", n_train, self.scratch / "train.bin")
        self.heldout_rows = _rows(
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
                    key: saved["moments"][key][name].to(parameter.device if key != "step" else "cpu")
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
