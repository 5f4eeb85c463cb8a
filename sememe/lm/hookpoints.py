"""Names of places in a model, and safe reads and writes there. Knows module trees; never runs a model.

A hookpoint is a module path of the Hugging Face model (`model.layers.3.mlp`), optionally with `:in` for the
module's input, or an alias that means the same place on every architecture:

    resid_pre.L   input of layer L                    resid_post.L  output of layer L
    attn_z.L      heads, before the output projection attn_out.L    output of the attention block
    mlp_in.L      input of the MLP block              mlp_out.L     output of the MLP block
    mlp_act.L     input of the MLP's last projection: after the non-linearity, and after the gate of a gated MLP

The layers are found, not listed: the first ModuleList with as many members as the config has layers. Only the
parts inside a layer go by name, through the short tables below.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sememe.errors import HookpointError, ModelError, nearest

__all__ = ["ALIASES", "Hookpoints", "Place", "attach", "attention_of", "read", "rows", "unrows", "write"]

ALIASES = ("resid_pre", "attn_z", "attn_out", "mlp_in", "mlp_act", "mlp_out", "resid_post")

# The attention block of a layer, the projection that ends it, the MLP block, and the projection that ends that.
_ATTENTION = ("self_attn", "attn.attention", "attn", "attention", "self_attention", "self_attention_layer")
_ATTENTION_LAST = ("o_proj", "out_proj", "c_proj", "dense", "wo", "proj")
_MLP = ("mlp", "ffn", "feed_forward", "block_sparse_moe")
_MLP_LAST = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "w2", "proj")
# Layers that keep the MLP's projections themselves, as OPT does: first and last.
_BARE_MLP = (("fc1", "fc2"),)
_AFTER_THE_STACK = (
    "norm",
    "ln_f",
    "final_layer_norm",
    "final_layernorm",
    "norm_f",
    "final_norm",
    "project_out",
)


class Place(NamedTuple):
    """A hookpoint found in a model.

    `layer` is the layer that holds it: -1 before the stack, n_layers after it. `start` is the layer whose output
    is enough to recompute everything from this place on (-1: the embeddings).
    """

    name: str
    path: str
    side: Literal["in", "out"]
    layer: int
    start: int


class Hookpoints:
    """The hookpoints of one model.

    Args:
        hf: A causal language model.
    Raises:
        ModelError: the model has no stack of layers.
    """

    def __init__(self, hf: nn.Module) -> None:
        self.hf = hf
        self.label = type(hf).__name__
        self.modules = dict(hf.named_modules())
        self.stack_path, stack = _find_stack(hf)
        self.layers: tuple[nn.Module, ...] = tuple(stack)
        self.table: dict[str, Place] = {}
        for layer, module in enumerate(self.layers):
            for alias, (path, side) in _parts(module).items():
                whole = f"{self.stack_path}.{layer}" + (f".{path}" if path else "")
                start = layer if alias == "resid_post" else layer - 1
                self.table[f"{alias}.{layer}"] = Place(f"{alias}.{layer}", whole, side, layer, start)
        self.aliases = tuple(a for a in ALIASES if any(name.startswith(f"{a}.") for name in self.table))
        by_alias = sorted(self.table, key=lambda n: (ALIASES.index(n.split(".")[0]), int(n.split(".")[1])))
        self.names = tuple(by_alias)

    def module(self, place: Place) -> nn.Module:
        """The module whose input or output the place is."""
        module: nn.Module = self.modules[place.path]
        return module

    def expand(self, patterns: str | Iterable[str]) -> tuple[str, ...]:
        """Names and globs to names, each once, in the order given; a glob's in the order of the layers.

        `*`, `?` and `[0-3]` match inside one part of a name, so `resid_post.*` is every layer's output.

        Raises:
            HookpointError: a name or a glob matches nothing in this model.
        """
        found: dict[str, None] = {}
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if not any(sign in pattern for sign in "*?["):
                found[self.resolve(pattern).name] = None
                continue
            match = re.compile(_glob(pattern)).fullmatch
            names = [name for name in self.names if match(name)] or [
                name for path in self.modules if path for name in (path, f"{path}:in") if match(name)
            ]
            if not names:
                raise self._unknown(pattern)
            found.update(dict.fromkeys(names))
        return tuple(found)

    def resolve(self, name: str) -> Place:
        """The place of one name.

        Raises:
            HookpointError: there is no such place in this model.
        """
        if name in self.table:
            return self.table[name]
        path, _, side = name.partition(":")
        if path in self.modules and side in ("", "in", "out"):
            return self._at_module(name, path, "in" if side == "in" else "out")
        raise self._unknown(name)

    def _at_module(self, name: str, path: str, side: Literal["in", "out"]) -> Place:
        if path.startswith(f"{self.stack_path}."):
            number, _, inner = path.removeprefix(f"{self.stack_path}.").partition(".")
            layer = int(number)
            return Place(name, path, side, layer, layer if not inner and side == "out" else layer - 1)
        decoder = self.stack_path.rpartition(".")[0]
        head = _path_of(self.hf, _head(self.hf))
        ends = {f"{decoder}.{part}".lstrip(".") for part in _AFTER_THE_STACK} | {head}
        n = len(self.layers)
        holds_stack = f"{self.stack_path}.".startswith(f"{path}." if path else "")
        if path in ends or (holds_stack and side == "out"):
            return Place(name, path, side, n, n - 1)
        return Place(name, path, side, -1, -1)

    def _unknown(self, name: str) -> HookpointError:
        alias, _, number = name.partition(".")
        n = len(self.layers)
        if alias in self.aliases and re.fullmatch(r"-?\d+", number) and not 0 <= int(number) < n:
            return HookpointError(
                f"the layer of {alias} must be in [0, {n - 1}] for {self.label}",
                number,
                f"Use {alias}.{n - 1} or lower.",
            )
        if alias in ALIASES and alias not in self.aliases:
            return HookpointError(
                f"{alias} must be a part of {self.label}",
                "a model without it",
                f"It has: {', '.join(self.aliases)}.",
            )
        known = [*self.names, *(path for path in self.modules if path)]
        if alias in self.aliases:
            having = [n.partition(".")[2] for n in self.names if n.startswith(f"{alias}.")]
            hint = f"Write {alias}.L with a layer L in {', '.join(having)}." if len(having) < n else None
            hint = hint or f"Write {alias}.L with L in [0, {n - 1}], or {alias}.* for all."
        else:
            hint = nearest(name, known)
        return HookpointError(f"a hookpoint must be a place in {self.label}", repr(name), hint)


def _glob(pattern: str) -> str:
    """A glob as a regular expression; stars stay inside one part of the name."""
    out, i = "", 0
    while i < len(pattern):
        sign = pattern[i]
        close = pattern.find("]", i + 1)
        if sign == "[" and close > 0:
            out, i = out + pattern[i : close + 1].replace("[!", "[^"), close
        else:
            out += {"*": r"[^.]*", "?": r"[^.]"}.get(sign, re.escape(sign))
        i += 1
    return out


def _find_stack(hf: nn.Module) -> tuple[str, nn.ModuleList]:
    config: Any = getattr(hf, "config", None)
    if config is None:
        raise ModelError(
            "a language model must be a Hugging Face model with a config",
            type(hf).__name__,
            "Wrap a causal LM.",
        )
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    n_layers = int(config.num_hidden_layers)
    stacks = [(n, m) for n, m in hf.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    # A model that also sees has a second stack, its vision tower's.
    stacks = [s for s in stacks if "vision" not in s[0] and "visual" not in s[0]] or stacks
    if not stacks:
        raise ModelError(
            f"{type(hf).__name__} must hold its layers in a ModuleList",
            f"none with {n_layers} members",
            "Name hookpoints of a decoder-only model of Hugging Face.",
        )
    return stacks[0]


def _parts(layer: nn.Module) -> dict[str, tuple[str, Literal["in", "out"]]]:
    """The aliases that a layer has: path inside the layer, and side."""
    parts: dict[str, tuple[str, Literal["in", "out"]]] = {"resid_pre": ("", "in"), "resid_post": ("", "out")}
    attention = _first(layer, _ATTENTION)
    if attention:
        last = _first(layer.get_submodule(attention), _ATTENTION_LAST)
        if last:
            parts["attn_z"] = (f"{attention}.{last}", "in")
        parts["attn_out"] = (_before_residual(layer, attention, last), "out")
    mlp = _first(layer, _MLP)
    bare = next((pair for pair in _BARE_MLP if all(hasattr(layer, name) for name in pair)), None)
    if mlp:
        last = _first(layer.get_submodule(mlp), _MLP_LAST)
        parts["mlp_in"] = (mlp, "in")
        if last:
            parts["mlp_act"] = (f"{mlp}.{last}", "in")
        parts["mlp_out"] = (_before_residual(layer, mlp, last), "out")
    elif bare:
        parts |= {"mlp_in": (bare[0], "in"), "mlp_act": (bare[1], "in"), "mlp_out": (bare[1], "out")}
    return parts


def attention_of(layer: nn.Module) -> nn.Module | None:
    """A layer's attention block; None if it has none."""
    path = _first(layer, _ATTENTION)
    return layer.get_submodule(path) if path else None


