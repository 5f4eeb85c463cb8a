"""The verb that trains a dictionary. Takes any source of activations; knows nothing about language models
beyond handing their names on (training straight from one is set up in `source.py`).

    source -> batch * scale -> dictionary.loss -> optimiser -> dictionary.after_step

Killed at any moment and started again, it goes on from its last checkpoint with the same bits.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sememe import artifact, dictionaries, kernels
from sememe.checkpoint import load_checkpoint, save_checkpoint
from sememe.config import Config
from sememe.dictionaries import Architecture, Dictionary, Trainable
from sememe.dictionaries.topk import TopKConfig
from sememe.errors import ActivationError, ConfigError, MismatchError
from sememe.interrupt import stop_requests
from sememe.lm import ModelConfig
from sememe.optimiser import Adam
from sememe.progress import Progress, track
from sememe.source import LiveSource, Source, StoreSource
from sememe.store import open_store
from sememe.text import TextConfig, TokenPolicy, fetch
from sememe.text import fingerprint as text_fingerprint
from sememe.tracking import Log, Tracker

__all__ = ["TrainConfig", "learning_rate", "train"]

VERSION = 1
LOG = "metrics.jsonl"
N_SAMPLE_ROWS = 8192
"""Rows that set the scale and the biases: enough for a stable mean at any width met here."""


class TrainConfig(Config):
    """What to train, on what, and for how long."""

    not_identity: ClassVar[frozenset[str]] = frozenset(
        {"store", "out", "checkpoint_every_seconds", "track", "log_every", "threads"}
    )

    store: Path = Path("artifacts/store")
    """The store to train on."""
    out: Path = Path("artifacts/dictionary")
    """The folder to make."""
    architecture: Architecture = TopKConfig()
    """Which dictionary, with its options."""
    inputs: tuple[str, ...] | None = None
    """Hookpoints whose concatenation is encoded; the store's only one if not given."""
    outputs: tuple[str, ...] | None = None
    """Hookpoints whose concatenation is reconstructed; the inputs if not given (an autoencoder)."""
    n_tokens: int | None = Field(default=None, ge=1)
    """Rows to train on; `epochs` passes over the store if not given."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the store; 1 if n_tokens is not given either."""
    batch_size: int = Field(default=2048, ge=1)
    """Rows per step."""
    lr: float | None = Field(default=None, gt=0)
    """Learning rate; 1.2e-3 / sqrt(d_sae / 4096) if not given."""
    warmup: float = Field(default=0.05, ge=0, le=1)
    """Share of the run over which the learning rate rises from 0."""
    decay: float = Field(default=0.3, ge=0, le=1)
    """Share of the run, at its end, over which the learning rate falls to 0."""
    scale: bool = True
    """Divide activations by their root mean square distance from the mean while training; folded back after."""
    seed: int = 0
    """Of the initial weights and the data's order."""
    log_every: int = Field(default=50, ge=1)
    """Steps between lines of metrics.jsonl."""
    checkpoint_every_seconds: float = Field(default=60.0, ge=0)
    """Wall-clock time between checkpoints."""
    track: tuple[Tracker, ...] = ()
    """Trackers that get the metrics too: tensorboard, wandb, trackio."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; all cores if not given."""
    live: bool = False
    """Train straight from the language model, through a shuffle buffer in memory, instead of from a store."""
    buffer_mb: int = Field(default=512, ge=1)
    """Memory of the shuffle buffer of a live run."""
    batch_rows: int = Field(default=16, ge=1)
    """Contexts per forward of a live run."""
    model: ModelConfig = ModelConfig()
    """The language model of a live run."""
    text: TextConfig = TextConfig()
    """The corpus of a live run."""
    policy: TokenPolicy = TokenPolicy()
    """Which positions a live run keeps."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if self.n_tokens is not None and self.epochs is not None:
            raise ConfigError(
                "n_tokens and epochs both say how long to train: only one may be given",
                f"{self.n_tokens} and {self.epochs:g}",
                "Drop one of them.",
            )
        if self.warmup + self.decay > 1:
            raise ConfigError(
                "warmup + decay must be <= 1", f"{self.warmup:g} + {self.decay:g}", "Lower one of them."
            )
        return self

    @model_validator(mode="after")
    def _no_inert_option(self) -> TrainConfig:
        if self.live:
            if self.store != type(self).model_fields["store"].default:
                raise ConfigError(
                    "store must be left out when live",
                    self.store,
                    "A live run reads the model itself; drop one.",
                )
            if self.n_tokens is None:
                raise ConfigError(
                    "n_tokens must be given when live",
                    "nothing",
                    "A live stream has no end: pass --n-tokens.",
                )
            if self.inputs is None:
                raise ConfigError(
                    "inputs must be given when live", "nothing", "Name a hookpoint: --inputs resid_post.8."
                )
        else:
            for name in ("buffer_mb", "batch_rows", "model", "text", "policy"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ConfigError(
                        f"{name} must be left out unless live is set",
                        getattr(self, name),
                        "A store brings its own; drop it.",
                    )
        return self


def learning_rate(config: TrainConfig, d_sae: int) -> float:
    """The peak learning rate. Source: the 1/sqrt(width) rule of Gao et al. 2024, appendix A.3."""
    return config.lr if config.lr is not None else 1.2e-3 / math.sqrt(d_sae / 4096)


class _Plan(NamedTuple):
    """What follows from the config and the source."""

    n_steps: int
    lr: float
    resample_steps: tuple[int, ...]
    rewarmup_steps: int

    def rate(self, step: int, config: TrainConfig, since_resample: int | None) -> float:
        """The learning rate of a step (counted from 0)."""
        rise = min(1.0, (step + 1) / max(1.0, config.warmup * self.n_steps))
        fall = min(1.0, (self.n_steps - step) / max(1.0, config.decay * self.n_steps))
        again = 1.0
        if since_resample is not None and self.rewarmup_steps:
            again = min(1.0, (since_resample + 1) / self.rewarmup_steps)
        return self.lr * min(rise, fall) * again


def _plan(config: TrainConfig, dictionary: Trainable, source: Source) -> _Plan:
    n_tokens = config.n_tokens
    if n_tokens is None:
        if source.n_rows is None:
            raise ConfigError(
                "n_tokens must be given for a stream without an end", "nothing", "Pass --n-tokens."
            )
        n_tokens = int((config.epochs or 1.0) * source.n_rows)
    n_steps = max(1, n_tokens // config.batch_size)
    resampling = dictionary.resampling()
    at = () if resampling is None else tuple(int(share * n_steps) for share in resampling.at)
    return _Plan(
        n_steps, learning_rate(config, dictionary.d_sae), at, resampling.rewarmup_steps if resampling else 0
    )


def train(
    config: TrainConfig,
    *,
    source: Source | None = None,
    parents: dict[str, str] | None = None,
    extra: dict[str, Any] | None = None,
    fresh: bool = False,
) -> Dictionary:
    """Train a dictionary, or open it if it is there.

    Args:
        config: What, on what, for how long.
        source: Where activations come from; the store at config.store if not given.
        parents: Fingerprints of what the source is made from; the store's if the source is not given.
        extra: More to remember in the dictionary's meta.json (the token policy, for a live source).
        fresh: Replace whatever stands at config.out.

    Returns:
        The finished dictionary, folded: it takes and gives raw activations.

    Raises:
        ConfigError: an option is out of range for this source.
        ActivationError: the loss is NaN or infinite; the last good checkpoint is kept.
        MismatchError: another dictionary, or a checkpoint of another set-up, stands at config.out.
    """
    if source is None and config.live:
        return _train(config, *_live(config, extra or {}), fresh)
    if source is None:
        return _train(config, *_stored(config, extra or {}), fresh)
    return _train(config, source, parents or {}, extra or {}, fresh)


def _train(
    config: TrainConfig, source: Source, parents: dict[str, str], extra: dict[str, Any], fresh: bool
) -> Dictionary:
    identity = artifact.identity_of("dictionary", VERSION, config, parents)
    if not fresh and artifact.find(config.out, "dictionary", identity):
        return dictionaries.load(config.out)
    dictionary = dictionaries.build(config.architecture, source.d_in, source.d_out, source.sites)
    with (
        kernels.threads(config.threads) as threads,
        artifact.building(
            config.out,
            kind="dictionary",
            version=VERSION,
            config=config,
            parents=parents,
            resumable=True,
            fresh=fresh,
            leave_out=("checkpoint.tmp", "checkpoint-*.safetensors"),
        ) as work,
    ):
        _Run(config, dictionary, source, work, threads).go()
        probe_rows = source.sample(16).x
        work.extra = extra | dictionary.write(work.path, probe_rows) | _summary(dictionary, source)
    return dictionaries.load(config.out)


def _stored(config: TrainConfig, extra: dict[str, Any]) -> tuple[Source, dict[str, str], dict[str, Any]]:
    """A store as a source, and what it is made from."""
    store = open_store(config.store)
    source = StoreSource(store, config.inputs, config.outputs, config.seed)
    about = {"policy": store.info.policy.resolved(), "store": store.info.resolved()}
    return source, {"store": store.fingerprint}, about | extra


def _live(config: TrainConfig, extra: dict[str, Any]) -> tuple[Source, dict[str, str], dict[str, Any]]:
    """A live source and what it is made from. The only path here that loads a language model."""
    from sememe import lm as language_models

    assert config.inputs is not None
    fetch(config.text)
    lm = language_models.load(config.model)
    source = LiveSource(
        lm,
        config.text,
        config.policy,
        config.inputs,
        config.outputs,
        seed=config.seed,
        buffer_mb=config.buffer_mb,
        batch_rows=config.batch_rows,
    )
    parents = {"model": lm.fingerprint, "text": text_fingerprint(config.text)}
    return source, parents, extra | {"policy": config.policy.resolved()}


def _summary(dictionary: Trainable, source: Source) -> dict[str, Any]:
    horizon = source.n_rows
    silent = dictionary.tokens_since_fired
    alive = None if horizon is None else float((silent < horizon).float().mean())
    return {"training": {"frac_alive_last_pass": alive, "scale_in": float(dictionary.scale_in)}}


class _Run:
    """One training run between its checkpoints."""

    def __init__(
        self, config: TrainConfig, dictionary: Trainable, source: Source, work: artifact.Work, threads: int
    ) -> None:
        self.config, self.dictionary, self.source, self.work = config, dictionary, source, work
        self.threads = threads
        self.generator = torch.Generator().manual_seed(config.seed)
        self.plan = _plan(config, dictionary, source)
        self.step = 0
        self.resampled_at: int | None = None
        self.seconds_before = 0.0
        self.started = time.monotonic()
        self.optimiser = Adam(dictionary)
        saved = load_checkpoint(work.path)
        if saved is None:
            self._initialise()
        else:
            self._restore(saved)

    def _initialise(self) -> None:
        sample = self.source.sample(N_SAMPLE_ROWS)
        if not bool(torch.isfinite(sample.x).all() and torch.isfinite(sample.target).all()):
            raise ActivationError(
                "activations must be finite", "NaN or infinity in the sample", "Check the source."
            )
        if self.config.scale:
            self.dictionary.scale_in.fill_(_scale(sample.x))
            self.dictionary.scale_out.fill_(_scale(sample.target))
        x, target = self._scaled(sample.x, sample.target)
        self.dictionary.initialise(x, target, self.generator)

    def _scaled(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        scaled = x * self.dictionary.scale_in
        return scaled, scaled if target is x else target * self.dictionary.scale_out

    # -- state -------------------------------------------------------------------------------------

    def _setting(self) -> dict[str, Any]:
        """What the bits depend on besides the state."""
        parameter = next(self.dictionary.parameters())
        return {"threads": self.threads, "kernels": kernels.path_for(parameter), "torch": torch.__version__}

    def _state(self) -> dict[str, Any]:
        return {
            "weights": self.dictionary.state_dict(),
            "training": self.dictionary.training_buffers(),
            "optimiser": self.optimiser.state_dict(),
            "source": self.source.state_dict(),
            "run": {
                "step": self.step,
                "generator": self.generator.get_state(),
                "resampled_at": self.resampled_at,
                "seconds": self.seconds_before + time.monotonic() - self.started,
            },
            "setting": self._setting(),
        }

    def _restore(self, saved: dict[str, Any]) -> None:
        if saved["setting"] != self._setting():
            raise MismatchError(
                f"a checkpoint must go on with the threads, kernels and torch it was made with ({saved['setting']})",
                str(self._setting()),
                "Set them as they were (--threads), or pass --fresh to start again.",
            )
        self.dictionary.load_state_dict(saved["weights"])
        for name, buffer in self.dictionary.training_buffers().items():
            buffer.copy_(saved["training"][name])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.source.load_state_dict(saved["source"])
        self.generator.set_state(saved["run"]["generator"])
        self.step, self.resampled_at = saved["run"]["step"], saved["run"]["resampled_at"]
        self.seconds_before = saved["run"]["seconds"]

    # -- the loop ----------------------------------------------------------------------------------

    def go(self) -> None:
        """Train to the end; checkpoints by wall clock, and once more when interrupted."""
        config, plan = self.config, self.plan
        log = Log(
            self.work.path / LOG,
            config.track,
            name=config.out.name,
            config=config.resolved(),
            resume_step=self.step if self.step else None,
        )
        description = f"train {self.dictionary.kind}"
        n_rows = plan.n_steps * config.batch_size
        with (
            log,
            track(description, n_rows, "rows", done=self.step * config.batch_size) as progress,
            stop_requests() as stop,
        ):
            saved_at = time.monotonic()
            while self.step < plan.n_steps:
                logging = (self.step + 1) % config.log_every == 0 or self.step + 1 == plan.n_steps
                self._one_step(log if logging else None, progress)
                progress.advance(config.batch_size)
                if stop.is_set() or time.monotonic() - saved_at >= config.checkpoint_every_seconds:
                    self._check_weights()
                    save_checkpoint(self.work.path, self.step, self._state())
                    saved_at = time.monotonic()
                    if stop.is_set():
                        raise KeyboardInterrupt
        self._check_weights()

    def _one_step(self, log: Log | None, progress: Progress) -> None:
        config, plan, dictionary = self.config, self.plan, self.dictionary
        if self.step in plan.resample_steps and self.step > 0 and self.resampled_at != self.step:
            self._resample(log)
        batch = self.source.next_batch(config.batch_size)
        x, target = self._scaled(batch.x, batch.target)
        dictionary.train()
        loss = dictionary.loss(x, target, self.step / plan.n_steps)
        loss.total.backward()  # type: ignore[no-untyped-call]
        since = None if self.resampled_at is None else self.step - self.resampled_at
        lr = plan.rate(self.step, config, since)
        self.optimiser.step(lr)
        dictionary.after_step(loss.encoded)
        self.step += 1
        if log is not None:
            values = {name: float(term) for name, term in loss.terms.items()}
            total = float(loss.total.detach())
            if not math.isfinite(total):
                raise ActivationError(
                    f"the loss must be finite at step {self.step}",
                    total,
                    "Lower --lr; the last checkpoint is kept.",
                )
            variance = float((target - target.mean(0)).square().mean())
            values |= {
                "loss": total,
                "fvu": values["mse"] / max(variance, 1e-12),
                "l0": float(loss.encoded.l0().float().mean()),
                "frac_silent": float((dictionary.tokens_since_fired > 100_000).float().mean()),
                "lr": lr,
                "tokens": self.step * config.batch_size,
                "seconds": self.seconds_before + time.monotonic() - self.started,
            }
            log.write(self.step, values)
            progress.note = f"fvu {values['fvu']:.3f}  l0 {values['l0']:.0f}"

    def _check_weights(self) -> None:
        """A checkpoint or a dictionary with NaN in it is never written."""
        for name, parameter in self.dictionary.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise ActivationError(
                    f"{name} must be finite at step {self.step}",
                    "NaN or infinity",
                    "Lower --lr; the last checkpoint is kept.",
                )

    @torch.no_grad()
    def _resample(self, log: Log | None) -> None:
        """Point silent latents at rows drawn in proportion to their squared loss.

        Source: Bricken et al. 2023, appendix "Neuron Resampling". Differs: on 8 batches instead of 819,200 rows.
        """
        resampling = self.dictionary.resampling()
        assert resampling is not None
        self.resampled_at = self.step
        ids = torch.nonzero(self.dictionary.tokens_since_fired > resampling.after_tokens).view(-1)
        if ids.numel() == 0:
            return
        rows, losses = [], []
        for _ in range(8):
            batch = self.source.next_batch(self.config.batch_size)
            x, target = self._scaled(batch.x, batch.target)
            encoded = self.dictionary.encode(x)
            losses.append((target - self.dictionary.decode(encoded, x)).square().sum(1))
            rows.append(target)
        weights = torch.cat(losses).square()
        ids = ids[: weights.shape[0]]
        picked = torch.multinomial(weights, ids.shape[0], replacement=False, generator=self.generator)
        centre = getattr(self.dictionary, "b_dec", 0.0)
        self.dictionary.reset_latents(ids, torch.cat(rows)[picked] - centre)
        self.optimiser.forget(ids)


def _scale(x: Tensor) -> float:
    """What makes the mean square distance from the mean, per feature, equal 1: then mse is nearly fvu."""
    spread = float((x - x.mean(0)).square().mean().sqrt())
    return 1.0 / spread if spread > 0 else 1.0
