"""A model's forward on one prompt in which everything that is not linear is held still. Knows no dictionary.

Attention patterns, the denominators of norms and the outputs of MLPs are kept from the model's own forward. What is
left is an affine map: from token embeddings and MLP outputs to what each MLP reads and what the unembedding sees. Its
derivatives are what one part of the model gives another directly, through residual stream and attention heads.

Plain hooks: queries and keys are put back as they were, and a norm's output is computed from its gain, its bias and the
denominator it had. No architecture is listed; whether the map is right and affine is tried out on the prompt itself.

Source: Ameisen et al. 2025 (Circuit Tracing: Revealing Computational Graphs in Language Models), "From cross-layer
transcoder to replacement model".
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sememe.errors import ModelError
from sememe.lm.hookpoints import attach, attention_of
from sememe.lm.model import LanguageModel
from sememe.lm.readout import affine_of

__all__ = ["Frozen", "FrozenRun"]

Change = Callable[[Float[Tensor, "batch seq d_model"]], Float[Tensor, "batch seq d_model"]]
Put = Callable[[Mapping[int, Float[Tensor, "batch seq d_model"]]], Float[Tensor, "batch seq d_model"]]
"""What makes an MLP's output from what the MLPs so far have read, by layer."""


class FrozenRun(NamedTuple):
    """What the affine map gives."""

    mlp_in: tuple[Float[Tensor, "batch seq d_model"], ...]
    """What each layer's MLP reads."""
    hidden: Float[Tensor, "batch seq d_hidden"]
    """What the unembedding sees."""


class _Norm(NamedTuple):
    """A norm as it was on the prompt: `gain * (x - mean, where it centres) * scale + bias`."""

    module: nn.Module
    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centred: bool
    scale: Float[Tensor, "1 seq 1"]

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.to(self.scale.dtype)
        wide = wide - wide.mean(-1, keepdim=True) if self.centred else wide
        return (self.gain * wide * self.scale + self.bias).to(x.dtype)


