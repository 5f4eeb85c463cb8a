"""Any iterator of tensors as a source: exact resume, ends that say so, and the functions for other libraries.

The functions are tried on objects that answer as those libraries do; scripts/check_wrappers.py asks the real ones.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sememe.errors import ActivationError, ConfigError, HookpointError, ShapeError
from sememe.source import IteratorSource, Source, nnsight_rows, transformer_lens_rows, upcoming
from sememe.train import TrainConfig, train

D = 4


def blocks(n: int = 12, seed: int = 0) -> Iterator[Tensor]:
    """Blocks of different lengths, every row different, in the same order each time."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(n):
        yield torch.randn(2, 5 + number % 3, D, generator=generator)


ROWS = torch.cat([block.reshape(-1, D) for block in blocks()])


def test_a_pass_is_every_row_once_in_another_order() -> None:
    source = IteratorSource(blocks(), buffer_rows=40)
    assert isinstance(source, Source) and (source.d_in, source.d_out) == (D, D)
    parts = []
    while (batch := source.next_batch(16)).x.shape[0]:
        parts.append(batch.x)
        assert batch.target is batch.x
    seen = torch.cat(parts)
    assert seen.shape == ROWS.shape and not torch.equal(seen, ROWS)
    assert torch.equal(seen.sort(0).values, ROWS.sort(0).values)


@pytest.mark.parametrize("again", [blocks, list(blocks())], ids=["function", "list"])
def test_it_starts_over_and_resumes_to_the_same_bits(again: Any) -> None:
    source = IteratorSource(again, seed=3, buffer_rows=40)
    for _ in range(5):
        source.next_batch(16)
    state = source.state_dict()
    wanted = [source.next_batch(16).x for _ in range(30)]  # over the end of a pass
    other = IteratorSource(again, seed=3, buffer_rows=40)
    other.load_state_dict(state)
    assert upcoming(other, 8).x.shape == (8, D), "which does not move the stream"
    for batch in wanted:
        assert torch.equal(other.next_batch(16).x, batch)


def test_blocks_in_another_order_are_noticed_when_a_run_goes_on() -> None:
    seeds = iter(range(9))
    source = IteratorSource(lambda: blocks(seed=next(seeds)), buffer_rows=40)
    for _ in range(5):
        source.next_batch(16)
    again = IteratorSource(lambda: blocks(seed=next(seeds)), buffer_rows=40)
    with pytest.raises(
        ActivationError, match=r"in the same order every time .* got another one as block \d+\. Shuffle"
    ):
        again.load_state_dict(source.state_dict())


def test_pairs_keep_their_targets() -> None:
    source = IteratorSource(lambda: ((block, block[..., :2] * 3) for block in blocks()), buffer_rows=40)
    batch = source.next_batch(16)
    assert source.d_out == 2 and torch.equal(batch.target, batch.x[:, :2] * 3)


def test_training_takes_it_and_says_where_it_ends(tmp_path: Path) -> None:
    def config(out: str, n: int) -> TrainConfig:
        made = {"kind": "topk", "k": 1, "d_sae": 8}
        return TrainConfig.build(
            {"out": tmp_path / out, "architecture": made, "n_tokens": n, "batch_size": 16}
        )

    dictionary = train(config("whole", 600), source=IteratorSource(blocks, buffer_rows=64))
    assert dictionary.d_in == D
    once = train(config("once", 128), source=IteratorSource(blocks(), buffer_rows=64))
    assert once.d_sae == 8
    with pytest.raises(ActivationError, match=r"must give the .* rows of this run.*ended at step 9 of 37"):
        train(config("ended", 600), source=IteratorSource(blocks(), buffer_rows=64))


