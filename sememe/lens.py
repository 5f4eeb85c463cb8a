"""The verb that trains a tuned lens: for each layer a map to where the last layer would put the residual stream.

Knows models and text. Trained on the divergence of what the lens says from what the model says; measured on held-out
documents beside the logit lens.

Source: Belrose et al. 2023, arXiv:2303.08112. Differs: Adam with a linear decay instead of SGD with momentum; token
rows, and positions left out, are those of the token policy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from sememe import artifact, metrics
from sememe import lm as language_models
from sememe.checkpoint import load_checkpoint, save_checkpoint
from sememe.config import Config
from sememe.errors import ActivationError, ConfigError, HookpointError, TextError
from sememe.interrupt import stop_requests
from sememe.lm import LanguageModel, ModelConfig
from sememe.progress import Progress, track
from sememe.text import Split, TextConfig, TokenBlock, TokenPolicy, fetch, fingerprint, token_blocks
from sememe.tuned import Lens, Translator, open_lens, read_out

__all__ = ["LensConfig", "lens"]

VERSION = 1
CHECKPOINTS = "checkpoint-*"


class LensConfig(Config):
    """Which layers of which model, on which text."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"out", "checkpoint_seconds"})

    out: Path = Path("artifacts/lens")
    """The folder to make."""
    model: ModelConfig = ModelConfig()
    """The language model."""
    layers: tuple[int, ...] | None = None
    """Layers whose output is read; all but the last, if not given. Each costs about an unembedding and its gradient."""
    text: TextConfig = TextConfig()
    """The corpus: trained on its training documents, measured on those held out."""
    policy: TokenPolicy = TokenPolicy()
    """How text becomes token rows, and which positions count."""
    n_tokens: int = Field(default=100_000, ge=1)
    """Tokens trained on."""
    n_heldout_tokens: int = Field(default=16_384, ge=1)
    """Tokens measured on."""
    batch_rows: int = Field(default=8, ge=1)
    """Contexts per step."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Of Adam, at the start; it falls linearly to 0."""
    n_bootstrap: int = Field(default=1000, ge=0)
    """Draws of documents for the 95% intervals."""
    seed: int = Field(default=0, ge=0)
    """Of the bootstrap."""
    checkpoint_seconds: float = Field(default=60.0, ge=0)
    """How often the state is saved."""


class _Batch(NamedTuple):
    """Token rows, the residual stream after each layer, and what the model says."""

    ids: Int[Tensor, "rows ctx"]
    residual: dict[int, Float[Tensor, "rows ctx d"]]
    log_probs: Float[Tensor, "n vocab"]
    """At the kept positions."""
    keep: Bool[Tensor, "rows ctx"]


def lens(config: LensConfig, *, lm: LanguageModel | None = None, fresh: bool = False) -> Lens:
    """Train a tuned lens, or open it if it is there.

    Args:
        config: Which layers, on which text.
        lm: The model, if it is loaded already.
        fresh: Replace whatever stands at config.out.

    Raises:
        ConfigError: the corpus holds no documents out.
        HookpointError: the model has no such layer, or it is the last, which needs no lens.
        TextError: the text is shorter than one context.
        ActivationError: the loss is NaN or infinite.
        KeyboardInterrupt: interrupted; the same call goes on.
    """
    if config.text.heldout_fraction == 0:
        raise ConfigError("a lens is measured on held-out documents", "heldout_fraction 0", "Raise it.")
    fetch(config.text)
    model_print = lm.fingerprint if lm is not None else language_models.fingerprint_of(config.model)
    parents = {"model": model_print, "text": fingerprint(config.text)}
    identity = artifact.identity_of("lens", VERSION, config, parents)
    if not fresh and artifact.find(config.out, "lens", identity, config, parents):
        return open_lens(config.out, lm if lm is not None else language_models.load(config.model))
    lm = lm if lm is not None else language_models.load(config.model)
    layers = _layers(config, lm)
    with artifact.building(
        config.out, kind="lens", version=VERSION, config=config, parents=parents, resumable=True, fresh=fresh,
        leave_out=(CHECKPOINTS, "checkpoint.tmp"),
    ) as work:  # fmt: skip
        run = _Training(config, lm, layers, work.path)
        run.run()
        made = run.lens()
        made.save(work.path)
        work.extra = {"model": lm.name, "layers": list(layers), "measured": measure(config, lm, made)}
    return open_lens(config.out, lm)


