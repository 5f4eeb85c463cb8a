"""Latents changed inside a running model. Knows a dictionary and its sites; knows no text and no verb.

With f the latents' activations, f' what an edit makes of them, and D the decoder directions:

    error kept:     x' = x + (f' - f) D          the part that the dictionary misses stays
    error dropped:  x' = decode(f')              only what the dictionary sees stays

so that with the error kept an edit that changes no activation changes no bit of x. Rows whose norm is over the
site's limit (attention sinks, which the dictionary was not trained on) are never changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sememe.dictionaries.base import Dictionary, Site
from sememe.encoded import Encoded
from sememe.errors import ActivationError, ConfigError, HookpointError, MismatchError, ShapeError
from sememe.intervene.config import LatentEdit
from sememe.lm import LanguageModel
from sememe.splice import check_places

__all__ = ["Intervention", "acts_of"]


def acts_of(encoded: Encoded, latents: Sequence[int]) -> Float[Tensor, "rows n"]:
    """The activations of a few latents, dense."""
    slots = torch.full((encoded.d_sae,), -1, dtype=torch.long, device=encoded.indices.device)
    slots[list(latents)] = torch.arange(len(latents), device=slots.device)
    slot = slots[encoded.indices.long()]
    wanted = slot >= 0
    dense = encoded.acts.new_zeros(encoded.n_rows, len(latents))
    return dense.index_put((encoded.row_ids()[wanted], slot[wanted]), encoded.acts[wanted], accumulate=True)


class Intervention:
    """Edits of one dictionary's latents.

    Args:
        dictionary: Folded, with sites.
        edits: In the order in which they are made.
        error: Whether what the dictionary does not reconstruct is kept or dropped.
        keep: Positions of a whole forward at which edits act; all if not given. Not for generation.

    Raises:
        ConfigError: a latent does not exist.
        MismatchError: the dictionary does not know its hookpoints.
    """

    def __init__(
        self,
        dictionary: Dictionary,
        edits: Sequence[LatentEdit],
        *,
        error: Literal["keep", "drop"] = "keep",
        keep: Bool[Tensor, "batch seq"] | None = None,
    ) -> None:
        if dictionary.sites is None:
            raise MismatchError(
                "the dictionary must know its model and hookpoint",
                "none (it was trained on bare tensors)",
                "Train it from a store.",
            )
        self.dictionary, self.sites, self.edits = dictionary, dictionary.sites, tuple(edits)
        self.error, self.keep = error, keep
        self.latents = tuple(dict.fromkeys(latent for edit in edits for latent in edit.latents))
        for latent in self.latents:
            if not 0 <= latent < dictionary.d_sae:
                raise ConfigError(
                    f"a latent must be in [0, {dictionary.d_sae - 1}]", latent, "Change --latents."
                )

    # -- the arithmetic ----------------------------------------------------------------------------

    def after(self, before: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
        """What the edits make of the activations of `latents`, in their order."""
        after = before.clone()
        column = {latent: i for i, latent in enumerate(self.latents)}
        for edit in self.edits:
            chosen = [column[latent] for latent in edit.latents]
            value = edit.value or 0.0
            if edit.how == "scale":
                after[:, chosen] *= value
            elif edit.how == "add":
                after[:, chosen] += value
            else:
                after[:, chosen] = value
        return after

    def edited(self, activations: Mapping[str, Float[Tensor, "batch seq d"]]) -> dict[str, Tensor]:
        """What each output hookpoint becomes, from the activations at all inputs and outputs of one forward.

        Raises:
            ShapeError: `keep` is of another shape.
            ActivationError: an edit gave NaN or infinity.
        """
        inputs = [activations[site.hookpoint] for site in self.sites.inputs]
        lead = inputs[0].shape[:-1]
        device = self.dictionary.decoder_directions().device
        x = torch.cat([part.reshape(-1, part.shape[-1]).to(device, torch.float32) for part in inputs], dim=1)
        encoded = self.dictionary.encode(x)
        directions = self.dictionary.decoder_directions()[list(self.latents)].float()
        before = acts_of(encoded, self.latents)
        after = self.after(before)
        if self.error == "keep":
            base, moved = None, (after - before) @ directions
        else:  # the edited latents are decoded once, with their new activations
            others = encoded.with_acts(torch.where(self._is_edited(encoded), 0.0, encoded.acts))
            base, moved = self.dictionary.decode(others, x), after @ directions
        here = self._acts_here(x, lead)
        return {
            site.hookpoint: self._write(site, activations, base, moved, here) for site in self.sites.outputs
        }

    def _is_edited(self, encoded: Encoded) -> Bool[Tensor, " nnz"]:
        edited = torch.zeros(encoded.d_sae, dtype=torch.bool, device=encoded.indices.device)
        edited[list(self.latents)] = True
        return edited[encoded.indices.long()]

    def _write(
        self,
        site: Site,
        activations: Mapping[str, Tensor],
        base: Float[Tensor, "rows d_out"] | None,
        moved: Float[Tensor, "rows d_out"],
        here: Bool[Tensor, " rows"],
    ) -> Tensor:
        old = activations[site.hookpoint]
        part = slice(site.start, site.stop)
        flat = old.reshape(-1, old.shape[-1]).to(moved.device, torch.float32)
        new = (flat if base is None else base[:, part]) + moved[:, part]
        new = torch.where(here[:, None], new, flat).to(old.dtype)
        # the norm and not the entries: layer norms square what they get, and give zeros when that overflows
        if not bool(torch.isfinite(new[here].float().norm(dim=1)).all()):
            raise ActivationError(
                f"an edit at {site.hookpoint} must give activations of finite norm",
                "NaN or infinity",
                "Lower the strength, or check the model's activations.",
            )
        return new.reshape(old.shape).to(old.device)

    def _acts_here(self, x: Float[Tensor, "rows d_in"], lead: torch.Size) -> Bool[Tensor, " rows"]:
        here = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
        for site in self.sites.inputs:
            if site.max_norm is not None:
                here &= x[:, site.start : site.stop].norm(dim=1) <= site.max_norm
        if self.keep is not None:
            if self.keep.shape != lead:
                raise ShapeError(
                    f"the positions to edit must have the shape of the batch {tuple(lead)}",
                    tuple(self.keep.shape),
                    "Give one value per token, or none for generation.",
                )
            here &= self.keep.reshape(-1).to(x.device)
        return here

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
        with lm.edit({name: self._hook(name, seen) for name in self.sites.hookpoints}):
            yield

    def _hook(self, name: str, seen: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        inputs = [site.hookpoint for site in self.sites.inputs]
        writes = any(site.hookpoint == name for site in self.sites.outputs)

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
            outputs = {site.hookpoint: seen.get(site.hookpoint, x) for site in self.sites.outputs}
            return self.edited({**outputs, **seen, name: x})[name]

        return hook


def check(dictionary: Dictionary, lm: LanguageModel) -> None:
    """That a dictionary belongs to this model and fits its hookpoints.

    Raises:
        MismatchError: it does not.
    """
    assert dictionary.sites is not None
    check_places((*dictionary.sites.inputs, *dictionary.sites.outputs), lm)
