"""What can be patched: a dictionary's latents, or a baseline's directions. Knows both runs' rows; runs no model.

With c a latent's activation in the run that is edited, c' in the other and f the direction that it writes, patching the
latents in F adds the sum over F of (c' - c) f. What is the same in both runs is no candidate: patching it adds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sememe.dictionaries.base import Dictionary
from sememe.dictionaries.pca import PCA
from sememe.measure import Material, make_null
from sememe.patch.runs import Part, Runs

__all__ = ["Arm", "baseline", "of_dictionary"]

Codes = Callable[[Float[Tensor, "rows d_in"]], Float[Tensor, "rows m"]]


class Arm(NamedTuple):
    """Candidates for being patched. They are named by their place in `latents`."""

    name: str
    is_dictionary: bool
    about: dict[str, Any]
    n_latents: int
    """Of all, candidates or not."""
    latents: tuple[int, ...]
    """Those that are not the same in both runs everywhere."""
    directions: Float[Tensor, "m d_out"]
    """What they write."""
    changes: list[Float[Tensor, "rows m"]]
    """c' - c, for each part of the runs; 0 where nothing may be edited."""

    def moves(self, chosen: Sequence[int]) -> list[Float[Tensor, "_ d_out"]]:
        """What patching some of them adds."""
        columns = list(chosen)
        if len(columns) == len(self.latents):
            return [change @ self.directions for change in self.changes]
        directions = self.directions[columns]
        return [change[:, columns] @ directions for change in self.changes]


def of_dictionary(name: str, dictionary: Dictionary, runs: Runs, about: dict[str, Any] | None = None) -> Arm:
    """A dictionary's latents. Only those are held that fire in one of the runs."""
    fires = torch.zeros(dictionary.d_sae, dtype=torch.bool)
    pairs, l0, n_rows = [], 0, 0
    with torch.no_grad():
        for part in runs.parts:
            pair = dictionary.encode(part.x).compact(), dictionary.encode(part.other).compact()
            pairs.append(pair)
            for encoded in pair:
                fires[encoded.indices.long()[encoded.acts != 0].cpu()] = True
                l0, n_rows = l0 + int(encoded.l0().sum()), n_rows + encoded.n_rows
        firing = torch.nonzero(fires).flatten().tolist()
        changes = [
            (there.columns(firing) - here.columns(firing)) * _editable(runs, part)[:, None]
            for part, (here, there) in zip(runs.parts, pairs, strict=True)
        ]
        differs = torch.zeros(len(firing), dtype=torch.bool)
        for change in changes:
            differs |= (change != 0).any(0).cpu()
        columns = torch.nonzero(differs).flatten().tolist()
        latents = [firing[column] for column in columns]
        directions = dictionary.decoder_directions().detach().float()[latents]
    about = {"l0": l0 / max(n_rows, 1), **(about or {})}
    return Arm(
        name,
        True,
        about,
        dictionary.d_sae,
        tuple(latents),
        directions,
        [change[:, columns] for change in changes],
    )


def baseline(
    name: str, runs: Runs, first: Dictionary, first_l0: float, material: Material | None, seed: int
) -> Arm:
    """A baseline's directions.

    Args:
        name: Which.
        runs: Whose rows.
        first: The dictionary that random directions are as many as.
        first_l0: How many of its latents are active.
        material: What is fitted, is fitted to these rows.
        seed: Of what is drawn.
    """
    d = first.d_in
    if name == "random_rotation":
        drawn = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        basis = torch.linalg.qr(drawn).Q.float().to(runs.parts[0].x.device)
        return _linear(name, runs, lambda x: x @ basis.T, basis)
    if name == "difference_in_means":
        unit = _difference_in_means(runs)
        return _linear(name, runs, lambda x: x @ unit.T, unit)
    assert material is not None
    sites = runs.sites
    kind = "pca" if name == "pca_signs" else name
    k = max(1, round(first_l0)) if name == "random_directions" else d
    made, about = make_null(kind, k, first.d_sae, seed, sites, material)
    if name != "pca_signs":
        arm = of_dictionary(name, made, runs, {key: about[key] for key in ("converged",) if key in about})
        return arm._replace(is_dictionary=False)
    assert isinstance(made, PCA)
    components, mean = made.W_dec, made.b_dec

    def halves(x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows two_d"]:
        codes = (x - mean) @ components.T
        return torch.cat([codes, -codes], dim=1).clamp_min(0)

    return _linear(name, runs, halves, torch.cat([components, -components]))


def _linear(name: str, runs: Runs, codes: Codes, directions: Float[Tensor, "m d_out"]) -> Arm:
    """Directions whose codes are known for any row."""
    with torch.no_grad():
        changes = [
            (codes(part.other) - codes(part.x)) * _editable(runs, part)[:, None] for part in runs.parts
        ]
    return Arm(name, False, {}, len(directions), tuple(range(len(directions))), directions, changes)


def _difference_in_means(runs: Runs) -> Float[Tensor, "1 d"]:
    """The unit direction of the mean difference of the two runs, over the places where they differ."""
    total = torch.zeros_like(runs.parts[0].x[0])
    for part in runs.parts:
        total += ((part.other - part.x) * _editable(runs, part)[:, None]).sum(0)
    unit: Tensor = total / total.norm().clamp_min(1e-12)
    return unit[None]


def _editable(runs: Runs, part: Part) -> Bool[Tensor, " rows"]:
    """Rows that are no filling and not over a site's limit of norm (attention sinks): the others are never changed."""
    return part.real & runs.sites.admit(part.x)
