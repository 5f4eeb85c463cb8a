"""Whole forwards of a language model: reading at hookpoints, writing, stopping early. Knows no dictionary.

Plain PyTorch forward hooks on the Hugging Face model itself. Nothing here switches gradients off: the caller
chooses `torch.inference_mode()`, `torch.no_grad()` or neither. The model is always in eval mode, and hooks are
gone when a call returns or raises. One `LanguageModel` serves one thread.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sememe.errors import HookpointError, ModelError, ShapeError
from sememe.lm.hookpoints import Hookpoints, Place, attach, rows, unrows
from sememe.lm.past import Packed, Past, Prefix

__all__ = ["Forwards", "Running", "window_of"]

WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "attention_window_size",
    "attention_chunk_size",
    "window_size",
)
"""What transformers' configurations call the number of tokens that a layer sees, where it is not the whole context."""

Edit = Callable[[Float[Tensor, "batch seq d"]], Float[Tensor, "batch seq d"]]


class _Stop(BaseException):
    """Ends a forward once everything asked for was read. Not an Exception, so that no model swallows it."""


class Running(NamedTuple):
    """Which tokens a forward is about."""

    first: int
    """The number of the first: in KV-cached generation, how many came before."""
    cached: bool
    """Whether keys and values are kept: then more tokens may follow."""
    n_prompt: int | None = None
    """Inside `generate`: tokens of the prompt."""
    n_read: int | None = None
    """Inside `generate`: tokens that are read at most; the last new one is not."""


def window_of(config: Any) -> int | None:
    """The smallest number of tokens that some layer sees; None where a configuration says of none."""
    found = [getattr(config, name, None) for name in WINDOWS]
    return min((n for n in found if isinstance(n, int)), default=None)


