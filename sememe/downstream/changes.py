"""What an ablation changes in a model's predictions: losses, and the tokens that rise and fall. Runs no layer.

With z the logits and D the change of what the unembedding sees, a linear unembedding changes the logits by u = W D,
and the log-probability of a token v by

    u_v - log sum_w p_w exp(u_w)            p: the unedited probabilities

which is computed so: half-precision logits are good to about 0.05 nats, and the difference of two of them would drown
small effects; u is rounded relative to itself. Where the unembedding is not linear (soft-capping), u is the
difference of the two logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sememe.errors import ActivationError
from sememe.lm import LanguageModel

__all__ = ["Changes", "Predictions", "Unembedding"]

ROWS = 384
"""Rows of logits made at once, so that the unembedding's matrix is read once for many: 384 x 50,000 in bfloat16 are
38 MB."""
CACHED_ROWS = 8
"""And looked at at once, so that on a CPU they stay in its cache."""

PART = 128
"""Tokens of the vocabulary of which the largest is looked for first."""


class Changes(NamedTuple):
    """What each of n ablations changes, in nats. Losses are 0 where `n_scored` says there is no token to predict."""

    loss: Float[Tensor, " n"]
    """Of the true next token, unedited."""
    loss_change: Float[Tensor, " n"]
    """Ablated minus unedited: above 0 where the latent helped."""
    loss_change_after: Float[Tensor, " n"]
    """Summed over the predictions of the tokens after the next one."""
    scored: Bool[Tensor, " n"]
    """Whether there is a next token."""
    n_after: Int[Tensor, " n"]
    """Predictions behind `loss_change_after`."""
    kl: Float[Tensor, " n"]
    """From the unedited prediction at the position to the ablated one."""
    logit_change: Float[Tensor, " n"]
    """Of the true next token's logit, minus the mean over the vocabulary."""
    raised: Int[Tensor, "n shown"]
    """Of the likeliest tokens, those whose log-probability rises most."""
    raised_by: Float[Tensor, "n shown"]
    lowered: Int[Tensor, "n shown"]
    """And falls most."""
    lowered_by: Float[Tensor, "n shown"]


class _Found(NamedTuple):
    """Filled place by place."""

    changed: Float[Tensor, "n after_plus_1"]
    loss: Float[Tensor, " n"]
    kl: Float[Tensor, " n"]
    logit: Float[Tensor, " n"]
    tokens: Int[Tensor, "2 n shown"]
    by: Float[Tensor, "2 n shown"]


class Unembedding:
    """What is to be known of a model's unembedding, looked at once; and memory for its logits, used again and again.

    Fresh memory for tens of megabytes costs a CPU as much as the product that fills it. `Predictions` made with one and
    the same of these share it: only the last of them is good.

    Args:
        lm: The model.
        seen: A few rows of what its unembedding sees.
    """

    def __init__(self, lm: LanguageModel, seen: Float[Tensor, "n d_hidden"]) -> None:
        self.lm = lm
        bias = lm.logits(torch.zeros_like(seen[:1])).float()
        self.constant = bias if bool(bias.any()) else None
        """Its bias, if it has one."""
        whole, half = (
            lm.logits(x).float() - (0.0 if self.constant is None else bias) for x in (seen, seen / 2)
        )
        self.linear = bool((whole - 2 * half).norm() <= 0.02 * whole.norm())
        """Whether twice the input gives twice the logits."""
        self.weight: Tensor | None = None
        """Its matrix, where the logits are the product with it and nothing else."""
        weight = lm.embeddings()[1]
        if self.linear and self.constant is None and _fits(weight, seen):
            plain = (seen @ weight.T).float()
            same = (plain - whole).norm() <= (1e-2 if seen.element_size() < 4 else 1e-4) * whole.norm()
            self.weight = weight if bool(same) else None
        self._rooms: dict[str, Tensor] = {}

    def logits(self, hidden: Float[Tensor, "n d_hidden"], room: str) -> Float[Tensor, "n vocab"]:
        """Of some rows, in the memory of that name where there is some."""
        if self.weight is None:
            return self.lm.logits(hidden)
        n, vocab = len(hidden), self.weight.shape[0]
        if room not in self._rooms or len(self._rooms[room]) < n:
            self._rooms.pop(room, None)
            self._rooms[room] = hidden.new_empty(n, vocab)
        return torch.mm(hidden, self.weight.T, out=self._rooms[room][:n])


def _fits(weight: Tensor, seen: Tensor) -> bool:
    return weight.is_floating_point() and (weight.dtype, weight.device) == (seen.dtype, seen.device)


