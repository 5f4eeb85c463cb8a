"""A language model to read from, write to and continue from the middle. Knows no dictionary, store or verb.

Whole forwards, what is read in them and written, are in `forwards.py`; here are those that begin in the middle, and
what is asked of the model besides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sememe.errors import HookpointError, ModelError, ShapeError
from sememe.lm.forwards import Forwards, window_of
from sememe.lm.hookpoints import attach, read, unrows, write
from sememe.lm.past import Packed, Past, Prefix
from sememe.lm.readout import Readout, between_stack_and_head
from sememe.lm.tokens import TokenTable

__all__ = ["LanguageModel"]


def _without_extras(output: Any) -> Any:
    """A layer's output with the residual alone: states and attention weights of another forward are no use."""
    kept = read(output)
    if isinstance(output, tuple) and not hasattr(output, "_fields"):
        return tuple(m if m is kept else None for m in output)
    return output


class LanguageModel(Forwards):
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
        super().__init__(hf, tokenizer, name, fingerprint)
        self._outputs: dict[int, Any] = {}
        self._can_skip: dict[int, bool] = {}
        self._can_go_on: bool | None = None
        self._can_pack: bool | None = None
        self._tokens: TokenTable | None = None

    # ---- from the middle ------------------------------------------------------------------------------------

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
    def after(self, prefix: Prefix | Packed) -> Iterator[None]:
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

    def packs(self, n_tokens: int) -> bool:
        """Whether a row may hold several continuations of a context of so many tokens (`Past.packed`).

        Tried once on a few tokens. Not where some layer sees less than the whole context: such a layer makes its mask
        itself, and a mask that is given takes the place of that.
        """
        if self._can_pack is None:
            self._can_pack = self.goes_on() and self._tries_packing()
        window = window_of(self.hf.config.get_text_config())
        return self._can_pack and (window is None or n_tokens <= window)

    def _tries_packing(self) -> bool:
        """Two rows of two continuations each, with other tokens than the contexts', against whole forwards."""
        n = 12 if self.context_length is None else min(12, self.context_length)
        n_new, n_all = n // 4, 2 * (n // 4)
        ids = torch.stack([torch.arange(n), torch.arange(n).flip(0)]) % self.vocab_size
        other = (ids[:, :n_all] + n) % self.vocab_size
        begins = torch.tensor([[n // 4, n // 2], [n - n_new, 1]])
        step = torch.arange(n_new)
        try:
            with self._without_edits(), torch.no_grad():
                with self.remembering() as past:
                    self.hidden(ids)
                lengths = begins.repeat_interleave(n_new, 1)
                first = (torch.arange(n_all) // n_new * n_new).expand(2, -1)
                with self.after(past.packed(torch.arange(2), lengths, first)):
                    found = self.hidden(other).float()
                rows = torch.tensor([0, 0, 1, 1])[:, None]
                places = begins.view(4, 1) + step
                whole = ids[rows[:, 0]]
                whole.scatter_(1, places, other.view(4, n_new))
                truth = self.hidden(whole)
                places = places.to(truth.device)
                truth = truth[torch.arange(4, device=truth.device)[:, None], places].float()
            tolerance = 1e-3 if self.dtype == torch.float32 else 5e-2
            return bool((found.reshape(truth.shape) - truth).norm() <= tolerance * truth.norm())
        except Exception:
            return False

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
        self._generating = ids.shape[1], ids.shape[1] + max_new_tokens - 1
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
            self._generating = None, None
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

    # ---- leaving layers out ---------------------------------------------------------------------------------

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