class Forwards:
    """What `LanguageModel` does in whole forwards."""

    def __init__(self, hf: Any, tokenizer: Any, name: str, fingerprint: str) -> None:
        self.hf, self.tokenizer, self.name, self.fingerprint = hf.eval(), tokenizer, name, fingerprint
        self._points = Hookpoints(hf)
        self._head: Any = hf.get_output_embeddings()
        if self._head is None:
            raise ModelError(
                "a language model must have an unembedding", type(hf).__name__, "Load its causal-LM class."
            )
        config = hf.config.get_text_config()
        self._layers = self._points.layers
        self.n_layers = len(self._layers)
        self.d_model = int(config.hidden_size)
        self.vocab_size = int(hf.get_input_embeddings().weight.shape[0])
        self.context_length: int | None = getattr(config, "max_position_embeddings", None)
        self._widths: dict[str, int] = {}
        self._arguments = frozenset(inspect.signature(type(hf).forward).parameters)
        # transformers renamed it in 5.24, and warns where it is called by the old name.
        self._cache_name = "cache" if "cache" in self._arguments else "past_key_values"
        self.running = Running(0, False)
        """The forward that edits see now."""
        self._generating: tuple[int, int] | tuple[None, None] = (None, None)
        """`n_prompt` and `n_read` of the generation that is going on."""
        self._counted: tuple[Any, Tensor, int] | None = None
        """A cache that does not know its length, the tokens last given, and how many there were before them."""
        self._edits_off = False
        self._skipped_to = -2
        self._past: Past | None = None
        self._prefix: Prefix | Packed | None = None

    def __repr__(self) -> str:
        return (
            f"LanguageModel({self.name!r}, {type(self.hf).__name__}, n_layers={self.n_layers}, "
            f"d_model={self.d_model}, vocab_size={self.vocab_size}, {self.dtype}, {self.device})"
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embeddings, and so of the activations."""
        return self.hf.get_input_embeddings().weight.dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return self.hf.get_input_embeddings().weight.device  # type: ignore[no-any-return]

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """The stack, as modules."""
        return self._layers

    # ---- hookpoints -----------------------------------------------------------------------------------------

    def hookpoints(self) -> tuple[str, ...]:
        """Every alias with every layer that has it: `resid_pre.0`, ..., `resid_post.29`."""
        return self._points.names

    def expand(self, patterns: str | Iterable[str]) -> tuple[str, ...]:
        """Names, paths and globs (`resid_post.*`) to names, each once.

        Raises:
            HookpointError: one matches nothing; the nearest names are suggested.
        """
        return self._points.expand(patterns)

    def width(self, hookpoint: str) -> int:
        """Number of features at a hookpoint."""
        if hookpoint not in self._widths:
            with self._without_edits(), torch.no_grad():
                ids = torch.zeros(1, 1, dtype=torch.long)
                self._widths[hookpoint] = self.capture(ids, [hookpoint])[hookpoint].shape[-1]
        return self._widths[hookpoint]

    def replay_layer(self, hookpoint: str) -> int:
        """The layer from whose output `hidden_from` recomputes everything from this hookpoint on; -1: none."""
        return self._points.resolve(hookpoint).start

    def written_layer(self, hookpoint: str) -> int:
        """The layer in whose output a write to the residual stream here first shows; -1: before layer 0."""
        place = self._points.resolve(hookpoint)
        return place.layer - 1 if place.name.startswith("resid_pre.") else place.layer

    # ---- reading --------------------------------------------------------------------------------------------

    def capture(
        self,
        ids: Int[Tensor, "batch seq"],
        hookpoints: str | Iterable[str],
        mask: Bool[Tensor, "batch seq"] | None = None,
    ) -> dict[str, Float[Tensor, "batch seq d"]]:
        """Activations at some hookpoints; nothing after the last of them is computed.

        Inside `edit`, what is captured at an edited hookpoint is the edited value.

        Args:
            ids: Token ids.
            hookpoints: Names or globs.
            mask: False where a position is padding (at the end of a row).
        Returns:
            By name, in the model's dtype, on the device of the module.
        Raises:
            HookpointError: a hookpoint is unknown, or the forward never reaches it.
            ModelError: ids are outside the vocabulary, or a row is longer than the model's context.
        """
        places = [self._points.resolve(name) for name in self.expand(hookpoints)]
        found: dict[str, Tensor] = {}
        with contextlib.ExitStack() as hooks:
            lead = self._follow_shape(hooks)
            for place in places:

                def take(x: Tensor, place: Place = place) -> None:
                    if place.name in found:
                        return
                    row = self._rows(x, lead[0], place)
                    last = len(found) + 1 == len(places)
                    # Some models add to a block's output in place, after it was read.
                    found[place.name] = row if last else row.clone()
                    if last:
                        raise _Stop

                hooks.callback(attach(self._points.module(place), place.side, take).remove)
            self._forward(ids, mask)
        missing = [place.name for place in places if place.name not in found]
        if missing:
            raise HookpointError(
                "a forward pass must reach every hookpoint with activations",
                f"none at {', '.join(missing)}",
                "Choose another module.",
            )
        return {place.name: found[place.name] for place in places}

    def hidden(
        self,
        ids: Int[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch seq"] | None = None,
        cache: Any = None,
    ) -> Float[Tensor, "batch seq d_hidden"]:
        """What the unembedding sees: the last layer's output after the final norm.

        Its width is d_model but where a model projects once more before the unembedding (OPT-350m).

        Args:
            ids: Token ids.
            mask: False where a position is padding (at the end of a row).
            cache: transformers' keys and values of the tokens before `ids`; those of `ids` are added to it.
        """
        found: list[Tensor] = []

        def take(x: Tensor) -> None:
            found.append(x)
            raise _Stop

        with contextlib.ExitStack() as hooks:
            hooks.callback(attach(self._head, "in", take).remove)
            self._forward(ids, mask, cache)
        return found[0]

    # ---- writing --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def edit(self, edits: Mapping[str, Edit]) -> Iterator[None]:
        """Change activations on every forward inside the context, generation included.

        Each function gets (batch, seq, d) and returns the same shape; under KV-cached generation it sees the
        whole prompt once and then one new position at a time. Edits at one place run in the order of their
        contexts, outer first.

        Raises:
            HookpointError: a hookpoint is unknown.
            ShapeError: a function returned another shape (raised by the forward).
        """
        with contextlib.ExitStack() as hooks:
            lead = self._follow_shape(hooks)
            for pattern, function in edits.items():
                for name in self.expand(pattern):
                    place = self._points.resolve(name)

                    def change(x: Tensor, place: Place = place, function: Edit = function) -> Tensor | None:
                        if self._edits_off or self._is_skipped(place):
                            return None
                        row = self._rows(x, lead[0], place)
                        new = function(row)
                        if new is row:
                            return None
                        if new.shape != row.shape:
                            raise ShapeError(
                                f"an edit of {place.name} must keep the shape {tuple(row.shape)}",
                                tuple(new.shape),
                                "Return one row per position.",
                            )
                        return unrows(new, x)

                    hooks.callback(attach(self._points.module(place), place.side, change).remove)
            yield

    # ---- inside ---------------------------------------------------------------------------------------------

    def _check(self, ids: Tensor, mask: Tensor | None) -> None:
        if ids.dim() != 2 or ids.is_floating_point() or 0 in ids.shape:
            raise ShapeError(
                "token ids must be whole numbers of shape (batch, seq)",
                f"{ids.dtype} of shape {tuple(ids.shape)}",
                "Pass a batch of rows.",
            )
        if mask is not None and mask.shape != ids.shape:
            raise ShapeError(
                "the mask must have the shape of the ids", tuple(mask.shape), f"Use {tuple(ids.shape)}."
            )
        if self.context_length is not None and ids.shape[1] > self.context_length:
            raise ModelError(
                f"a row must fit the context of {self.context_length} tokens of {self.name}",
                f"{ids.shape[1]} tokens",
                "Lower context_length.",
            )
        # On an accelerator this look would make the host wait; ids come from the host.
        if ids.device.type == "cpu":
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.vocab_size:
                raise ModelError(
                    f"token ids must be in [0, {self.vocab_size - 1}] for {self.name}",
                    low if low < 0 else high,
                    "Tokenize with this model's tokenizer.",
                )

    def _forward(self, ids: Tensor, mask: Tensor | None, cache: Any = None) -> Any:
        """One forward; None when a hook stopped it."""
        self._check(ids, mask)
        # All ones is the default, and lets attention take its fast path.
        if mask is not None and mask.device.type == "cpu" and bool(mask.all()):
            mask = None
        # Byte-sized masks and int32 ids are what stores hold; models want long.
        ids = ids.to(self.device, torch.long)
        mask = mask.to(self.device, torch.long) if mask is not None else None
        try:
            if cache is not None:
                told = {"attention_mask": mask, self._cache_name: cache, "use_cache": True}
                return self.hf(input_ids=ids, **told)
            return self.hf(input_ids=ids, **self._cache_arguments(ids, mask))
        except _Stop:
            return None

    def _cache_arguments(self, ids: Tensor, mask: Tensor | None) -> dict[str, Any]:
        """What a forward is told of earlier tokens, and whether it is to leave its own keys behind."""
        if self._prefix is not None:
            n_new = ids.shape[1]
            mask = self._prefix.mask(n_new)
            dtype = self.dtype if mask is not None and mask.is_floating_point() else torch.long
            told: dict[str, Any] = {self._cache_name: self._prefix.cache, "use_cache": True}
            if "position_ids" in self._arguments:
                told["position_ids"] = self._prefix.positions(n_new, self.context_length).to(ids.device)
            return told | {"attention_mask": None if mask is None else mask.to(ids.device, dtype)}
        if self._past is not None:
            self._past.forget()
            return {"attention_mask": mask, self._cache_name: self._past.cache, "use_cache": True}
        return {"attention_mask": mask, "use_cache": False}

    def _follow_shape(self, hooks: contextlib.ExitStack) -> list[tuple[int, int] | None]:
        """The (batch, seq) of the running forward, whoever calls it."""
        lead: list[tuple[int, int] | None] = [None]

        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            cache: Any = kwargs.get(self._cache_name)
            given = args[0] if args else kwargs.get("input_ids")
            given = kwargs.get("inputs_embeds") if given is None else given
            self.running = Running(self._tokens_before(cache, given), cache is not None, *self._generating)
            lead[0] = (given.shape[0], given.shape[1]) if given is not None else None

        hooks.callback(self.hf.register_forward_pre_hook(see, with_kwargs=True).remove)
        return lead

    def _tokens_before(self, cache: Any, given: Tensor | None) -> int:
        """How many tokens a cache holds; what was counted, where it does not know (mamba's states)."""
        try:
            return int(cache.get_seq_length()) if cache is not None else 0
        except (AttributeError, ValueError):
            before = self._counted
            if before is None or before[0] is not cache:
                first = 0
            else:  # several hooks see one forward: it is counted once
                first = before[2] if before[1] is given else before[2] + before[1].shape[1]
            self._counted = None if given is None else (cache, given, first)
            return first

    def _rows(self, x: Tensor, lead: tuple[int, int] | None, place: Place) -> Float[Tensor, "batch seq d"]:
        # Generation unembeds the last position of the prompt only.
        return rows(x, lead if place.layer < self.n_layers else None, place.name)

    @contextlib.contextmanager
    def _without_edits(self) -> Iterator[None]:
        before, self._edits_off = self._edits_off, True
        try:
            with self._on_its_own():
                yield
        finally:
            self._edits_off = before

    @contextlib.contextmanager
    def _on_its_own(self) -> Iterator[None]:
        """Forwards go on from nothing and leave nothing behind."""
        before = self._past, self._prefix
        self._past, self._prefix = None, None
        try:
            yield
        finally:
            self._past, self._prefix = before

    @contextlib.contextmanager
    def _below_off(self, layer: int) -> Iterator[None]:
        """Edits that could not change the output of a layer do nothing."""
        before, self._skipped_to = self._skipped_to, layer
        try:
            yield
        finally:
            self._skipped_to = before

    def _is_skipped(self, place: Place) -> bool:
        after_head = place.side == "out" and self._points.module(place) is self._head
        return place.start < self._skipped_to and not after_head