def test_what_is_wrong_with_blocks_is_said() -> None:
    with pytest.raises(ActivationError, match=r"blocks must hold at least one tensor, got none"):
        IteratorSource([])
    mixed = IteratorSource([torch.ones(3, D), torch.ones(3, D + 1)], buffer_rows=8)
    with pytest.raises(ShapeError, match=r"shape \(rows >= 1, 4\).*got \(3, 5\) after 1 blocks"):
        mixed.next_batch(4)
    pairs = IteratorSource([torch.ones(3, D), (torch.ones(3, D), torch.ones(3, D))], buffer_rows=8)
    with pytest.raises(ShapeError, match=r"all be tensors or all be pairs"):
        pairs.next_batch(4)
    with pytest.raises(ShapeError, match=r"a block must have shape \(..., d_in\), got \(3,\)"):
        IteratorSource([torch.ones(3)])
    with pytest.raises(ConfigError, match=r"batch_size must be <= half of buffer_rows=8, got 5"):
        IteratorSource(blocks, buffer_rows=8).next_batch(5)
    one = IteratorSource(blocks(), buffer_rows=8)
    with pytest.raises(ConfigError, match=r"blocks must be a function or a list.*read only once"):
        one.load_state_dict(one.state_dict())
    long = IteratorSource(blocks, buffer_rows=40)
    long.next_batch(20)
    short = IteratorSource(lambda: blocks(1), buffer_rows=40)
    with pytest.raises(ActivationError, match=r"the 3 that were read before, got 1"):
        short.load_state_dict(long.state_dict() | {"n_blocks": 3})


# -- other libraries ---------------------------------------------------------------------------------

IDS = [torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[7, 8, 9]])]


class Hooked:
    """As a HookedTransformer answers: its activations are the token ids."""

    hook_dict = ("blocks.1.hook_resid_post", "blocks.1.attn.hook_z")

    def run_with_cache(
        self, ids: Tensor, names_filter: str, return_type: None, stop_at_layer: int
    ) -> tuple[None, dict[str, Tensor]]:
        assert stop_at_layer == 2 and not torch.is_grad_enabled()
        heads = (2, 2) if names_filter.endswith("hook_z") else (4,)
        return None, {names_filter: ids[..., *(None,) * len(heads)].float().expand(*ids.shape, *heads)}


def test_transformer_lens_rows() -> None:
    for hook in Hooked.hook_dict:
        first, second = transformer_lens_rows(Hooked(), IDS, hook)
        assert torch.equal(first, torch.tensor([2.0, 3, 5, 6])[:, None].expand(4, 4))
        assert second.shape == (2, 4), "position 0 is left out"
    whole = next(transformer_lens_rows(Hooked(), IDS, hook, drop=0))
    assert whole.shape == (6, 4)
    with pytest.raises(
        HookpointError, match=r"must be one of the model's, got 'blocks.1.hook_resid_pos'.*Did you"
    ):
        next(transformer_lens_rows(Hooked(), IDS, "blocks.1.hook_resid_pos"))


class Traced:
    """As an nnsight model answers: what a module gave can be saved while it is traced."""

    def __init__(self) -> None:
        self.ids = torch.empty(0)
        self.model = types.SimpleNamespace(layers=[types.SimpleNamespace(), types.SimpleNamespace()])

    @contextlib.contextmanager
    def trace(self, ids: Tensor) -> Iterator[None]:
        acts = ids[..., None].float().expand(*ids.shape, D)
        given = types.SimpleNamespace(save=lambda: (acts, None))
        self.model.layers[1].output, self.model.layers[1].input = (
            given,
            types.SimpleNamespace(save=lambda: acts),
        )
        yield


def test_nnsight_rows() -> None:
    source = IteratorSource(lambda: nnsight_rows(Traced(), IDS, "model.layers.1"), buffer_rows=16)
    assert sorted(source.next_batch(6).x[:, 0].tolist()) and source.d_in == D
    rows = torch.cat(list(nnsight_rows(Traced(), IDS, "model.layers.1", side="input")))
    assert rows[:, 0].tolist() == [2, 3, 5, 6, 8, 9]
    with pytest.raises(HookpointError, match=r"a module must be a path in the model, got 'model.layers.7'"):
        next(nnsight_rows(Traced(), IDS, "model.layers.7"))
