"""A process that answers requests, so that what it measures shares nothing with anybody else."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any

from benchmarks.graphs import PeerUnavailable

__all__ = ["AnsweringProcess", "answering"]

ROOT = Path(__file__).parents[1]


class AnsweringProcess:
    """A module of this folder that runs in a process of its own.

    Requests go there as lines of JSON, and come back as lines of JSON.
    """

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        *,
        threads: int,
        python: str = sys.executable,
    ) -> None:
        """Start the process.

        Args:
            name: What it is called where it fails.
            module: That is run, with its arguments.
            arguments: Of the module.
            threads: That it may compute with.
            python: The interpreter, and so the environment.
        """
        self._errors = TemporaryFile("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [python, "-m", module, *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
        )
        self._name = name
        self.id = self._process.pid

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a request.

        Raises:
            PeerUnavailable: If the process ends, with what it said last.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, and the answer says why
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Return the next answer, whether or not it was asked for.

        Raises:
            PeerUnavailable: If the process ends, with what it said last.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip().rpartition("\n")[2]
            self.stop()
            raise PeerUnavailable(f"{self._name} ended with {code}: {said}")
        return json.loads(line)

    def stop(self) -> None:
        """End the process and wait until its memory is free."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended, and was asked for more
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> "AnsweringProcess":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def answering() -> Callable[[dict[str, Any]], None]:
    """Return what such a process answers with. From then on, what a library prints is no answer."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    return answer
