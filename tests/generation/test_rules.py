"""Rules by hand; ``tests/pretrained/test_generate.py`` holds them to transformers."""

import pytest
import torch

from moe_mt.errors import InputError
from moe_mt.generation.logits import (
    SequenceBias,
    force_any,
    keep_min_p,
    keep_probable,
    keep_probable_by_entropy,
    keep_typical,
    raise_end,
    replace_invalid,
)
from moe_mt.generation.rules import ForcedTokens, LogitsProcessor, RuleContext, logits_rules
from moe_mt.generation.stopping import Stopping

BANNED = -torch.inf
CPU = torch.device("cpu")
# Their logarithms are scores; entropy 1.14, information 1.9, 0.69, 3.0 and 1.2.
PROBABILITIES = torch.tensor([[0.15, 0.5, 0.05, 0.3]])


def kept(scores):
    return [token for token in range(scores.shape[1]) if scores[0, token] > BANNED]


@pytest.mark.parametrize(
    ("rule", "strength", "expected"),
    [
        (keep_min_p, 0.0, [0, 1, 2, 3]),
        (keep_min_p, 0.2, [0, 1, 3]),
        (keep_min_p, 0.5, [1, 3]),
        (keep_min_p, 1.0, [1]),
        # From the nearest to the entropy outwards: 3, 1, 0, 2.
        (keep_typical, 0.2, [3]),
        (keep_typical, 0.5, [1, 3]),
        (keep_typical, 0.9, [0, 1, 3]),
        (keep_probable, 0.1, [0, 1, 3]),
        (keep_probable, 0.9, [1]),
        # The square root of 0.3 times exp(-1.14) is 0.175, below 0.3.
        (keep_probable_by_entropy, 0.3, [1, 3]),
        # The square root of 0.04 times exp(-1.14) is 0.064, above 0.04, which then counts.
        (keep_probable_by_entropy, 0.04, [0, 1, 2, 3]),
    ],
)
def test_what_sampling_keeps(rule, strength, expected):
    scores = PROBABILITIES.log()
    assert kept(rule(scores, strength, least=1)) == expected
    assert torch.equal(scores, PROBABILITIES.log())


@pytest.mark.parametrize("rule", [keep_min_p, keep_probable, keep_probable_by_entropy])
def test_sampling_keeps_as_many_as_beams_need(rule):
    assert kept(rule(PROBABILITIES.log(), 0.99, least=3)) == [0, 1, 3]


def test_sequence_bias_waits_for_the_beginning_of_a_sequence():
    rule = SequenceBias({(3,): 1.0, (4, 3): 0.5, (5, 4, 0): BANNED, (5, 6): 9.0}, CPU)
    history = torch.tensor([[2, 5, 4], [2, 4, 5]])
    found = rule(history, torch.zeros(2, 8))
    assert found[0].tolist() == [BANNED, 0, 0, 1.5, 0, 0, 0, 0]
    assert found[1].tolist() == [0, 0, 0, 1, 0, 0, 9, 0]
    # As in transformers, a sequence longer than the history is left out.
    assert rule(torch.tensor([[4]]), torch.zeros(1, 8))[0, 3] == 1


def test_end_marks_rise_by_their_own_size_unless_they_are_banned():
    scores = torch.tensor([[-2.0, 1.0, 3.0], [BANNED, 1.0, -1.0]])
    found = raise_end(scores, torch.tensor([0, 2]), 0.5)
    assert found.tolist() == [[-1.0, 1.0, 4.5], [BANNED, 1.0, -0.5]]


def test_forced_ends_and_invalid_values():
    scores = torch.tensor([[1.0, torch.nan, torch.inf, BANNED]])
    largest = torch.finfo(torch.float32).max
    assert replace_invalid(scores).tolist() == [[1.0, 0.0, largest, -largest]]
    assert force_any(scores, torch.tensor([1, 3])).tolist() == [[BANNED, 0, BANNED, 0]]


def rules(options, **context):
    context = {"device": CPU, "eos_ids": (2,)} | context
    return LogitsProcessor(logits_rules(options, RuleContext(**context)))


