import pytest
import torch

from moe_mt.generation import is_repetition_loop
from moe_mt.generation.hypotheses import FinishedBeams, hypothesis_from_tokens

EOS = 2
TEXT = list(range(10, 40))

LOOPS = {
    "one token 24 times": [5] * 24,
    "a pair, as in ()()()": [5, 6] * 12,
    "a phrase of eight tokens three times": [*range(10, 18)] * 3,
    "a long sentence three times": [*range(10, 50)] * 3,
    "in the middle": [*TEXT, *[5, 6, 7] * 8, *TEXT],
    "at the end, cut inside the unit": [*TEXT, *[5, 6, 7, 8, 9] * 5, 5, 6],
}
NO_LOOPS = {
    "nothing": [],
    "ordinary text": TEXT,
    "one token 23 times, a dotted line": [5] * 23,
    "a large number, 1,000,000,000,000": [4, 5, 6, 5, 6, 5, 6, 5, 6],
    "a list with equal separators": [token for item in range(30) for token in (100 + item, 5)],
    "a refrain sung twice": [*range(10, 40)] * 2,
    "ha ha ha": [5, 6] * 3,
    "opening hours: every line alike but for the day": [
        token for day in range(7) for token in (100 + day, 5, 6, 7, 8, 9)
    ],
    "a unit too long to be looked for": [*range(10, 80)] * 3,
}


@pytest.mark.parametrize("name", LOOPS)
def test_loops(name):
    assert is_repetition_loop(LOOPS[name])


@pytest.mark.parametrize("name", NO_LOOPS)
def test_no_loops(name):
    assert not is_repetition_loop(NO_LOOPS[name])


@pytest.mark.parametrize(
    ("tokens", "source", "reason"),
    [
        ([7, 8, EOS], TEXT, "stop"),
        ([7, 8, 9], TEXT, "length"),
        ([], TEXT, "length"),
        ([7, 8] * 20, TEXT, "repetition"),
        # A loop that found its end is a loop all the same.
        ([*[7, 8] * 20, EOS], TEXT, "repetition"),
        # The source repeats itself, so its translation may.
        ([*[7, 8] * 20, EOS], [5] * 40, "stop"),
        ([7, 8] * 20, [5] * 40, "length"),
    ],
)
def test_finish_reason(tokens, source, reason):
    found = hypothesis_from_tokens(tokens, -1.5, eos_id=EOS, source=source)
    assert found.finish_reason == reason
    assert found.tokens == tuple(tokens)
    assert found.score == -1.5


def merge(finished, tokens, scores, ended):
    ended = torch.tensor(ended)
    parents = torch.zeros_like(ended, dtype=torch.int64)
    finished.merge(torch.tensor(tokens), torch.tensor(scores), ended, parents)


def test_slots_keep_the_best_in_order():
    finished = FinishedBeams((1, 2), capacity=3, device=torch.device("cpu"))
    assert not finished.full().any()
    merge(finished, [[[4, 2], [5, 2]]], [[-3.0, -1.0]], [[True, True]])
    assert finished.full().all()
    merge(finished, [[[6, 7, 2]]], [[-2.0]], [[True]])
    assert finished.best(2) == [[([5, 2], -1.0), ([6, 7, 2], -2.0)]]
    assert finished.best(1) == [[([5, 2], -1.0)]]


def test_empty_slots_are_not_returned_but_every_sentence_has_a_result():
    finished = FinishedBeams((2, 2), capacity=1, device=torch.device("cpu"))
    merge(finished, [[[4]], [[5]]], [[-1.0], [-2.0e9]], [[True], [False]])
    assert finished.best(2) == [[([4], -1.0)], [([], -1.0e9)]]


def test_copies_of_any_hypothesis_are_left_out():
    # Fewer tokens to choose from than beams: the rest are copies, not only of the best one.
    beams = FinishedBeams((1, 4), capacity=2, device=torch.device("cpu"))
    tokens = [[[7, 41], [7, 7], [7, 7], [7, 7]]]
    merge(beams, tokens, [[-1.0, -1.2, -5e8, -5e8]], [[True] * 4])
    assert [found for found, _ in beams.best(4)[0]] == [[7, 41], [7, 7]]
