"""Pairs of prompts inside a model: one run is edited, the other says what should come out. Knows no dictionary.

Both runs are recorded once; then, for every edit, only the layers above the hookpoint are computed again, and only the
logits of the last position.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sememe.dictionaries.base import Sites
from sememe.errors import ActivationError
from sememe.lm import LanguageModel
from sememe.lm.past import Prefix
from sememe.pairs import Pair
from sememe.splice import BaseRun, Splicer

__all__ = ["Measured", "Part", "Runs", "kl_of"]

Moves = Sequence[Float[Tensor, "_ d_out"]]
"""What is added to the activations that are written, for each part: its rows are positions, prompt after prompt."""


class Part(NamedTuple):
    """Some pairs, from the first position at which those of a pair differ.

    Before it the two runs are the same, and nothing that is added could be anything but 0: keys and values of those
    positions are kept and not computed again. Prompts that are shorter are filled up at their end, which nothing sees.
    """

    numbers: Int[Tensor, " n"]
    """Which pairs."""
    run: BaseRun
    """The run that is edited, at those positions."""
    x: Float[Tensor, "rows d_in"]
    """What it reads."""
    other: Float[Tensor, "rows d_in"]
    """What the other run reads at the same places."""
    real: Bool[Tensor, " rows"]
    """False at what fills a prompt up."""
    target: Float[Tensor, "n vocab"]
    """Log-probabilities of the other run after the last token."""
    last: Int[Tensor, " n"]
    """The place of the last token."""
    n_after: Int[Tensor, " n"]
    """Positions from the first at which the prompts differ."""
    before: Callable[[], Prefix] | None
    """What the run goes on from; None where it begins at the first token."""


class Measured(NamedTuple):
    """What an edit leads to, for every pair."""

    kl: Float[Tensor, " pairs"]
    """Of the edited run from the other, after the last token, in nats."""
    edit: Float[Tensor, " pairs"]
    """Mean norm of what was added, over the positions from the first at which the prompts differ."""
    logit_difference: Float[Tensor, " pairs"]
    """Logit of the clean prompt's answer less that of the wrong one; NaN where they are not known."""


