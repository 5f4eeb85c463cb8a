"""Numbers that can be traced back: one per row of tokens, made by a forward. Knows models; latents only as something to
look at.

A row r of a batch belongs to prompt r % n: batches hold all n prompts, some number of times over.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sememe.errors import ConfigError
from sememe.lm import LanguageModel
from sememe.splice import BaseRun, Splicer
from sememe.trace.places import Inputs, Placed

__all__ = [
    "LatentMetric",
    "Metric",
    "PredictionMetric",
    "kl",
    "log_prob",
    "logit",
    "logit_difference",
    "loss",
    "of_logits",
]


class Metric(abc.ABC):
    """A number for each row of a batch, differentiable in what the forward reads."""

    name: str
    text: str
    """What it is, for people."""
    positions: Int[Tensor, " n"]
    """Where each prompt's number is read; the last position of those that are, if several."""
    is_least: bool = False
    """Whether it is as small as it can be where nothing is changed: its gradient there is 0 but for rounding."""

    @abc.abstractmethod
    def forward(self, lm: LanguageModel, inputs: Inputs) -> Float[Tensor, " batch"]:
        """By a forward of the model, edits and all."""

    @abc.abstractmethod
    def spliced(
        self, splicer: Splicer, run: BaseRun, replacements: Mapping[str, Float[Tensor, "batch seq d"]]
    ) -> Float[Tensor, " batch"]:
        """With some activations replaced, from the middle where that gives the same."""


@final
class PredictionMetric(Metric):
    """A number made of what the unembedding sees.

    Args:
        name: What it is called.
        text: What it is.
        positions: Where each prompt's number is read.
        of: The model, hidden states (batch, seq, d) and the prompts' tokens to one number per row.
        is_least: Whether nothing can make it smaller than it is where nothing is changed.
    """

    def __init__(
        self,
        name: str,
        text: str,
        positions: Int[Tensor, " n"],
        of: Callable[[LanguageModel, Float[Tensor, "batch seq d"], Inputs], Float[Tensor, " batch"]],
        *,
        is_least: bool = False,
    ) -> None:
        self.name, self.text, self.positions, self._of = name, text, positions, of
        self.is_least = is_least

    def forward(self, lm: LanguageModel, inputs: Inputs) -> Float[Tensor, " batch"]:
        """By a whole forward."""
        return self._of(lm, lm.hidden(inputs.ids, inputs.mask), inputs)

    def spliced(
        self, splicer: Splicer, run: BaseRun, replacements: Mapping[str, Float[Tensor, "batch seq d"]]
    ) -> Float[Tensor, " batch"]:
        """Only the layers above the lowest replacement run."""
        assert run.mask is not None
        return self._of(splicer.lm, splicer.spliced(run, replacements), Inputs(run.ids, run.mask))


@final
class LatentMetric(Metric):
    """The activation of one latent at one position of each prompt.

    Where a selection leaves the latent out the number is 0 and so is its gradient.

    Args:
        placed: Its dictionary.
        latent: Which.
        positions: Where, in each prompt.
    """

    def __init__(self, placed: Placed, latent: int, positions: Int[Tensor, " n"]) -> None:
        if not 0 <= latent < placed.d_sae:
            raise ConfigError(f"a latent must be in [0, {placed.d_sae - 1}]", latent, "Change --latent.")
        self.name, self.text = "latent", f"the activation of latent {latent} at {placed.reads}"
        self.placed, self.latent, self.positions = placed, latent, positions

    def forward(self, lm: LanguageModel, inputs: Inputs) -> Float[Tensor, " batch"]:
        """By a forward that ends where the dictionary reads."""
        x = lm.capture(inputs.ids, [self.placed.reads], inputs.mask)[self.placed.reads]
        rows = torch.arange(len(x), device=x.device)
        at = self.positions.to(x.device)[rows % len(self.positions)]
        encoded = self.placed.dictionary.encode(
            x[rows, at].to(self.placed.directions.device, torch.float32)
        ).compact()
        mine = encoded.indices.long() == self.latent
        value = encoded.acts.new_zeros(len(x))
        return value.index_add(0, encoded.row_ids()[mine], encoded.acts[mine])

    def spliced(
        self, splicer: Splicer, run: BaseRun, replacements: Mapping[str, Float[Tensor, "batch seq d"]]
    ) -> Float[Tensor, " batch"]:
        """By a forward from the first layer: reading in the middle needs no more than that."""
        assert run.mask is not None
        edits = {name: (lambda x, new=new: new.to(x.device, x.dtype)) for name, new in replacements.items()}
        with splicer.lm.edit(edits):
            return self.forward(splicer.lm, Inputs(run.ids, run.mask))


