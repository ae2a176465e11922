"""Beam search on logits written by hand; the goldens of test_generate.py cover the rest."""

import pytest
import torch

from moe_mt.generation import GenerationConfig
from moe_mt.generation.beam import BeamSearch
from moe_mt.generation.logits import LogitsProcessor
from moe_mt.models import TransformerConfig

EOS, A, B, C = 2, 3, 4, 5
MODEL = TransformerConfig(
    family="m2m100", vocab_size=40, d_model=4, encoder_heads=1, decoder_heads=1
)
CPU = torch.device("cpu")


def search(script, *, limit=60, **options):
    """Run two beams on scripted log-probabilities; return the results and the steps it took.

    ``script[step]`` maps the tokens so far to the log-probabilities of the next one; what is not
    named shares what is left.
    """
    config = GenerationConfig(num_beams=2, num_return_sequences=2, **options)
    processor = LogitsProcessor(config, [(), ()], eos_id=EOS, device=CPU)
    beams = BeamSearch(config, MODEL, processor, [limit], None, CPU)
    steps = 0
    while not beams.all_done():
        histories = [tuple(row[1:]) for row in beams.histories[0].tolist()]
        beams.advance(torch.stack([log_probs(script[steps].get(row, {})) for row in histories]))
        steps += 1
    return [(tuple(tokens), score) for tokens, score in beams.results()[0]], steps


def log_probs(named):
    left = 1 - sum(torch.tensor(value).exp().item() for value in named.values())
    row = torch.full((MODEL.vocab_size,), left / (MODEL.vocab_size - len(named))).log()
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