def kl_of(log_probs: Float[Tensor, "n vocab"], target: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
    """KL(the first || the second) in nats; a token that is ruled out adds nothing."""
    return torch.where(log_probs.isneginf(), 0.0, log_probs.exp() * (log_probs - target)).sum(-1)


class Runs:
    """Pairs of prompts, both runs recorded.

    Args:
        lm: The model.
        pairs: Prompts of equal length in each.
        sites: Where is read and written.
        restore: The corrupted run is edited; else the clean one.
        batch_rows: Prompts per forward.
        keep_keys: Go on from the keys of the positions before the first at which prompts differ, where the model can.

    `n_forwards` counts edits of all pairs at once, each one forward from the hookpoint on; `n_backwards` gradients.

    Raises:
        ActivationError: an activation is NaN or infinite.
    """

    def __init__(
        self,
        lm: LanguageModel,
        pairs: Sequence[Pair],
        sites: Sites,
        *,
        restore: bool,
        batch_rows: int,
        keep_keys: bool = True,
    ) -> None:
        self.lm, self.pairs, self.sites, self.restore = lm, tuple(pairs), sites, restore
        reads, writes = ([site.hookpoint for site in side] for side in (sites.inputs, sites.outputs))
        self.splicer = Splicer(lm, reads, writes)
        self.goes_on = keep_keys and lm.goes_on()
        self.first_layer = self.splicer.start + 1 if lm.skips(self.splicer.start) else 0
        self.n_forwards = self.n_backwards = 0
        self.known = torch.tensor([pair.answer is not None and pair.wrong is not None for pair in pairs])
        self.asked = torch.tensor([(pair.answer or 0, pair.wrong or 0) for pair in pairs])
        self.base = torch.zeros(len(pairs)), torch.zeros(len(pairs))
        """Logit differences of the clean and the corrupted prompts."""
        self.right = torch.zeros(len(pairs), dtype=torch.bool)
        """Whether the clean prompt's answer is likelier than the wrong one."""
        self.parts = [
            self._part(torch.arange(start, min(start + batch_rows, len(pairs))))
            for start in range(0, len(pairs), batch_rows)
        ]

    @torch.no_grad()
    def _part(self, numbers: Int[Tensor, " n"]) -> Part:
        chosen = [self.pairs[number] for number in numbers.tolist()]
        first = torch.tensor([pair.first for pair in chosen])
        length = torch.tensor([len(pair.clean) for pair in chosen])
        n_after = length - first
        begins = first if self.goes_on and int(first.max()) > 0 else torch.zeros_like(first)
        n_new = int((length - begins).max())
        columns = torch.minimum(begins[:, None] + torch.arange(n_new), length[:, None] - 1)
        last = length - 1 - begins
        runs, before, logits = [], [], []
        for side in (0, 1):
            ids = pad_sequence([torch.tensor(pair[side]) for pair in chosen], batch_first=True)
            run, prefix = self._recorded(ids, begins, columns)
            runs.append(run)
            before.append(prefix)
            # through the same operations as edits: what is the same then is the same to the bit
            logits.append(self._last(self._spliced(run, {}, prefix() if prefix else None), last))
        for values, found in zip(self.base, logits, strict=True):
            values[numbers] = self._difference(found, numbers).cpu()
        self.right[numbers] = self.base[0][numbers] > 0
        edited, other = (1, 0) if self.restore else (0, 1)
        x, theirs = self._read(runs[edited]), self._read(runs[other])
        if not bool(torch.isfinite(x).all() and torch.isfinite(theirs).all()):
            raise ActivationError(
                "activations must be finite",
                "NaN or infinity",
                "Load the model in bfloat16 or float32 (--dtype), or check its weights.",
            )
        real = torch.arange(n_new) <= last[:, None]
        target = logits[other].float().log_softmax(-1)
        return Part(
            numbers, runs[edited], x, theirs, real.reshape(-1).to(x.device), target, last, n_after, before[edited]
        )  # fmt: skip

    def _recorded(
        self, ids: Int[Tensor, "n seq"], begins: Int[Tensor, " n"], columns: Int[Tensor, "n new"]
    ) -> tuple[BaseRun, Callable[[], Prefix] | None]:
        """The unedited run of some prompts at some columns, and what it goes on from there."""
        goes_on = int(begins.max()) > 0
        with self.lm.remembering() if goes_on else contextlib.nullcontext() as past:
            run = self.splicer.base(ids)
        rows = torch.arange(len(ids))

        def taken(values: Tensor) -> Tensor:
            return values[rows[:, None].to(values.device), columns.to(values.device)]

        kept = BaseRun(
            taken(run.ids),
            None,
            taken(run.hidden),
            {name: taken(own) for name, own in run.activations.items()},
        )
        if past is None:
            return kept, None
        n_new = columns.shape[1]
        return kept, lambda: past.prefix(rows, begins, n_new, self.first_layer)

    def _spliced(self, run: BaseRun, replaced: Mapping[str, Tensor], before: Prefix | None) -> Tensor:
        with self.lm.after(before) if before is not None else contextlib.nullcontext():
            return self.splicer.spliced(run, replaced)

    def _read(self, run: BaseRun) -> Float[Tensor, "rows d_in"]:
        parts = [run.activations[site.hookpoint] for site in self.sites.inputs]
        return torch.cat([part.reshape(-1, part.shape[-1]).float() for part in parts], dim=1)

    def _last(self, hidden: Float[Tensor, "n new d"], last: Int[Tensor, " n"]) -> Float[Tensor, "n vocab"]:
        rows = torch.arange(len(last), device=hidden.device)
        return self.lm.logits(hidden[rows, last.to(hidden.device)][:, None])[:, 0]

    def _difference(
        self, logits: Float[Tensor, "n vocab"], numbers: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        both = logits.float().gather(1, self.asked[numbers].to(logits.device))
        return torch.where(self.known[numbers].to(logits.device), both[:, 0] - both[:, 1], torch.nan)

    # -- edits -------------------------------------------------------------------------------------------------

    def written(self, part: Part, moved: Float[Tensor, "rows d_out"]) -> dict[str, Tensor]:
        """The activations that are written, with something added."""
        out: dict[str, Tensor] = {}
        for site in self.sites.outputs:
            old = part.run.activations[site.hookpoint]
            add = moved[:, site.start : site.stop].reshape(old.shape)
            out[site.hookpoint] = (old.float() + add.to(old.device)).to(old.dtype)
        return out

    def _edited(self, part: Part, moved: Float[Tensor, "rows d_out"]) -> Float[Tensor, "n vocab"]:
        """Logits after the last token with something added."""
        before = part.before() if part.before is not None else None
        return self._last(self._spliced(part.run, self.written(part, moved), before), part.last)

    @torch.no_grad()
    def measure(self, moves: Moves) -> Measured:
        """What the other layers make of an edit: one forward of every pair, from the hookpoint on.

        Raises:
            ActivationError: it gave NaN or infinity.
        """
        n = len(self.pairs)
        kl, edit, difference = torch.zeros(n), torch.zeros(n), torch.zeros(n)
        self.n_forwards += 1
        for part, moved in zip(self.parts, moves, strict=True):
            logits = self._edited(part, moved)
            kl[part.numbers] = kl_of(logits.float().log_softmax(-1), part.target).cpu()
            norms = moved.norm(dim=1).reshape(len(part.numbers), -1).sum(1).cpu()
            edit[part.numbers] = norms / part.n_after
            difference[part.numbers] = self._difference(logits, part.numbers).cpu()
        if not bool(torch.isfinite(kl).all()):
            raise ActivationError(
                "the edited model's predictions must be finite",
                "NaN or infinity",
                "Load the model in float32 (--dtype float32).",
            )
        return Measured(kl, edit, difference)

    def gradient(self, moves: Moves, of: Literal["kl", "logit_difference"]) -> list[Tensor]:
        """What adding something would do to what is to become small, at first order: a gradient of the mean over pairs.

        Args:
            moves: Where it is taken.
            of: kl: the divergence from the other run. logit_difference: how far the answer is behind the wrong one; the
                other way round where the clean run is edited.
        Returns:
            For each part, of the shape of its move.
        """
        self.n_forwards += 1
        self.n_backwards += 1
        found = []
        for part, move in zip(self.parts, moves, strict=True):
            moved = move.detach().clone().requires_grad_(True)
            logits = self._edited(part, moved)
            if of == "kl":
                small = kl_of(logits.float().log_softmax(-1), part.target).sum()
            else:
                difference = self._difference(logits, part.numbers).nansum()
                small = -difference if self.restore else difference
            (grad,) = torch.autograd.grad(small, moved)
            found.append(grad / len(self.pairs))
        return found

    def nothing(self) -> list[Tensor]:
        """A move that adds nothing."""
        d_out = sum(site.stop - site.start for site in self.sites.outputs)
        return [part.x.new_zeros(part.x.shape[0], d_out) for part in self.parts]
