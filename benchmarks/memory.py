"""The most memory a call holds beyond what was held before it, and that a process holds at all."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["AnonymousPeak", "anonymous_bytes", "extra_memory"]

PROCESSES = Path("/proc")
SAMPLE_SECONDS = 0.005


def extra_memory(call: Callable[[], object], device: torch.device) -> int:
    """Return the peak of bytes allocated during ``call`` minus those allocated at its start.

    What PyTorch's allocators hand out: results and intermediate tensors, on a GPU those of the
    device; not the workspace that a matrix library allocates behind them.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    held = peak = 0
    changes = [event for event in events if event.get("name") == "[memory]"]
    for change in sorted(changes, key=lambda event: event["ts"]):
        held += change["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def anonymous_bytes(process: int) -> int:
    """Return the anonymous memory of a process: what it holds itself, without files it maps.

    Weights that are read straight from a mapped checkpoint lie in the system's cache of files and
    do not count; copies of them do. Linux only.
    """
    status = (PROCESSES / str(process) / "status").read_text(encoding="utf-8")
    found = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0  # a process that has ended holds nothing


class AnonymousPeak:
    """Watches another process: the most anonymous memory it held between ``with`` and its end.

    It is sampled from outside every five milliseconds, so that whatever the process does, its
    interpreter's lock held or not, it is seen.
    """

    def __init__(self, process: int) -> None:
        """Take the id of the process."""
        self.bytes = 0
        self._process = process
        self._done = Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "AnonymousPeak":
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        try:
            self.bytes = max(self.bytes, anonymous_bytes(self._process))
        except FileNotFoundError:
            self._done.set()  # it has ended, and who waits for its answer will say so
