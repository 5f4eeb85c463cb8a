"""Forwards that differ from an unedited one in one latent at one position, or lack one token. Measures nothing.

With x the activation at an output of the dictionary, a the latent's activation and d its decoder direction, an
ablation puts x - a d in the place of x at one position: what the dictionary does not reconstruct stays. Where a
dictionary writes at several places, each is set so, and whatever the change does in between is overwritten there at
that position. Later positions are left to follow.

Ablations of one context lie one after the other in a row of the batch, so that its keys and values are copied once for
all of them (`LanguageModel.packs`); where a model does not take that, each has a row and copies of its own. Where its
forwards do not go on from kept keys and values at all (`LanguageModel.goes_on`), whole rows run again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sememe.dictionaries.base import Dictionary
from sememe.downstream.changes import Unembedding
from sememe.encoded import Encoded
from sememe.errors import ActivationError, MismatchError
from sememe.lm import LanguageModel
from sememe.lm.past import Packed, Past, Prefix
from sememe.splice import BaseRun, Splicer, check_places

__all__ = ["Reruns", "Unedited", "check_dictionary"]

TOKENS_AT_ONCE = {"cpu": 320}
"""New tokens in one forward: on a CPU a few rows fill its units, and longer batches only fill more rows up."""
TOKENS_ON_A_GPU = 8192
PACKED_TOKENS = {"cpu": 768}
"""The same where several ablations lie in a row: hardly anything is filled up."""
TOKENS_IN_A_LINE = 48
"""New tokens of one context in one row, if nothing asks for more: each attends to all of them, most masked out."""
ENCODE_FLOATS = 1 << 25
"""Rows are encoded in parts so that a dense (rows, d_sae) matrix holds at most this many floats."""


class Unedited(NamedTuple):
    """Contexts as the model reads them."""

    base: BaseRun
    past: Past | None
    """None where forwards cannot go on from it."""


class _Lines(NamedTuple):
    """Where continuations lie: several of one context in a row of the batch, their tokens one after the other."""

    context: Int[Tensor, " lines"]
    """The context of each row."""
    line: Int[Tensor, " n"]
    """The row of each continuation."""
    begins: Int[Tensor, " n"]
    """Where in it the continuation begins."""

    @classmethod
    def of(cls, rows: Int[Tensor, " n"], widths: Int[Tensor, " n"], most: int) -> _Lines:
        """Continuations of so many tokens each in few rows of at most so many tokens, about equally full."""
        context: list[int] = []
        line, begins = torch.zeros(2, len(rows), dtype=torch.long)
        for one, own in _runs(rows):
            w = widths[own].tolist()
            room = max(most, *w)
            n_lines = -(-sum(w) // room)
            room = min(-(-sum(w) // n_lines) + max(w) - 1, room)
            size = room + 1
            for i, width in zip(own.tolist(), w, strict=True):
                if size + width > room:
                    context.append(one)
                    size = 0
                line[i], begins[i] = len(context) - 1, size
                size += width
        return cls(torch.tensor(context), line, begins)


def _runs(rows: Int[Tensor, " n"]) -> Iterator[tuple[int, Int[Tensor, " own"]]]:
    """Each value, ascending, and where it stands."""
    values, counts = torch.unique(rows, return_counts=True)
    parts = torch.split(torch.argsort(rows, stable=True), counts.tolist())
    yield from zip(values.tolist(), parts, strict=True)


class _Layout(NamedTuple):
    """A batch of ablations or removals."""

    contexts: Int[Tensor, " lines"]
    """Of which context each row is."""
    columns: Int[Tensor, "lines new"]
    """Which of its tokens stands at each place."""
    lines: Int[Tensor, " n"]
    """The row of each."""
    begins: Int[Tensor, " n"]
    """Where in it the ablation's own position is, or the token after the one left out."""
    prefix: Prefix | Packed | None
    """What rows go on from; None where they run whole."""


