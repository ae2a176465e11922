import pytest
import torch

from moe_mt.generation import GenerationConfig
from moe_mt.generation.generate import translation_rules
from moe_mt.generation.logits import (
    ban_repeated_ngrams,
    force,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
)
from moe_mt.generation.rules import ForcedTokens

BANNED = -torch.inf
CPU = torch.device("cpu")


def banned_by_hand(history, size):
    """Tokens that would complete an n-gram of the history, by comparing every one."""
    prefix = history[len(history) - size + 1 :]
    return {
        history[start + size - 1]
        for start in range(len(history) - size + 1)
        if history[start : start + size - 1] == prefix
    }


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 12])
def test_repeated_ngrams(size, length):
    # Few tokens, so that n-grams do repeat; lengths below, at and above n.
    history = torch.randint(0, 3, (20, length), generator=torch.Generator().manual_seed(length))
    scores = torch.randn(20, 6)
    found = ban_repeated_ngrams(scores, history, size)
    for row in range(20):
        banned = banned_by_hand(history[row].tolist(), size)
        for token in range(6):
            assert found[row, token] == (BANNED if token in banned else scores[row, token])


def test_repetition_penalty_multiplies_negative_and_divides_positive_scores():
    scores = torch.tensor([[2.0, -2.0, 3.0, -3.0]])
    # Token 0 comes twice and is penalised once.
    found = penalize_repetition(scores, torch.tensor([[0, 1, 0]]), 2.0)
    assert found.tolist() == [[1.0, -4.0, 3.0, -3.0]]


def test_forced_rows_keep_one_token_with_score_zero_and_others_are_left_alone():
    scores = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    found = force(scores, torch.tensor([2, -1]))
    assert found.tolist() == [[BANNED, BANNED, 0.0], [4.0, 5.0, 6.0]]


def test_top_k_keeps_ties_of_the_last_place():
    scores = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    assert keep_top_k(scores, 2).tolist() == [[BANNED, 3.0, 2.0, 2.0, BANNED]]
    assert torch.equal(keep_top_k(scores, 99), scores)


@pytest.mark.parametrize(
    ("probability", "kept"),
    [
        # The smallest set of best tokens that reaches the probability.
        (0.4, [1]),
        (0.5, [1]),
        (0.6, [1, 3]),
        (0.9, [0, 1, 3]),
        (1.0, [0, 1, 2, 3]),
        # Always one token at least.
        (0.01, [1]),
    ],
)
def test_top_p(probability, kept):
    scores = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    found = keep_top_p(scores, probability, least=1)
    assert [token for token in range(4) if found[0, token] > BANNED] == kept


def test_top_p_keeps_as_many_as_beam_sampling_needs():
    scores = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    assert (keep_top_p(scores, 0.01, least=2) > BANNED).tolist() == [[False, True, False, True]]


def processor(forced=((),), **options):
    return translation_rules(GenerationConfig(**options), ForcedTokens(forced, CPU), 2, CPU)


def test_end_mark_is_banned_until_enough_tokens_came():
    process = processor(min_new_tokens=2)
    for length, banned in ((1, True), (2, True), (3, False)):
        found = process(torch.full((1, length), 3), torch.zeros(1, 4))
        assert (found[0, 2] == BANNED) == banned
        assert (found[0, [0, 1, 3]] == 0).all()


def test_forced_tokens_win_over_every_other_rule():
    # The end mark is forced although it is too early, and although it would repeat the start.
    process = processor([(2,)], min_new_tokens=5, no_repeat_ngram_size=1, repetition_penalty=9.0)
    found = process(torch.tensor([[2]]), torch.zeros(1, 4))
    assert found.tolist() == [[BANNED, BANNED, 0.0, BANNED]]


def test_forced_tokens_differ_in_number_from_row_to_row():
    process = processor([(3, 4), (), (5,)])
    scores = torch.zeros(3, 6)
    first = process(torch.full((3, 1), 2), scores)
    assert first.argmax(-1).tolist() == [3, 0, 5]
    assert (first[1] == 0).all()
    second = process(torch.full((3, 2), 2), scores)
    assert second.argmax(-1).tolist() == [4, 0, 0]
    assert ForcedTokens([(3, 4), (), (5,)], CPU).at(2) is None


def test_penalty_comes_before_the_ban_and_temperature_before_top_p():
    # At temperature 2 the probabilities are nearly even, and top_p keeps more than it would first.
    scores = torch.tensor([[4.0, 2.0, 1.0]])
    cold = processor(do_sample=True, top_k=0, top_p=0.8)(torch.tensor([[2]]), scores)
    warm = processor(do_sample=True, top_k=0, top_p=0.8, temperature=4.0)(
        torch.tensor([[2]]), scores
    )
    assert (cold > BANNED).sum() == 1
    assert (warm > BANNED).sum() == 3
    assert warm[0, 0] == 1.0


def test_beam_sampling_keeps_two_tokens_so_that_a_beam_can_go_on():
    process = processor(do_sample=True, num_beams=2, top_k=1, top_p=1e-9)
    found = process(torch.tensor([[2]]), torch.tensor([[1.0, 3.0, 2.0, 0.0]]))
    assert (found > BANNED).tolist() == [[False, True, True, False]]


def test_sampling_rules_wait_for_sampling():
    process = processor(top_k=1, temperature=9.0)
    scores = torch.tensor([[1.0, 2.0]])
    assert torch.equal(process(torch.tensor([[0]]), scores), scores)


def test_scores_of_the_caller_are_left_alone():
    scores = torch.zeros(1, 4)
    process = processor([(3,)], min_new_tokens=2, no_repeat_ngram_size=1, repetition_penalty=2.0)
    process(torch.tensor([[1]]), scores)
    assert (scores == 0).all()
