"""Extra memory is a count of bytes, so it can be asserted exactly; a process is watched."""

import subprocess
import sys

import pytest
import torch

from benchmarks.memory import AnonymousPeak, extra_memory

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


HOLD = """
import mmap, sys, time
{what}
print(len(held), flush=True)
sys.stdin.readline()
"""


def watch(what, *arguments):
    """Return the most anonymous memory that a process held while it did something."""
    command = [sys.executable, "-c", HOLD.format(what=what), *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as child:
        with AnonymousPeak(child.pid) as peak:
            assert child.stdout.readline()
        child.communicate("\n")
    return peak.bytes


def test_memory_of_a_process_that_was_released_again_counts():
    before = watch("held = b'1'")
    held = watch("held = bytearray(b'1') * 2**26; time.sleep(0.1); held = b'1'")
    assert held - before == pytest.approx(64 * MEBI, rel=0.05)


def test_a_mapped_file_is_not_memory_of_the_process(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"1" * 64 * MEBI)
    read = "file = open(sys.argv[1]); held = mmap.mmap(file.fileno(), 0, prot=1); held.find(b'2')"
    assert watch(read, str(path)) - watch("held = b'1'") < 4 * MEBI


def test_a_process_that_has_ended_held_nothing_more():
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
        with AnonymousPeak(child.pid) as peak:
            pass
    assert peak.bytes == 0
