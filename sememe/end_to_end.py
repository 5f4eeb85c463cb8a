"""Training against the model's output: whole contexts as batches, and the loss of the spliced model.

Knows a language model through `lm` and `splice`, and a dictionary through its contract; knows no trainer. A trainer
is handed the source and the objective, and needs no language model itself.

    context -> unedited forward -> x at kept positions -> dictionary -> recon spliced in -> layers above -> KL or CE

Source: Braun, Taylor, Goldowsky-Dill & Sharkey 2024, arXiv:2405.12241. Differs: any architecture and topology; the
policy's positions only; downstream errors are divided by the variance of what they miss, and averaged.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int32
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from sememe.capture import first_norms, heldout_rows, sites_along
from sememe.config import Config
from sememe.dictionaries.base import Batch, Loss, Sites, Trainable
from sememe.errors import ActivationError, ConfigError, HookpointError, TextError
from sememe.recompute import recomputed
from sememe.splice import BaseRun, Splicer
from sememe.text import Split, TextConfig, TokenPolicy, token_blocks

if TYPE_CHECKING:
    from sememe.lm import LanguageModel

__all__ = ["ContextBatch", "ContextSource", "EndToEnd", "EndToEndConfig"]

LOGIT_ROWS = 256
"""Predictions whose logits are held at once; they are computed again on the way back."""
NORM_ROWS = 16
"""Contexts per forward while norms are measured, or held-out rows read."""


class EndToEndConfig(Config):
    """What a dictionary is trained for besides its own objective."""

    objective: Literal["local", "kl", "ce"] = "local"
    """local: the dictionary's own loss. kl: the divergence of the spliced model's predictions from the model's own,
    in the place of the squared error; ce: the spliced model's cross-entropy. The last two need a live run."""
    local_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the dictionary's own squared error beside kl or ce."""
    downstream: tuple[str, ...] = ()
    """Later hookpoints at which the spliced model's activations shall stay what they were."""
    downstream_coefficient: float = Field(default=1.0, gt=0)
    """Weight of the mean over those hookpoints of squared error / variance."""

    @model_validator(mode="after")
    def _no_inert_option(self) -> Self:
        fields = type(self).model_fields
        names: tuple[str, ...] = () if self.downstream else ("downstream_coefficient",)
        why = "downstream names no hookpoint"
        if self.objective == "local":
            names, why = ("local_coefficient", "downstream", "downstream_coefficient"), "objective is local"
        for name in names:
            if getattr(self, name) != fields[name].default:
                raise ConfigError(
                    f"{name} must be left out when {why}: it has no effect then",
                    getattr(self, name),
                    "Drop it.",
                )
        return self


class ContextBatch(Batch):
    """The kept rows of whole contexts, and the forward that they are from."""

    run: BaseRun
    """The unedited forward."""
    places: Int[Tensor, " rows"]
    """Which flat position of the contexts each row is."""

    @classmethod
    def of(cls, x: Tensor, target: Tensor, run: BaseRun, places: Tensor) -> Self:
        """Rows with what they are from."""
        batch = cls(x, target)
        batch.run, batch.places = run, places
        return batch

    def of_rows(self, x: Tensor, target: Tensor) -> Self:
        """The same rows elsewhere; what they are from stays where the language model is."""
        return self.of(x, target, self.run, self.places)


class _Context(NamedTuple):
    """One row of tokens, which of its positions the policy keeps, and which are not padding."""

    ids: Int32[np.ndarray, " ctx"]
    keep: Bool[np.ndarray, " ctx"]
    attention_mask: Bool[np.ndarray, " ctx"]


