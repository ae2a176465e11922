"""Honest clocks: one that waits for the device, and one that runs a rival in the same noise."""

import statistics
from collections.abc import Callable, Sequence
from time import perf_counter

import torch
from torch import Tensor

__all__ = ["Rival", "affordable_rounds", "spread", "synchronized"]

FEWEST_ROUNDS, MOST_ROUNDS = 7, 41


def synchronized() -> float:
    """Return seconds on a monotonic clock, read after the GPU has finished what it was given.

    For ``pytest --benchmark-timer=benchmarks.timing.synchronized``. A process that has not used a
    GPU is not made to start one.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return perf_counter()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, quartiles and count of measurements, as they stand in a result file."""
    middle = statistics.median(values)
    quartiles = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [middle] * 3
    )
    return {"median": middle, "q1": quartiles[0], "q3": quartiles[2], "rounds": len(values)}


def affordable_rounds(call: Callable[[], object], seconds: float) -> int:
    """Return how many rounds of ``call`` fit into ``seconds``: at least 7, at most 41.

    Fewer than seven say little of quartiles; more than 41 add nothing to a median.
    """
    start = synchronized()
    call()
    took = synchronized() - start
    return max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(seconds / took) if took else MOST_ROUNDS))


class Rival:
    """Times a second implementation around the rounds of a benchmark.

    ``prepare`` and ``follow`` are the ``setup`` and ``teardown`` of ``benchmark.pedantic``. Both
    implementations get the same input in a round, and who goes first alternates: noise that lasts
    longer than a round, and caches that are warm, touch both alike.
    """

    def __init__(self, call: Callable[[Tensor], object], inputs: Sequence[Tensor]) -> None:
        """Take the rival and the inputs, which rounds use in turn."""
        self.call = call
        self.inputs = inputs
        self.seconds: list[float] = []
        self._prepared = 0

    def prepare(self) -> tuple[tuple[Tensor], dict[str, object]]:
        """Return the arguments of the next round; run the rival first in every other one."""
        x = self.inputs[self._prepared % len(self.inputs)]
        self._prepared += 1
        if self._rival_goes_first:
            self._run(x)
        return (x,), {}

    def follow(self, x: Tensor) -> None:
        """Run the rival in the rounds in which it did not go first."""
        if not self._rival_goes_first:
            self._run(x)

    @property
    def _rival_goes_first(self) -> bool:
        return self._prepared % 2 == 1

    def _run(self, x: Tensor) -> None:
        start = synchronized()
        self.call(x)
        self.seconds.append(synchronized() - start)
