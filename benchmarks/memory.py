"""The most memory a call holds beyond what was held before it."""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["extra_memory"]


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
