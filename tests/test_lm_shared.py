"""Attention of rows that share their contexts' keys, against each row's own attention over its own copy."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONTEXT, tiny_lm

from sememe.lm.shared import PACKED, Plan, plan_of, supports


def one_row(query, keys, values, past_keys, past_values, scale):
    """(heads, new, d): softmax over the row's past and its new tokens, written out."""
    n_groups, n_past = query.shape[0] // keys.shape[0], past_keys.shape[1]
    all_keys = torch.cat([past_keys, keys], 1).repeat_interleave(n_groups, 0)
    all_values = torch.cat([past_values, values], 1).repeat_interleave(n_groups, 0)
    scores = query @ all_keys.mT * scale
    for i in range(query.shape[1]):
        scores[:, i, n_past + i + 1 :] = -math.inf
    return scores.softmax(-1) @ all_values


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.integers(0, 4), min_size=1, max_size=9),
    n_new=st.integers(1, 4),
    key_heads=st.integers(1, 2),
    n_groups=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_every_row_attends_as_if_alone(rows, n_new, key_heads, n_groups, seed):
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    n, d, n_seq = len(rows), 4, 7
    which = torch.tensor(rows)
    lengths = torch.randint(0, n_seq + 1, (n,), generator=generator)
    past_keys, past_values = noise(5, key_heads, n_seq, d), noise(5, key_heads, n_seq, d)
    query = noise(n, key_heads * n_groups, n_new, d)
    keys, values = noise(n, key_heads, n_new, d), noise(n, key_heads, n_new, d)
    plan = Plan(which, lengths, n_new)
    found = plan.attend(query, plan.packed(past_keys, keys), plan.packed(past_values, values), 0.3)
    for i in range(n):
        own = (x[rows[i], :, : int(lengths[i])] for x in (past_keys, past_values))
        truth = one_row(query[i], keys[i], values[i], *own, 0.3)
        torch.testing.assert_close(found[i], truth.transpose(0, 1), rtol=1e-4, atol=1e-5)


def test_many_new_tokens_of_one_context_are_not_put_side_by_side():
    rows, lengths = torch.zeros(10, dtype=torch.long), torch.full((10,), 6)
    few = 6 * PACKED // 10
    assert plan_of(rows, lengths, few) is not None
    assert plan_of(rows, lengths, few + 1) is None
    assert plan_of(rows[:0], lengths[:0], 1) is None


@pytest.mark.parametrize(
    ("config", "able"),
    [
        ({}, True),
        ({"layer_types": ["full_attention"] * 2, "sliding_window": 64}, True),
        ({"layer_types": ["full_attention", "sliding_attention"]}, False),
        ({"sliding_window": 64}, False),
        ({"attention_chunk_size": 64, "layer_types": ["full_attention"]}, False),
    ],
)
def test_attention_that_does_not_look_at_all_earlier_tokens_is_not_shared(config, able):
    assert supports(SimpleNamespace(**config)) == able


def test_a_model_is_left_as_it_was_after_an_error():
    lm = tiny_lm("llama")
    config = lm.hf.config.get_text_config()
    before = config._attn_implementation
    assert lm.shares()
    with lm.remembering() as past:
        lm.hidden(torch.arange(8)[None])
    prefix = past.prefix(torch.tensor([0, 0]), torch.tensor([2, 3]), 2, shared=True)
    assert prefix.plan is not None
    with pytest.raises(Exception, match="must fit the context"), lm.after(prefix):
        lm.hidden(torch.zeros(2, CONTEXT + 1, dtype=torch.long))
    assert config._attn_implementation == before