class Predictions:
    """What an unedited run predicts at some places.

    Args:
        lm: The model.
        ids: The contexts' tokens.
        hidden: What its unembedding saw.
        wanted: The positions at which predictions will be compared.
        unembedding: The model's, if it was looked at before.
    """

    def __init__(
        self,
        lm: LanguageModel,
        ids: Int[Tensor, "batch seq"],
        hidden: Float[Tensor, "batch seq d_hidden"],
        wanted: Bool[Tensor, "batch seq"],
        unembedding: Unembedding | None = None,
    ) -> None:
        self.lm, self.ids, self.hidden = lm, ids, hidden
        rows, positions = torch.nonzero(wanted, as_tuple=True)
        self.number = torch.full(wanted.shape, -1, dtype=torch.long)
        self.number[rows, positions] = torch.arange(len(rows))
        seen = hidden[rows.to(hidden.device), positions.to(hidden.device)]
        self.unembedding = unembedding if unembedding is not None else Unembedding(lm, seen[:8])
        self.constant, self.linear = self.unembedding.constant, self.unembedding.linear
        if self.unembedding.weight is not None:
            self.logits = self.unembedding.logits(seen, "unedited")
        else:
            self.logits = torch.cat([lm.logits(part) for part in torch.split(seen, ROWS)])
        self.norms = torch.cat([few.float().logsumexp(-1) for few in torch.split(self.logits, CACHED_ROWS)])
        self.likeliest: dict[int, Tensor] = {}
        """By place: the likeliest tokens there, which many ablations ask for."""

    def losses(self) -> Float[Tensor, "batch seq"]:
        """Of each true next token, unedited, in nats; 0 where it was not asked for, and at the last position."""
        out = torch.zeros(self.number.shape)
        rows, positions = torch.nonzero(self.number[:, :-1] >= 0, as_tuple=True)
        number = self.number[rows, positions].to(self.logits.device)
        target = self.ids[rows, positions + 1].to(self.logits.device)
        out[rows, positions] = (self.norms[number] - self.logits[number, target].float()).cpu()
        return out

    def changes(
        self,
        hidden: Float[Tensor, "n after_plus_1 d_hidden"],
        rows: Int[Tensor, " n"],
        positions: Int[Tensor, " n"],
        scored: Bool[Tensor, "n after_plus_1"],
        *,
        n_shown: int,
        n_likeliest: int,
    ) -> Changes:
        """What ablations change.

        Args:
            hidden: What the unembedding sees from each ablation's position on.
            rows: The ablations' contexts.
            positions: Their positions.
            scored: Whether there is a next token whose loss counts, at the position and each one after it.
            n_shown: Tokens named at either end.
            n_likeliest: Only the so many likeliest tokens, before and after, are named.
        Raises:
            ActivationError: an ablation drives the model to NaN or infinity.
        """
        n, width = scored.shape
        n_shown = min(n_shown, self.lm.vocab_size)
        found = _Found(
            torch.zeros(n, width),
            torch.zeros(n),
            torch.zeros(n),
            torch.zeros(n),
            torch.zeros(2, n, n_shown, dtype=torch.long),
            torch.zeros(2, n, n_shown),
        )
        wanted = scored.clone()
        wanted[:, 0] = True
        step = ROWS if self.logits.is_cuda else CACHED_ROWS
        for t in range(width):
            for i in torch.split(torch.nonzero(wanted[:, t])[:, 0], ROWS):
                logits = self._moved(hidden[i.to(hidden.device), t], rows[i], positions[i] + t)
                for few, part in zip(torch.split(i, step), torch.split(logits, step), strict=True):
                    self._compare(found, part, few, t, rows, positions, scored, n_shown, n_likeliest)
        return Changes(
            found.loss,
            found.changed[:, 0],
            found.changed[:, 1:].sum(1),
            scored[:, 0],
            scored[:, 1:].sum(1),
            found.kl,
            found.logit,
            found.tokens[0],
            found.by[0],
            found.tokens[1],
            found.by[1],
        )

    def _moved(
        self, hidden: Float[Tensor, "m d_hidden"], rows: Int[Tensor, " m"], positions: Int[Tensor, " m"]
    ) -> Float[Tensor, "m vocab"]:
        """The change of the logits where the unembedding is linear, and the new logits where it is not."""
        if not self.linear:
            return self.lm.logits(hidden)
        base = self.hidden[rows.to(self.hidden.device), positions.to(self.hidden.device)]
        return self.unembedding.logits((hidden.float() - base.float()).to(hidden.dtype), "moved")

    def _compare(
        self,
        found: _Found,
        logits: Float[Tensor, "m vocab"],
        i: Int[Tensor, " m"],
        t: int,
        rows: Int[Tensor, " n"],
        positions: Int[Tensor, " n"],
        scored: Bool[Tensor, "n after_plus_1"],
        n_shown: int,
        n_likeliest: int,
    ) -> None:
        """Note what some predictions change, of the token `t` after the next one; `logits` are those of `_moved`."""
        row, position = rows[i], positions[i] + t
        number = self.number[row, position]
        assert bool((number >= 0).all()), "a prediction is compared that was not asked for"
        number = number.to(self.logits.device)
        before, u = self.logits.index_select(0, number).float(), logits.float()
        if not self.linear:
            u -= before
        elif self.constant is not None:
            u -= self.constant
        log_p = before.sub_(self.norms[number][:, None])
        after = log_p + u
        if t == 0:
            n_likeliest = max(min(n_likeliest, u.shape[1]), n_shown)
            likely = torch.cat(
                [self._likeliest(number, log_p, n_likeliest), _largest(after, n_likeliest)], dim=1
            )
        shift = after.exp_().sum(1).log_()
        if not bool(torch.isfinite(shift).all()):
            raise ActivationError(
                "an ablation must leave the model's output finite",
                "NaN or infinity",
                "Check the decoder's weights.",
            )
        has = scored[i, t]
        target = self.ids[row, (position + 1).clamp(max=self.ids.shape[1] - 1)].to(u.device)[:, None]
        own = u.gather(1, target)[:, 0]
        found.changed[i, t] = torch.where(has, (shift - own).cpu(), 0.0)
        if t > 0:
            return
        found.loss[i] = torch.where(has, -log_p.gather(1, target)[:, 0].cpu(), 0.0)
        found.logit[i] = torch.where(has, (own - u.mean(1)).cpu(), 0.0)
        found.kl[i] = (shift - log_p.exp_().mul_(u).sum(1)).clamp(min=0).cpu()
        for end, (ids, values) in enumerate(_extremes(likely, u, shift, n_shown)):
            found.tokens[end, i], found.by[end, i] = ids.cpu(), values.cpu()

    def _likeliest(
        self, number: Int[Tensor, " n"], log_p: Float[Tensor, "n vocab"], n_likeliest: int
    ) -> Int[Tensor, "n likeliest"]:
        """Of the unedited predictions; looked for once at each place."""
        numbers = number.tolist()
        first = {one: i for i, one in reversed(list(enumerate(numbers))) if one not in self.likeliest}
        if first:
            found = _largest(log_p[list(first.values())], n_likeliest)
            self.likeliest |= dict(zip(first, found, strict=True))
        return torch.stack([self.likeliest[one] for one in numbers])


