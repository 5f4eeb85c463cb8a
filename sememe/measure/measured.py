"""The pass over held-out text: one unedited forward per batch, and per arm only the layers above the hookpoint.

Fills the sums of `metrics.py` and turns them into report.json. Knows arms, not where they come from.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from sememe import figures, metrics, text
from sememe.dictionaries.base import Dictionary, Sites
from sememe.errors import ActivationError, TextError
from sememe.lm import LanguageModel
from sememe.measure.arms import Arms, join
from sememe.measure.config import MeasureConfig
from sememe.measure.units import Units
from sememe.progress import track
from sememe.splice import BaseRun, SeveralModels, SeveralSplicers, Splicer
from sememe.text import TokenBlock, TokenPolicy

__all__ = ["Measured", "check_documents", "rows_at", "run"]

LOGIT_ROWS = 256
"""Predictions whose logits are held at once: (rows, vocabulary) in float32 is 50 MB at 49,152 tokens."""


CHECKED_EVERY = 5.0
"""Seconds between two looks at how wide the intervals are, where there is a budget."""
CHECK_DRAWS = 200
NARROW_FLOOR = 1e-4
"""Half a width that is narrow enough whatever the value, which may be 0."""


class _Batch(NamedTuple):
    """One forward's rows: those that are not padding, in order."""

    run: BaseRun
    x: Float[Tensor, "rows d_in"]
    target: Float[Tensor, "rows d_out"]
    valid: Bool[Tensor, " positions"]
    keep: Bool[Tensor, " positions"]
    units: Int[Tensor, " positions"]


LEAST_DOCUMENTS = 2
"""Held-out documents without which nothing can be drawn again."""


def check_documents(config: MeasureConfig, lm: LanguageModel | SeveralModels, policy: TokenPolicy) -> None:
    """Whether there are enough held-out documents for intervals; reads no further than the second.

    Raises:
        TextError: intervals are asked for, and there are not.
    """
    if config.n_bootstrap == 0:
        return
    found: set[int] = set()
    for block in text.token_blocks(
        config.text, lm.tokenizer, policy, split="heldout", n_tokens=config.n_tokens
    ):
        found |= set(np.unique(block.doc_ids[block.keep]).tolist())
        if len(found) >= LEAST_DOCUMENTS:
            return
    raise TextError(
        f"intervals need at least {LEAST_DOCUMENTS} held-out documents",
        len(found),
        "Raise n_tokens or heldout_fraction, or pass --n-bootstrap 0.",
    )


def run(
    config: MeasureConfig, groups: Mapping[str, tuple[Measured, Arms]], since: float | None = None
) -> dict[str, Any]:
    """One pass over the held-out tokens, every group on the same ones; why it stopped, and what a budget was spent on.

    Args:
        config: How many tokens, how long.
        groups: What is measured together, by name: one for each set of sites.
        since: When fitting the nulls began, as `time.monotonic()` has it: a budget counts from there.

    Raises:
        TextError: there was nothing to predict.
    """
    budget = config.budget_seconds()
    reading = checked = time.monotonic()
    started = reading if since is None else since
    why, (first, _) = "all tokens", next(iter(groups.values()))
    for measured, arms in groups.values():
        measured.begin(arms)
    with track("evaluate", config.n_tokens, "tokens") as progress:
        for block, part in first.parts():
            n_tokens = [measured.step(block, part, arms) for measured, arms in groups.values()]
            progress.advance(n_tokens[0])
            if budget is None:
                continue
            now = time.monotonic()
            if now - started >= budget and first.enough_documents():
                why = "the budget is spent"
                break
            if now - checked >= CHECKED_EVERY:
                if all(measured.narrow(arms) for measured, arms in groups.values()):
                    why = "the intervals are narrow enough"
                    break
                checked = time.monotonic()
    for measured, _ in groups.values():
        if measured.n_predictions == 0:
            raise TextError(
                "the held-out text must hold predictions from kept positions",
                f"none in {measured.n_tokens:,} tokens",
                "Raise n_tokens or heldout_fraction, or drop fewer positions.",
            )
    stopped = {"because": why, "n_tokens": first.n_tokens, "budget": config.budget}
    if budget is not None:  # without one, equal runs write equal reports
        ended = time.monotonic()
        stopped["spent"] = {"fitting": round(reading - started, 1), "reading": round(ended - reading, 1)}
    return stopped