class Frozen:
    """The affine map of one prompt, and the values it has on it.

    Args:
        lm: The model. Its queries and keys must come from `q_proj` and `k_proj`, or from GPT-2's `c_attn`.
        ids: The prompt.
    Raises:
        ModelError: an attention block is of another kind; a layer has no MLP to be told apart; or what is left when
            patterns, norms and MLPs are held is not affine.
    """

    def __init__(self, lm: LanguageModel, ids: Int[Tensor, "1 seq"]) -> None:
        self.lm, self.ids = lm, ids
        lacking = [
            name
            for layer in range(lm.n_layers)
            for name in (f"mlp_in.{layer}", f"mlp_out.{layer}")
            if name not in lm.hookpoints()
        ]
        if lacking:
            raise ModelError(
                f"every layer of {lm.name} must have an MLP whose input and output are known",
                f"no {lacking[0]}",
                "Use a model of the Llama family or GPT-2.",
            )
        self._projections = [pair for layer in lm.layers for pair in _queries_and_keys(layer)]
        self._tolerance = 1e-3 if lm.dtype == torch.float32 else 5e-2
        with torch.no_grad():
            self._record()
            self._try()

    def run(
        self, embedding: Float[Tensor, "batch seq d_model"], mlp_out: Sequence[Tensor | Put]
    ) -> FrozenRun:
        """The map's values, differentiable in everything that is given.

        Args:
            embedding: What stands in the place of the token embeddings.
            mlp_out: What stands in the place of each MLP's output, or what makes it.
        """
        read: dict[int, Tensor] = {}

        def keep(layer: int) -> Change:
            def see(x: Tensor) -> Tensor:
                read[layer] = x
                return x

            return see

        def put(layer: int) -> Change:
            given = mlp_out[layer]
            return lambda _: given if isinstance(given, Tensor) else given(read)

        edits: dict[str, Change] = {}
        for layer in range(self.lm.n_layers):
            edits |= {f"mlp_in.{layer}": keep(layer), f"mlp_out.{layer}": put(layer)}
        with contextlib.ExitStack() as hooks:
            for (module, _), kept in zip(self._projections, self._kept, strict=True):
                hooks.callback(attach(module, "out", _putting_back(kept)).remove)
            for norm in self._norms:
                hooks.callback(norm.module.register_forward_hook(_as_it_was(norm)).remove)
            embed = self.lm.hf.get_input_embeddings()
            hooks.callback(attach(embed, "out", lambda x: embedding.to(x.dtype)).remove)
            hooks.enter_context(self.lm.edit(edits))
            hidden = self.lm.hidden(self.ids.expand(embedding.shape[0], -1))
        return FrozenRun(tuple(read[layer] for layer in range(self.lm.n_layers)), hidden)

    # ---- inside ---------------------------------------------------------------------------------------------

    def _record(self) -> None:
        """One plain forward, with everything kept that is held later."""
        found: dict[str, Tensor] = {}
        queries: dict[int, Tensor] = {}
        norms: dict[int, tuple[nn.Module, Tensor, Tensor]] = {}

        def keeps(name: str) -> Change:
            def keep(x: Tensor) -> Tensor:
                found[name] = x.clone()
                return x

            return keep

        def embedded(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            found["embedding"] = output.clone()

        def norm_ran(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            x = args[0] if args else None
            if isinstance(x, Tensor) and x.dim() == 3 and x.shape[-1] == self.lm.d_model:
                norms[id(module)] = (module, x, output)

        places = [f"{part}.{layer}" for layer in range(self.lm.n_layers) for part in ("mlp_in", "mlp_out")]
        with contextlib.ExitStack() as hooks:
            for number, (module, held) in enumerate(self._projections):

                def keep_part(x: Tensor, number: int = number, held: float = held) -> None:
                    queries[number] = x[..., : round(held * x.shape[-1])].clone()

                hooks.callback(attach(module, "out", keep_part).remove)
            for module in self.lm.hf.modules():
                if "Norm" in type(module).__name__:
                    hooks.callback(module.register_forward_hook(norm_ran).remove)
            embed = self.lm.hf.get_input_embeddings()
            hooks.callback(embed.register_forward_hook(embedded).remove)
            hooks.enter_context(self.lm.edit({name: keeps(name) for name in places}))
            self.hidden: Tensor = self.lm.hidden(self.ids)[0]
        self._kept = [queries[number] for number in range(len(self._projections))]
        self._norms = [_norm_of(*seen) for seen in norms.values()]
        self.embedding: Float[Tensor, "seq d_model"] = found["embedding"][0]
        self.mlp_in = [found[f"mlp_in.{layer}"][0] for layer in range(self.lm.n_layers)]
        self.mlp_out = [found[f"mlp_out.{layer}"][0] for layer in range(self.lm.n_layers)]

    def _try(self) -> None:
        """That the map gives the forward's own values, and is affine about them."""
        generator = torch.Generator().manual_seed(0)

        def around(x: Tensor) -> Tensor:
            noise = torch.randn(x.shape, generator=generator).to(x) * x.float().std().to(x)
            return torch.stack([x, x + noise, x - noise])

        found = self.run(around(self.embedding), [around(x) for x in self.mlp_out])
        places = list(zip((*found.mlp_in, found.hidden), (*self.mlp_in, self.hidden), strict=True))

        def worst_of(offs: list[Tensor]) -> float:
            sizes = [at.float().norm().clamp_min(1e-12) for at, _ in places]
            return max(float(off.float().norm() / size) for off, size in zip(offs, sizes, strict=True))

        for name, worst in (
            ("give what the model's own forward gives", worst_of([at[0] - true for at, true in places])),
            ("be affine", worst_of([(at[1] + at[2]) / 2 - at[0] for at, _ in places])),
        ):
            if not worst <= self._tolerance:
                raise ModelError(
                    f"{self.lm.name} with its attention patterns, norms and MLPs held must {name} to "
                    f"{self._tolerance:g}",
                    f"a relative difference of {worst:.3g}",
                    "Use a model of the Llama family or GPT-2, in float32.",
                )


def _queries_and_keys(layer: nn.Module) -> list[tuple[nn.Module, float]]:
    """The projections of a layer that make queries and keys, and the share of their output that is held."""
    attention = attention_of(layer)
    parts = {name: getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj", "c_attn")}
    if all(isinstance(parts[name], nn.Module) for name in ("q_proj", "k_proj", "v_proj")):
        return [(parts["q_proj"], 1.0), (parts["k_proj"], 1.0)]  # type: ignore[list-item]
    if isinstance(parts["c_attn"], nn.Module):
        return [(parts["c_attn"], 2 / 3)]  # queries, keys and values side by side
    raise ModelError(
        "an attention block must make queries and keys by q_proj and k_proj, or by c_attn, to be held still",
        "none" if attention is None else type(attention).__name__,
        "Use a model of the Llama family or GPT-2.",
    )


def _putting_back(kept: Tensor) -> Callable[[Tensor], Tensor]:
    def put(x: Tensor) -> Tensor:
        held = kept.expand(x.shape[0], *kept.shape[1:])
        return torch.cat([held, x[..., kept.shape[-1] :]], dim=-1)

    return put


def _norm_of(module: nn.Module, x: Tensor, y: Tensor) -> _Norm:
    """The norm with the denominators it had, which its output tells."""
    gain, bias, centred = affine_of(module, x.shape[-1], x.device)
    direction = x.double()
    direction = gain.double() * (direction - direction.mean(-1, keepdim=True) if centred else direction)
    size = direction.square().sum(-1, keepdim=True).clamp_min(1e-300)
    scale = ((y.double() - bias.double()) * direction).sum(-1, keepdim=True) / size
    return _Norm(module, gain, bias, centred, scale.float())


def _as_it_was(norm: _Norm) -> Callable[[nn.Module, tuple[Any, ...], Any], Tensor]:
    return lambda _, args, __: norm(args[0])
