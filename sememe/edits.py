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
from typing import Literal, NamedTuple, Self

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
_PLACED = ("resample", "patch")
_BLIND = ("add", "project_out")
"""Edits that need not know which latents fire: nothing is encoded for them."""
_GOLDEN, _FIRST, _SECOND = (
    constant - (1 << 64) for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


class LatentEdit(Config):
    """One change of some latents' activations, wherever the intervention acts."""

    latents: tuple[int, ...] = Field(min_length=1)
    """Which latents."""
    how: Literal["zero", "mean", "resample", "clamp", "scale", "add", "patch", "project_out"] = "zero"
    """zero: ablate. mean: set to the latent's mean over the other activations. resample: set to what the latents are
    together in a row of the other activations, drawn for every text and position anew, and there always the same: a
    forward and its continuation from cached keys see one draw. clamp: set to value. scale: multiply by value. add: add
    value, active or not (steering). patch: set to what they are at the same place of the other activations; new tokens
    of a generation that the other run does not have are left alone. project_out: leave nothing along the latents'
    directions, whatever wrote it."""
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


class Places(NamedTuple):
    """Where some rows stand."""

    text: Int[Tensor, " rows"]
    """Which text of the batch."""
    position: Int[Tensor, " rows"]
    """Which of its tokens, those before a cached forward counted."""


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
            wants them in the shape of the run that is edited (in generation: of the prompt, or longer).
        other_keep: Rows of the other run that mean and resample may take; those over the norm limit they never do. All
            others if not given: leave out what the token policy drops.
        seed: Of the rows that resample draws.

    Raises:
        ConfigError: a latent does not exist, an edit lacks the other activations, or none of their rows may be taken.
        MismatchError: the dictionary does not know its hookpoints.
        ShapeError: `other_keep` is of another shape than the other activations.
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
        other_keep: Bool[Tensor, "texts tokens"] | None = None,
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
        self._other: Tensor | None = None
        self._pool: Tensor | None = None
        if other is not None:
            self._other, self._pool = self._acts_at(other, other_keep)
        self._columns = {latent: i for i, latent in enumerate(self.latents)}
        self._placed = any(edit.how in _PLACED for edit in self.edits)
        self._patches = any(edit.how == "patch" for edit in self.edits)
        outside = [latent for edit in self.edits if edit.how == "project_out" for latent in edit.latents]
        self._basis = {site.hookpoint: self._span(site, outside) for site in self.sites.outputs}
        self._blind = error == "keep" and all(edit.how in _BLIND for edit in self.edits)

    # -- the arithmetic ----------------------------------------------------------------------------

    def after(self, before: Float[Tensor, "rows n"], places: Places | None = None) -> Float[Tensor, "rows n"]:
        """What the edits make of the activations of `latents`, in their order; two of them ask for the rows' places."""
        after = before.clone()
        for number, edit in enumerate(self.edits):
            chosen = [self._columns[latent] for latent in edit.latents]
            if edit.how == "scale":
                after[:, chosen] *= edit.value or 0.0
            elif edit.how == "add":
                after[:, chosen] += edit.value or 0.0
            elif edit.how in _FROM_OTHER:
                after[:, chosen] = self._from_other(number, after, places)[:, chosen].to(after)
            elif edit.how != "project_out":
                after[:, chosen] = edit.value or 0.0
        return after

    def _from_other(
        self, number: int, mine: Float[Tensor, "rows n"], places: Places | None
    ) -> Float[Tensor, "rows n"]:
        assert self._other is not None and self._pool is not None
        if self.edits[number].how == "mean":
            return self._pool.mean(0, keepdim=True).expand(len(mine), -1)
        assert places is not None
        text, position = (column.to(self._other.device) for column in places)
        if self.edits[number].how == "resample":
            return self._pool[_hashed(self.seed, number, text, position) % len(self._pool)]
        last = self._other.shape[1] - 1
        theirs = self._other[text, position.clamp(max=last)]
        return torch.where((position <= last)[:, None], theirs, mine.to(theirs))

    def _acts_at(
        self, activations: Mapping[str, Tensor], keep: Tensor | None
    ) -> tuple[Float[Tensor, "batch seq n"], Float[Tensor, "rows n"]]:
        """What `latents` are on recorded activations: all of them, and the rows that stand for what is usual."""
        x, lead = self._rows(activations)
        usual = self.sites.admit(x)
        if keep is not None:
            _check_shape(keep, lead, "rows of the other run that may be taken")
            usual &= keep.reshape(-1).to(x.device)
        with torch.no_grad():
            acts = self.dictionary.encode_latents(x, self.latents)
        if any(edit.how in ("mean", "resample") for edit in self.edits) and not bool(usual.any()):
            raise ConfigError(
                "mean and resample must find a row of the other run that is kept and within the norm limit",
                f"none of {len(usual)}",
                "Capture more text, or keep more of its rows (other_keep).",
            )
        return acts.reshape(1 if len(lead) == 1 else lead[0], -1, len(self.latents)), acts[usual]

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
        n_read: int | None = None,
    ) -> dict[str, Tensor]:
        """What each output hookpoint becomes, from the activations at all inputs and outputs of one forward.

        Args:
            activations: By hookpoint.
            first: The number of the first position among all tokens.
            n_prompt: Tokens of the prompt, where this is a generation; else the forward is the whole of it.
            n_read: Of a generation: tokens that it reads at most, prompt and all; unknown if not given.

        Raises:
            ShapeError: `keep` is of another shape, or the other run is.
            ConfigError: a position is outside the prompt, or after the last token that a generation reads.
            ActivationError: an edit gave NaN or infinity.
        """
        x, lead = self._rows(activations)
        here = self._acts_here(x, lead, first, n_prompt, n_read)
        if self._patches:
            self._check_other(here, lead, first, n_prompt)
            if all(edit.how == "patch" for edit in self.edits):
                here &= self._places(None, lead, first, x.device).position < self._other_length
        rows = None if bool(here.all()) else here.nonzero()[:, 0]
        places = self._places(rows, lead, first, x.device) if self._placed else None
        base, moved = self._moved(x if rows is None else x[rows], places)
        return {
            site.hookpoint: self._write(site, activations, base, moved, rows) for site in self.sites.outputs
        }

    def _moved(
        self, x: Float[Tensor, "rows d_in"], places: Places | None
    ) -> tuple[Float[Tensor, "rows d_out"] | None, Float[Tensor, "#rows d_out"]]:
        """What the rows are replaced by (None: they stay), and what is added."""
        directions = self.dictionary.decoder_directions()[list(self.latents)].float()
        if self._blind:
            before = directions.new_zeros(1, len(self.latents))
            return None, self.after(before) @ directions
        if self.error == "keep":
            before = self.dictionary.encode_latents(x, self.latents)
            return None, (self.after(before, places) - before) @ directions
        encoded = self.dictionary.encode(x)
        after = self.after(encoded.columns(self.latents), places)
        # the edited latents are decoded once, with their new activations
        others = encoded.with_acts(torch.where(self._is_edited(encoded), 0.0, encoded.acts))
        return self.dictionary.decode(others, x), after @ directions

    @property
    def _other_length(self) -> int:
        assert self._other is not None
        return self._other.shape[1]

    @staticmethod
    def _places(
        rows: Int[Tensor, " rows"] | None, lead: torch.Size, first: int, device: torch.device
    ) -> Places:
        flat = torch.arange(lead.numel(), device=device) if rows is None else rows
        return Places(flat // lead[-1], first + flat % lead[-1])

    def _check_other(
        self, here: Bool[Tensor, " rows"], lead: torch.Size, first: int, n_prompt: int | None
    ) -> None:
        """That the other run has what is to be patched; of a generation, that it is not shorter than the prompt."""
        assert self._other is not None
        batch, seq = (1, lead[0]) if len(lead) == 1 else (lead[0], lead[1])
        if len(self._other) != batch:
            raise ShapeError(
                f"to patch, the other run must have as many texts as this one, {batch}",
                len(self._other),
                "Give one counterpart for each prompt.",
            )
        n = self._other_length
        if n_prompt is not None:
            if self.positions is None and n < n_prompt:
                raise ShapeError(
                    f"to patch a whole prompt, the other run must have its {n_prompt} tokens or more",
                    n,
                    "Give prompts of equal length (in tokens) in each pair, or positions.",
                )
        elif self.positions is None and n != seq:
            raise ShapeError(
                f"to patch every position, the other run must have {seq} tokens",
                n,
                "Give prompts of equal length (in tokens) in each pair, or positions.",
            )
        elif bool((here & (self._places(None, lead, first, here.device).position >= n)).any()):
            raise ShapeError(
                "the other run must reach the positions that are patched",
                f"{n} tokens, and positions {', '.join(map(str, self.positions or ()))} of {seq}",
                "Give prompts of equal length (in tokens) in each pair, or other positions.",
            )

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
        self,
        x: Float[Tensor, "rows d_in"],
        lead: torch.Size,
        first: int,
        n_prompt: int | None,
        n_read: int | None,
    ) -> Bool[Tensor, " rows"]:
        here = self.sites.admit(x.detach())
        if self.keep is not None:
            _check_shape(self.keep, lead, "positions to edit")
            here &= self.keep.reshape(-1).to(x.device)
        if self.positions is not None:
            here &= self._at(lead[-1], first, n_prompt, n_read).to(x.device).repeat(x.shape[0] // lead[-1])
        return here

    def _at(self, seq: int, first: int, n_prompt: int | None, n_read: int | None) -> Bool[Tensor, " seq"]:
        """Which of the positions from `first` on are named."""
        n = seq if n_prompt is None else n_prompt
        end = seq if n_prompt is None else n_read
        at = torch.zeros(seq, dtype=torch.bool)
        for position in self.positions or ():
            if position < -n or (end is not None and position >= end):
                new = "" if end is None or end == n else f" and {end - n} of the new ones are read"
                last = "..." if end is None else str(end - 1)
                raise ConfigError(
                    f"a position must be in [{-n}, {last}], the prompt has {n} tokens{new}",
                    position,
                    "Change positions; those below 0 count from the end of the prompt.",
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
            run = lm.running
            prompt[0] = x.shape[1] if run.first == 0 else prompt[0]
            # keys that are kept may be gone on from by hand, and then nobody knows how far
            n_prompt = prompt[0] if run.n_prompt is None and run.cached else run.n_prompt
            outputs = {site.hookpoint: seen.get(site.hookpoint, x) for site in self.sites.outputs}
            now = {**outputs, **seen, name: x}
            return self.edited(now, run.first, n_prompt, run.n_read)[name]

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


def _check_shape(keep: Tensor, lead: torch.Size, what: str) -> None:
    if keep.shape != lead:
        raise ShapeError(
            f"the {what} must have the shape of the batch {tuple(lead)}",
            tuple(keep.shape),
            "Give one value per token, or none for generation.",
        )


def _hashed(seed: int, number: int, *columns: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """Well-mixed numbers from 0 to 2^62, of a seed, an edit and a place (splitmix64's finaliser after each).

    Draws that follow a place and not the forwards are the same with keys kept and without.
    """
    x = torch.zeros_like(columns[0])
    parts: tuple[int | Tensor, ...] = (seed, number, *columns)
    for part in parts:
        x = (x + part) * _GOLDEN
        for shift, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
            x = (
                x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))
            ) * factor  # >> keeps the sign, which is masked away
    return x & ((1 << 62) - 1)


def check(dictionary: Dictionary, lm: LanguageModel) -> None:
    """That a dictionary belongs to this model and fits its hookpoints.

    Raises:
        MismatchError: it does not.
    """
    assert dictionary.sites is not None
    check_places((*dictionary.sites.inputs, *dictionary.sites.outputs), lm)
