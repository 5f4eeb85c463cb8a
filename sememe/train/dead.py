"""Latents that are pointed anew at set times: which, and where to. Knows one member and its data.

Auxiliary losses (AuxK, ghost gradients) are the architectures' own; this is what is done from outside.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sememe import artifact, dictionaries, metrics
from sememe.dictionaries import Resampling, Trainable
from sememe.dictionaries.initial import unit_rows
from sememe.encoded import Encoded
from sememe.errors import ShapeError
from sememe.source import Batch
from sememe.train.config import TrainConfig
from sememe.train.schedule import Plan

if TYPE_CHECKING:
    from sememe.train.member import Member

__all__ = ["resample", "revive", "rows_wanted", "second_dictionary"]

N_BATCHES = 8
"""Batches among whose rows the new directions are looked for."""
FAINTEST, N_WEAKENED = 1e-3, 8
"""How weak latents are made at most, as silent ones would be dead again; and how often it is looked."""
STRONGER, N_COMPETED = (2.0, 4.0, 8.0, 16.0), 2048
"""How much stronger latents that compete for places may become; and on about how many rows it is looked."""
TOLERATED = 1.02
"""By how much latents that compete for places may worsen the squared error at first, so that more of them live on."""


class _Directions(NamedTuple):
    """What changed latents write and read from now on."""

    out: Float[Tensor, "n d_out"]
    into: Float[Tensor, "n d_in"] | None


def second_dictionary(config: TrainConfig, d_out: int) -> dict[str, str]:
    """The fingerprint of the dictionary that latents are compared with, as a parent of the result; {} if none is.

    Raises:
        ArtifactError: there is none.
        ShapeError: it has another width.
    """
    path = getattr(config.architecture, "resample_against", None)
    if path is None:
        return {}
    saved = artifact.load(path, "dictionary")
    if saved.extra["d_out"] != d_out:
        raise ShapeError(
            f"the dictionary {path} must have d_out={d_out} like the one in training",
            saved.extra["d_out"],
            "Name one of the same hookpoint: --resample-against.",
        )
    return {"resample_against": saved.fingerprint}


def rows_wanted(config: TrainConfig, plan: Plan, step: int) -> int:
    """How many of the rows that come next `revive` looks at before a step: known from the plan alone.

    They stay in the stream: what one member does must not change what another is trained on.
    """
    if step == 0 or step not in plan.resample_steps:
        return 0
    return N_BATCHES * config.batch_size


def revive(member: Member, rows: Batch | None) -> None:
    """Point the member's latents anew if its plan says so for this step.

    Args:
        member: Between two steps.
        rows: As many rows as it wants (raw units, on its device); None if it wants none.
    """
    if member.step > 0 and member.step in member.plan.resample_steps:
        assert rows is not None
        resample(member, rows)


@torch.no_grad()
def resample(member: Member, rows: Batch) -> None:
    """Point latents anew as the architecture's config says; the optimiser begins anew for them, then re-warms.

    Frozen latents stay. Directions are taken relative to what is reconstructed without any latent.

    Sources, by scheme. loss: Bricken et al. 2023, appendix "Neuron Resampling", on 8 batches instead of 819,200
    rows. worst: Cunningham et al. 2023's repository, rows with the largest error, over 8 batches instead of ten
    chunks; the decoder row is pointed there, too, where theirs stays. random: Nanda 2023, directions uniform on
    the sphere instead of Kaiming-uniform entries, which differ little in direction. mcs: proposed by Cunningham,
    Riggs, Ewart & Huben; which latents is theirs, where to as loss.

    Args:
        member: Between two steps.
        rows: Raw rows among which directions are looked for (but with random), and on which they are tempered.
    """
    dictionary = member.dictionary
    resampling = dictionary.resampling()
    assert resampling is not None
    ids = torch.nonzero(_chosen(member, resampling) & ~member.optimiser.frozen).view(-1)
    if ids.numel() == 0:
        return
    for group in dictionary.latent_groups():
        own = ids[(ids >= group.latents.start) & (ids < group.latents.stop)]
        if own.numel():
            _point(member, rows, own, group.outputs, resampling.scheme)
    member.resampled_at = member.step


def _point(member: Member, rows: Batch, ids: Int[Tensor, " n"], outputs: slice, scheme: str) -> None:
    """Point latents that write to some outputs anew; as many as there are rows for."""
    dictionary = member.dictionary
    if scheme == "random":
        device = ids.device
        out = unit_rows(ids.numel(), dictionary.d_out, member.generator).to(device)
        into = unit_rows(ids.numel(), dictionary.d_in, member.generator).to(device)
        directions = _Directions(out, into if _transcodes(member) else None)
    else:
        directions = _badly_reconstructed(member, rows, ids.numel(), outputs, scheme == "worst")
    ids = ids[: directions.out.shape[0]]
    dictionary.reset_latents(ids, *directions)
    _temper(member, rows, ids, outputs)
    member.optimiser.forget(ids)


def _temper(member: Member, rows: Batch, ids: Int[Tensor, " n"], outputs: slice) -> None:
    """Latents just pointed anew must not, all together, make the reconstruction worse.

    Rows with the largest loss are often alike, and hundreds of latents pointed at them fire as one: the reconstruction
    overshoots a hundred times, and a short run spends itself on coming back. Where that is so, they fire so many times
    as strongly as reconstructs these rows best: a ReLU's acts are linear in that factor, and one pass tells it; where
    they are not quite, it is looked again. Where latents compete for k places, see `_fit_places`. Ours: Bricken et al.
    leave their latents to the 25,000 steps that follow.
    """
    dictionary = member.dictionary
    finite = torch.isfinite(rows.x).all(1) & torch.isfinite(rows.target).all(1)
    if not bool(finite.all()):  # such rows are not for a latent; their step will say what they are
        x = rows.x[finite]
        rows = Batch(x, x if rows.target is rows.x else rows.target[finite])
    if not len(rows.x):
        return
    dictionary.settle(ids, rows.x * dictionary.scale_in)
    if not dictionary.weakens:
        return
    if dictionary.competes:
        _fit_places(member, rows, ids, outputs)
        return
    total = 1.0
    for _ in range(N_WEAKENED):
        own, both = _contribution(member, rows, ids, outputs)
        if not math.isfinite(own + both) or own <= 2 * both or own == 0:  # (left - added)^2 <= left^2
            return
        factor = max(both / own, FAINTEST / total)
        if factor >= 1:
            return
        dictionary.weaken(ids, factor)
        total *= factor


def _fit_places(member: Member, rows: Batch, ids: Int[Tensor, " n"], outputs: slice) -> None:
    """Latents that compete for places, just pointed anew, fire as strongly as hardly worsens the reconstruction.

    Weaker ones win fewer places, and from some point on none: there they would be dead again. So the factor is the
    largest, among those tried, at which the error of some rows is at most some percent above what it is without these
    latents; where there is none, that of the smallest error at which they win a place. It is looked for by halves,
    and then more closely.

    Args:
        member: Whose.
        rows: Raw and finite rows.
        ids: The latents.
        outputs: Features whose errors count.
    """
    dictionary, now = member.dictionary, 1.0
    every = max(1, len(rows.x) // N_COMPETED)
    x = rows.x[::every]
    rows = Batch(x, x if rows.target is rows.x else rows.target[::every])
    errors: dict[float, float] = {}
    without = math.inf

    def look(factor: float) -> None:
        """The error, if they win a place."""
        nonlocal now, without
        dictionary.weaken(ids, factor / now)
        now = factor
        error, n_won = _competed(member, rows, ids, outputs)
        if n_won and math.isfinite(error):
            errors[factor] = error
        elif not n_won:
            without = error

    def best() -> float:
        smallest = min(errors.values())
        bound = TOLERATED * (without if math.isfinite(without) else smallest)
        return max((one for one, error in errors.items() if error <= max(bound, smallest)), default=1.0)

    factor = 1.0
    look(factor)
    while factor in errors and factor > FAINTEST:
        factor /= 2
        look(factor)
    if not errors or best() == 1:
        for factor in STRONGER:
            look(factor)
            if errors and best() != factor:
                break
    for ratio in (2**0.5, 2**0.25) if errors else ():
        middle = best()
        look(middle * ratio)
        look(middle / ratio)
    dictionary.weaken(ids, (best() if errors else 1.0) / now)


def _competed(member: Member, rows: Batch, ids: Int[Tensor, " n"], outputs: slice) -> tuple[float, int]:
    """The squared error of some rows as a training step reconstructs them, and how many places some latents win."""
    dictionary, size = member.dictionary, member.config.batch_size
    new = torch.zeros(dictionary.d_sae, dtype=torch.bool, device=ids.device)
    new[ids] = True
    error, n_won = 0.0, 0
    for start in range(0, len(rows.x), size):
        x, target = rows.x[start : start + size], rows.target[start : start + size]
        part = member.scaled(Batch(x, x if rows.target is rows.x else target))
        encoded = dictionary.kept(part.x)
        left = (part.target - dictionary.decode(encoded, part.x))[:, outputs].double()
        error += float(left.square().sum())
        n_won += int(((encoded.acts != 0) & new[encoded.indices]).sum())
    return error, n_won


def _contribution(member: Member, rows: Batch, ids: Int[Tensor, " n"], outputs: slice) -> tuple[float, float]:
    """What some latents add to the reconstruction: its square, and its product with what is left over without it."""
    dictionary, size = member.dictionary, member.config.batch_size
    new = torch.zeros(dictionary.d_sae, dtype=torch.bool, device=ids.device)
    new[ids] = True
    own = both = 0.0
    for start in range(0, len(rows.x), size):
        x, target = rows.x[start : start + size], rows.target[start : start + size]
        part = member.scaled(Batch(x, x if rows.target is rows.x else target))
        encoded = dictionary.kept(part.x)
        theirs = encoded.with_acts(encoded.acts * new[encoded.indices])
        without = dictionary.decode(_silent(dictionary, part.x), part.x)
        added = (dictionary.decode(theirs, part.x) - without)[:, outputs].double()
        left = (part.target - dictionary.decode(encoded, part.x))[:, outputs].double() + added
        own += float((added * added).sum())
        both += float((left * added).sum())
    return own, both


def _silent(dictionary: Trainable, x: Float[Tensor, "rows d_in"]) -> Encoded:
    """Rows on which no latent is active."""
    none = torch.zeros(len(x), 1, device=x.device)
    return Encoded.from_topk(none, none.to(torch.int32), dictionary.d_sae)


def _chosen(member: Member, resampling: Resampling) -> Bool[Tensor, " d_sae"]:
    """Which latents: the silent ones, or those unlike any of the second dictionary's."""
    dictionary = member.dictionary
    if resampling.scheme != "mcs":
        return dictionary.tokens_since_fired > resampling.after_tokens
    assert resampling.against is not None
    with member.optimiser.exported():
        ours = dictionary.decoder_directions().detach()
    theirs = dictionaries.load(resampling.against).decoder_directions().detach().to(ours.device)
    unlike = metrics.mcs(ours, theirs) < resampling.below
    if getattr(dictionary.config, "constant_latent", False):
        unlike[0] = False  # it is not like any
    return unlike


