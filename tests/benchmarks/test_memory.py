"""Extra memory is a count of bytes, so it can be asserted exactly."""

import torch

from benchmarks.memory import extra_memory

CPU = torch.device("cpu")
MEBI = 2**20


def of_size(mebibytes: int) -> torch.Tensor:
    return torch.empty(mebibytes * MEBI, dtype=torch.uint8)


def test_what_is_released_before_the_peak_does_not_count():
    def call():
        first = of_size(4)
        del first
        second, third = of_size(1), of_size(2)
        return second, third

    assert extra_memory(call, CPU) == 4 * MEBI


def test_what_is_held_together_adds_up():
    def call():
        first, second = of_size(4), of_size(1)
        del first
        return second, of_size(2)

    assert extra_memory(call, CPU) == 5 * MEBI


def test_what_was_held_before_does_not_count():
    before = of_size(8)
    assert extra_memory(before.zero_, CPU) == 0
