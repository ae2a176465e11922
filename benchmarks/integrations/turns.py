"""The versions of transformers that are here, a process for each, and turns between all systems."""

import re
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.agreement import TOLERANCE, check_close
from benchmarks.graphs import PeerUnavailable
from benchmarks.integrations.layers import (
    OURS,
    PeerLayer,
    define,
    draw_input,
    transformers_major,
)
from benchmarks.process import AnsweringProcess
from benchmarks.timing import affordable_rounds, spread

__all__ = [
    "MAJORS",
    "Found",
    "LayerProcess",
    "Measured",
    "beside",
    "environments",
    "measure_in_turns",
    "start_processes",
]

MAJORS = (4, 5)

ROOT = Path(__file__).parents[2]
FOLDERS = {4: ".venv-peers", 5: ".venv-transformers-5"}
"""Where make puts an environment with a version of transformers."""

PAUSE_SECONDS = 0.3
"""Between processes: threads of the one that has just computed still spin for a moment."""

GROUP_SECONDS = 40
"""What all rounds of a layer at one number of tokens may take together."""

CHECKED_TOKENS = 4


@dataclass
class Measured:
    """One system in one version of transformers, at one number of tokens."""

    seconds: list[float] = field(default_factory=list)
    """Of every round."""

    extra_bytes: int = 0
    note: str = ""
    """Why there are no figures."""


Found = dict[tuple[int, str], Measured]
"""Major version of transformers and system → what was measured."""


class LayerProcess(AnsweringProcess):
    """A layer of one version of transformers, in a process with its environment."""

    def __init__(
        self, layer: PeerLayer, python: str, device: torch.device, dtype: torch.dtype, threads: int
    ) -> None:
        """Start the process and wait until the layer is built.

        Raises:
            PeerUnavailable: If it ends, with what it said last.
        """
        name = str(dtype).removeprefix("torch.")
        super().__init__(
            f"{layer.name} in {python}",
            "benchmarks.integrations.worker",
            [layer.name, str(device), name, str(threads)],
            python=python,
            threads=threads,
        )
        about = self.answer()
        self.version: str = about["transformers"]
        self.systems: list[str] = about["systems"]
        self.first_patch_s: float = about["first_patch_s"]

    def __enter__(self) -> "LayerProcess":
        return self


def environments(root: Path = ROOT) -> dict[int, str]:
    """Return major version of transformers → an interpreter that has it.

    The one that runs counts, and those of the environments that make builds for it.
    """
    suffix = re.search(r"-python[\d.]+$", sys.prefix)
    found = {
        major: str(python)
        for major, folder in FOLDERS.items()
        if (python := root / f"{folder}{suffix.group() if suffix else ''}" / "bin/python").exists()
    }
    try:
        return found | {transformers_major(): sys.executable}
    except PeerUnavailable:
        return found


def count_rounds(measure_once: Callable[[], object]) -> int:
    """Return how many rounds are affordable, by how long one takes."""
    return affordable_rounds(measure_once, GROUP_SECONDS)


