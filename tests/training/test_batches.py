"""Which pairs train together, and the tensors they become."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_mt.losses import IGNORED_LABEL
from moe_mt.training import TokenBatch, TokenPairs, plan_batches

PAD, START = 1, 2
LENGTHS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), max_size=80)


def pairs_of(lengths) -> TokenPairs:
    return TokenPairs.from_sequences([([7] * source, [8] * target) for source, target in lengths])


def test_a_batch_by_hand():
    pairs = TokenPairs.from_sequences([([5, 6, 2], [9, 2]), ([5, 2], [9, 10, 2]), ([7, 2], [8, 2])])
    batch = TokenBatch.collate(pairs, [1, 0], PAD, START)
    assert batch.source_tokens.tolist() == [[5, 2, PAD], [5, 6, 2]]
    assert batch.source_mask.tolist() == [[True, True, False], [True, True, True]]
    # The decoder reads its start and then every label but the last …
    assert batch.target_tokens.tolist() == [[START, 9, 10], [START, 9, PAD]]
    assert batch.target_mask.tolist() == [[True, True, True], [True, True, False]]
    # … and is to say the labels.
    assert batch.labels.tolist() == [[9, 10, 2], [9, 2, IGNORED_LABEL]]
    assert batch.source_tokens.dtype == batch.labels.dtype == torch.int64


def test_a_batch_moves_whole():
    batch = TokenBatch.collate(pairs_of([(2, 3)]), [0], PAD, START).to(torch.device("meta"))
    assert {tensor.device.type for tensor in vars(batch).values()} == {"meta"}


@given(LENGTHS, st.integers(1, 200), st.integers(0, 3))
def test_every_pair_once_and_no_batch_too_large(lengths, max_batch_tokens, seed):
    batches = plan_batches(pairs_of(lengths), max_batch_tokens, seed)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(max(lengths[index]) for index in batch)
        assert padded <= max_batch_tokens or len(batch) == 1


def test_a_plan_depends_on_the_seed_alone():
    # An interrupted epoch is continued by planning it again, whatever was drawn in between.
    pairs = pairs_of([(n % 7 + 1, n % 5 + 1) for n in range(200)])
    first = plan_batches(pairs, 40, seed=3)
    torch.rand(5)
    assert plan_batches(pairs, 40, seed=3) == first
    assert plan_batches(pairs, 40, seed=4) != first


def test_batches_hold_pairs_of_similar_length_and_come_in_no_order_of_length():
    pairs = pairs_of([(n % 50 + 1, 1) for n in range(1_000)])
    longest = pairs.lengths().amax(1)
    batches = plan_batches(pairs, 100, seed=0)
    spans = [
        int(longest[batch].max() - longest[batch].min()) for batch in batches if len(batch) > 1
    ]
    assert sum(spans) / len(spans) < 5
    means = [float(longest[batch].float().mean()) for batch in batches]
    assert means != sorted(means)
    assert means != sorted(means, reverse=True)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_pair_longer_than_a_batch_stands_alone(seed):
    assert plan_batches(pairs_of([(50, 2)]), 10, seed) == [[0]]
