"""Several systems on the same batches, in turns, so that the machine's noise touches all alike."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from benchmarks.generation.process import Worker
from benchmarks.generation.shapes import (
    NEW_TOKENS,
    Decoding,
    GeneratedModel,
    System,
    draw_sources,
)
from benchmarks.graphs import PeerUnavailable
from benchmarks.timing import spread

__all__ = ["Measured", "measure_in_turns", "speedup"]

PAUSE_SECONDS = 0.3
"""Between turns: threads of a system that has just computed still spin for a moment."""


@dataclass
class Measured:
    """One system at one batch and beam."""

    seconds: list[float] = field(default_factory=list)
    """Of every round."""

    first_s: float = 0.0
    """Of the first call at this batch and beam, which may compile."""

    load_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    tokens: list[list[int]] = field(default_factory=list)
    note: str = ""
    """Why there are no figures."""

    def describe(self) -> str:
        """Return speed, loading and memory in a line."""
        tokens = NEW_TOKENS * len(self.tokens)
        times = spread(self.seconds)
        slow, middle, fast = (tokens / times[key] for key in ("q3", "median", "q1"))
        return (
            f"{middle:.4g} tokens/s ({slow:.4g} to {fast:.4g}), first call {self.first_s:.3g} s, "
            f"loaded in {self.load_s[-1]:.3g} s, {self.peak_bytes / 1e9:.3g} GB"
        )

    def figures(self) -> dict[str, float]:
        """Return what is kept of it beside its time."""
        return {
            "load_s": statistics.median(self.load_s),
            "first_s": self.first_s,
            "peak_anonymous_bytes": self.peak_bytes,
        }


Found = dict[tuple[Decoding, str], Measured]


def measure_in_turns(
    model: GeneratedModel,
    wanted: Mapping[Decoding, Sequence[System]],
    start: Callable[[System], Worker],
    *,
    pause: float = PAUSE_SECONDS,
    tell: Callable[[str], object] = lambda _: None,
) -> Found:
    """Measure systems at several batches and beams.

    Args:
        model: What it is about, and how many rounds there are.
        wanted: The systems to measure at each batch and beam.
        start: Starts the process of a system, its model loaded.
        pause: Seconds between turns.
        tell: Called with a line of text for every system when it has done its rounds at a batch and
            beam; who interrupts a long run keeps these.

    Returns:
        A measurement for every wanted pair.
    """
    found: Found = {
        (decoding, system.name): Measured() for decoding in wanted for system in wanted[decoding]
    }
    systems = list(dict.fromkeys(system for group in wanted.values() for system in group))
    together = [systems] if model.lives == 1 else [[one] for one in systems] * model.lives
    for group in together:
        with ExitStack() as stack:
            workers = {
                system.name: worker
                for system in group
                if (worker := _started(system, start, stack, found))
            }
            for decoding in sorted(wanted):
                present = [s.name for s in wanted[decoding] if s.name in workers]
                names = {name: workers[name] for name in present}
                _measure_group(model, decoding, names, found, pause)
                for name in names:
                    tell(f"{model.name} {decoding} {name}: {found[decoding, name].describe()}")
    return found


def _started(
    system: System, start: Callable[[System], Worker], stack: ExitStack, found: Found
) -> Worker | None:
    try:
        return stack.enter_context(start(system))
    except PeerUnavailable as reason:
        for (_, name), measured in found.items():
            if name == system.name:
                measured.note = str(reason)
        return None


def _measure_group(
    model: GeneratedModel,
    decoding: Decoding,
    workers: dict[str, Worker],
    found: Found,
    pause: float,
) -> None:
    sources = draw_sources(model.config, decoding.batch)
    for name, worker in workers.items():
        mine = found[decoding, name]
        first = worker.generate(sources, decoding.beam, NEW_TOKENS, watch=True)
        mine.first_s, mine.tokens = first.seconds, first.tokens
        mine.load_s.append(worker.load_s)
        mine.peak_bytes = max(mine.peak_bytes, worker.peak_bytes)
    for index in range(model.rounds[decoding]):
        for name in _rotated(list(workers), index):
            time.sleep(pause)
            answer = workers[name].generate(sources, decoding.beam, NEW_TOKENS)
            found[decoding, name].seconds.append(answer.seconds)


def _rotated(names: Sequence[str], by: int) -> Iterator[str]:
    """Yield the names, another one first in every round."""
    for index in range(len(names)):
        yield names[(index + by) % len(names)]


def speedup(mine: Measured, other: Measured) -> list[float]:
    """Return how many times as fast it was in every round."""
    return [theirs / ours for ours, theirs in zip(mine.seconds, other.seconds, strict=True)]