def _transcodes(member: Member) -> bool:
    """Whether latents read elsewhere than they write, so that a direction to write is none to read."""
    sites = member.dictionary.sites
    return member.dictionary.d_in != member.dictionary.d_out or (
        sites is not None and sites.inputs != sites.outputs
    )


def _badly_reconstructed(member: Member, rows: Batch, n: int, outputs: slice, worst: bool) -> _Directions:
    """Up to n of the rows: those with the largest error, or drawn in proportion to its square.

    Args:
        member: Whose errors.
        rows: Raw rows; computed with a batch at a time.
        n: How many.
        outputs: Features whose errors count.
        worst: The largest errors, instead of a draw.
    """
    dictionary, size = member.dictionary, member.config.batch_size
    errors = []
    for start in range(0, rows.x.shape[0], size):
        x, target = rows.x[start : start + size], rows.target[start : start + size]
        part = member.scaled(Batch(x, x if rows.target is rows.x else target))
        recon = dictionary.decode(dictionary.encode(part.x), part.x)
        errors.append((part.target - recon)[:, outputs].square().sum(1))
    error = torch.cat(errors).cpu()  # drawn on the CPU, where the member's generator is
    n = min(n, error.shape[0])
    error = error.nan_to_num(
        0.0, 0.0, 0.0
    )  # such rows are not for a latent; their step will say what they are
    if worst:
        picked = error.topk(n).indices
    else:
        chances = (
            error / error.max().clamp_min(1e-30)
        ).double().square() + 1e-12  # where all is perfect, any row
        picked = torch.multinomial(chances, n, replacement=False, generator=member.generator)
    picked = picked.to(rows.x.device)
    out, into = rows.target[picked], rows.x[picked]
    x, target = member.scaled(Batch(into, out))
    read = x - getattr(dictionary, "b_pre", 0.0) if _transcodes(member) else None
    return _Directions(target - dictionary.decode(_silent(dictionary, x), x), read)
