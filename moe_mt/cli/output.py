"""Where results go, such that nothing translated is lost."""

import hashlib
import json
import sys
from pathlib import Path
from typing import IO, Any

from moe_mt.errors import InputError

__all__ = ["ResumableFile", "StandardOutput"]

FINGERPRINT_BYTES = 1 << 20


class StandardOutput:
    """Lines to standard output, as UTF-8 whatever the locale says."""

    lines_done = 0

    def write_line(self, line: str) -> None:
        """Write one line."""
        sys.stdout.buffer.write(line.encode("utf-8") + b"\n")

    def flush(self) -> None:
        """Hand everything written to the reader."""
        sys.stdout.buffer.flush()

    def finish(self) -> None:
        """End the output."""
        self.flush()


class ResumableFile:
    """Lines to ``OUT.partial``, renamed to ``OUT`` when all are there.

    Beside it stands ``OUT.partial.json``, which says what the lines were made from, so that only
    the same command on the same input continues them.
    """

    def __init__(
        self, path: Path, source: Path | None, settings: dict[str, Any], *, resume: bool
    ) -> None:
        """Open the output.

        Args:
            path: The file to make.
            source: The file that is translated, or ``None`` for standard input.
            settings: Whatever the output depends on besides the source.
            resume: Whether to continue what an interrupted run left.

        Raises:
            InputError: If an interrupted run's output is there and ``resume`` is not set, or it
                was made by another command, or standard input cannot be read again.
        """
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.journal = path.with_name(path.name + ".partial.json")
        self.lines_done = 0
        journal = {"settings": settings, "input": _fingerprint(source)}
        if resume and source is None:
            raise InputError("--resume needs an input that can be read again; name it with -i")
        if self.partial.exists() and not resume:
            raise InputError(
                f"{self.partial} is there from an interrupted run; continue it with --resume, or "
                "remove it to start again"
            )
        if self.partial.exists():
            self._check(journal)
            self._file = self.partial.open("r+b")
            self.lines_done = _cut_behind_last_line(self._file)
        else:
            self.journal.write_text(json.dumps(journal, indent=1), encoding="utf-8")
            self._file = self.partial.open("wb")

    def write_line(self, line: str) -> None:
        """Write one line."""
        self._file.write(line.encode("utf-8") + b"\n")

    def flush(self) -> None:
        """Hand everything written to the operating system: it then survives a kill."""
        self._file.flush()

    def finish(self) -> None:
        """Rename the complete file to its name."""
        self._file.close()
        self.partial.replace(self.path)
        self.journal.unlink()

    def _check(self, journal: dict[str, Any]) -> None:
        try:
            found = json.loads(self.journal.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.partial} cannot be continued: its journal {self.journal} is missing or "
                "unreadable; remove both to start again"
            ) from error
        if found != json.loads(json.dumps(journal)):
            raise InputError(
                f"{self.partial} was made from another input or with other options: {found} there, "
                f"{journal} now; use the same ones, or remove it to start again"
            )


def _fingerprint(source: Path | None) -> dict[str, Any] | None:
    if source is None:
        return None
    with source.open("rb") as file:
        digest = hashlib.sha256(file.read(FINGERPRINT_BYTES)).hexdigest()
    return {"bytes": source.stat().st_size, "sha256_of_first_mebibyte": digest}


def _cut_behind_last_line(file: IO[bytes]) -> int:
    """Remove an unfinished last line, stand at the end and return how many lines are there."""
    lines, end = 0, 0
    for line in file:
        if line.endswith(b"\n"):
            lines, end = lines + 1, end + len(line)
    file.seek(end)
    file.truncate()
    return lines
