"""Beam search on logits written by hand; the goldens of test_generate.py cover the rest."""

from functools import partial

import pytest
import torch

from moe_mt.generation.beam import BeamSearch, take_best_several
from moe_mt.generation.rules import LogitsProcessor
from moe_mt.generation.stopping import Stopping

EOS, A, B, C = 2, 3, 4, 5
START, VOCAB_SIZE = 2, 40
CPU = torch.device("cpu")


def search(script, *, limit=60, length_penalty=1.0, early_stopping=False):
    """Run two beams on scripted log-probabilities; return the results and the steps it took.

    ``script[step]`` maps the tokens so far to the log-probabilities of the next one; what is not
    named shares what is left.
    """
    beams = beams_of(limit, length_penalty, early_stopping)
    steps = run(beams, script)
    return [(tuple(tokens), score) for tokens, score in beams.results(2)[0]], steps


def beams_of(limit, length_penalty=1.0, early_stopping=False):
    return BeamSearch(
        torch.full((1, 2, 1), START),
        LogitsProcessor([]),
        Stopping([limit], [EOS], CPU),
        partial(take_best_several, 4),
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )


def run(beams, script):
    """Let the script speak until the search is done; return how many steps it took."""
    steps = 0
    while not beams.all_done():
        histories = [tuple(row[1:]) for row in beams.histories[0].tolist()]
        beams.advance(torch.stack([log_probs(script[steps].get(row, {})) for row in histories]))
        steps += 1
    return steps


def log_probs(named):
    left = 1 - sum(torch.tensor(value).exp().item() for value in named.values())
    row = torch.full((VOCAB_SIZE,), left / (VOCAB_SIZE - len(named))).log()
    for token, value in named.items():
        row[token] = value
    return row


# A short hypothesis ends first, a poor one next, and the best one last.
LATE_WINNER = [
    {(): {A: -0.1, EOS: -3.0}},
    {(A,): {A: -0.05, EOS: -4.0}},
    {(A, A): {EOS: -0.05, B: -4.0}},
]


@pytest.mark.parametrize("early_stopping", [False, "never"])
def test_an_open_beam_that_can_still_win_is_waited_for(early_stopping):
    # A negative penalty prefers short hypotheses, so the best an open one can do is to end now.
    # Judged by its score at the limit, 60 tokens away, it would be given up one step too soon.
    results, steps = search(LATE_WINNER, early_stopping=early_stopping, length_penalty=-1.0)
    assert steps == 3
    assert [tokens for tokens, _ in results] == [(A, A, EOS), (EOS,)]
    assert [score for _, score in results] == pytest.approx([-0.2 * 3, -3.0], rel=1e-4)


def test_early_stopping_takes_the_first_that_end():
    results, steps = search(LATE_WINNER, early_stopping=True, length_penalty=-1.0)
    assert steps == 2
    assert [tokens for tokens, _ in results] == [(EOS,), (A, EOS)]


def test_only_candidates_among_the_first_beams_may_end():
    # The end mark ranks third at first; if it could end there, it would win at once.
    script = [
        {(): {A: -1.0, B: -1.15, EOS: -1.25}},
        {(A,): {EOS: -0.7, C: -0.75}, (B,): {EOS: -0.7, C: -0.75}},
        {(A, C): {EOS: -0.1}, (B, C): {EOS: -0.1}},
    ]
    results, _ = search(script, early_stopping=True, length_penalty=0.0)
    assert (EOS,) not in [tokens for tokens, _ in results]


def test_score_is_the_sum_over_the_length_to_the_penalty():
    results, _ = search(LATE_WINNER, limit=3, length_penalty=2.0)
    assert dict(results)[(A, A, EOS)] == pytest.approx(-0.2 / 9, rel=1e-4)


def test_open_beams_end_at_the_limit():
    script = [{(): {A: -0.5, B: -1.5}}, {(A,): {A: -0.2}, (B,): {B: -0.2}}]
    results, steps = search(script, limit=2)
    assert steps == 2
    assert [tokens for tokens, _ in results] == [(A, A), (B, B)]


def test_paths_lead_back_from_the_end_of_each_hypothesis_to_the_first_row():
    # Both beams of the second step continue row 0, and the best hypothesis ends in row 1.
    script = [
        {(): {A: -0.5, B: -1.0}},
        {(A,): {A: -0.7, B: -0.8}, (B,): {A: -9.0}},
        {(A, B): {EOS: -0.01}, (A, A): {B: -3.0}},
    ]
    beams = beams_of(limit=3)
    run(beams, script)
    assert [tokens for tokens, _ in beams.results(1)[0]] == [[A, B, EOS]]
    assert beams.paths()[0, 0].tolist() == [0, 0, 1]
    # A hypothesis that ended earlier has no rows behind its end.
    beams = beams_of(limit=3, length_penalty=-1.0)
    run(beams, LATE_WINNER)
    assert beams.paths()[0].tolist() == [[0, 0, 0], [0, -1, -1]]


def test_histories_begin_with_the_prompt_and_results_do_not():
    prompts = torch.tensor([[[START, C], [START, C]]])
    seen = []
    beams = BeamSearch(
        prompts,
        lambda history, scores: seen.append(history.tolist()) or scores,
        Stopping([2], [EOS], CPU),
        partial(take_best_several, 4),
        length_penalty=1.0,
        early_stopping=False,
    )
    run(beams, [{(C,): {A: -0.1}}, {(C, A): {EOS: -0.3}}])
    assert seen[0] == [[START, C]] * 2
    assert seen[1][0] == [START, C, A]
    ((tokens, score),) = beams.results(1)[0]
    assert tokens == [A, EOS]
    # The prompt counts in neither sum nor length.
    assert score == pytest.approx(-0.4 / 2, rel=1e-4)