def _layers(config: LensConfig, lm: LanguageModel) -> tuple[int, ...]:
    layers = config.layers if config.layers is not None else tuple(range(lm.n_layers - 1))
    for layer in layers:
        if not 0 <= layer < lm.n_layers - 1:
            raise HookpointError(
                f"a lens reads the output of a layer in [0, {lm.n_layers - 2}] of {lm.name}: the last needs none",
                layer,
                "Leave it out.",
            )
    return tuple(dict.fromkeys(layers))


class _Training:
    """Translators and their optimiser."""

    def __init__(self, config: LensConfig, lm: LanguageModel, layers: tuple[int, ...], folder: Path) -> None:
        self.config, self.lm, self.layers, self.folder = config, lm, layers, folder
        d = lm.d_model
        self.A = {layer: torch.zeros(d, d, device=lm.device, requires_grad=True) for layer in layers}
        self.b = {layer: torch.zeros(d, device=lm.device, requires_grad=True) for layer in layers}
        self.optimiser = torch.optim.Adam([*self.A.values(), *self.b.values()], lr=config.learning_rate)
        self.n_rows = self.n_read = 0

    def lens(self) -> Lens:
        """What there is by now."""
        return Lens(
            {layer: Translator(self.A[layer].detach(), self.b[layer].detach()) for layer in self.layers}
        )

    def run(self) -> None:
        """Train to the end, from the last checkpoint if there is one."""
        self._restore()
        config = self.config
        next_save = time.monotonic() + config.checkpoint_seconds
        with (
            stop_requests() as stop,
            track("tuned lens", config.n_tokens, "tokens", done=self.n_read) as progress,
        ):
            for part in _parts(config, self.lm, "train", config.n_tokens, self.n_rows):
                self._step(part, progress)
                if stop.is_set() or time.monotonic() >= next_save:
                    self._save()
                    next_save = time.monotonic() + config.checkpoint_seconds
                if stop.is_set():
                    raise KeyboardInterrupt
        if self.n_rows == 0:
            raise TextError("the text must fill a context", "less", "Give more text.")

    def _step(self, part: TokenBlock, progress: Progress) -> None:
        batch = _batch(self.lm, part, self.layers)
        left = max(0.0, 1 - self.n_read / self.config.n_tokens)
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.learning_rate * left
        self.optimiser.zero_grad(set_to_none=True)
        worst = 0.0
        for layer in self.layers:  # one after the other: a layer's logits are as large as everything else
            h = batch.residual[layer].float()
            moved = h + h @ self.A[layer] + self.b[layer]
            logits = read_out(self.lm, moved.to(self.lm.dtype), batch.ids)[batch.keep].float()
            says = torch.log_softmax(logits, -1)
            kl = torch.nn.functional.kl_div(says, batch.log_probs, log_target=True, reduction="batchmean")
            size = float(kl.detach())
            if not math.isfinite(size):
                raise ActivationError(
                    "the lens's divergence from the model must be finite",
                    f"{size:g} at layer {layer} after {self.n_read:,} tokens",
                    "Lower learning_rate, or load the model in float32 (--dtype).",
                )
            kl.backward()  # type: ignore[no-untyped-call]
            worst = max(worst, size)
        self.optimiser.step()
        n_tokens = int(part.attention_mask.sum())
        self.n_rows += part.ids.shape[0]
        self.n_read += n_tokens
        progress.note = f"largest kl {worst:.3f}"
        progress.advance(n_tokens)

    def _save(self) -> None:
        tensors = {f"A{layer}": self.A[layer] for layer in self.layers}
        tensors |= {f"b{layer}": self.b[layer] for layer in self.layers}
        moments = {
            f"{number}": {
                "exp_avg": state["exp_avg"],
                "exp_avg_sq": state["exp_avg_sq"],
                "step": state["step"],
            }
            for number, state in enumerate(self.optimiser.state.values())
        }
        counts = {"n_rows": self.n_rows, "n_read": self.n_read}
        save_checkpoint(self.folder, self.n_rows, {"weights": tensors, "adam": moments, "counts": counts})

    def _restore(self) -> None:
        found = load_checkpoint(self.folder)
        if found is None:
            return
        with torch.no_grad():
            for layer in self.layers:
                self.A[layer].copy_(found["weights"][f"A{layer}"])
                self.b[layer].copy_(found["weights"][f"b{layer}"])
        parameters = [*self.A.values(), *self.b.values()]
        for number, parameter in enumerate(parameters):
            state = found["adam"][f"{number}"]
            self.optimiser.state[parameter] = {
                name: value.to(parameter.device) if name != "step" else value for name, value in state.items()
            }
        self.n_rows, self.n_read = int(found["counts"]["n_rows"]), int(found["counts"]["n_read"])


