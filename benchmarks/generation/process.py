"""A worker and what is known of its process: answers, and the most memory it held."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.memory import AnonymousPeak
from benchmarks.process import AnsweringProcess

__all__ = ["Answer", "Worker"]


class Answer(NamedTuple):
    """What one request came to."""

    seconds: float
    tokens: list[list[int]]


class Worker(AnsweringProcess):
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
        super().__init__(
            f"{program} in {dtype}",
            "benchmarks.generation.worker",
            [program, dtype, str(folder), str(threads)],
            threads=threads,
        )
        self.answer()
        read_once(folder)
        with AnonymousPeak(self.id) as peak:
            self.load_s: float = self.ask({})["seconds"]
        self.peak_bytes = peak.bytes

    def __enter__(self) -> "Worker":
        return self

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
            return Answer(**self.ask(request))
        with AnonymousPeak(self.id) as peak:
            found = self.ask(request)
        self.peak_bytes = max(self.peak_bytes, peak.bytes)
        return Answer(**found)


def read_once(folder: Path) -> None:
    """Read all files of a folder, so that loading is not about the disk."""
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.read(2**24):
                pass