def _first(module: nn.Module, paths: Iterable[str]) -> str:
    for path in paths:
        child: Any = module
        for part in path.split("."):
            child = getattr(child, part, None)
        if isinstance(child, nn.Module):
            return path
    return ""


def _before_residual(layer: nn.Module, block: str, last: str) -> str:
    """The block, or its last projection where the block adds the residual itself (BLOOM, MPT)."""
    adds = "residual" in inspect.signature(type(layer.get_submodule(block)).forward).parameters
    return f"{block}.{last}" if adds and last else block


def _head(hf: nn.Module) -> nn.Module | None:
    get = getattr(hf, "get_output_embeddings", None)
    return get() if get is not None else None


def _path_of(hf: nn.Module, module: nn.Module | None) -> str:
    return (
        next((path for path, other in hf.named_modules() if other is module), "")
        if module is not None
        else ""
    )


# ---- reads and writes: some modules take and return tensors, some tuples, some named outputs ----------------


def _activation(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def read(value: Any) -> Tensor | None:
    """The first floating-point tensor of a module's output, whatever its structure."""
    if _activation(value):
        return value  # type: ignore[no-any-return]
    members = (
        value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    )
    return next((m for m in members if _activation(m)), None)


def write(value: Any, new: Tensor) -> Any:
    """The same structure with the tensor that `read` gives replaced."""
    if isinstance(value, Tensor):
        return new
    if isinstance(value, Mapping):
        key = next(k for k, m in value.items() if _activation(m))
        changed: Any = type(value)(**dict(value))
        changed[key] = new
        return changed
    at = next(i for i, m in enumerate(value) if _activation(m))
    members = [*value[:at], new, *value[at + 1 :]]
    return type(value)(*members) if hasattr(value, "_fields") else type(value)(members)


def rows(x: Tensor, lead: tuple[int, int] | None, name: str) -> Float[Tensor, "batch seq d"]:
    """An activation as (batch, seq, d), also where the model flattened batch and seq (OPT) or split d in heads.

    Raises:
        HookpointError: the tensor does not hold one row per token.
    """
    if x.dim() == 3 and (lead is None or x.shape[:2] == lead):
        return x
    if lead is not None and x.dim() == 2 and x.shape[0] == lead[0] * lead[1]:
        return x.view(*lead, -1)
    if lead is not None and x.dim() > 3 and x.shape[:2] == lead:
        return x.flatten(2)
    raise HookpointError(
        f"{name} must hold one row of activations per token",
        f"a tensor of shape {tuple(x.shape)}",
        "Hook the module around it.",
    )


def unrows(new: Float[Tensor, "batch seq d"], x: Tensor) -> Tensor:
    """Rows back in the model's own shape and dtype. A copy: some models add to these tensors in place."""
    return new.to(device=x.device, dtype=x.dtype, copy=True, memory_format=torch.contiguous_format).view(
        x.shape
    )


def attach(
    module: nn.Module,
    side: Literal["in", "out"],
    change: Callable[[Tensor], Tensor | None],
    *,
    first: bool = False,
) -> RemovableHandle:
    """Call `change` with the module's input or output on every forward; put back what it returns, unless None.

    Hooks of one module run in the order of their attachment, but one attached as `first` before the others.
    """
    if side == "out":

        def after(_: nn.Module, __: Any, output: Any) -> Any:
            x = read(output)
            new = change(x) if x is not None else None
            return None if new is None else write(output, new)

        return module.register_forward_hook(after, prepend=first)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if read(args) is not None:
            x = read(args)
            new = change(x) if x is not None else None
            return None if new is None else (write(args, new), kwargs)
        key = (
            "hidden_states"
            if "hidden_states" in kwargs
            else next((k for k, v in kwargs.items() if _activation(v)), "")
        )
        new = change(kwargs[key]) if key else None
        return None if new is None else (args, kwargs | {key: new})

    return module.register_forward_pre_hook(before, with_kwargs=True, prepend=first)