def check_dictionary(dictionary: Dictionary, lm: LanguageModel) -> None:
    """That a dictionary reads and writes this model alone, and fits its hookpoints.

    Raises:
        MismatchError: it does not.
    """
    if dictionary.sites is None:
        raise MismatchError(
            "the dictionary must know its model and hookpoints",
            "none (it was trained on bare tensors)",
            "Train it from a store.",
        )
    sites = (*dictionary.sites.inputs, *dictionary.sites.outputs)
    models = {site.model_fingerprint: site.model for site in sites}
    if len(models) > 1:
        raise MismatchError(
            "a latent can be ablated where its dictionary reads and writes one model",
            f"a dictionary of {len(models)}: {', '.join(models.values())}",
            "Use a dictionary of one model.",
        )
    check_places(sites, lm)


class Reruns:
    """Runs contexts unedited, and then parts of them again.

    Args:
        lm: The model.
        dictionary: One of its dictionaries, folded.
        keep_keys: Go on from kept keys and values where the model can; if not, whole rows run again.
    Raises:
        MismatchError: the dictionary does not belong to the model.
    """

    def __init__(self, lm: LanguageModel, dictionary: Dictionary, *, keep_keys: bool = True) -> None:
        check_dictionary(dictionary, lm)
        assert dictionary.sites is not None
        self.lm, self.dictionary = lm, dictionary.eval().to(lm.device)
        self.inputs, self.outputs = dictionary.sites.inputs, dictionary.sites.outputs
        reads, writes = ([site.hookpoint for site in sites] for sites in (self.inputs, self.outputs))
        self.splicer = Splicer(lm, reads, writes)
        self.directions = dictionary.decoder_directions().detach().float()
        self.goes_on = keep_keys and lm.goes_on()
        self.unembedding: Unembedding | None = None
        """The model's, once somebody looked at it."""
        # The lowest layer that runs in an ablated forward; skipping is tried out here, on its own.
        self.first_layer = self.splicer.start + 1 if lm.skips(self.splicer.start) else 0

    def rows_at_once(self, n_new: int) -> int:
        """How many rows of so many new tokens are best run in one forward; at least one."""
        if not self.goes_on:
            n_new = max(n_new, 64)  # whole rows run again
        return max(TOKENS_AT_ONCE.get(self.lm.device.type, TOKENS_ON_A_GPU) // n_new, 1)

    def batches(
        self, run: Unedited, rows: Int[Tensor, " n"], lengths: Int[Tensor, " n"], n_new: Int[Tensor, " n"]
    ) -> Iterator[Int[Tensor, " some"]]:
        """Which of many continuations are best run in one forward.

        Args:
            run: The contexts.
            rows: Which of them each goes on from.
            lengths: After how many tokens.
            n_new: How many tokens it has.
        """
        if not self._packs(run):
            order = torch.argsort(lengths, stable=True)  # neighbours, so that few rows are filled up
            order = order[torch.argsort(n_new[order], stable=True)]
            start, widths = 0, n_new[order].tolist()
            while start < len(order):
                stop = start + 1
                while stop < len(order) and stop - start < self.rows_at_once(widths[stop]):
                    stop += 1
                yield order[start:stop]
                start = stop
            return
        lines = [own for _, own in _runs(_Lines.of(rows, n_new, self._room(n_new)).line)]
        sizes = [int(n_new[own].sum()) for own in lines]
        most = PACKED_TOKENS.get(self.lm.device.type, TOKENS_ON_A_GPU)
        if lines:
            most = -(-sum(sizes) // -(-sum(sizes) // most))  # all batches about equally large
        some, size = [], 0
        for i in sorted(range(len(lines)), key=lambda i: -sizes[i]):
            some.append(lines[i])
            size += sizes[i]
            if size >= most:
                yield torch.cat(some)
                some, size = [], 0
        if some:
            yield torch.cat(some)

    def _packs(self, run: Unedited) -> bool:
        """Whether continuations of a context share rows."""
        return run.past is not None and self.lm.packs(run.base.ids.shape[1])

    def _room(self, n_new: Int[Tensor, " n"]) -> int:
        """Tokens in a row that several continuations share, at most."""
        room = max(TOKENS_IN_A_LINE, 3 * int(n_new.max())) if len(n_new) else TOKENS_IN_A_LINE
        return min(room, self.lm.context_length or room)

    def unedited(self, ids: Int[Tensor, "batch seq"]) -> Unedited:
        """Whole contexts; what fills a row up at its end needs no mask, as nothing before it sees it.

        Raises:
            ActivationError: the model gives NaN or infinity.
        """
        remember = self.lm.remembering() if self.goes_on else contextlib.nullcontext()
        with remember as past:
            base = self.splicer.base(ids)
        if not bool(torch.isfinite(base.hidden.float().sum())):
            raise ActivationError(
                f"the activations of {self.lm.name} must be finite",
                "NaN or infinity",
                "Load the model in bfloat16 or float32 (--dtype), or check its weights.",
            )
        return Unedited(base, past)

    # -- latents ---------------------------------------------------------------------------------------

    def encode(self, run: Unedited, rows: Int[Tensor, " n"], positions: Int[Tensor, " n"]) -> Encoded:
        """The latents at some places of an unedited run."""
        return self._encode([run.base.activations[s.hookpoint] for s in self.inputs], rows, positions)

    def _encode(self, inputs: Sequence[Tensor], rows: Tensor, positions: Tensor) -> Encoded:
        device = self.directions.device
        x = torch.cat(
            [
                part[rows.to(part.device), positions.to(part.device)].to(device, torch.float32)
                for part in inputs
            ],
            dim=1,
        )
        step = max(ENCODE_FLOATS // self.dictionary.d_sae, 64)
        encoded = Encoded.cat([self.dictionary.encode(part) for part in torch.split(x, step)])
        if not bool(torch.isfinite(encoded.acts).all()):
            raise ActivationError(
                "the dictionary's latents must be finite",
                "NaN or infinity",
                "Check its weights and the model's.",
            )
        return encoded

    def acts(
        self,
        run: Unedited,
        rows: Int[Tensor, " n"],
        positions: Int[Tensor, " n"],
        latents: Int[Tensor, " n"],
    ) -> Float[Tensor, " n"]:
        """The activation of one latent at each place of an unedited run."""
        return _one_each(self.encode(run, rows, positions), latents)

    # -- ablations -------------------------------------------------------------------------------------

    def ablated(
        self,
        run: Unedited,
        rows: Int[Tensor, " n"],
        positions: Int[Tensor, " n"],
        latents: Int[Tensor, " n"],
        acts: Float[Tensor, " n"],
        n_after: int,
    ) -> Float[Tensor, "n after_plus_1 d_hidden"]:
        """What the unembedding sees at a position and after it when one latent is taken out there.

        Args:
            run: The contexts.
            rows: Which of them, for each ablation.
            positions: Where in it.
            latents: What is taken out.
            acts: Its activation there.
            n_after: Positions after it; what lies past a row's end repeats its last token and means nothing.
        """
        base, widths = run.base, torch.full_like(positions, n_after + 1)
        if run.past is None:
            whole_rows = torch.arange(base.ids.shape[1]).expand(len(rows), -1)
            lay = _Layout(rows, whole_rows, torch.arange(len(rows)), positions, None)
        else:
            last = torch.full_like(positions, base.ids.shape[1] - 1)
            lay = self._lay(run, run.past, rows, positions, widths, positions, last, self.first_layer)
        contributions = (
            acts.to(self.directions)[:, None] * self.directions[latents.to(self.directions.device)]
        )
        ids = base.ids[lay.contexts[:, None], lay.columns]
        edits = {}
        residual = None
        for site in self.outputs:
            name = site.hookpoint
            whole = base.activations[name]
            old = whole[rows.to(whole.device), positions.to(whole.device)]
            part = contributions[:, site.start : site.stop]
            new = (old.float() - part.to(old.device)).to(old.dtype)
            if name == self.splicer.residual_write:
                residual = _set(_taken(whole, lay.contexts, lay.columns), lay, new)
            else:
                edits[name] = _setter(lay, new)
        if residual is None and self.splicer.start >= 0:
            residual = _taken(base.activations[self.splicer.residual_read], lay.contexts, lay.columns)
        with self.lm.edit(edits), self._after(lay):
            if residual is None:
                hidden = self.lm.hidden(ids)
            else:
                hidden = self.lm.hidden_from(self.splicer.start, residual, ids)
        wanted = (lay.begins[:, None] + torch.arange(n_after + 1)).clamp(max=ids.shape[1] - 1)
        return hidden[lay.lines[:, None].to(hidden.device), wanted.to(hidden.device)]

    def _lay(
        self,
        run: Unedited,
        past: Past,
        rows: Int[Tensor, " n"],
        lengths: Int[Tensor, " n"],
        widths: Int[Tensor, " n"],
        start: Int[Tensor, " n"],
        last: Int[Tensor, " n"],
        first_layer: int,
    ) -> _Layout:
        """Where continuations go: after so many tokens of their contexts, so many new ones, which are the contexts' own
        from one column on, and the last column again where they would go beyond."""
        if not self._packs(run):
            n_new = int(widths.max())
            columns = torch.minimum(start[:, None] + torch.arange(n_new), last[:, None])
            prefix = past.prefix(rows, lengths, n_new, first_layer)
            return _Layout(rows, columns, torch.arange(len(rows)), torch.zeros_like(lengths), prefix)
        shared = _Lines.of(rows, widths, self._room(widths))
        n_lines, n_new = len(shared.context), int((shared.begins + widths).max())
        item = torch.arange(len(rows)).repeat_interleave(widths)
        step = torch.arange(len(item)) - (widths.cumsum(0) - widths)[item]
        at = shared.line[item], shared.begins[item] + step
        # What nobody needs at a row's end reads the context's first token, and sees nothing but itself.
        columns, before = torch.zeros(2, n_lines, n_new, dtype=torch.long)
        first = torch.arange(n_new).repeat(n_lines, 1)
        columns[at] = torch.minimum(start[item] + step, last[item])
        before[at], first[at] = lengths[item], shared.begins[item]
        packed = past.packed(shared.context, before, first, first_layer)
        return _Layout(shared.context, columns, shared.line, shared.begins, packed)

    # -- contexts without a token ----------------------------------------------------------------------

    def acts_without(
        self,
        run: Unedited,
        rows: Int[Tensor, " n"],
        positions: Int[Tensor, " n"],
        removed: Int[Tensor, " n"],
        latents: Int[Tensor, " n"],
    ) -> Float[Tensor, " n"]:
        """The activation of one latent at a position when an earlier token is left out of the context.

        The tokens after it move up by one: the model reads the text as if it had been written without that token.

        Args:
            run: The contexts.
            rows: Which of them.
            positions: Where the latent is looked at, as a position of the whole context.
            removed: The position that is left out, before that.
            latents: Which latent.
        """
        ids, widths = run.base.ids, positions - removed
        if run.past is None:
            columns = torch.arange(int(positions.max())).expand(len(rows), -1)
            columns = torch.minimum(columns + (columns >= removed[:, None]), positions[:, None])
            lay = _Layout(rows, columns, torch.arange(len(rows)), removed, None)
        else:
            lay = self._lay(run, run.past, rows, removed, widths, removed + 1, positions, 0)
        names = list(dict.fromkeys(site.hookpoint for site in self.inputs))
        with self._after(lay):
            found = self.lm.capture(ids[lay.contexts[:, None], lay.columns], names)
        inputs = [found[site.hookpoint] for site in self.inputs]
        return _one_each(self._encode(inputs, lay.lines, lay.begins + widths - 1), latents)

    def _after(self, lay: _Layout) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if lay.prefix is None else self.lm.after(lay.prefix)


def _one_each(encoded: Encoded, latents: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The activation of one latent in each row."""
    encoded = encoded.compact()
    rows = encoded.row_ids()
    mine = encoded.indices == latents.to(encoded.indices)[rows]
    return encoded.acts.new_zeros(encoded.n_rows).index_add_(0, rows[mine], encoded.acts[mine])


def _taken(
    x: Float[Tensor, "batch seq d"], rows: Int[Tensor, " n"], columns: Int[Tensor, "n new"]
) -> Float[Tensor, "n new d"]:
    return x[rows.to(x.device)[:, None], columns.to(x.device)]


def _set(x: Float[Tensor, "lines new d"], lay: _Layout, new: Float[Tensor, "n d"]) -> Tensor:
    """A copy in which each ablation's first position is replaced."""
    x = x.clone()
    x[lay.lines.to(x.device), lay.begins.to(x.device)] = new.to(x.device, x.dtype)
    return x


def _setter(lay: _Layout, new: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: _set(x, lay, new)
