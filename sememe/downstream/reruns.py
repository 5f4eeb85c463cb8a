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
"""New tokens of one context in one row, each of which attends to all of them, most of them masked out."""
ENCODE_FLOATS = 1 << 25
"""Rows are encoded in parts so that a dense (rows, d_sae) matrix holds at most this many floats."""


class Unedited(NamedTuple):
    """Contexts as the model reads them."""

    base: BaseRun
    past: Past | None
    """None where forwards cannot go on from it."""


class _Lines(NamedTuple):
    """Where ablations lie: several of one context in a row of the batch, their tokens one after the other."""

    context: Int[Tensor, " lines"]
    """The context of each row."""
    line: Int[Tensor, " n"]
    slot: Int[Tensor, " n"]
    """The how manieth of its row each ablation is."""
    n_slots: int

    @classmethod
    def of(cls, rows: Int[Tensor, " n"], most: int) -> _Lines:
        """Ablations of these contexts in as few rows of at most so many as there are, about equally full."""
        contexts, which, counts = torch.unique(rows, return_inverse=True, return_counts=True)
        order = torch.argsort(which, stable=True)
        place = torch.empty_like(order)  # the how manieth of its context
        place[order] = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[which[order]]
        n_lines = (counts + most - 1) // most
        each = (counts + n_lines - 1) // n_lines
        first = n_lines.cumsum(0) - n_lines
        slot = place % each[which]
        line = first[which] + place // each[which]
        return cls(contexts.repeat_interleave(n_lines), line, slot, int(each.max()))


class _Layout(NamedTuple):
    """A batch of ablations."""

    contexts: Int[Tensor, " lines"]
    """Of which context each row is."""
    columns: Int[Tensor, "lines new"]
    """Which of its tokens stands at each place."""
    lines: Int[Tensor, " n"]
    """The row of each ablation."""
    begins: Int[Tensor, " n"]
    """Where in it the ablation's own position is."""
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
        self, run: Unedited, rows: Int[Tensor, " n"], positions: Int[Tensor, " n"], n_new: int
    ) -> Iterator[Int[Tensor, " some"]]:
        """Which of many ablations, of so many new tokens each, are best run in one forward."""
        if not self._packs(run):
            order = torch.argsort(positions, stable=True)  # neighbours, so that few rows are filled up
            yield from torch.split(order, self.rows_at_once(n_new))
            return
        lines = _Lines.of(rows, self._slots(n_new))
        sizes = torch.bincount(lines.line)
        by_line = torch.split(torch.argsort(lines.line, stable=True), sizes.tolist())
        most = PACKED_TOKENS.get(self.lm.device.type, TOKENS_ON_A_GPU)
        n_batches = -(-len(rows) * n_new // most)
        most = -(-len(rows) // n_batches)  # about equally large
        some: list[Tensor] = []
        for i in torch.argsort(sizes, descending=True, stable=True).tolist():
            some.append(by_line[i])
            if sum(map(len, some)) >= most:
                yield torch.cat(some)
                some = []
        if some:
            yield torch.cat(some)

    def _packs(self, run: Unedited) -> bool:
        """Whether ablations of a context share rows."""
        return run.past is not None and self.lm.packs(run.base.ids.shape[1])

    def _slots(self, n_new: int) -> int:
        """How many ablations of so many new tokens lie in one row, at most."""
        n_tokens = min(TOKENS_IN_A_LINE, self.lm.context_length or TOKENS_IN_A_LINE)
        return max(n_tokens // n_new, 1)

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
        base = run.base
        lay = self._lay(run, rows, positions, n_after + 1)
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
        around = self.lm.after(lay.prefix) if lay.prefix is not None else contextlib.nullcontext()
        with self.lm.edit(edits), around:
            if residual is None:
                hidden = self.lm.hidden(ids)
            else:
                hidden = self.lm.hidden_from(self.splicer.start, residual, ids)
        wanted = (lay.begins[:, None] + torch.arange(n_after + 1)).clamp(max=ids.shape[1] - 1)
        return hidden[lay.lines[:, None].to(hidden.device), wanted.to(hidden.device)]

    def _lay(
        self, run: Unedited, rows: Int[Tensor, " n"], positions: Int[Tensor, " n"], width: int
    ) -> _Layout:
        """Where ablations at some positions go, each with so many tokens from there on."""
        last = run.base.ids.shape[1] - 1
        alone = torch.arange(len(rows))
        if run.past is None:
            return _Layout(rows, torch.arange(last + 1).expand(len(rows), -1), alone, positions, None)
        places = (positions[:, None] + torch.arange(width)).clamp(max=last)
        if not self._packs(run):
            prefix = run.past.prefix(rows, positions, width, self.first_layer)
            return _Layout(rows, places, alone, torch.zeros_like(positions), prefix)
        shared = _Lines.of(rows, self._slots(width))
        n_new = shared.n_slots * width
        # A slot that nobody needs reads the context's first token, and sees nothing else.
        columns, lengths = torch.zeros(2, len(shared.context), n_new, dtype=torch.long)
        begins = shared.slot * width
        new = begins[:, None] + torch.arange(width)
        columns[shared.line[:, None], new] = places
        lengths[shared.line[:, None], new] = positions[:, None].expand_as(new)
        first = (torch.arange(n_new) // width * width).expand_as(lengths)
        packed = run.past.packed(shared.context, lengths, first, self.first_layer)
        return _Layout(shared.context, columns, shared.line, begins, packed)

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
        ids = run.base.ids
        last = positions - removed - 1  # the peak's place among the tokens that run again
        around: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if run.past is None:
            n_new = int(positions.max())
            places = torch.arange(n_new).expand(len(rows), -1)
            places = torch.minimum(places + (places >= removed[:, None]), positions[:, None])
            last = positions - 1
        else:
            n_new = int(last.max()) + 1
            places = torch.minimum(removed[:, None] + 1 + torch.arange(n_new), positions[:, None])
            around = self.lm.after(run.past.prefix(rows, removed, n_new))
        names = list(dict.fromkeys(site.hookpoint for site in self.inputs))
        with around:
            found = self.lm.capture(ids[rows[:, None], places], names)
        inputs = [found[site.hookpoint] for site in self.inputs]
        return _one_each(self._encode(inputs, torch.arange(len(rows)), last), latents)


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