def _largest(x: Float[Tensor, "n vocab"], k: int) -> Int[Tensor, "n k"]:
    """Where the k largest of each row are.

    They lie in the k parts of the row that have the largest maxima, and only those are sorted: on a CPU `topk` of a
    whole vocabulary takes twice as long.
    """
    n, vocab = x.shape
    n_parts = vocab // PART
    if n_parts < 2 * k:
        return x.topk(k, dim=1).indices
    whole = n_parts * PART
    parts = x[:, :whole].view(n, n_parts, PART).amax(2).topk(k, dim=1).indices
    places = (parts[:, :, None] * PART + torch.arange(PART, device=x.device)).flatten(1)
    places = torch.cat([places, torch.arange(whole, vocab, device=x.device).expand(n, -1)], 1)
    return places.gather(1, x.gather(1, places).topk(k, dim=1).indices)


def _extremes(
    likely: Int[Tensor, "n likely"], u: Float[Tensor, "n vocab"], shift: Float[Tensor, " n"], n_shown: int
) -> list[tuple[Int[Tensor, "n shown"], Float[Tensor, "n shown"]]]:
    """Of the likeliest tokens before and after, those that rise most and those that fall most."""
    likely = likely.sort(dim=1).values
    again = torch.zeros_like(likely, dtype=torch.bool)
    again[:, 1:] = likely[:, 1:] == likely[:, :-1]
    change = u.gather(1, likely) - shift[:, None]
    found = []
    for sign in (1.0, -1.0):
        ranked = (sign * change).masked_fill(again, -torch.inf).topk(n_shown, dim=1)
        found.append((likely.gather(1, ranked.indices), sign * ranked.values))
    return found