def _parts(
    config: LensConfig, lm: LanguageModel, split: Split, n_tokens: int, skip_rows: int = 0
) -> Iterator[TokenBlock]:
    """Token rows, a step's at a time, from a row on."""
    first = 0
    for block in token_blocks(config.text, lm.tokenizer, config.policy, split=split, n_tokens=n_tokens):
        n = block.ids.shape[0]
        for start in range(max(skip_rows - first, 0), n, config.batch_rows):
            rows = slice(start, start + config.batch_rows)
            yield block._replace(**{name: getattr(block, name)[rows] for name in _ROWS})
        first += n


_ROWS = ("ids", "doc_ids", "doc_positions", "keep", "attention_mask")


@torch.no_grad()
def _batch(lm: LanguageModel, part: TokenBlock, layers: tuple[int, ...]) -> _Batch:
    ids = torch.from_numpy(part.ids).to(lm.device, torch.int64)
    mask = None if part.attention_mask.all() else torch.from_numpy(part.attention_mask).to(lm.device)
    last = lm.n_layers - 1
    found = lm.capture(ids, [f"resid_post.{layer}" for layer in (*layers, last)], mask)
    keep = torch.from_numpy(part.keep).to(lm.device)
    logits = read_out(lm, found[f"resid_post.{last}"], ids)[keep].float()
    residual = {layer: found[f"resid_post.{layer}"] for layer in layers}
    return _Batch(ids, residual, torch.log_softmax(logits, -1), keep)


@torch.no_grad()
def measure(config: LensConfig, lm: LanguageModel, made: Lens) -> dict[str, dict[str, Any]]:
    """Cross-entropy of each layer's lens and its divergence from the model, held out, beside the logit lens's.

    Intervals are 95%, over documents.
    """
    found = metrics.LanguageModelLoss()
    layers = tuple(made.translators)
    with track("measure the lens", config.n_heldout_tokens, "tokens") as progress:
        for part in _parts(config, lm, "heldout", config.n_heldout_tokens):
            ids = torch.from_numpy(part.ids)
            follows = torch.from_numpy(part.doc_ids[:, 1:] == part.doc_ids[:, :-1])
            at = torch.from_numpy(part.keep).clone()
            at[:, :-1] &= follows
            at[:, -1] = False
            part = part._replace(keep=at.numpy())
            batch = _batch(lm, part, layers)
            targets = torch.roll(ids, -1, 1)[at].to(lm.device)
            units = torch.from_numpy(part.doc_ids)[at].long()
            base = metrics.base_terms(batch.log_probs, targets)
            ce, kl = {"base": base.ce}, {"base": torch.zeros_like(base.ce)}
            for layer in layers:
                for name, residual in (
                    ("logit", batch.residual[layer]),
                    ("tuned", made.residual(batch.residual[layer].float(), layer).to(lm.dtype)),
                ):
                    logits = read_out(lm, residual, batch.ids)[batch.keep].float()
                    terms = metrics.prediction_terms(base, logits, targets)
                    ce[f"{name}.{layer}"], kl[f"{name}.{layer}"] = terms.ce, terms.kl
            found.update(units, ce, kl)
            progress.advance(int(part.attention_mask.sum()))
    out: dict[str, dict[str, Any]] = {}
    for layer in layers:
        out[str(layer)] = {}
        for name in ("tuned", "logit"):
            statistics = found.compute(f"{name}.{layer}", n_bootstrap=config.n_bootstrap, seed=config.seed)
            out[str(layer)][name] = {metric: statistics[metric].to_json() for metric in ("ce", "kl")}
    return out
