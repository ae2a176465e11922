"""A worker and what is known of its process: answers, and the most memory it held."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any, NamedTuple

from benchmarks.graphs import PeerUnavailable
from benchmarks.memory import AnonymousPeak

__all__ = ["Answer", "Worker"]

ROOT = Path(__file__).parents[2]


class Answer(NamedTuple):
    """What one request came to."""

    seconds: float
    tokens: list[list[int]]


class Worker:
    """One system that is loaded in a process of its own."""

    def __init__(self, program: str, dtype: str, folder: Path, threads: int) -> None:
        """Start the process, wait for its imports, then load the model.

        Args:
            program: One of ``worker.PROGRAMS``.
            dtype: As that program names it.
            folder: Of the model.
            threads: That it may compute with.

        Raises:
            PeerUnavailable: If it ends, with what it said last.
        """
        self._errors = TemporaryFile("w+", encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.generation.worker"]
        self._process = subprocess.Popen(
            [*command, program, dtype, str(folder), str(threads)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
        )
        self._name = f"{program} in {dtype}"
        self._answer()
        read_once(folder)
        with self._memory() as peak:
            self.load_s: float = self._ask({})["seconds"]
        self.peak_bytes = peak.bytes

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def generate(
        self, sources: Sequence[Sequence[int]], beams: int, new_tokens: int, *, watch: bool = False
    ) -> Answer:
        """Generate once.

        Args:
            sources: Token ids of every sentence.
            beams: Hypotheses kept side by side.
            new_tokens: Of every translation.
            watch: Whether ``peak_bytes`` shall follow this call, which then is no measurement of
                time.
        """
        request = {"sources": sources, "beams": beams, "new_tokens": new_tokens}
        if not watch:
            return Answer(**self._ask(request))
        with self._memory() as peak:
            found = self._ask(request)
        self.peak_bytes = max(self.peak_bytes, peak.bytes)
        return Answer(**found)

    def stop(self) -> None:
        """End the process and wait until its memory is free."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended, and was asked for more
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _memory(self) -> AnonymousPeak:
        return AnonymousPeak(self._process.pid)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, and the answer says why
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip().rpartition("\n")[2]
            self.stop()
            raise PeerUnavailable(f"{self._name} ended with {code}: {said}")
        return json.loads(line)


def read_once(folder: Path) -> None:
    """Read all files of a folder, so that loading is not about the disk."""
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.read(2**24):
                pass
