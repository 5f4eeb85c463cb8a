"""Tuned lenses: what the model would say if it stopped at a layer. Knows translators and their files; trains none.

A translator maps the residual stream after a layer to where the last layer would put it, `h + h A + b`; the model's
own final norm and unembedding read the rest. With A and b 0 it is the logit lens.

Source: Belrose et al. 2023, arXiv:2303.08112.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from sememe import artifact
from sememe.errors import ActivationError, CorruptError, FormatError, HookpointError, MismatchError
from sememe.lm import LanguageModel

__all__ = ["WEIGHTS", "Lens", "Translator", "fingerprint_of", "open_lens", "read_out"]

WEIGHTS = "lens.safetensors"
THEIR_CONFIG, THEIR_WEIGHTS = "config.json", "params.pt"


class Translator(NamedTuple):
    """One layer's."""

    A: Float[Tensor, "d d"]
    b: Float[Tensor, " d"]


class Lens(NamedTuple):
    """Translators by the layer whose output they read."""

    translators: dict[int, Translator]

    def translate(self, directions: Float[Tensor, "n d"], layer: int) -> Float[Tensor, "n d"]:
        """Where the last layer would put directions that are written after a layer; offsets do not count.

        Raises:
            HookpointError: the lens has no translator for the layer.
        """
        return directions + directions @ self._of(layer).A.to(directions)

    def residual(self, hidden: Float[Tensor, "*batch d"], layer: int) -> Float[Tensor, "*batch d"]:
        """The same for the residual stream itself.

        Raises:
            HookpointError: as `translate`.
        """
        found = self._of(layer)
        return hidden + hidden @ found.A.to(hidden) + found.b.to(hidden)

    def check(self, layer: int) -> None:
        """That there is a translator for a layer.

        Raises:
            HookpointError: there is none.
        """
        self._of(layer)

    def _of(self, layer: int) -> Translator:
        if layer not in self.translators:
            raise HookpointError(
                "the lens must have a translator for the layer",
                f"layer {layer} of {', '.join(map(str, sorted(self.translators))) or 'none'}",
                f"Train one with `sememe lens --layers {layer}`, or leave it out."
                if layer >= 0
                else "Leave it out: lenses begin after layer 0.",
            )
        return self.translators[layer]

    def save(self, folder: Path) -> None:
        """Write the file of weights."""
        tensors = {
            f"{name}.{layer}": value.detach().cpu().float().contiguous()
            for layer, one in self.translators.items()
            for name, value in (("A", one.A), ("b", one.b))
        }
        save_file(tensors, folder / WEIGHTS)


def read_out(
    lm: LanguageModel, residual: Float[Tensor, "batch seq d"], ids: Int[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq vocab"]:
    """The logits if the last layer's output were this; gradients flow."""
    return lm.logits(lm.hidden_from(lm.n_layers - 1, residual, ids))


def open_lens(path: str | Path, lm: LanguageModel) -> Lens:
    """A lens that `sememe lens` trained, or a folder in the layout of the tuned-lens package.

    Raises:
        ArtifactError: there is neither.
        MismatchError: it is of another model.
        FormatError: a file is not what it claims to be.
        ActivationError: a weight is NaN or infinite.
    """
    path = Path(path)
    if (path / THEIR_WEIGHTS).is_file():
        lens = _theirs(path)
    else:
        folder = artifact.load(path, "lens")
        of = str(folder.meta["parents"].get("model", ""))
        if of != lm.fingerprint:
            raise MismatchError(
                f"the lens {path} must be of {lm.name} (fingerprint {lm.fingerprint[:16]})",
                f"one of {folder.extra.get('model')} ({of[:16]})",
                "Train one of this model with `sememe lens`.",
            )
        tensors = load_file(folder.file(WEIGHTS, verify=True))
        layers = sorted(int(name.split(".")[1]) for name in tensors if name.startswith("A."))
        lens = Lens({layer: Translator(tensors[f"A.{layer}"], tensors[f"b.{layer}"]) for layer in layers})
    for layer, one in lens.translators.items():
        if one.A.shape != (lm.d_model, lm.d_model) or one.b.shape != (lm.d_model,):
            raise MismatchError(
                f"the lens {path} must be {lm.d_model} wide, like the residual stream of {lm.name}",
                f"{tuple(one.A.shape)} and {tuple(one.b.shape)} at layer {layer}",
                "Name the lens of this model.",
            )
        if not bool(torch.isfinite(one.A).all() and torch.isfinite(one.b).all()):
            raise ActivationError(
                f"the lens {path} must be finite", f"NaN or infinity at layer {layer}", "Train it again."
            )
    return lens


def fingerprint_of(path: str | Path) -> str:
    """What results made with a lens depend on.

    Raises:
        ArtifactError: there is no lens.
    """
    theirs = Path(path) / THEIR_WEIGHTS
    return artifact.file_sha256(theirs) if theirs.is_file() else artifact.load(path, "lens").fingerprint


def _theirs(path: Path) -> Lens:
    """The tuned-lens package's layout: their translator i reads the input of layer i, which is layer i - 1's output."""
    try:
        config = json.loads((path / THEIR_CONFIG).read_text(encoding="utf-8"))
        state = torch.load(path / THEIR_WEIGHTS, map_location="cpu", weights_only=True)
        tensors = {str(name): value.float() for name, value in state.items()}
        n = int(config["num_hidden_layers"])
    except FileNotFoundError:
        raise FormatError(
            f"a tuned lens must have {THEIR_CONFIG} beside {THEIR_WEIGHTS}",
            f"none in {path}",
            "Fetch it whole.",
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"{path} must be a lens of the tuned-lens package",
            f"{type(error).__name__}: {error}",
            "Fetch it again.",
        ) from None
    except (
        Exception
    ) as error:  # torch's unpickler refuses what is no tensor, and truncated files, in its own words
        raise CorruptError(
            f"{path / THEIR_WEIGHTS} must hold tensors and nothing else",
            str(error).splitlines()[0],
            "Fetch it again from whom you trust.",
        ) from None
    found = {}
    for i in range(1, n):
        names = [name for name in (f"{i}", f"layer_translators.{i}") if f"{name}.weight" in tensors]
        if not names:
            raise FormatError(
                f"{path} must have a translator for each of {n} layers",
                f"none for layer {i}",
                "Fetch it again.",
            )
        found[i - 1] = Translator(tensors[f"{names[0]}.weight"].T.contiguous(), tensors[f"{names[0]}.bias"])
    return Lens(found)