class Measured:
    """The sums of one set of sites, and the pass that fills them."""

    def __init__(
        self,
        config: MeasureConfig,
        lm: LanguageModel | SeveralModels,
        splicer: Splicer | SeveralSplicers,
        sites: Sites,
        policy: TokenPolicy,
    ) -> None:
        self.config, self.lm, self.splicer, self.sites, self.policy = config, lm, splicer, sites, policy
        self.loss = metrics.LanguageModelLoss()
        self.loss_by_model: dict[int, metrics.LanguageModelLoss] = {}
        """Where several models are written to, that of each; `loss` is of their mean then."""
        if isinstance(splicer, SeveralSplicers):
            self.loss_by_model = {number: metrics.LanguageModelLoss() for number in splicer.splicers}
        self.kept: dict[str, metrics.Reconstruction] = {}
        self.all_rows: dict[str, metrics.Reconstruction] = {}
        self.sparsity: dict[str, metrics.Sparsity] = {}
        self.by_site: dict[str, list[metrics.Reconstruction]] = {}
        self.units = Units(config.text.tag_fields)
        self.n_tokens = self.n_rows = self.n_outliers = self.n_predictions = 0

    def begin(self, arms: Arms) -> None:
        """Empty sums for every arm."""
        for name, dictionary in arms.dictionaries.items():
            self.kept[name], self.all_rows[name] = metrics.Reconstruction(), metrics.Reconstruction()
            self.sparsity[name] = metrics.Sparsity(dictionary.d_sae)
            if len(self.sites.outputs) > 1 and name not in arms.parts:
                self.by_site[name] = [metrics.Reconstruction() for _ in self.sites.outputs]

    def parts(self) -> Iterator[tuple[TokenBlock, slice]]:
        """The held-out text, one forward's rows after the other."""
        rows = self.config.batch_rows
        blocks = text.token_blocks(
            self.config.text,
            self.lm.tokenizer,
            self.policy,
            split="heldout",
            n_tokens=self.config.n_tokens,
            block_rows=max(rows, 64) // rows * rows,
        )
        for block in blocks:
            for start in range(0, block.ids.shape[0], rows):
                yield block, slice(start, start + rows)

    @torch.inference_mode()
    def step(self, block: TokenBlock, part: slice, arms: Arms) -> int:
        """One forward's rows through every arm; returns the number of tokens."""
        batch = self._forward(block, part)
        flat_valid = torch.nonzero(batch.valid).view(-1)
        keep, units = batch.keep[flat_valid], batch.units[flat_valid]
        predicting, targets = self._predictions(batch)
        hidden = {"base": rows_at(batch.run.hidden, predicting)}
        shape = (*batch.run.ids.shape, batch.target.shape[1])
        for name, dictionary in arms.dictionaries.items():
            encoded = dictionary.encode(batch.x)
            recon = dictionary.decode(encoded, batch.x)
            self.sparsity[name].update(encoded, keep, units)
            self.kept[name].update(batch.target, recon, keep, units)
            self.all_rows[name].update(batch.target, recon, None, units)
            for site, sums in zip(self.sites.outputs, self.by_site.get(name, ()), strict=False):
                columns = slice(site.start, site.stop)
                sums.update(batch.target[:, columns], recon[:, columns], keep, units)
            whole = recon.new_zeros(shape).view(-1, shape[-1]).index_copy_(0, flat_valid, recon).view(shape)
            hidden[name] = self._spliced(batch, whole, predicting)
        hidden["zero"] = self._spliced(batch, batch.target.new_zeros(1), predicting)
        hidden["mean"] = self._spliced(batch, arms.mean, predicting)
        self._compare(hidden, predicting, targets, batch.units[predicting])
        self.n_rows += int(keep.sum())
        self.n_predictions += predicting.shape[0]
        n_tokens = int(flat_valid.shape[0])
        self.n_tokens += n_tokens
        return n_tokens

    def _forward(self, block: TokenBlock, part: slice) -> _Batch:
        """The unedited forward, its finite rows, and which positions the policy keeps."""
        device = self.lm.device
        ids = torch.from_numpy(block.ids[part]).to(device, torch.int64)
        attention = block.attention_mask[part]
        mask = None if attention.all() else torch.from_numpy(attention).to(device)
        run = self.splicer.base(ids, mask)
        valid = torch.from_numpy(attention.reshape(-1)).to(device)
        keep = torch.from_numpy(block.keep[part].reshape(-1)).to(device) & valid
        within = torch.ones_like(keep)
        for site in {s.hookpoint: s for s in (*self.sites.inputs, *self.sites.outputs)}.values():
            rows = run.activations[site.hookpoint].flatten(0, 1)
            norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).to(device)
            bad = ~torch.isfinite(norms) & valid
            if bool(bad.any()):
                at = int(torch.nonzero(bad)[0])
                raise ActivationError(
                    f"activations at {site.hookpoint} must be finite",
                    f"NaN or infinity in document {int(block.doc_ids[part].reshape(-1)[at])}, "
                    f"position {int(block.doc_positions[part].reshape(-1)[at])}",
                    "Load the model in bfloat16 or float32 (--dtype), or check its weights.",
                )
            if site.max_norm is not None:
                within &= norms <= site.max_norm
        self.n_outliers += int((keep & ~within).sum())
        keep &= within
        units = torch.from_numpy(self.units(block, part)).to(device)
        found = {
            name: value.flatten(0, 1).to(device)[valid].float() for name, value in run.activations.items()
        }
        x = join(found, self.sites.inputs)
        same = self.sites.inputs == self.sites.outputs
        return _Batch(run, x, x if same else join(found, self.sites.outputs), valid, keep, units)

    def _predictions(self, batch: _Batch) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Flat positions that are kept and followed by a token of their row, and those tokens."""
        rows, length = batch.run.ids.shape
        followed = torch.zeros_like(batch.keep).view(rows, length)
        followed[:, :-1] = batch.valid.view(rows, length)[:, 1:]
        predicting = torch.nonzero(batch.keep & followed.view(-1)).view(-1)
        return predicting, batch.run.ids.reshape(-1)[predicting + 1]

    def _spliced(
        self, batch: _Batch, new: Float[Tensor, "*any d"], predicting: Int[Tensor, " n"]
    ) -> Float[Tensor, "n d_model"]:
        """The hidden states of predictions when kept positions hold `new` (broadcast, concatenated outputs)."""
        rows, length = batch.run.ids.shape
        keep = batch.keep.view(rows, length, 1)
        replacements = {}
        for site in self.sites.outputs:
            original = batch.run.activations[site.hookpoint]
            part = new[..., site.start : site.stop] if new.shape[-1] > 1 else new
            chosen = torch.where(keep.to(original.device), part.to(original.device, original.dtype), original)
            replacements[site.hookpoint] = chosen
        return rows_at(self.splicer.spliced(batch.run, replacements), predicting)

    def _compare(
        self,
        hidden: dict[str, Float[Tensor, "n d_model"]],
        predicting: Int[Tensor, " n"],
        targets: Int[Tensor, " n"],
        units: Int[Tensor, " n"],
    ) -> None:
        """Cross-entropy and KL of every arm, a few predictions at a time: logits are never held whole."""
        for start in range(0, predicting.shape[0], LOGIT_ROWS):
            part = slice(start, start + LOGIT_ROWS)
            found = [
                self._terms(lm, {name: states[part, own] for name, states in hidden.items()}, targets[part])
                for lm, own in self._heads()
            ]
            for sums, (ce, kl) in zip(self.loss_by_model.values(), found, strict=False):
                sums.update(units[part], ce, kl)
            ce, kl = ({name: _mean([one[i][name] for one in found]) for name in found[0][i]} for i in (0, 1))
            self.loss.update(units[part], ce, kl)

    def _heads(self) -> list[tuple[LanguageModel, slice]]:
        """Each model that is written to, and the part of the hidden states that is its own."""
        if isinstance(self.lm, SeveralModels):
            assert isinstance(self.splicer, SeveralSplicers)
            heads, start = [], 0
            for number, width in self.splicer.widths.items():
                heads.append((self.lm.models[number], slice(start, start + width)))
                start += width
            return heads
        return [(self.lm, slice(None))]

    def _terms(
        self, lm: LanguageModel, hidden: dict[str, Float[Tensor, "n d_model"]], targets: Int[Tensor, " n"]
    ) -> tuple[dict[str, Float[Tensor, " n"]], dict[str, Float[Tensor, " n"]]]:
        """Cross-entropy of every arm, and KL of all but the unedited one, of one model's predictions."""

        def logits(states: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocab"]:
            return lm.logits(states).to(lm.device)

        base = metrics.base_terms(logits(hidden["base"]), targets)
        ce, kl = {"base": base.ce}, {}
        for name, states in hidden.items():
            if name != "base":
                terms = metrics.prediction_terms(base, logits(states), targets)
                ce[name], kl[name] = terms.ce, terms.kl
        return ce, kl

    def enough_documents(self) -> bool:
        """Whether what was read gives intervals, if such are asked for; a budget spent on fitting waits for it."""
        return self.config.n_bootstrap == 0 or len(self.units.of) >= LEAST_DOCUMENTS

    def narrow(self, arms: Arms) -> bool:
        """Whether the intervals of fvu and ce_increase are narrow enough in every arm that is no null."""
        options: dict[str, Any] = {"n_bootstrap": CHECK_DRAWS, "seed": self.config.seed}
        for name in arms.dictionaries:
            if name in arms.controls:
                continue
            found = [
                self.kept[name].compute(**options)["fvu"],
                self.loss.compute(name, **options)["ce_increase"],
            ]
            for statistic in found:
                half = (statistic.high - statistic.low) / 2
                if not half <= max(self.config.narrow_enough * abs(statistic.value), NARROW_FLOOR):
                    return False
        return True

    def drawn(self, name: str) -> dict[str, Float64[np.ndarray, " draws"]]:
        """An arm's fvu, l0, cross-entropy and so on: first over all units, then in each draw of the bootstrap.

        The i-th draw has the same units in every arm, and in every measurement on the same documents.
        """
        n_units, draws = len(self.units.tags), self.config.n_bootstrap
        options = {"n": draws, "seed": self.config.seed, "n_units": n_units}
        found = self.kept[name].drawn(**options) | self.sparsity[name].drawn(**options)
        found["fvu_all_rows"] = self.all_rows[name].drawn(**options)["fvu"]
        return found | self.loss.drawn(name, **options)

    def cheats(self, name: str, dictionary: Dictionary, called: str = "") -> list[str]:
        """Known ways of reconstructing without finding features that an arm shows, a sentence each; or why they are
        not known.

        Args:
            name: The arm.
            dictionary: What it is.
            called: What the sentences call it; "it" if empty.
        """
        found = self.sparsity[name]
        l0 = found.compute()["l0"]
        W_dec = dictionary.decoder_directions().detach()
        n_bad = int((~torch.isfinite(W_dec).all(1)).sum())
        if n_bad or l0.cause:
            why = f"{n_bad:,} decoder rows are NaN or infinite" if n_bad else l0.cause
            return [
                f"Whether {called or 'it'} reconstructs without having found features is not known: {why}."
            ]
        named = metrics.cheats(W_dec, found.density().to(W_dec.device), l0.value).named
        return [f"{called or 'It'} may be {cheat}." for cheat in named]

    # -- the report --------------------------------------------------------------------------------

    def report(self, arms: Arms, beside: Mapping[str, Measured] | None = None) -> dict[str, Any]:
        """report.json, but for what describes the inputs.

        Args:
            arms: What was measured here.
            beside: Nulls that were measured elsewhere, on the same documents.
        """
        beside = beside or {}
        found = {name: self.statistics(name) for name in arms.dictionaries}
        found |= {name: one.statistics(name) for name, one in beside.items()}
        ablations = {name: self._quality(name) for name in ("zero", "mean")}
        main = found["dictionary"]
        main |= self.unedited()
        main |= {f"ce_{name}": values["ce"] for name, values in ablations.items()}
        parts = {name: found[name] for name in arms.parts}
        for values in parts.values():  # what is left out of a part is not silent
            del values["frac_alive"], values["frac_alive_8192"]
        nulls = {name: found[name] for name in found if name != "dictionary" and name not in parts}
        return {
            "format_version": 2,
            **{name: main[name]["value"] for name in figures.HEADLINE if name in main},
            "metrics": main,
            "parts": parts,
            "nulls": nulls,
            "ablations": ablations,
            "density": {name: beside.get(name, self).density(name) for name in found if name not in parts},
            **self._by_tags(nulls, beside),
            **self._by_site(("dictionary", *nulls), beside),
            **self._by_model(arms),
            "bootstrap": self.describe_bootstrap(),
        }

    def describe_bootstrap(self) -> dict[str, Any]:
        """What intervals were drawn from."""
        return {
            "unit": "document" if len(self.units.of) == len(self.units.tags) else "group of documents",
            "n_units": len(self.units.tags),
            "units": self.units.fingerprint(),
            "n": self.config.n_bootstrap,
            "level": 0.95,
            "seed": self.config.seed,
        }

    def describe_text(self, fingerprint: str) -> dict[str, Any]:
        """What was read."""
        return {
            "config": self.config.text.resolved(),
            "fingerprint": fingerprint,
            "split": "heldout",
            "policy": self.policy.resolved(),
            "n_tokens": self.n_tokens,
            "n_rows_kept": self.n_rows,
            "n_norm_outliers": self.n_outliers,
            "n_predictions": self.n_predictions,
            "n_documents": len(self.units.of),
        }

    def _options(self, units: Bool[np.ndarray, " units"] | None) -> dict[str, Any]:
        return {"n_bootstrap": self.config.n_bootstrap, "seed": self.config.seed, "units": units}

    def statistics(self, name: str) -> dict[str, Any]:
        """An arm's numbers with their intervals, as plain data."""
        options = self._options(None)
        statistics = self.kept[name].compute(**options) | self.sparsity[name].compute(**options)
        statistics["fvu_all_rows"] = self.all_rows[name].compute(**options)["fvu"]
        statistics |= self.loss.compute(name, **options)
        return {key: statistic.to_json() for key, statistic in statistics.items()}

    def unedited(self) -> dict[str, Any]:
        """The model's own cross-entropy and perplexity on the same predictions: `ce_base`, `perplexity_base`."""
        return {f"{name}_base": statistic for name, statistic in self._quality("base").items()}

    def _by_site(self, names: Iterable[str], beside: Mapping[str, Measured]) -> dict[str, Any]:
        """The dictionary's and its nulls' reconstruction of each output, where there are several."""
        if not self.by_site:
            return {}
        found: dict[str, Any] = {}
        for name in names:
            measured = beside.get(name, self)
            for site, sums in zip(measured.sites.outputs, measured.by_site[name], strict=True):
                statistics = sums.compute(**self._options(None))
                numbers = {key: statistic.to_json() for key, statistic in statistics.items()}
                if name == "dictionary":
                    found[site.hookpoint] = numbers | {"nulls": {}}
                elif site.hookpoint in found:
                    found[site.hookpoint]["nulls"][name] = numbers
        return {"by_site": found}

    def _by_model(self, arms: Arms) -> dict[str, Any]:
        """Of each model that is written to, what all replacements at once do to its own predictions."""
        if not self.loss_by_model:
            return {}
        assert isinstance(self.lm, SeveralModels)
        options = self._options(None)

        def of(sums: metrics.LanguageModelLoss, name: str) -> dict[str, Any]:
            return {key: one.to_json() for key, one in sums.compute(name, **options).items()}

        return {
            "by_model": {
                str(number): {
                    "model": self.lm.models[number].name,
                    "model_fingerprint": self.lm.models[number].fingerprint,
                    "base": of(sums, "base"),
                    "metrics": of(sums, "dictionary"),
                    "nulls": {name: of(sums, name) for name in arms.controls},
                    "ablations": {name: of(sums, name) for name in ("zero", "mean")},
                }
                for number, sums in self.loss_by_model.items()
            }
        }

    def _quality(self, name: str) -> dict[str, Any]:
        return {key: s.to_json() for key, s in self.loss.compute(name, **self._options(None)).items()}

    def density(self, name: str) -> dict[str, Any]:
        """How often an arm's latents are active, as plain data."""
        found = self.sparsity[name]
        histogram = metrics.density_histogram(found.density())._asdict()
        rows = {n: int(count) for n, count in enumerate(found.rows_with.tolist()) if count}
        options: dict[str, Any] = {"n_bootstrap": self.config.n_bootstrap, "seed": self.config.seed}
        return histogram | {
            **{
                key: {name: one.to_json() for name, one in numbers.items()}
                for key, numbers in (
                    ("shares", found.density_shares(**options)),
                    ("l0_quantiles", found.l0_quantiles(**options)),
                )
            },
            "l0_histogram": [[n, count] for n, count in rows.items()],
        }

    def _by_tags(self, nulls: Iterable[str], beside: Mapping[str, Measured]) -> dict[str, Any]:
        """The dictionary's numbers and its nulls' per language, source, and value of each tag."""

        def reported(groups: dict[str, Any]) -> dict[str, Any]:
            return {
                value: {
                    "n_documents": group["n_documents"],
                    **group["arms"]["dictionary"],
                    "nulls": {
                        name: arm["metrics"] for name, arm in group["arms"].items() if name != "dictionary"
                    },
                }
                for value, group in groups.items()
            }

        found = self.grouped(["dictionary", *(name for name in nulls if name not in beside)])
        for name, one in beside.items():
            theirs = one.grouped([name])
            for ours, other in (
                *((found[axis], theirs[axis]) for axis in ("by_language", "by_source")),
                *((found["by_tag"][field], theirs["by_tag"][field]) for field in found["by_tag"]),
            ):
                for value, group in other.items():
                    ours[value]["arms"] |= group["arms"]
        by_tag = {field: reported(groups) for field, groups in found["by_tag"].items()}
        return {**{key: reported(found[key]) for key in ("by_language", "by_source")}, "by_tag": by_tag}

    def grouped(self, names: Sequence[str], keys: Sequence[str] | None = None) -> dict[str, Any]:
        """Numbers of some arms per language, source, and value of each tag.

        Args:
            names: Which arms.
            keys: Which of their metrics; all if not given.
        """
        by_axis = [self._per_value(axis, names, keys) for axis in range(2 + len(self.units.fields))]
        by_tag = dict(zip(self.units.fields, by_axis[2:], strict=True))
        return {"by_language": by_axis[0], "by_source": by_axis[1], "by_tag": by_tag}

    def _per_value(self, axis: int, names: Sequence[str], keys: Sequence[str] | None) -> dict[str, Any]:
        out = {}
        for value in sorted({tags[axis] for tags in self.units.tags}):
            units = self.units.where(axis, value)
            options = self._options(units)
            base = {f"{key}_base": one for key, one in self.loss.compute("base", **options).items()}
            arms = {}
            for name in names:
                statistics = self.kept[name].compute(**options) | self.sparsity[name].compute(**options)
                statistics["fvu_all_rows"] = self.all_rows[name].compute(**options)["fvu"]
                statistics |= self.loss.compute(name, **options) | base
                # counted by latent, and that for groups of documents of any value (docs/evaluate.md)
                del statistics["frac_alive"], statistics["frac_alive_8192"]
                counts = self.sparsity[name].sums.arrays(len(units)).get("n", np.zeros(len(units)))
                arms[name] = {
                    "n_rows": int(counts[units].sum()),
                    "metrics": {
                        key: one.to_json() for key, one in statistics.items() if keys is None or key in keys
                    },
                }
            n_documents = sum(bool(units[unit]) for unit in self.units.of.values())
            out[value] = {"n_documents": n_documents, "arms": arms}
        return out


def _mean(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).mean(0)


def rows_at(hidden: Float[Tensor, "batch seq d"], index: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
    """Hidden states of positions, counted through the batch."""
    flat = hidden.flatten(0, 1)
    return flat.index_select(0, index.to(flat.device))
