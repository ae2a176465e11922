"""The clock, and the order in which two implementations take turns. Nothing here asserts a time."""

import pytest
import torch

from benchmarks import timing
from benchmarks.timing import Rival, affordable_rounds, spread, synchronized


def test_the_clock_never_runs_back():
    readings = [synchronized() for _ in range(1000)]
    assert readings == sorted(readings)
    assert readings[-1] > readings[0]


@pytest.mark.parametrize(
    ("used", "waits"),
    [
        (True, 1),  # work may still be queued there
        (False, 0),  # a GPU that nobody used must not be started by a clock
    ],
)
def test_the_clock_waits_for_a_gpu_in_use(monkeypatch, used, waits):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    monkeypatch.setattr(timing, "perf_counter", lambda: calls.append("read") or 0.0)
    synchronized()
    assert calls == ["wait"] * waits + ["read"]  # waits before it reads, not after


def test_spread_is_median_quartiles_and_count():
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0, "rounds": 5}


def test_one_measurement_is_its_own_spread():
    assert spread([2.0]) == {"median": 2.0, "q1": 2.0, "q3": 2.0, "rounds": 1}


@pytest.mark.parametrize(
    ("took", "rounds"),
    [
        (1.0, 20),  # what fits
        (60.0, 7),  # too slow: quartiles still need some
        (0.001, 41),  # fast: more would add nothing
        (0.0, 41),  # faster than the clock
    ],
)
def test_rounds_follow_what_one_costs(monkeypatch, took, rounds):
    readings = iter([5.0, 5.0 + took])
    monkeypatch.setattr(timing, "synchronized", lambda: next(readings))
    assert affordable_rounds(lambda: None, seconds=20) == rounds


def test_the_rival_takes_turns_and_gets_the_same_input():
    log = []
    inputs = [torch.tensor(0), torch.tensor(1), torch.tensor(2)]
    rival = Rival(lambda x: log.append(("rival", int(x))), inputs)
    for _ in range(4):
        (x,), keywords = rival.prepare()
        log.append(("ours", int(x)))
        rival.follow(x, **keywords)
    assert log == [
        *[("rival", 0), ("ours", 0)],
        *[("ours", 1), ("rival", 1)],
        *[("rival", 2), ("ours", 2)],
        *[("ours", 0), ("rival", 0)],  # inputs come round again
    ]
    assert len(rival.seconds) == 4


def test_the_rival_is_timed_by_the_same_clock(monkeypatch):
    readings = iter([1.0, 1.5, 7.0, 9.0])
    monkeypatch.setattr(timing, "synchronized", lambda: next(readings))
    rival = Rival(lambda x: x, [torch.tensor(0)])
    for _ in range(2):
        (x,), _ = rival.prepare()
        rival.follow(x)
    assert rival.seconds == [0.5, 2.0]
