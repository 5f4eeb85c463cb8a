"""Activations of a language model replaced, and only what lies above them computed again.

What evaluation and intervention share. Knows where a dictionary reads and writes and how to run a model from
the middle; knows no dictionary, no metric and no text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sememe.dictionaries.base import Site
from sememe.errors import MismatchError

if TYPE_CHECKING:
    from sememe.lm import LanguageModel

__all__ = ["BaseRun", "SeveralModels", "SeveralSplicers", "Splicer", "check_places"]


class BaseRun(NamedTuple):
    """One unedited forward: what reads, writes and the unembedding see."""

    ids: Int[Tensor, "batch seq"]
    mask: Bool[Tensor, "batch seq"] | None
    hidden: Float[Tensor, "batch seq d_model"]
    activations: dict[str, Float[Tensor, "batch seq d"]]


class Splicer:
    """Runs a model once unedited, and then again from the spliced hookpoints on, once per replacement.

    Args:
        lm: The language model.
        reads: Hookpoints whose activations are wanted.
        writes: Hookpoints whose activations will be replaced.
    """

    def __init__(self, lm: LanguageModel, reads: Sequence[str], writes: Sequence[str]) -> None:
        self.lm = lm
        self.reads, self.writes = lm.expand(reads), lm.expand(writes)
        self.start = min(self._start_of(name) for name in self.writes)
        # The one write, if any, that is the very residual from which the rest is computed.
        self.residual_write = next((n for n in self.writes if self._residual_layer(n) == self.start), None)
        self.residual_read = f"resid_post.{self.start}" if self.start >= 0 else "resid_pre.0"
        needed = () if self.residual_write or self.start < 0 else (self.residual_read,)
        self.records = tuple(dict.fromkeys((*self.reads, *self.writes, *needed)))

    def _residual_layer(self, name: str) -> int | None:
        """The layer after which a hookpoint is the whole residual; None where it is something else."""
        alias, _, number = name.partition(".")
        if not number.isdigit():
            return None
        return {"resid_post": int(number), "resid_pre": int(number) - 1}.get(alias)

    def _start_of(self, name: str) -> int:
        layer = self.lm.replay_layer(name)
        if self._residual_layer(name) is None and "." in name and not name.split(".")[1].isdigit():
            # A module path may be a layer's whole output, which cannot be edited when that layer is left out.
            return max(layer - 1, -1)
        return layer

    def base(self, ids: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"] | None = None) -> BaseRun:
        """The unedited forward."""
        found: dict[str, Tensor] = {}

        def record(name: str) -> Mapping[str, object]:
            def keep(x: Tensor) -> Tensor:
                found.setdefault(name, x.clone())  # some models add to these tensors in place
                return x

            return {name: keep}

        with contextlib.ExitStack() as edits:
            for name in self.records:
                edits.enter_context(self.lm.edit(record(name)))  # type: ignore[arg-type]
            hidden = self.lm.hidden(ids, mask)
        return BaseRun(ids, mask, hidden, found)

    def spliced(
        self, run: BaseRun, replacements: Mapping[str, Float[Tensor, "batch seq d"]]
    ) -> Float[Tensor, "batch seq d_model"]:
        """What the unembedding sees when activations are replaced; hookpoints left out keep their own.

        Equal to the bit to a full forward with the same edits.
        """
        edits = {
            name: (lambda x, new=new: new.to(x.device, x.dtype))
            for name, new in replacements.items()
            if name != self.residual_write
        }
        if self.start < 0 and self.residual_write is None:
            with self.lm.edit(edits):
                return self.lm.hidden(run.ids, run.mask)
        if self.residual_write is not None:
            original = run.activations[self.residual_write]
            residual = replacements.get(self.residual_write, original).to(original.device, original.dtype)
        else:
            residual = run.activations[self.residual_read]
        with self.lm.edit(edits):
            return self.lm.hidden_from(self.start, residual, run.ids, run.mask)


def check_places(sites: Sequence[Site], lm: LanguageModel) -> None:
    """That sites belong to this model and have its hookpoints' widths.

    Raises:
        MismatchError: one does not.
    """
    for site in sites:
        if site.model_fingerprint != lm.fingerprint:
            raise MismatchError(
                f"the dictionary must belong to the model {lm.name} (fingerprint {lm.fingerprint[:16]})",
                f"one of {site.model} ({site.model_fingerprint[:16]})",
                f"Pass --model {site.model}, or a dictionary of {lm.name}.",
            )
        width = lm.width(site.hookpoint)
        if site.stop - site.start != width:
            raise MismatchError(
                f"the dictionary must take all {width} features of {site.hookpoint} of {lm.name}",
                site.stop - site.start,
                "Use it with the model and hookpoint it was trained on.",
            )


class SeveralModels:
    """Language models that read the same tokens, as one that is captured: hookpoints are named `resid_post.8@0` (of the
    first), `resid_post.8@1`, and so on, as in a joined store.

    Args:
        models: On one device.

    Raises:
        MismatchError: their tokenizers differ.
    """

    def __init__(self, models: Sequence[LanguageModel]) -> None:
        self.models = tuple(models)
        first = self.models[0]
        self.tokenizer, self.device = first.tokenizer, first.device
        self.name = " + ".join(lm.name for lm in self.models)
        for lm in self.models[1:]:
            if lm.tokenizer.get_vocab() != first.tokenizer.get_vocab():
                raise MismatchError(
                    f"models that are run together must share a tokenizer with {first.name}",
                    f"another vocabulary in {lm.name}",
                    "Evaluate a dictionary whose models read the same tokens.",
                )

    def capture(
        self,
        ids: Int[Tensor, "batch seq"],
        hookpoints: Sequence[str],
        mask: Bool[Tensor, "batch seq"] | None = None,
    ) -> dict[str, Float[Tensor, "batch seq d"]]:
        """Activations at hookpoints of any of the models."""
        found: dict[str, Tensor] = {}
        for number, lm in enumerate(self.models):
            own = _own(hookpoints, number)
            if own:
                captured = lm.capture(ids, own, mask)
                found |= {_numbered(name, number): captured[name] for name in own}
        return {name: found[name] for name in hookpoints}

    def width(self, hookpoint: str) -> int:
        """Of one of them."""
        name, _, number = hookpoint.rpartition("@")
        return self.models[int(number)].width(name)


class SeveralSplicers:
    """A splicer for each model: all are replaced at once, each in its own forward.

    `hidden` holds what the unembeddings see, model after model along the feature axis, as `widths` cuts it.

    Args:
        several: The models.
        reads: Hookpoints whose activations are wanted, numbered.
        writes: Hookpoints whose activations will be replaced, numbered.
    """

    def __init__(self, several: SeveralModels, reads: Sequence[str], writes: Sequence[str]) -> None:
        self.splicers: dict[int, Splicer] = {}
        self.only_read: dict[int, tuple[str, ...]] = {}
        for number, lm in enumerate(several.models):
            own_reads, own_writes = _own(reads, number), _own(writes, number)
            if own_writes:
                self.splicers[number] = Splicer(lm, own_reads or own_writes, own_writes)
            else:
                self.only_read[number] = own_reads
        self.several = several
        self.widths: dict[int, int] = {}
        """By the number of each model that is written to; known after the first forward."""

    def base(self, ids: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"] | None = None) -> BaseRun:
        """The unedited forwards."""
        found: dict[str, Tensor] = {}
        hidden = []
        for number, splicer in self.splicers.items():
            run = splicer.base(ids, mask)
            found |= {_numbered(name, number): value for name, value in run.activations.items()}
            self.widths[number] = run.hidden.shape[-1]
            hidden.append(run.hidden)
        for number, names in self.only_read.items():
            captured = self.several.models[number].capture(ids, names, mask)
            found |= {_numbered(name, number): captured[name] for name in names}
        return BaseRun(ids, mask, torch.cat(hidden, dim=-1), found)

    def spliced(
        self, run: BaseRun, replacements: Mapping[str, Float[Tensor, "batch seq d"]]
    ) -> Float[Tensor, "batch seq d_models"]:
        """What the unembeddings see when activations are replaced."""
        parts = torch.split(run.hidden, list(self.widths.values()), dim=-1)
        hidden = []
        for (number, splicer), part in zip(self.splicers.items(), parts, strict=True):
            activations = {name: run.activations[_numbered(name, number)] for name in splicer.records}
            new = {
                name: replacements[_numbered(name, number)]
                for name in splicer.writes
                if _numbered(name, number) in replacements
            }
            hidden.append(splicer.spliced(BaseRun(run.ids, run.mask, part, activations), new))
        return torch.cat(hidden, dim=-1)


def _numbered(name: str, number: int) -> str:
    return f"{name}@{number}"


def _own(names: Sequence[str], number: int) -> tuple[str, ...]:
    """Those that belong to a model, as it calls them."""
    end = f"@{number}"
    return tuple(name.removesuffix(end) for name in names if name.endswith(end))