def test_nothing_asked_for_is_no_rule():
    options = {"repetition_penalty": 1.0, "min_length": 0, "top_k": 0, "bad_words_ids": [[2]]}
    assert rules(options | {"do_sample": True, "temperature": None}).rules == []


def test_prompts_shift_what_counts_new_tokens_and_not_what_counts_all():
    def bans_end(options, length, prompt_length=3):
        found = rules(options, prompt_length=prompt_length)(
            torch.full((1, length), 5), torch.zeros(1, 8)
        )
        return found[0, 2].item() == BANNED

    assert [bans_end({"min_new_tokens": 2}, length) for length in (3, 4, 5)] == [True, True, False]
    assert [bans_end({"min_length": 4}, length) for length in (3, 4, 5)] == [True, False, False]
    # New tokens win over the whole length.
    assert not bans_end({"min_length": 9, "min_new_tokens": 1}, 4)
    assert bans_end({"begin_suppress_tokens": [2]}, 3)
    assert not bans_end({"begin_suppress_tokens": [2]}, 4)


def test_the_first_choice_behind_a_forced_token_is_the_second_one():
    process = rules({"begin_suppress_tokens": [4]}, forced=ForcedTokens([[7]], CPU))
    assert process(torch.tensor([[2]]), torch.zeros(1, 8))[0].argmax() == 7
    assert process(torch.tensor([[2, 7]]), torch.zeros(1, 8))[0, 4] == BANNED


def test_a_callers_rules_come_before_those_of_sampling():
    # Raised by the caller's rule, token 0 is the one that top_k keeps.
    raise_first = [lambda _, scores: scores + torch.tensor([9.0, 0, 0])]
    process = rules({"do_sample": True, "top_k": 1}, extra=raise_first)
    assert kept(process(torch.tensor([[2]]), torch.tensor([[1.0, 2.0, 3.0]]))) == [0]


def test_renormalized_scores_are_log_probabilities_of_what_is_left():
    process = rules({"suppress_tokens": [1], "renormalize_logits": True})
    found = process(torch.tensor([[2]]), PROBABILITIES.log())
    assert found.exp().tolist()[0] == pytest.approx([0.3, 0.0, 0.1, 0.6])


def test_rows_look_at_their_own_source():
    sources = torch.tensor([[3, 2], [4, 2]])
    context = {"source_tokens": sources, "rows_per_sentence": 2}
    process = rules({"encoder_no_repeat_ngram_size": 1}, **context)
    found = process(torch.full((4, 1), 5), torch.zeros(4, 6))
    assert [[t for t in range(6) if row[t] == BANNED] for row in found] == [[2, 3]] * 2 + [
        [2, 4]
    ] * 2


def test_allowed_tokens_are_asked_for_row_by_row():
    def allowed(sentence, ids):
        return [int(ids[-1]) + sentence] if sentence < 2 else []

    process = rules({}, allowed_tokens=allowed, rows_per_sentence=2)
    found = process(torch.tensor([[2, 3], [2, 4], [2, 3], [2, 4]]), torch.zeros(4, 6))
    assert found.argmax(1).tolist() == [3, 4, 4, 5]
    with pytest.raises(InputError, match="sentence 2"):
        process(torch.full((5, 1), 3), torch.zeros(5, 6))


# What ends a hypothesis.


def test_any_end_mark_ends_and_without_any_nothing_does():
    histories = torch.tensor([[[2, 5], [2, 9]], [[9, 2], [2, 2]]])
    assert Stopping([4], [2, 9], CPU).ends(histories).tolist() == [[False, True], [True, True]]
    assert not Stopping([4], [], CPU).ends(histories).any()


def test_criteria_speak_for_all_rows_or_for_each():
    histories = torch.tensor([[[2, 5], [2, 9]], [[9, 3], [2, 4]]])
    seen = []
    stopping = Stopping([4], [5], CPU, [lambda rows: seen.append(rows.shape) or rows[:, -1] == 4])
    assert stopping.ends(histories).tolist() == [[True, False], [False, True]]
    assert seen == [(4, 2)]
    assert Stopping([4], [5], CPU, [lambda rows: rows.shape[1] > 1]).ends(histories).all()


def test_limits_are_reached_one_by_one():
    assert Stopping([2, 4], [], CPU).at_limit(3).tolist() == [True, False]
