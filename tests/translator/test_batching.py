"""Every sequence in one batch, and no batch larger than allowed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_mt.translator.batching import plan_batches


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 8), st.integers(1, 100))
def test_every_sequence_once_within_both_limits(lengths, batch_size, max_batch_tokens):
    batches = plan_batches(lengths, batch_size, max_batch_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[index] for index in batch)
        assert len(batch) <= batch_size
        assert padded <= max_batch_tokens or len(batch) == 1


@pytest.mark.parametrize(
    ("lengths", "batch_size", "max_batch_tokens", "expected"),
    [
        ([], 4, 100, []),
        # Longest first, so that memory runs out at once or never; equals in their order.
        ([3, 9, 3, 5], 2, 100, [[1, 3], [0, 2]]),
        # Padding counts: the third would make 3 * 5 tokens of 13.
        ([5, 5, 3], 9, 14, [[0, 1], [2]]),
        # Longer than allowed: alone, not lost.
        ([50, 2], 9, 10, [[0], [1]]),
    ],
)
def test_plans(lengths, batch_size, max_batch_tokens, expected):
    assert plan_batches(lengths, batch_size, max_batch_tokens) == expected