class ContextSource:
    """Batches of whole contexts straight from a language model.

    A batch of n rows asked for is n / context_length contexts, at least one; it holds those of their positions that
    the policy keeps, so somewhat fewer than n. Contexts come in the text's own shuffled order.

    Args:
        lm: The language model.
        splicer: Reads what is needed and runs the unedited forward.
        text: The corpus.
        policy: Which positions are kept.
        inputs: Hookpoints whose concatenation is x.
        outputs: Hookpoints whose concatenation is the target; the inputs if not given.
        split: Which documents.
        max_norms: Largest norm kept, per hookpoint; measured on the first contexts if not given.
    """

    n_rows: int | None = None

    def __init__(
        self,
        lm: LanguageModel,
        splicer: Splicer,
        text: TextConfig,
        policy: TokenPolicy,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...] | None = None,
        *,
        split: Split = "train",
        max_norms: dict[str, float | None] | None = None,
    ) -> None:
        self.lm, self.splicer, self.text, self.policy, self.split = lm, splicer, text, policy, split
        self.inputs, self.outputs = lm.expand(inputs), lm.expand(outputs or inputs)
        names = tuple(dict.fromkeys((*self.inputs, *self.outputs)))
        if max_norms is None:
            medians = first_norms(lm, text, policy, names, NORM_ROWS, split)
            ratio = policy.max_norm_ratio
            max_norms = {name: None if ratio is None else ratio * median for name, median in medians.items()}
        self.max_norms = max_norms
        self.sites = Sites(
            inputs=sites_along(lm, self.inputs, self.max_norms),
            outputs=sites_along(lm, self.outputs, self.max_norms),
        )
        self.d_in, self.d_out = self.sites.inputs[-1].stop, self.sites.outputs[-1].stop
        self._contexts: Iterator[_Context] | None = None
        self._n_read = 0  # contexts, in this pass over the text

    def hold_out(self, n: int) -> Batch:
        """The first rows of the documents that are held out of the stream's split, as a live run's.

        Raises:
            ConfigError, TextError: there are none, as `heldout_rows` says.
        """
        names = tuple(self.max_norms)
        rows = heldout_rows(self.lm, self.text, self.policy, names, n, NORM_ROWS, self.max_norms, self.split)
        x, target = (
            torch.cat([rows[name] for name in some], dim=1).float() for some in (self.inputs, self.outputs)
        )
        return Batch(x, x if self.inputs == self.outputs else target)

    def _read(self) -> Iterator[_Context]:
        """The text's contexts from the first on."""
        blocks = token_blocks(self.text, self.lm.tokenizer, self.policy, split=self.split, n_tokens=None)
        for block in blocks:
            for row in range(block.ids.shape[0]):
                yield _Context(block.ids[row], block.keep[row], block.attention_mask[row])

    def next_batch(self, n: int) -> ContextBatch:
        """The next contexts; the text starts over when it ends."""
        wanted: list[_Context] = []
        while len(wanted) < max(1, n // self.policy.context_length):
            if self._contexts is None:
                self._contexts = itertools.islice(self._read(), self._n_read, None)
            context = next(self._contexts, None)
            if context is not None:
                self._n_read += 1
                wanted.append(context)
            elif self._n_read == 0:
                raise TextError("the text must hold at least one context", "none", "Give more text.")
            else:
                self._n_read, self._contexts = 0, None
        return self._forward(wanted)

    @torch.no_grad()
    def _forward(self, contexts: list[_Context]) -> ContextBatch:
        """Not in inference mode: what is recorded takes part in the spliced forward's graph."""
        tokens, kept, attention = (np.stack(parts) for parts in zip(*contexts, strict=True))
        ids = torch.from_numpy(tokens).to(self.lm.device, torch.int64)
        mask = None if attention.all() else torch.from_numpy(attention).to(ids.device)
        run = self.splicer.base(ids, mask)
        keep = torch.from_numpy((kept & attention).reshape(-1)).to(ids.device)
        for name, limit in self.max_norms.items():
            rows = run.activations[name].flatten(0, 1)
            norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).to(keep.device)
            if not bool(torch.isfinite(norms[keep]).all()):
                raise ActivationError(
                    f"activations at {name} must be finite",
                    "NaN or infinity",
                    "Load the model in bfloat16 or float32 (--dtype), or check its weights.",
                )
            if limit is not None:
                keep &= norms <= limit
        places = torch.nonzero(keep).view(-1)

        def join(names: tuple[str, ...]) -> Tensor:
            parts = [run.activations[name].flatten(0, 1) for name in names]
            return torch.cat([part[places.to(part.device)].float().to(ids.device) for part in parts], dim=1)

        x = join(self.inputs)
        return ContextBatch.of(x, x if self.inputs == self.outputs else join(self.outputs), run, places)

    def sample(self, n: int) -> Batch:
        """Rows of the text's first contexts."""
        contexts = self._read()
        parts: list[ContextBatch] = []
        while sum(part.x.shape[0] for part in parts) < n:
            some = list(itertools.islice(contexts, NORM_ROWS))
            if not some:
                break
            parts.append(self._forward(some))
        x = torch.cat([part.x for part in parts])[:n].cpu()
        if self.inputs == self.outputs:
            return Batch(x, x)
        return Batch(x, torch.cat([part.target for part in parts])[:n].cpu())

    def state_dict(self) -> dict[str, Any]:
        """How many contexts of this pass over the text were read."""
        return {"n_read": self._n_read}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there: the text is read again up to that context (tokenising only)."""
        self._n_read, self._contexts = state["n_read"], None


class EndToEnd:
    """The loss of the model with the reconstruction spliced in, and of the dictionary's own all but the squared error.

    Args:
        config: Which output loss, and what else counts.
        lm: The language model; its parameters are frozen here.
        inputs: Hookpoints that the dictionary reads.
        outputs: Hookpoints that it writes.

    Raises:
        HookpointError: a downstream hookpoint is one that the dictionary writes.
    """

    def __init__(
        self, config: EndToEndConfig, lm: LanguageModel, inputs: tuple[str, ...], outputs: tuple[str, ...]
    ) -> None:
        self.config, self.lm = config, lm
        self.downstream = lm.expand(config.downstream) if config.downstream else ()
        for name in lm.expand(outputs):
            if name in self.downstream:
                raise HookpointError(
                    "a downstream hookpoint must lie above what the dictionary writes",
                    repr(name),
                    "Set local_coefficient for the error there, and name later hookpoints.",
                )
        lm.hf.requires_grad_(False)
        self.splicer = Splicer(lm, (*inputs, *self.downstream), outputs)

    def source(
        self,
        text: TextConfig,
        policy: TokenPolicy,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...] | None = None,
        **options: Any,
    ) -> ContextSource:
        """The contexts that this objective needs, see `ContextSource`."""
        return ContextSource(self.lm, self.splicer, text, policy, inputs, outputs, **options)

    def __call__(
        self,
        dictionary: Trainable,
        batch: Batch,
        x: Float[Tensor, "batch d_in"],
        target: Float[Tensor, "batch d_out"],
        progress: float,
    ) -> Loss:
        """The loss, its terms `kl` or `ce` in nats per prediction, and the dictionary's own terms.

        Args:
            dictionary: In training units.
            batch: Of a `ContextSource`, in raw units.
            x: The same inputs in training units.
            target: The same targets in training units.
            progress: From 0 to 1 over the run.

        Raises:
            ConfigError: the architecture gives no reconstruction to splice.
        """
        assert isinstance(batch, ContextBatch), "end-to-end training needs whole contexts"
        loss = dictionary.loss(x, target, progress)
        if loss.error is None:
            raise ConfigError(
                "an architecture must give its reconstruction to be trained end to end",
                dictionary.kind,
                "Train it with --objective local.",
            )
        found: dict[str, Tensor] = {}
        with self._recording(found):
            hidden = self.splicer.spliced(batch.run, self._replaced(dictionary, batch, target + loss.error))
        output = self._output_loss(batch, hidden).to(x.device)
        mse = loss.error.square().mean()
        # all that the dictionary's own objective adds to its squared error: penalties, auxiliary losses
        total = output + (loss.total - mse) + self.config.local_coefficient * mse
        terms = loss.terms | {self.config.objective: output.detach()}
        if self.downstream:
            missed = self._downstream_loss(batch, found)
            total = total + self.config.downstream_coefficient * missed
            terms["downstream"] = missed.detach()
        return Loss(total, terms, loss.encoded, loss.error)

    def _replaced(
        self, dictionary: Trainable, batch: ContextBatch, recon: Float[Tensor, "rows d_out"]
    ) -> dict[str, Float[Tensor, "batch seq d"]]:
        """Each output with the reconstruction at kept positions; other positions keep their own activation."""
        assert dictionary.sites is not None
        raw = recon / dictionary.scale_out  # each part goes to its layer's device
        out = {}
        for site in dictionary.sites.outputs:
            old = batch.run.activations[site.hookpoint]
            part = raw[:, site.start : site.stop].to(old.device, old.dtype)
            flat = old.flatten(0, 1).index_copy(0, batch.places.to(old.device), part)
            out[site.hookpoint] = flat.view(old.shape)
        return out

    @contextlib.contextmanager
    def _recording(self, found: dict[str, Tensor]) -> Iterator[None]:
        """Keep the downstream activations of the forward inside the context."""

        def keeping(name: str) -> Any:
            def keep(x: Tensor) -> Tensor:
                found.setdefault(name, x.clone())  # some models add to these tensors in place
                return x

            return keep

        with self.lm.edit({name: keeping(name) for name in self.downstream}):
            yield

    def _downstream_loss(self, batch: ContextBatch, found: dict[str, Tensor]) -> Float[Tensor, ""]:
        missing = [name for name in self.downstream if name not in found]
        if missing:
            raise HookpointError(
                "a downstream hookpoint must lie above what the dictionary writes",
                ", ".join(missing),
                "Name later hookpoints.",
            )
        losses = []
        for name in self.downstream:
            old = batch.run.activations[name].flatten(0, 1)
            places = batch.places.to(old.device)
            rows, new = old[places].float(), found[name].flatten(0, 1)[places].float()
            variance = (rows - rows.mean(0)).square().mean().clamp_min(1e-12)
            losses.append(((rows - new).square().mean() / variance).to(batch.x.device))
        return torch.stack(losses).mean()

    def _output_loss(
        self, batch: ContextBatch, hidden: Float[Tensor, "batch seq d_model"]
    ) -> Float[Tensor, ""]:
        """The mean over predictions made from kept positions, a few at a time: logits are never held whole."""
        ids, mask = batch.run.ids, batch.run.mask
        followed = torch.zeros_like(ids, dtype=torch.bool)
        followed[:, :-1] = True if mask is None else mask[:, 1:]
        predicting = batch.places[followed.view(-1)[batch.places]]
        if predicting.numel() == 0:
            raise TextError(
                "a batch must hold predictions from kept positions",
                "none",
                "Raise batch_size, or keep more positions.",
            )
        targets = ids.reshape(-1)[predicting + 1]
        spliced, base = hidden.flatten(0, 1), batch.run.hidden.flatten(0, 1)
        sums = []
        for start in range(0, predicting.shape[0], LOGIT_ROWS):
            part = slice(start, start + LOGIT_ROWS)
            where = predicting[part].to(spliced.device)
            sums.append(recomputed(self._sum, spliced[where], base[where], targets[part]))
        return torch.stack(sums).sum() / predicting.shape[0]

    def _sum(self, spliced: Tensor, base: Tensor, targets: Tensor) -> Float[Tensor, ""]:
        new = self.lm.logits(spliced).float()
        if self.config.objective == "ce":
            return cross_entropy(new, targets.to(new.device), reduction="sum").to(targets.device)
        with torch.no_grad():
            old = self.lm.logits(base).float().log_softmax(-1)
        return kl_div(new.log_softmax(-1), old, reduction="sum", log_target=True).to(targets.device)
