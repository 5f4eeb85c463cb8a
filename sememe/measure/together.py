"""Several dictionaries at several hookpoints, all spliced in at once: each reads what those below it left.

One forward with an edit at every hookpoint. So errors add up as they would in a model that is run on its dictionaries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sememe.dictionaries.base import Dictionary, Site, Sites
from sememe.errors import ConfigError
from sememe.lm import LanguageModel
from sememe.measure.arms import Arms
from sememe.measure.config import MeasureConfig
from sememe.measure.measured import Measured, rows_at
from sememe.splice import Splicer
from sememe.text import TokenBlock, TokenPolicy

__all__ = ["Together", "check_together"]

ARM = "together"
Edit = Callable[[Float[Tensor, "batch seq d"]], Tensor]


def check_together(sites: Mapping[str, Sites]) -> None:
    """Whether dictionaries can be spliced in at once.

    Args:
        sites: Each dictionary's, by name.

    Raises:
        ConfigError: there are fewer than two, one has several inputs or outputs, or two write to the same hookpoint.
    """
    if len(sites) < 2:
        raise ConfigError("together must be asked of two dictionaries or more", len(sites), "Name another.")
    writers: dict[str, str] = {}
    for name, one in sites.items():
        if len(one.inputs) != 1 or len(one.outputs) != 1:
            raise ConfigError(
                "dictionaries spliced together must read and write one hookpoint each",
                f"{name}, which has {len(one.inputs)} inputs and {len(one.outputs)} outputs",
                "Leave it out, or drop together.",
            )
        hookpoint = one.outputs[0].hookpoint
        if hookpoint in writers:
            raise ConfigError(
                "dictionaries spliced together must write to different hookpoints",
                f"{hookpoint} of {writers[hookpoint]} and of {name}",
                "Leave one out, or drop together.",
            )
        writers[hookpoint] = name


class Together(Measured):
    """The sums of one arm that replaces every dictionary's output, and of zeros and means in all those places.

    Args:
        config: As for the dictionaries one by one.
        lm: The language model.
        dictionaries: By name; `check_together` holds of them.
        means: The mean activation at each output's hookpoint.
        policy: The token policy.
    """

    def __init__(
        self,
        config: MeasureConfig,
        lm: LanguageModel,
        dictionaries: Mapping[str, Dictionary],
        means: Mapping[str, Float[Tensor, " d"]],
        policy: TokenPolicy,
    ) -> None:
        self.model, self.members, self.means = lm, dict(dictionaries), dict(means)
        own = [one.sites for one in dictionaries.values() if one.sites is not None]
        sites = Sites(inputs=_side_by_side(own, "inputs"), outputs=_side_by_side(own, "outputs"))
        splicer = Splicer(lm, [s.hookpoint for s in sites.inputs], [s.hookpoint for s in sites.outputs])
        super().__init__(config, lm, splicer, sites, policy)

    @torch.inference_mode()
    def step(self, block: TokenBlock, part: slice, arms: Arms) -> int:
        """One forward's rows, unedited and with every output replaced; returns the number of tokens."""
        batch = self._forward(block, part)
        predicting, targets = self._predictions(batch)
        hidden = {"base": rows_at(batch.run.hidden, predicting)}
        shape = batch.run.ids.shape
        keep, valid = batch.keep.view(shape), batch.valid.view(shape)
        for name, edits in {
            ARM: self._reconstructions(keep, valid),
            "zero": self._constants(
                {name: torch.zeros_like(mean) for name, mean in self.means.items()}, keep
            ),
            "mean": self._constants(self.means, keep),
        }.items():
            with self.model.edit(edits):
                hidden[name] = rows_at(self.model.hidden(batch.run.ids, batch.run.mask), predicting)
        self._compare(hidden, predicting, targets, batch.units[predicting])
        self.n_rows += int(batch.keep.sum())
        self.n_predictions += predicting.shape[0]
        n_tokens = int(batch.valid.sum())
        self.n_tokens += n_tokens
        return n_tokens

    def _reconstructions(
        self, keep: Bool[Tensor, "batch seq"], valid: Bool[Tensor, "batch seq"]
    ) -> dict[str, Edit]:
        """An edit at every hookpoint that is read or written."""
        reads: dict[str, Tensor] = {}
        edits: dict[str, list[Edit]] = {}

        def remember(name: str) -> Edit:
            def keep_it(x: Tensor) -> Tensor:
                reads[name] = x.clone()
                return x

            return keep_it

        def replace(dictionary: Dictionary, read: str) -> Edit:
            def change(x: Tensor) -> Tensor:
                seen = reads.get(read, x)
                rows = seen[valid.to(seen.device)].to(self.lm.device).float()
                recon = dictionary.decode(dictionary.encode(rows), rows)
                new = x.clone()
                new[valid.to(x.device)] = recon.to(x.device, x.dtype)
                return torch.where(keep.to(x.device)[..., None], new, x)

            return change

        for dictionary in self.members.values():
            assert dictionary.sites is not None
            read, write = dictionary.sites.inputs[0].hookpoint, dictionary.sites.outputs[0].hookpoint
            if read != write:
                edits.setdefault(read, []).append(remember(read))
            edits.setdefault(write, []).insert(
                0, replace(dictionary, read)
            )  # whoever reads there reads what it left
        return {name: _one_after_the_other(several) for name, several in edits.items()}

    def _constants(self, values: Mapping[str, Tensor], keep: Bool[Tensor, "batch seq"]) -> dict[str, Edit]:
        def put(value: Tensor) -> Edit:
            return lambda x: torch.where(keep.to(x.device)[..., None], value.to(x.device, x.dtype), x)

        return {name: put(value) for name, value in values.items()}

    def narrow(self, arms: Arms) -> bool:
        """Nobody waits for it."""
        return True

    def summary(self) -> dict[str, Any]:
        """What comparison.json says of it."""
        return {
            "dictionaries": list(self.members),
            "hookpoints": [site.hookpoint for site in self.sites.outputs],
            "metrics": self._quality(ARM),
            "ablations": {name: self._quality(name)["ce"] for name in ("base", "zero", "mean")},
        }


def _one_after_the_other(edits: list[Edit]) -> Edit:
    def all_of_them(x: Tensor) -> Tensor:
        for edit in edits:
            x = edit(x)
        return x

    return all_of_them


def _side_by_side(sites: list[Sites], side: str) -> tuple[Site, ...]:
    """Their sites one behind the other, each hookpoint once, with the strictest of all limits there."""
    limits: dict[str, float] = {}
    for site in (one for each in sites for one in (*each.inputs, *each.outputs)):
        if site.max_norm is not None:
            limits[site.hookpoint] = min(site.max_norm, limits.get(site.hookpoint, site.max_norm))
    found: list[Site] = []
    for site in (one for each in sites for one in getattr(each, side)):
        if site.hookpoint not in {one.hookpoint for one in found}:
            start = found[-1].stop if found else 0
            stop, limit = start + site.stop - site.start, limits.get(site.hookpoint)
            found.append(site.replace(start=start, stop=stop, max_norm=limit))
    return tuple(found)