# -- of predictions ------------------------------------------------------------------------------------


def logit_difference(
    lm: LanguageModel, inputs: Inputs, answers: Sequence[str], wrong: Sequence[str], position: int = -1
) -> PredictionMetric:
    """The logit of one token minus that of another.

    Args:
        lm: The model, whose tokens they are.
        inputs: The prompts.
        answers: One for all, or one for each.
        wrong: The same.
        position: Whose prediction; counted from each prompt's end where negative.
    Raises:
        ConfigError: a text is not one token, the two are the same, or the position is outside a prompt.
    """
    a, b = _tokens(lm, answers, len(inputs.ids)), _tokens(lm, wrong, len(inputs.ids))
    if bool((a == b).any()):
        raise ConfigError("answer and wrong must differ", _named(answers), "Change --wrong.")
    text = f"logit of {_named(answers)} minus logit of {_named(wrong)}"
    return _at(lm, inputs, position, "logit_difference", text, lambda z, r: _take(z, a, r) - _take(z, b, r))


def logit(lm: LanguageModel, inputs: Inputs, answers: Sequence[str], position: int = -1) -> PredictionMetric:
    """The logit of one token, minus the mean over the vocabulary, which softmax does not see."""
    a = _tokens(lm, answers, len(inputs.ids))
    return _at(
        lm, inputs, position, "logit", f"logit of {_named(answers)}", lambda z, r: _take(z, a, r) - z.mean(1)
    )


def log_prob(
    lm: LanguageModel, inputs: Inputs, answers: Sequence[str], position: int = -1
) -> PredictionMetric:
    """The log-probability of one token, in nats."""
    a = _tokens(lm, answers, len(inputs.ids))
    text = f"log-probability of {_named(answers)}"
    return _at(lm, inputs, position, "log_prob", text, lambda z, r: _take(z.log_softmax(1), a, r))


def loss(lm: LanguageModel, inputs: Inputs) -> PredictionMetric:
    """The mean cross-entropy of each prompt's own tokens after its first, in nats.

    Raises:
        ConfigError: a prompt has one token only.
    """
    if int(inputs.lengths.min()) < 2:
        raise ConfigError(
            "a prompt whose loss is traced must have at least 2 tokens", 1, "Write a longer one."
        )

    def of(lm: LanguageModel, hidden: Tensor, rows: Inputs) -> Tensor:
        log_probs = lm.logits(hidden[:, :-1]).float().log_softmax(-1)
        truth = rows.ids[:, 1:].to(hidden.device)
        there = rows.mask[:, 1:].to(hidden.device)
        nats = -log_probs.gather(2, truth[:, :, None].long())[:, :, 0]
        return (nats * there).sum(1) / there.sum(1)

    return PredictionMetric("loss", "mean cross-entropy of the prompt's own tokens", inputs.lengths - 2, of)


