"""Latents changed inside a running model. Knows dictionaries and their sites; knows no text and no verb.

With f the latents' activations, f' what an edit makes of them, and D the decoder directions:

    error kept:     x' = x + (f' - f) D          the part that the dictionary misses stays
    error dropped:  x' = decode(f')              only what the dictionary sees stays

so that with the error kept an edit that changes no activation changes no bit of x. Rows whose norm is over the
site's limit (attention sinks, which the dictionary was not trained on) are never changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from sememe.config import Config
from sememe.dictionaries.base import Dictionary, Site
from sememe.encoded import Encoded
from sememe.errors import ActivationError, ConfigError, HookpointError, MismatchError, ShapeError
from sememe.lm import LanguageModel
from sememe.splice import check_places

__all__ = ["Intervention", "LatentEdit", "check", "editing"]

_WITH_VALUE = ("clamp", "scale", "add")
_FROM_OTHER = ("mean", "resample", "patch")
_BLIND = ("add", "project_out")
"""Edits that need not know which latents fire: nothing is encoded for them."""


class LatentEdit(Config):
    """One change of some latents' activations, wherever the intervention acts."""

    latents: tuple[int, ...] = Field(min_length=1)
    """Which latents."""
    how: Literal["zero", "mean", "resample", "clamp", "scale", "add", "patch", "project_out"] = "zero"
    """zero: ablate. mean: set to the latent's mean over the other activations. resample: set to what the latents are
    in a row of the other activations, drawn anew for every row. clamp: set to value. scale: multiply by value. add: add
    value, active or not (steering). patch: set to what they are at the same place of the other activations.
    project_out: leave nothing along the latents' directions, whatever wrote it."""
    value: float | None = None
    """In activation units (clamp, add) or as a factor (scale); the others take none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        wants = self.how in _WITH_VALUE
        if wants != (self.value is not None):
            raise ConfigError(
                f"an edit that is {self.how!r} {'needs a' if wants else 'takes no'} value",
                self.value,
                "Set value." if wants else "Drop value.",
            )
        return self


class Intervention:
    """Edits of one dictionary's latents.

    Args:
        dictionary: Folded, with sites.
        edits: In the order in which they are made; project_out comes last.
        error: Whether what the dictionary does not reconstruct is kept or dropped.
        keep: Positions of a whole forward at which edits act; all if not given. Not for generation.
        positions: The same for all rows: token numbers, those below 0 from the end of the prompt. In generation new
            tokens count on after the prompt.
        other: Activations of another run at the dictionary's inputs, by hookpoint, for mean, resample and patch; patch
            wants them in the shape of the run that is edited.
        seed: Of the rows that resample draws.

    Raises:
        ConfigError: a latent does not exist, or an edit lacks the other activations.
        MismatchError: the dictionary does not know its hookpoints.
    """

    def __init__(
        self,
        dictionary: Dictionary,
        edits: Sequence[LatentEdit],
        *,
        error: Literal["keep", "drop"] = "keep",
        keep: Bool[Tensor, "batch seq"] | None = None,
        positions: Sequence[int] | None = None,
        other: Mapping[str, Float[Tensor, "rows_of other d"]] | None = None,
        seed: int = 0,
    ) -> None:
        if dictionary.sites is None:
            raise MismatchError(
                "the dictionary must know its model and hookpoint",
                "none (it was trained on bare tensors)",
                "Train it from a store.",
            )
        self.dictionary, self.sites, self.edits = dictionary, dictionary.sites, tuple(edits)
        self.error, self.keep, self.seed = error, keep, seed
        self.positions = None if positions is None else tuple(positions)
        self.latents = tuple(dict.fromkeys(latent for edit in edits for latent in edit.latents))
        for latent in self.latents:
            if not 0 <= latent < dictionary.d_sae:
                raise ConfigError(
                    f"a latent must be in [0, {dictionary.d_sae - 1}]", latent, "Change --latents."
                )
        lacking = next((edit.how for edit in edits if edit.how in _FROM_OTHER and other is None), None)
        if lacking is not None:
            raise ConfigError(
                f"an edit that is {lacking!r} needs the activations of another run",
                "none",
                "Give other=lm.capture(ids, hookpoints).",
            )
        self._other = None if other is None else self._acts_at(other)
        self._columns = {latent: i for i, latent in enumerate(self.latents)}
        self._generator = torch.Generator().manual_seed(seed)
        outside = [latent for edit in self.edits if edit.how == "project_out" for latent in edit.latents]
        self._basis = {site.hookpoint: self._span(site, outside) for site in self.sites.outputs}
        self._blind = error == "keep" and all(edit.how in _BLIND for edit in self.edits)

    # -- the arithmetic ----------------------------------------------------------------------------

    def after(
        self,
        before: Float[Tensor, "rows n"],
        same_place: Float[Tensor, "rows n"] | None = None,
    ) -> Float[Tensor, "rows n"]:
        """What the edits make of the activations of `latents`, in their order; `same_place` is the other run's."""
        after = before.clone()
        for edit in self.edits:
            chosen = [self._columns[latent] for latent in edit.latents]
            if edit.how == "scale":
                after[:, chosen] *= edit.value or 0.0
            elif edit.how == "add":
                after[:, chosen] += edit.value or 0.0
            elif edit.how in _FROM_OTHER:
                after[:, chosen] = self._from_other(edit, len(before), same_place)[:, chosen].to(after)
            elif edit.how != "project_out":
                after[:, chosen] = edit.value or 0.0
        return after

    def _from_other(
        self, edit: LatentEdit, n_rows: int, same_place: Float[Tensor, "rows n"] | None
    ) -> Float[Tensor, "rows n"]:
        assert self._other is not None
        rows = self._other.flatten(0, 1)
        if edit.how == "mean":
            return rows.mean(0, keepdim=True).expand(n_rows, -1)
        if edit.how == "resample":
            return rows[torch.randint(len(rows), (n_rows,), generator=self._generator).to(rows.device)]
        assert same_place is not None
        return same_place

    def _acts_at(self, activations: Mapping[str, Tensor]) -> Float[Tensor, "batch seq n"]:
        """What `latents` are on recorded activations."""
        x, lead = self._rows(activations)
        with torch.no_grad():
            acts = self.dictionary.encode_latents(x, self.latents)
        return acts.reshape(1 if len(lead) == 1 else lead[0], -1, len(self.latents))

    def _rows(self, activations: Mapping[str, Tensor]) -> tuple[Float[Tensor, "rows d_in"], torch.Size]:
        inputs = [activations[site.hookpoint] for site in self.sites.inputs]
        device = self.dictionary.decoder_directions().device
        parts = [part.reshape(-1, part.shape[-1]).to(device, torch.float32) for part in inputs]
        return torch.cat(parts, dim=1), inputs[0].shape[:-1]

    def _span(self, site: Site, latents: Sequence[int]) -> Float[Tensor, "d_site rank"] | None:
        """An orthonormal basis of what the directions of some latents span in one output."""
        if not latents:
            return None
        directions = self.dictionary.decoder_directions()[list(latents), site.start : site.stop]
        u, sizes, _ = torch.linalg.svd(directions.detach().double().T, full_matrices=False)
        basis: Tensor = u[:, sizes > 1e-6 * sizes.max().clamp_min(1e-30)]
        return basis.float()

    def edited(
        self,
        activations: Mapping[str, Float[Tensor, "batch seq d"]],
        first: int = 0,
        n_prompt: int | None = None,
    ) -> dict[str, Tensor]:
        """What each output hookpoint becomes, from the activations at all inputs and outputs of one forward.

        Args:
            activations: By hookpoint.
            first: The number of the first position among all tokens.
            n_prompt: Tokens of the prompt, where this is a generation; else the forward is the whole of it.

        Raises:
            ShapeError: `keep` is of another shape, or the other run is.
            ConfigError: a position is outside the prompt.
            ActivationError: an edit gave NaN or infinity.
        """
        x, lead = self._rows(activations)
        here = self._acts_here(x, lead, first, n_prompt)
        rows = None if bool(here.all()) else here.nonzero()[:, 0]
        base, moved = self._moved(x if rows is None else x[rows], rows, lead, first)
        return {
            site.hookpoint: self._write(site, activations, base, moved, rows) for site in self.sites.outputs
        }

    def _moved(
        self, x: Float[Tensor, "rows d_in"], rows: Int[Tensor, " rows"] | None, lead: torch.Size, first: int
    ) -> tuple[Float[Tensor, "rows d_out"] | None, Float[Tensor, "#rows d_out"]]:
        """What the rows are replaced by (None: they stay), and what is added."""
        directions = self.dictionary.decoder_directions()[list(self.latents)].float()
        if self._blind:
            before = directions.new_zeros(1, len(self.latents))
            return None, self.after(before) @ directions
        same_place = self._same_place(rows, lead, first)
        if self.error == "keep":
            before = self.dictionary.encode_latents(x, self.latents)
            return None, (self.after(before, same_place) - before) @ directions
        encoded = self.dictionary.encode(x)
        after = self.after(encoded.columns(self.latents), same_place)
        # the edited latents are decoded once, with their new activations
        others = encoded.with_acts(torch.where(self._is_edited(encoded), 0.0, encoded.acts))
        return self.dictionary.decode(others, x), after @ directions

    def _same_place(
        self, rows: Int[Tensor, " rows"] | None, lead: torch.Size, first: int
    ) -> Float[Tensor, "rows n"] | None:
        if not any(edit.how == "patch" for edit in self.edits):
            return None
        assert self._other is not None
        batch, seq = (1, lead[0]) if len(lead) == 1 else (lead[0], lead[1])
        if self._other.shape[0] != batch or self._other.shape[1] < first + seq:
            raise ShapeError(
                f"to patch, the other run must have the shape of this one, {(batch, first + seq)}",
                tuple(self._other.shape[:2]),
                "Give prompts of equal length (in tokens) in each pair.",
            )
        if first == 0 and self._other.shape[1] != seq and self.positions is None:
            raise ShapeError(
                f"to patch every position, the other run must have {seq} tokens",
                self._other.shape[1],
                "Give prompts of equal length (in tokens) in each pair, or positions.",
            )
        place = self._other[:, first : first + seq].flatten(0, 1)
        return place if rows is None else place[rows]

    def _is_edited(self, encoded: Encoded) -> Bool[Tensor, " nnz"]:
        edited = torch.zeros(encoded.d_sae, dtype=torch.bool, device=encoded.indices.device)
        edited[list(self.latents)] = True
        return edited[encoded.indices.long()]

    def _write(
        self,
        site: Site,
        activations: Mapping[str, Tensor],
        base: Float[Tensor, "rows d_out"] | None,
        moved: Float[Tensor, "#rows d_out"],
        rows: Int[Tensor, " rows"] | None,
    ) -> Tensor:
        old = activations[site.hookpoint]
        part = slice(site.start, site.stop)
        flat = old.reshape(-1, old.shape[-1]).to(moved.device, torch.float32)
        mine = flat if rows is None else flat[rows]
        new = (mine if base is None else base[:, part]) + moved[:, part]
        basis = self._basis[site.hookpoint]
        if basis is not None:
            new = new - (new @ basis) @ basis.T
        new = new.to(old.dtype)
        # the norm and not the entries: layer norms square what they get, and give zeros when that overflows
        if not bool(torch.isfinite(new.detach().float().norm(dim=1)).all()):
            raise ActivationError(
                f"an edit at {site.hookpoint} must give activations of finite norm",
                "NaN or infinity",
                "Lower the strength, or check the model's activations.",
            )
        if rows is not None:
            new = flat.to(old.dtype).index_put((rows,), new)
        return new.reshape(old.shape).to(old.device)

    def _acts_here(
        self, x: Float[Tensor, "rows d_in"], lead: torch.Size, first: int, n_prompt: int | None
    ) -> Bool[Tensor, " rows"]:
        here = self.sites.admit(x.detach())
        if self.keep is not None:
            if self.keep.shape != lead:
                raise ShapeError(
                    f"the positions to edit must have the shape of the batch {tuple(lead)}",
                    tuple(self.keep.shape),
                    "Give one value per token, or none for generation.",
                )
            here &= self.keep.reshape(-1).to(x.device)
        if self.positions is not None:
            here &= self._at(lead[-1], first, n_prompt).to(x.device).repeat(x.shape[0] // lead[-1])
        return here

    def _at(self, seq: int, first: int, n_prompt: int | None) -> Bool[Tensor, " seq"]:
        """Which of the positions from `first` on are named."""
        n = seq if n_prompt is None else n_prompt
        at = torch.zeros(seq, dtype=torch.bool)
        for position in self.positions or ():
            if position < -n or (position >= n and n_prompt is None):
                raise ConfigError(
                    f"a position must be in [{-n}, {n - 1}], the prompt has {n} tokens",
                    position,
                    "Change positions; those below 0 count from the end.",
                )
            place = (position + n if position < 0 else position) - first
            if 0 <= place < seq:
                at[place] = True
        return at

    # -- in the model ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def on(self, lm: LanguageModel) -> Iterator[None]:
        """Every forward inside the context is edited, KV-cached generation included.

        Raises:
            MismatchError: the dictionary belongs to another model.
            HookpointError: (in the forward) the dictionary writes before it has read all its inputs.
        """
        check(self.dictionary, lm)
        seen: dict[str, Tensor] = {}
        self._generator.manual_seed(self.seed)
        with lm.edit({name: self._hook(name, seen, lm) for name in self.sites.hookpoints}):
            yield

    def _hook(self, name: str, seen: dict[str, Tensor], lm: LanguageModel) -> Callable[[Tensor], Tensor]:
        inputs = [site.hookpoint for site in self.sites.inputs]
        writes = any(site.hookpoint == name for site in self.sites.outputs)
        prompt = [0]

        def hook(x: Tensor) -> Tensor:
            if name in inputs:
                if name in seen:  # the first input of a new forward
                    seen.clear()
                seen[name] = x
            if not writes:
                return x
            missing = [other for other in inputs if other not in seen]
            if missing:
                raise HookpointError(
                    f"a dictionary that writes {name} must have read all its inputs by then, to be edited in one pass",
                    f"{', '.join(missing)} still to come",
                    "Edit it on recorded activations (Intervention.edited), or a dictionary of one layer.",
                )
            first, cached = lm.running.first, lm.running.cached
            prompt[0] = x.shape[1] if first == 0 else prompt[0]
            outputs = {site.hookpoint: seen.get(site.hookpoint, x) for site in self.sites.outputs}
            now = {**outputs, **seen, name: x}
            return self.edited(now, first, prompt[0] if cached else None)[name]

        return hook


@contextlib.contextmanager
def editing(lm: LanguageModel, *interventions: Intervention) -> Iterator[None]:
    """Several interventions at once, of several dictionaries at several hookpoints; at one hookpoint, in this order.

    Raises:
        MismatchError: a dictionary belongs to another model.
    """
    with contextlib.ExitStack() as stack:
        for intervention in interventions:
            stack.enter_context(intervention.on(lm))
        yield


def check(dictionary: Dictionary, lm: LanguageModel) -> None:
    """That a dictionary belongs to this model and fits its hookpoints.

    Raises:
        MismatchError: it does not.
    """
    assert dictionary.sites is not None
    check_places((*dictionary.sites.inputs, *dictionary.sites.outputs), lm)
