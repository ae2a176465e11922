"""Times without launch gaps: calls captured into a CUDA graph, replayed until a clock can read it.

Several calls on different data go into one graph, so that none finds its operands in the cache of
the call before; the time is divided by their number. On a CPU the same functions time plain calls.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

from benchmarks.timing import affordable_rounds, spread, synchronized

__all__ = ["Captured", "PeerUnavailable", "capture", "measure", "on_side_stream", "time_peer"]

Call = Callable[[], object]

GRAPH_SECONDS = 1e-3
"""A graph lasts at least this long, so that starting it, ten microseconds, is one per cent."""

ROUND_SECONDS = 1e-2
MOST_REPEATS = 200


class PeerUnavailable(Exception):
    """Why a peer was not timed."""


@dataclass(frozen=True, kw_only=True)
class Captured:
    """Calls that are run together."""

    replay: Call
    calls: int
    """How many of them one replay is."""

    note: str = ""
    """Why they are launched one by one and not as a graph; empty where they are as they should."""


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def on_side_stream(device: torch.device) -> Iterator[None]:
    """Run on the stream that graphs are captured from; a backward pass runs where its forward did.

    On a CPU, nothing.
    """
    if device.type != "cuda":
        yield
        return
    stream = _side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def capture(calls: Sequence[Call], device: torch.device) -> Captured:
    """Return calls as one graph; where one of them waits for the device, one by one with a note."""
    plain = Captured(replay=lambda: _run(calls), calls=len(calls))
    if device.type != "cuda":
        return plain
    with on_side_stream(device):
        _run(calls)  # kernels are compiled and libraries take their workspaces
        obstacle = _obstacle(calls)
    if obstacle:
        return Captured(replay=plain.replay, calls=len(calls), note=obstacle)
    replay = _graph(calls, device)
    repeats = _repeats(_seconds(replay, 1), GRAPH_SECONDS)
    if repeats > 1:
        replay = _graph([*calls] * repeats, device)
    return Captured(replay=replay, calls=len(calls) * repeats)


def measure(captured: Captured, *, seconds: float = 1.0, rounds: int | None = None) -> dict:
    """Return median, quartiles and rounds of the seconds that one call takes.

    Args:
        captured: What is timed.
        seconds: What all rounds together may take.
        rounds: Their number, where it does not follow from the seconds.
    """
    repeats = 1
    if rounds is None:
        repeats = _repeats(_seconds(captured.replay, 1), ROUND_SECONDS)
        rounds = affordable_rounds(lambda: _run([captured.replay] * repeats), seconds)
    one_by_one = [_seconds(captured.replay, repeats) for _ in range(rounds)]
    return spread([taken / (repeats * captured.calls) for taken in one_by_one])


def time_peer(
    prepare: Callable[[], Sequence[Call]],
    device: torch.device,
    clock: Callable[[Captured], dict],
) -> dict:
    """Return a peer's times, or why there are none.

    A peer that is not installed, is wrong or does not fit into memory costs its own figure and not
    the row that it stands in.

    Args:
        prepare: Checks the peer and returns the calls to time.
        device: Where it runs.
        clock: ``measure`` or the like.
    """
    try:
        return _time(prepare, device, clock)
    except Exception as error:  # whatever it is, it is the peer's
        reason = str(error).strip().partition("\n")[0]
        if isinstance(error, PeerUnavailable | AssertionError):
            return {"note": reason}
        return {"note": f"{type(error).__name__}: {reason}"}
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _time(
    prepare: Callable[[], Sequence[Call]],
    device: torch.device,
    clock: Callable[[Captured], dict],
) -> dict:
    captured = capture(prepare(), device)
    return {"seconds": clock(captured), **({"note": captured.note} if captured.note else {})}


def _run(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _seconds(call: Call, repeats: int) -> float:
    start = synchronized()
    _run([call] * repeats)
    return synchronized() - start


def _repeats(once: float, wanted: float) -> int:
    return max(1, min(MOST_REPEATS, math.ceil(wanted / once) if once else MOST_REPEATS))


def _obstacle(calls: Sequence[Call]) -> str:
    """Return why calls cannot be captured. Trying it would spoil the process for later graphs."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _run(calls)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return "no graph: it waits for the device"
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return ""


def _graph(calls: Sequence[Call], device: torch.device) -> Call:
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=_side_stream(device)):
        _run(calls)
    graph.replay()
    torch.cuda.synchronize(device)
    return graph.replay
