"""Who is decoded together, and when; the tokens must not know."""

import random
from functools import cache
from pathlib import Path

import pytest
import torch

from moe_mt.checkpoints import load
from moe_mt.errors import ConfigError, InputError, PlacementError
from moe_mt.generation import BatchLimits, GenerationConfig, Request, generate_each
from tests.translators import ScriptedModel, echo

GOLDENS = Path(__file__).parents[1] / "golden" / "models"
EOS, LANGUAGE = 2, 7


@cache
def load_model(name, dtype=torch.float64):
    return load(GOLDENS / name, device="cpu", dtype=dtype)


def echo_requests(lengths):
    """Requests that a scripted model answers with as many tokens as they have."""
    return [
        Request(source_tokens=[*range(10, 9 + length), EOS], max_new_tokens=99)
        for length in lengths
    ]


def run(model, requests, config=None, **limits):
    found = list(
        generate_each(model, requests, config or GenerationConfig(), limits=BatchLimits(**limits))
    )
    assert sorted(number for number, _ in found) == list(range(len(requests)))
    return found


def test_whoever_ends_is_handed_over_at_once_and_takes_no_more_steps():
    model = ScriptedModel(echo)
    requests = echo_requests([12, 9, 4, 3])
    found = run(model, requests, sentences=4)
    assert [number for number, _ in found] == [3, 2, 1, 0]
    assert [h[0].tokens for _, h in found] == [
        tuple(requests[number].source_tokens) for number in (3, 2, 1, 0)
    ]
    # Four rows until a quarter has ended, at the third step, then three; a half after the fourth …
    assert model.rows == [4] * 3 + [3] + [2] * 5 + [1] * 3


def test_others_join_where_sentences_have_ended():
    model = ScriptedModel(echo)
    found = run(model, echo_requests([8, 8, 4, 4, 6, 6, 5]), sentences=4)
    # Two end after four steps; two join, and the last one when it can.
    assert model.batches == [[8, 8, 4, 4], [6, 6], [5]]
    assert max(model.rows) == 4
    assert len(model.rows) == 13  # 8 steps of the first two, and 5 of the last
    assert [number for number, _ in found] == [2, 3, 0, 1, 4, 5, 6]


def test_a_few_free_places_are_not_worth_an_encoding():
    model = ScriptedModel(echo)
    run(model, echo_requests([9] * 7 + [3] + [8] * 5), sentences=8)
    assert model.batches == [[9] * 7 + [3], [8] * 5]


def test_no_batch_has_more_source_tokens_than_allowed():
    model = ScriptedModel(echo)
    run(model, echo_requests([20, 6, 5, 5, 5, 2]), sentences=4, source_tokens=12)
    # Longer than allowed: alone, not lost. Padding counts: six and five make twelve.
    assert model.batches == [[20], [6, 5], [5], [5], [2]]


# --- the same tokens -----------------------------------------------------------------------------

CONFIGS = {
    "greedy": GenerationConfig(no_repeat_ngram_size=3),
    "beam": GenerationConfig(num_beams=3, num_return_sequences=2),
    "beam, early stopping": GenerationConfig(num_beams=3, early_stopping=True),
    "sampling": GenerationConfig(do_sample=True, num_return_sequences=2, seed=5),
    "beam sampling": GenerationConfig(do_sample=True, num_beams=3, seed=5),
}


