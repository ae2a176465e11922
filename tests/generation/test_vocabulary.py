"""The best of a vocabulary, against PyTorch's own search of all of it."""

import pytest
import torch

from moe_mt.generation.vocabulary import best_token, log_prob_of, top_k

# One block, whole blocks, blocks and a rest, the sizes of both families.
SIZES = [1, 50, 256, 1024, 1087, 128_112, 256_206]


def scores_of(size, rows=3):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 8])
def test_the_largest_are_found_wherever_they_stand(size, count):
    scores, count = scores_of(size), min(count, size)
    values, indices = top_k(scores, count)
    expected = scores.topk(count)
    assert torch.equal(values, expected.values)
    assert torch.equal(indices, expected.indices)
    assert torch.equal(best_token(scores), scores.argmax(-1))


@pytest.mark.parametrize("place", [0, 63, 64, 1023, 1024, 1086])
def test_edges_of_blocks_and_the_rest_are_searched(place):
    scores = scores_of(1087)
    scores[1, place] = 9.0
    assert best_token(scores)[1] == place
    assert top_k(scores, 2)[1][1, 0] == place


def test_all_of_the_largest_may_stand_in_one_block():
    scores = scores_of(1087)
    scores[:, 128:136] += 20
    assert torch.equal(top_k(scores, 8)[1].sort().values[0], torch.arange(128, 136))


def test_of_equals_greedy_search_takes_the_first():
    scores = torch.zeros(1, 1087)
    for places in ([1080, 700, 90], [1086, 1025], [1030, 130]):
        scores.zero_()[0, places] = 1.0
        assert best_token(scores).tolist() == [min(places)]


def test_where_all_but_a_few_are_banned_these_are_found():
    scores = torch.full((2, 1087), -torch.inf)
    scores[0, 1086], scores[1, 5] = 0.0, 0.0
    values, indices = top_k(scores, 4)
    assert best_token(scores).tolist() == indices[:, 0].tolist() == [1086, 5]
    assert values[:, 1:].isneginf().all()
    assert ((indices >= 0) & (indices < 1087)).all()


def test_log_probability_of_a_token():
    scores = scores_of(1087).double()
    tokens = torch.tensor([0, 500, 1086])
    expected = scores.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(log_prob_of(scores, tokens), expected)