def measure_in_turns(
    layer: PeerLayer,
    tokens: int,
    processes: Mapping[int, Any],
    device: torch.device,
    dtype: torch.dtype,
    *,
    pause: float = PAUSE_SECONDS,
    rounds: Callable[[Callable[[], object]], int] = count_rounds,
) -> Found:
    """Check every system, ask for its extra memory, then measure all in turns.

    In a round every system gets the same input; the next round has another input and goes through
    processes and systems the other way round.

    Args:
        layer: What it is about.
        tokens: In a call.
        processes: Major version of transformers → its process.
        device: Where it runs.
        dtype: In which precision.
        pause: Seconds between processes.
        rounds: Decides on the number of rounds, given a function that does one.

    Returns:
        A measurement for every system of every process.

    Raises:
        AssertionError: If this package's output is wrong in one of the versions.
    """
    found: Found = {
        (major, system): Measured()
        for major, process in processes.items()
        for system in process.systems
    }
    _check(layer, tokens, processes, device, dtype, found)
    sound = {
        major: [system for system in process.systems if not found[major, system].note]
        for major, process in processes.items()
    }
    for major, process in processes.items():
        memory = process.ask({"memory": sound[major], "tokens": tokens})
        for system, extra in memory.items():
            found[major, system].extra_bytes = extra

    def measure_once(index: int) -> dict[tuple[int, str], float]:
        step = -1 if index % 2 else 1
        seconds: dict[tuple[int, str], float] = {}
        for major, process in list(processes.items())[::step]:
            time.sleep(pause if len(processes) > 1 else 0)
            order = sound[major][::step]
            answer = process.ask({"order": order, "tokens": tokens, "index": index})
            seconds |= {(major, system): taken for system, taken in answer.items()}
        return seconds

    for index in range(rounds(lambda: measure_once(0))):
        for key, taken in measure_once(index).items():
            found[key].seconds.append(taken)
    return found


def _check(
    layer: PeerLayer,
    tokens: int,
    processes: Mapping[int, Any],
    device: torch.device,
    dtype: torch.dtype,
    found: Found,
) -> None:
    """Hold this package to the definition, and everybody else to this package.

    On a few tokens first: what is wrong may also take very long.
    """
    for size in dict.fromkeys((min(CHECKED_TOKENS, tokens), tokens)):
        x = draw_input(layer, size, 0, device, dtype)
        defined = define(layer, x[0, :CHECKED_TOKENS])
        first: Tensor | None = None
        for major, process in processes.items():
            systems = [name for name in process.systems if not found[major, name].note]
            outputs, notes = _outputs(process, systems, size, device)
            ours = outputs.pop(OURS)
            where = f"moe_mt in transformers {process.version}"
            few = ours[0, :CHECKED_TOKENS]
            check_close(few, defined, TOLERANCE[dtype], f"{where}, its definition")
            first = ours if first is None else first
            check_close(ours, first, TOLERANCE[dtype], f"{where}, moe_mt in another version")
            for system, output in outputs.items():
                try:
                    check_close(output, ours, TOLERANCE[dtype], "its results and the definition")
                except AssertionError as wrong:
                    notes[system] = str(wrong)
            for system, note in notes.items():
                found[major, system].note = note


def _outputs(
    process: Any, systems: list[str], tokens: int, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, str]]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "outputs.pt"
        notes = process.ask({"save": str(path), "systems": systems, "tokens": tokens})["notes"]
        return torch.load(path, map_location=device), notes


def start_processes(
    layer: PeerLayer,
    device: torch.device,
    dtype: torch.dtype,
    threads: int,
    stack: ExitStack,
) -> tuple[dict[int, LayerProcess], dict[int, str]]:
    """Start a process in every version of transformers that is here.

    Returns:
        Major version → its process, and major version → why there is none.
    """
    here = environments()
    processes: dict[int, LayerProcess] = {}
    missing: dict[int, str] = {}
    for major in MAJORS:
        if major not in here:
            missing[major] = (
                f"transformers {major} is not installed here; make peers transformers builds "
                "environments with both versions"
            )
            continue
        try:
            process = LayerProcess(layer, here[major], device, dtype, threads)
        except PeerUnavailable as reason:
            missing[major] = str(reason)
        else:
            processes[major] = stack.enter_context(process)
    return processes, missing


def beside(mine: Measured, theirs: Measured) -> dict[str, Any]:
    """Return what stands in our row of a peer."""
    if theirs.note:
        return {"note": theirs.note}
    pairs = zip(mine.seconds, theirs.seconds, strict=True)
    return {
        "seconds": spread(theirs.seconds),
        "speedup": spread([other / own for own, other in pairs]),
        "extra_bytes": theirs.extra_bytes,
    }