def varied_requests(count):
    draw = random.Random(3)
    return [
        Request(
            source_tokens=[*(draw.randrange(4, 64) for _ in range(draw.randrange(1, 12))), EOS],
            forced_tokens=[LANGUAGE, 9][: draw.randrange(3)],
            max_new_tokens=draw.randrange(3, 24),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("strategy", CONFIGS)
@pytest.mark.parametrize("name", ["dense_3_1", "moe_4_experts_bias"])
def test_joining_and_leaving_change_no_token(name, strategy):
    # In float64, so that what is tested is who is where and not the rounding of a near-tie.
    model, config, requests = load_model(name), CONFIGS[strategy], varied_requests(16)
    alone = [run(model, [request], config, sentences=1)[0][1] for request in requests]
    for limits in ({"sentences": 4}, {"sentences": 16}, {"sentences": 7, "source_tokens": 40}):
        for number, hypotheses in run(model, requests, config, **limits):
            expected = alone[number]
            assert [h.tokens for h in hypotheses] == [h.tokens for h in expected]
            assert [h.score for h in hypotheses] == pytest.approx(
                [h.score for h in expected], abs=1e-6
            )


def test_where_capacity_follows_from_the_number_of_tokens_a_batch_stays_as_it_began(caplog):
    model = load_model("moe_priority_capacity")
    rows, decode_step = [], model.decode_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "decode_step", lambda t, c: rows.append(len(t)) or decode_step(t, c))
        run(model, varied_requests(9), sentences=6)
    assert set(rows) == {6, 3}
    assert rows == sorted(rows, reverse=True)
    assert "nobody joins or leaves" in caplog.text


# --- too little memory ---------------------------------------------------------------------------


class SmallMemory(ScriptedModel):
    """Has memory for a few sentences only."""

    def __init__(self, room, error):
        super().__init__(echo)
        self.room = room
        self.error = error

    def decode_step(self, tokens, cache):
        if len(tokens) > self.room:
            raise self.error
        return super().decode_step(tokens, cache)


CPU_ERROR = "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(CPU_ERROR), MemoryError()],
    ids=["GPU", "CPU", "Python"],
)
def test_where_memory_runs_out_smaller_batches_go_on_and_nothing_is_lost(error, caplog):
    model, requests = SmallMemory(3, error), echo_requests([9, 8, 7, 6, 5, 4, 3])
    found = dict(run(model, requests, sentences=7))
    for number, request in enumerate(requests):
        assert found[number][0].tokens == tuple(request.source_tokens)
    assert "out of memory with 7 sentences at once; going on with 3" in caplog.text
    assert max(model.rows) == 3


def test_a_sentence_that_does_not_fit_alone_is_named():
    model = SmallMemory(0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(PlacementError, match="one sentence of 5 tokens with 1 beams"):
        run(model, echo_requests([5, 4]), sentences=2)


def test_other_errors_are_not_taken_for_it():
    with pytest.raises(RuntimeError, match="something else"):
        run(SmallMemory(0, RuntimeError("something else")), echo_requests([5, 4]), sentences=2)


# --- what a search for mistakes found ------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [GenerationConfig(), GenerationConfig(do_sample=True, seed=3)],
    ids=["greedy", "drawn"],
)
def test_a_cohort_that_is_done_leaves_however_few_it_is(config):
    # One of eight ends at once and one more joins, which ends before the other seven: its search,
    # and its table of random numbers, end after three steps.
    model = load_model("dense_3_1")
    limits = [3, 40, 40, 40, 40, 40, 40, 40, 3]
    requests = [
        Request(source_tokens=[9 + i, 8, EOS], forced_tokens=[20], max_new_tokens=limit)
        for i, limit in enumerate(limits)
    ]
    alone = [run(model, [request], config, sentences=1)[0][1] for request in requests]
    for number, hypotheses in run(model, requests, config, sentences=8):
        assert [h.tokens for h in hypotheses] == [h.tokens for h in alone[number]]


def test_the_last_one_waiting_joins_as_soon_as_there_is_room():
    model = ScriptedModel(echo)
    run(model, echo_requests([9] * 7 + [3] + [6]), sentences=8)
    assert model.batches == [[9] * 7 + [3], [6]]
    assert len(model.rows) == 9


def test_a_smaller_batch_keeps_to_the_limit_of_source_tokens(caplog):
    model = SmallMemory(3, MemoryError())
    run(model, echo_requests([6] * 8), sentences=64, source_tokens=24)
    # Four were decoded together when memory ran out, not sixty-four.
    assert "out of memory with 4 sentences at once; going on with 2" in caplog.text
    assert max(map(len, model.batches[1:])) == 2


@pytest.mark.parametrize(
    ("limits", "message"),
    [({"sentences": 0}, "0 sentences"), ({"sentences": 1, "source_tokens": 0}, "0 source_tokens")],
)
def test_limits_that_leave_room_for_none_are_refused(limits, message):
    with pytest.raises(ConfigError, match=message):
        BatchLimits(**limits)


def test_an_output_limit_of_nothing_is_refused():
    request = Request(source_tokens=[9, EOS], max_new_tokens=0)
    with pytest.raises(InputError, match="limit of 0"):
        run(load_model("dense_2_2"), [request], sentences=1)


def test_a_source_without_a_real_token_is_translated():
    requests = [Request(source_tokens=[], max_new_tokens=3), varied_requests(1)[0]]
    assert len(run(load_model("dense_2_2"), requests, sentences=2)) == 2