def kl(lm: LanguageModel, inputs: Inputs, reference: Inputs, position: int = -1) -> PredictionMetric:
    """KL(reference || prompt) of the predictions at one position, in nats; the reference is run once, unedited."""
    at = _positions(inputs, position)
    with torch.no_grad():
        hidden = lm.hidden(reference.ids, reference.mask)
        rows = torch.arange(len(hidden), device=hidden.device)
        where = _positions(reference, position).to(hidden.device)
        truth = lm.logits(hidden[rows, where][:, None])[:, 0].float().log_softmax(1)

    def of(z: Tensor, r: Tensor) -> Tensor:
        own = truth.to(z.device)[r]
        return (own.exp() * (own - z.log_softmax(1))).sum(1)

    same = torch.equal(inputs.ids, reference.ids) and torch.equal(inputs.mask, reference.mask)
    return PredictionMetric(
        "kl", "KL of the predictions from the reference's", at, _read_at(at, of), is_least=same
    )


def of_logits(
    inputs: Inputs,
    of: Callable[[Float[Tensor, "batch vocab"]], Float[Tensor, " batch"]],
    *,
    position: int = -1,
    name: str = "own",
) -> PredictionMetric:
    """A number of your own, made of the logits at one position.

    Args:
        inputs: The prompts.
        of: Differentiable; the row r of what it gets belongs to prompt r % n.
        position: Whose prediction; counted from each prompt's end where negative.
        name: What it is called.
    """
    at = _positions(inputs, position)
    return PredictionMetric(name, name, at, _read_at(at, lambda z, _: of(z)))


def _at(
    lm: LanguageModel,
    inputs: Inputs,
    position: int,
    name: str,
    text: str,
    of: Callable[[Float[Tensor, "batch vocab"], Int[Tensor, " batch"]], Float[Tensor, " batch"]],
) -> PredictionMetric:
    at = _positions(inputs, position)
    return PredictionMetric(name, text, at, _read_at(at, of))


def _read_at(
    at: Int[Tensor, " n"],
    of: Callable[[Float[Tensor, "batch vocab"], Int[Tensor, " batch"]], Float[Tensor, " batch"]],
) -> Callable[[LanguageModel, Tensor, Inputs], Tensor]:
    """Only the logits of one position per row are made."""

    def read(lm: LanguageModel, hidden: Tensor, _: Inputs) -> Tensor:
        rows = torch.arange(len(hidden), device=hidden.device)
        prompt = rows % len(at)
        z = lm.logits(hidden[rows, at.to(hidden.device)[prompt]][:, None])[:, 0].float()
        return of(z, prompt)

    return read


def _positions(inputs: Inputs, position: int) -> Int[Tensor, " n"]:
    """A position of each prompt.

    Raises:
        ConfigError: one has no such position.
    """
    at = inputs.lengths + position if position < 0 else torch.full_like(inputs.lengths, position)
    if bool((at < 0).any()) or bool((at >= inputs.lengths).any()):
        n = int(inputs.lengths.min())
        raise ConfigError(
            f"the position must be inside the prompt, in [-{n}, {n - 1}]", position, "Change --position."
        )
    return at


def _take(
    z: Float[Tensor, "batch vocab"], tokens: Int[Tensor, " n"], prompt: Int[Tensor, " batch"]
) -> Tensor:
    return z.gather(1, tokens.to(z.device)[prompt][:, None])[:, 0]


def _tokens(lm: LanguageModel, texts: Sequence[str], n: int) -> Int[Tensor, " n"]:
    """The one token of each text, for each of n prompts."""
    found = []
    for text in texts:
        ids = lm.tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) != 1:
            pieces = " ".join(repr(lm.token_text(i)) for i in ids) or "none"
            raise ConfigError(
                f"{text!r} must be one token of {lm.name}",
                pieces,
                "Choose another; most words need the space before them.",
            )
        found.append(ids[0])
    if len(found) not in (1, n):
        raise ConfigError(
            f"there must be one token for all {n} prompts, or one for each", len(found), "Give as many."
        )
    return torch.tensor(found * n if len(found) == 1 else found)


def _named(texts: Sequence[str]) -> str:
    return ", ".join(repr(text) for text in texts[:3]) + (" ..." if len(texts) > 3 else "")
