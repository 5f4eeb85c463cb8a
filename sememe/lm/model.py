"""A language model to read from, write to and continue from the middle. Knows no dictionary, store or verb.

Plain PyTorch forward hooks on the Hugging Face model itself. Nothing here switches gradients off: the caller
chooses `torch.inference_mode()`, `torch.no_grad()` or neither. The model is always in eval mode, and hooks are
gone when a call returns or raises. One `LanguageModel` serves one thread.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sememe.errors import HookpointError, ModelError, ShapeError
from sememe.lm.hookpoints import Hookpoints, Place, attach, read, rows, unrows, write
from sememe.lm.past import Past, Prefix
from sememe.lm.readout import Readout, between_stack_and_head
from sememe.lm.tokens import TokenTable

__all__ = ["LanguageModel"]

Edit = Callable[[Float[Tensor, "batch seq d"]], Float[Tensor, "batch seq d"]]


class _Stop(BaseException):
    """Ends a forward once everything asked for was read. Not an Exception, so that no model swallows it."""


def _without_extras(output: Any) -> Any:
    """A layer's output with the residual alone: states and attention weights of another forward are no use."""
    kept = read(output)
    if isinstance(output, tuple) and not hasattr(output, "_fields"):
        return tuple(m if m is kept else None for m in output)
    return output


