"""Capturing, replaying and timing. The GPU is a fake that notes what it is asked for."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from benchmarks import graphs
from benchmarks.graphs import (
    Captured,
    PeerUnavailable,
    capture,
    measure,
    on_side_stream,
    time_peer,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """Replace what ``graphs`` uses of ``torch.cuda``; what happened stands in ``log``."""
    log = []
    fake = SimpleNamespace(log=log, mode="default", now=0.0, replay_s=1.0)

    def replay():
        log.append("replay")
        fake.now += fake.replay_s

    def set_mode(mode):
        fake.mode = mode

    @contextmanager
    def noted(name):
        log.append(f"{name} begins")
        yield
        log.append(f"{name} ends")

    def stream(name):
        return SimpleNamespace(name=name, wait_stream=lambda other: log.append(f"{name} waits"))

    side, current = stream("side"), stream("current")
    replacements = {
        "Stream": lambda _: side,
        "current_stream": lambda _: current,
        "stream": lambda chosen: noted(f"on {chosen.name}"),
        "graph": lambda _, stream: noted(f"capture on {stream.name}"),
        "CUDAGraph": lambda: SimpleNamespace(replay=replay),
        "synchronize": lambda _=None: None,
        "get_sync_debug_mode": lambda: fake.mode,
        "set_sync_debug_mode": set_mode,
        "empty_cache": lambda: log.append("empty"),
    }
    for name, replacement in replacements.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    monkeypatch.setattr(graphs, "synchronized", lambda: fake.now)
    graphs._side_stream.cache_clear()
    yield fake
    graphs._side_stream.cache_clear()


def test_on_a_cpu_calls_are_called_in_turn():
    log = []
    captured = capture([lambda: log.append(1), lambda: log.append(2)], CPU)
    assert (log, captured.calls, captured.note) == ([], 2, "")
    captured.replay()
    captured.replay()
    assert log == [1, 2, 1, 2]


def test_a_graph_is_captured_after_a_run_on_the_same_stream(gpu):
    captured = capture([lambda: gpu.log.append("call")], GPU)
    captured.replay()
    assert gpu.log == [
        *["side waits", "on side begins", "call", "call", "on side ends", "current waits"],
        *["capture on side begins", "call", "capture on side ends"],
        *["replay", "replay", "replay"],  # first time, how long it takes, and ours
    ]
    assert (captured.calls, captured.note) == (1, "")


def test_short_calls_stand_in_the_graph_many_times(gpu):
    gpu.replay_s = graphs.GRAPH_SECONDS / 4
    calls = [lambda: gpu.log.append("a"), lambda: gpu.log.append("b")]
    captured = capture(calls, GPU)
    last = gpu.log[len(gpu.log) - gpu.log[::-1].index("capture on side begins") :]
    assert last[:8] == ["a", "b"] * 4
    assert captured.calls == 8


def test_what_waits_for_the_device_is_not_captured_and_says_so(gpu):
    def call():
        gpu.log.append("call")
        if gpu.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    captured = capture([call], GPU)
    assert "waits for the device" in captured.note
    assert gpu.mode == "default"
    assert not [entry for entry in gpu.log if entry.startswith("capture")]
    gpu.log.clear()
    captured.replay()
    assert gpu.log == ["call"]


def test_another_error_is_not_taken_for_waiting(gpu):
    def call():
        if gpu.mode == "error":
            raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        capture([call], GPU)
    assert gpu.mode == "default"


def test_the_side_stream_is_none_on_a_cpu():
    with on_side_stream(CPU):
        pass


@pytest.fixture
def ticking(monkeypatch):
    """Let every reading of the clock be one second after the last."""
    readings = iter(range(10_000))
    monkeypatch.setattr(graphs, "synchronized", lambda: float(next(readings)))


@pytest.mark.usefixtures("ticking")
def test_seconds_are_those_of_one_call():
    assert measure(Captured(replay=lambda: None, calls=4), rounds=3) == {
        **{"median": 0.25, "q1": 0.25, "q3": 0.25},
        "rounds": 3,
    }


def test_short_graphs_are_replayed_until_the_clock_can_read_them(monkeypatch):
    now = [0.0]

    def replay():
        now[0] += graphs.ROUND_SECONDS / 5

    monkeypatch.setattr(graphs, "synchronized", lambda: now[0])
    monkeypatch.setattr(graphs, "affordable_rounds", lambda call, _: call() or 2)
    found = measure(Captured(replay=replay, calls=2))
    assert found["median"] == pytest.approx(graphs.ROUND_SECONDS / 5 / 2)
    assert found["rounds"] == 2
    assert now[0] == pytest.approx(graphs.ROUND_SECONDS / 5 * (1 + 3 * 5))


def test_a_call_faster_than_the_clock_is_repeated_as_often_as_any():
    assert graphs._repeats(0.0, 1.0) == graphs.MOST_REPEATS


def test_a_peer_is_timed():
    found = time_peer(lambda: [lambda: None], CPU, lambda captured: {"median": captured.calls})
    assert found == {"seconds": {"median": 1}}


def test_a_peer_that_cannot_be_captured_is_timed_with_a_note(gpu):
    def call():
        if gpu.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    found = time_peer(lambda: [call], GPU, lambda _: {"median": 1.0})
    assert found["seconds"] == {"median": 1.0}
    assert "waits" in found["note"]
    assert gpu.log[-1] == "empty"  # its memory is the next one's


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (PeerUnavailable("not installed"), "not installed"),
        (AssertionError("it is wrong\nassert 1 == 2"), "it is wrong"),
        (TypeError("another signature"), "TypeError: another signature"),
        (torch.OutOfMemoryError("tried to allocate"), "OutOfMemoryError: tried to allocate"),
    ],
)
def test_a_peer_that_fails_leaves_its_reason(error, note):
    def prepare():
        raise error

    assert time_peer(prepare, CPU, lambda _: {}) == {"note": note}