class LanguageModel:
    """A causal language model with its tokenizer.

    Args:
        hf: The Hugging Face model; put in eval mode here.
        tokenizer: Its fast tokenizer.
        name: What artifacts call it.
        fingerprint: Hash of its configuration, tokenizer and weights.
    Raises:
        ModelError: the model has no stack of layers or no unembedding.
    """

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
        self._outputs: dict[int, Any] = {}
        self._can_skip: dict[int, bool] = {}
        self._edits_off = False
        self._skipped_to = -2
        self._tokens: TokenTable | None = None
        self._past: Past | None = None
        self._prefix: Prefix | None = None
        self._can_go_on: bool | None = None

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

    def logits(self, hidden: Float[Tensor, "*batch d_hidden"]) -> Float[Tensor, "*batch vocab"]:
        """Next-token logits of `hidden`, as the model itself makes them (Gemma's soft-capping included).

        The model's own forward runs with its layers left out and `hidden` put before the unembedding, so that
        whatever an architecture does there is done.
        """
        shape = hidden.shape
        fits = hidden.dim() == 3 and (self.context_length is None or shape[1] <= self.context_length)
        placed = hidden if fits else hidden.reshape(-1, 1, shape[-1])
        ids = torch.zeros(placed.shape[:2], dtype=torch.long)
        with contextlib.ExitStack() as hooks:
            hooks.enter_context(self._on_its_own())
            hooks.enter_context(self._skipping(self.n_layers - 1, None))
            hooks.enter_context(self._below_off(self.n_layers))
            hooks.callback(attach(self._head, "in", lambda _: placed).remove)
            out = self._forward(ids, None)
        return out.logits.reshape(*shape[:-1], -1)  # type: ignore[no-any-return]

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

    def hidden_from(
        self,
        layer: int,
        residual: Float[Tensor, "batch seq d_model"],
        ids: Int[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch seq d_hidden"]:
        """`hidden` as if the output of `layer` were `residual`, without computing layers 0 to `layer`.

        Equal to the bit to the full forward with an edit at `resid_post.layer`. Edits at `resid_post.layer`
        change what is given, edits above it act as always, and edits below cannot. Where layers share more than
        the residual (a later layer reads an earlier one's keys), skipping is found not to agree and the full
        forward is run instead.

        Args:
            layer: The last layer left out; -1 puts `residual` before layer 0.
            residual: Its output.
            ids: The same token ids as for the full forward.
            mask: The same mask.
        Raises:
            HookpointError: no such layer.
            ShapeError: `residual` is not (batch, seq, d_model).
        """
        if not -1 <= layer < self.n_layers:
            raise HookpointError(
                f"the layer to start from must be in [-1, {self.n_layers - 1}]",
                layer,
                "Use replay_layer(hookpoint).",
            )
        if residual.shape != (*ids.shape, self.d_model):
            raise ShapeError(
                f"the residual must be (batch, seq, d_model) = {(*ids.shape, self.d_model)}",
                tuple(residual.shape),
                "Capture it with the same ids.",
            )
        with contextlib.ExitStack() as around:
            if layer >= 0 and self._skips(layer):
                around.enter_context(self._skipping(layer, residual))
            else:
                around.enter_context(self._below_off(layer))
                name = f"resid_post.{layer}" if layer >= 0 else "resid_pre.0"
                place = self._points.resolve(name)
                module = self._points.module(place)
                put = attach(module, place.side, lambda x: unrows(residual, x), first=True)
                around.callback(put.remove)
            return self.hidden(ids, mask)

    # ---- going on after some tokens -------------------------------------------------------------------------

    @contextlib.contextmanager
    def remembering(self) -> Iterator[Past]:
        """The keys and values of the forward inside the context; of the last one, if there are several."""
        before, self._past = self._past, Past()
        try:
            yield self._past
        finally:
            self._past = before

    @contextlib.contextmanager
    def after(self, prefix: Prefix) -> Iterator[None]:
        """Every forward inside the context gets new tokens only, which go on from a prefix.

        `hidden`, `capture`, `hidden_from` and `edit` then see the new tokens, as if the prefix's stood before them;
        rows filled up at their end need no mask. Ask `goes_on()` first.
        """
        before, self._prefix = self._prefix, prefix
        try:
            yield
        finally:
            self._prefix = before

    def goes_on(self) -> bool:
        """Whether going on after a prefix gives what a full forward gives, tried once on a few tokens."""
        if self._can_go_on is None:
            n = 12 if self.context_length is None else min(12, self.context_length)
            ids = torch.stack([torch.arange(n), torch.arange(n).flip(0)]) % self.vocab_size
            lengths = torch.tensor([n // 4, n // 2])
            n_new = n - n // 2
            try:
                with self._without_edits(), torch.no_grad():
                    with self.remembering() as past:
                        full = self.hidden(ids)
                    places = lengths[:, None] + torch.arange(n_new)
                    with self.after(past.prefix(torch.arange(2), lengths, n_new)):
                        new = self.hidden(ids.gather(1, places)).float()
                truth = full[torch.arange(2)[:, None].to(full.device), places.to(full.device)].float()
                tolerance = 1e-3 if self.dtype == torch.float32 else 5e-2
                self._can_go_on = bool((new - truth).norm() <= tolerance * truth.norm())
            except Exception:
                self._can_go_on = False
        return self._can_go_on

    def skips(self, layer: int) -> bool:
        """Whether `hidden_from` leaves layers 0 to `layer` out, and does not run the full forward instead."""
        return layer >= 0 and self._skips(layer)

    def generate(
        self,
        ids: Int[Tensor, "batch seq"],
        max_new_tokens: int,
        *,
        mask: Bool[Tensor, "batch seq"] | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        use_cache: bool = True,
        stop_at_eos: bool = True,
        ends: tuple[int, ...] = (),
        until: Callable[[Int[Tensor, "batch seq_so_far"]], Bool[Tensor, " batch"]] | None = None,
    ) -> Int[Tensor, "batch seq_plus_new"]:
        """Prompts with their continuations; edits act, and the global random state is left as it was.

        Args:
            ids: Prompts of equal length, or padded at the front with `mask`.
            max_new_tokens: Most tokens to add.
            mask: False at front padding.
            temperature: 0 takes the likeliest token; above 0 samples.
            top_k: Sample only among the k likeliest.
            top_p: Sample only among the likeliest that hold this much probability.
            seed: Of the sampling.
            use_cache: Keep keys and values of past positions; without it, every step recomputes all.
            stop_at_eos: End a row at the tokenizer's end token.
            ends: Further tokens that end a row.
            until: Which rows end, asked after each token with everything so far.
        """
        from transformers import GenerationConfig, StoppingCriteriaList

        self._check(ids, mask)
        if self.context_length is not None and ids.shape[1] + max_new_tokens > self.context_length:
            raise ModelError(
                f"prompt and continuation must fit the context of {self.context_length} tokens of {self.name}",
                ids.shape[1] + max_new_tokens,
                "Shorten the prompt or lower max_new_tokens.",
            )
        eos = self.tokenizer.eos_token_id if stop_at_eos else None
        all_ends = [*([eos] if eos is not None else []), *(end for end in ends if end != eos)]
        sampling = (
            {"temperature": temperature, "top_k": top_k or 0, "top_p": top_p or 1.0}
            if temperature > 0
            else {}
        )
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            use_cache=use_cache,
            eos_token_id=all_ends or None,
            pad_token_id=all_ends[0] if all_ends else 0,
            **sampling,
        )
        ids = ids.to(self.device, torch.long)
        ones = torch.ones_like(ids) if mask is None else mask.to(self.device, torch.long)
        devices = [self.device] if self.device.type == "cuda" else []
        # transformers fills what is not set here from the model's own advice (a repetition penalty, a top_k).
        advice, self.hf.generation_config = self.hf.generation_config, GenerationConfig()
        try:
            with torch.random.fork_rng(devices=devices), torch.no_grad():
                torch.manual_seed(seed)
                made: Tensor = self.hf.generate(
                    input_ids=ids,
                    attention_mask=ones,
                    generation_config=config,
                    stopping_criteria=StoppingCriteriaList(
                        [lambda so_far, _, **__: until(so_far)] if until is not None else []
                    ),
                )
        finally:
            self.hf.generation_config = advice
        return made

    # ---- directions and tokens ------------------------------------------------------------------------------

    def direct_logits(
        self,
        directions: Float[Tensor, "n d_model"],
        chunk: int = 512,
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[Float[Tensor, "chunk vocab"]]:
        """What each residual direction adds to the logits by the direct path, minus its mean over the vocabulary.

        The direction is scaled by the final norm's weight (and centred first where that norm centres) and
        multiplied by the unembedding. There is no division by a norm, which depends on the text: the logits of
        one direction compare with each other, not with those of a forward. Biases and soft-capping are left out.

        Args:
            directions: One per row, in the units of the residual stream.
            chunk: Rows per step; a step holds chunk x vocab floats.
            dtype: Of the products; bfloat16 is faster and good to about 3 digits.
        Yields:
            Float32 chunks, in order.
        """
        if directions.dim() != 2 or directions.shape[1] != self.d_model:
            raise ShapeError(
                f"directions must be (n, d_model={self.d_model})",
                tuple(directions.shape),
                "Pass decoder rows.",
            )
        with self._without_edits(), torch.no_grad():
            between = between_stack_and_head(
                self.hf,
                self._layers,
                self._head,
                lambda: self.hidden(torch.zeros(1, 1, dtype=torch.long)),
            )
        reading = Readout.of(between, self._head.weight.detach().to(dtype), self.d_model)
        for part in torch.split(directions.detach(), chunk):
            yield reading.logits(part)

    def embeddings(self) -> tuple[Float[Tensor, "vocab d_model"], Float[Tensor, "vocab d_hidden"]]:
        """A row per token: of the embedding, and of the unembedding. The weights themselves; change nothing."""
        return self.hf.get_input_embeddings().weight.detach(), self._head.weight.detach()

    def output_projection(self, hookpoint: str) -> Float[Tensor, "d d_out"] | None:
        """What the module that reads a hookpoint does to it, `x @ W`, without its bias; None unless the hookpoint is
        a single linear module's input (`mlp_act.L`, `attn_z.L`)."""
        place = self._points.resolve(hookpoint)
        module = self._points.module(place)
        weight = getattr(module, "weight", None)
        if (
            place.side != "in"
            or not isinstance(weight, Tensor)
            or weight.dim() != 2
            or any(module.children())
        ):
            return None
        basis = torch.eye(self.width(hookpoint), device=weight.device, dtype=weight.dtype)
        with self._without_edits(), torch.no_grad():  # some keep their weight transposed, so it is asked
            found = module(basis) - module(torch.zeros_like(basis[:1]))
        return found.float() if isinstance(found, Tensor) else None

    def token_text(self, token: int) -> str:
        """Readable text of a token; bytes that are only part of a character show as `\\xe6`."""
        return self._table().text(token)

    def token_bytes(self, token: int) -> bytes:
        """The exact bytes a token stands for; empty for ids that no token has."""
        return self._table().bytes_of[token]

    def _table(self) -> TokenTable:
        if self._tokens is None:
            self._tokens = TokenTable(self.tokenizer, self.vocab_size)
        return self._tokens

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
                return self.hf(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
            return self.hf(input_ids=ids, **self._cache_arguments(ids, mask))
        except _Stop:
            return None

    def _cache_arguments(self, ids: Tensor, mask: Tensor | None) -> dict[str, Any]:
        """What a forward is told of earlier tokens, and whether it is to leave its own keys behind."""
        if self._prefix is not None:
            n_new = ids.shape[1]
            mask = self._prefix.mask(n_new)
            told: dict[str, Any] = {"past_key_values": self._prefix.cache, "use_cache": True}
            if "position_ids" in inspect.signature(type(self.hf).forward).parameters:
                told["position_ids"] = self._prefix.positions(n_new, self.context_length).to(ids.device)
            return told | {"attention_mask": None if mask is None else mask.to(ids.device, torch.long)}
        if self._past is not None:
            self._past.forget()
            return {"attention_mask": mask, "past_key_values": self._past.cache, "use_cache": True}
        return {"attention_mask": mask, "use_cache": False}

    def _follow_shape(self, hooks: contextlib.ExitStack) -> list[tuple[int, int] | None]:
        """The (batch, seq) of the running forward, whoever calls it."""
        lead: list[tuple[int, int] | None] = [None]

        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else kwargs.get("input_ids")
            given = kwargs.get("inputs_embeds") if given is None else given
            lead[0] = (given.shape[0], given.shape[1]) if given is not None else None

        hooks.callback(self.hf.register_forward_pre_hook(see, with_kwargs=True).remove)
        return lead

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

    @contextlib.contextmanager
    def _skipping(self, layer: int, residual: Tensor | None) -> Iterator[None]:
        """Layers 0 to `layer` cost nothing; the last of them gives `residual` (None: its input)."""
        layers = self._layers[: layer + 1]
        before = [module.__dict__.get("forward") for module in layers]
        with self._below_off(layer):
            try:
                for i, module in enumerate(layers):
                    module.forward = self._stand_in(i, residual if i == layer else None)
                yield
            finally:
                for module, forward in zip(layers, before, strict=True):
                    # accelerate puts a forward of its own on the instance.
                    if forward is not None:
                        module.forward = forward
                    else:
                        module.__dict__.pop("forward", None)

    def _stand_in(self, layer: int, residual: Tensor | None) -> Callable[..., Any]:
        seen = self._layer_output(layer)

        def forward(*args: Any, **kwargs: Any) -> Any:
            x = read(args)
            x = x if x is not None else kwargs["hidden_states"]
            like = read(seen)
            if residual is not None and like is not None:
                # A copy: a later layer may add to it in place.
                x = residual.to(device=like.device, dtype=like.dtype, copy=True)
            return write(seen, x)

        return forward

    def _layer_output(self, layer: int) -> Any:
        """The structure a layer returns, from one look at a short forward."""
        if not self._outputs:
            with self._without_edits(), torch.no_grad(), contextlib.ExitStack() as hooks:
                for i, module in enumerate(self._layers):

                    def look(_: nn.Module, __: Any, output: Any, i: int = i) -> None:
                        self._outputs[i] = _without_extras(output)

                    hooks.callback(module.register_forward_hook(look).remove)
                self.hidden(torch.zeros(1, 1, dtype=torch.long))
        return self._outputs[layer]

    def _skips(self, layer: int) -> bool:
        """Whether leaving layers out gives the same hidden states, tried once on four tokens."""
        if layer not in self._can_skip:
            ids = torch.arange(min(4, self.vocab_size)).unsqueeze(0)
            with self._without_edits(), torch.no_grad():
                name = f"resid_post.{layer}"
                residual = self.capture(ids, [name])[name]
                full = self.hidden(ids)
                # Whatever the model keeps from its last forward must not be what would be right.
                self.hidden(ids.flip(1))
                try:
                    with self._skipping(layer, residual):
                        skipped = self.hidden(ids)
                    self._can_skip[layer] = torch.equal(full, skipped)
                except Exception:
                    self._can_skip[layer] = False
        return self._can_skip[layer]
