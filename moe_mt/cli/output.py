"""Where results go, such that nothing translated is lost."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, Protocol

from moe_mt.errors import InputError

__all__ = ["Mark", "Output", "ResumableFile", "StandardOutput"]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A place up to which all that was read is written, so that a run can continue from there."""

    lines: int = 0
    """Lines read, and written."""

    flagged: int = 0
    """Lines among them whose result had a warning."""

    input_sha256: str = sha256().hexdigest()
    """Of the lines read."""


class Output(Protocol):
    """Where lines go."""

    mark: Mark
    """How far an earlier run came."""

    def open(self) -> None:
        """Make ready to write behind the mark."""
        ...

    def write_line(self, line: str) -> None:
        """Write one line and hand it to the operating system: it then survives a kill."""
        ...

    def set_mark(self, mark: Mark) -> None:
        """Note that a run can continue from here."""
        ...

    def close(self) -> None:
        """Leave an unfinished output as it is."""
        ...

    def finish(self) -> None:
        """End the output; it is whole."""
        ...


class StandardOutput:
    """Lines to standard output, as UTF-8 whatever the locale says."""

    def __init__(self) -> None:
        """Begin at the first line."""
        self.mark = Mark()
        self._written = 0

    def open(self) -> None:
        """Do nothing: standard output is open."""

    def write_line(self, line: str) -> None:
        """Write one line and hand it to the reader."""
        with _named_failure(f"standard output behind line {self._written}", "make room for it"):
            sys.stdout.buffer.write(line.encode("utf-8") + b"\n")
            sys.stdout.buffer.flush()
        self._written += 1

    def set_mark(self, mark: Mark) -> None:
        """Do nothing: what a reader has taken cannot be continued."""

    def close(self) -> None:
        """Do nothing: standard output is not ours to close."""

    def finish(self) -> None:
        """Do nothing: every line has been handed over."""


class ResumableFile:
    """Lines to ``OUT.partial``, renamed to ``OUT`` when all are there.

    Beside it stands ``OUT.partial.json``, the journal: what the lines are made with, and the last
    mark. A run that continues cuts what stands behind the mark and checks that it was given the
    same options, and the same input before the mark.
    """

    def __init__(self, path: Path, settings: dict[str, Any], *, resume: bool) -> None:
        """Find out how far an earlier run came; nothing is written yet.

        Args:
            path: The file to make.
            settings: Whatever a line depends on besides the input.
            resume: Whether to continue what an interrupted run left.

        Raises:
            InputError: If an interrupted run's output is there and ``resume`` is not set, or it
                was made with other settings, or ``path`` cannot be a file.
        """
        if not path.parent.is_dir():
            raise InputError(f"there is no folder {path.parent} to write {path.name} to; make it")
        in_system = path.is_relative_to("/dev") or path.is_relative_to("/proc")
        if in_system or (path.exists() and not path.is_file()):
            # It would be replaced by a file, were it a folder or a device.
            raise InputError(f"{path} is no ordinary file; name another, or use standard output")
        # A link is written through, not replaced.
        path = self.path = path.resolve() if path.is_symlink() else path
        self.partial = path.with_name(path.name + ".partial")
        self.journal = path.with_name(path.name + ".partial.json")
        self.mark = Mark()
        self.lines_written = 0
        self._settings = settings
        self._size = 0
        self._file: IO[bytes] | None = None
        if self.partial.exists():
            if not resume:
                raise InputError(
                    f"{self.partial} is there from an interrupted run; continue it with --resume, "
                    "or remove it to start again"
                )
            self._read_journal()

    def open(self) -> None:
        """Cut what stands behind the mark, or begin a new file."""
        with self._named_failure():
            if not self.partial.exists():
                self._write_journal()
            self._file = self.partial.open("ab")
            self._file.truncate(self._size)
            self.lines_written = self.mark.lines

    def write_line(self, line: str) -> None:
        """Write one line and hand it to the operating system: it then survives a kill."""
        assert self._file is not None
        with self._named_failure():
            self._file.write(line.encode("utf-8") + b"\n")
            self._file.flush()
        self.lines_written += 1

    def set_mark(self, mark: Mark) -> None:
        """Note in the journal that a run can continue from here."""
        assert self._file is not None
        with self._named_failure():
            self.mark, self._size = mark, self._file.tell()
            self._write_journal()

    def close(self) -> None:
        """Leave the partial file as it is."""
        if self._file is not None:
            # A full disk refuses the rest of a line once more.
            with suppress(OSError):
                self._file.close()

    def finish(self) -> None:
        """Rename the complete file to its name."""
        assert self._file is not None
        with self._named_failure():
            os.fsync(self._file.fileno())
            self._file.close()
            self.partial.replace(self.path)
            self.journal.unlink()

    def _named_failure(self) -> AbstractContextManager[None]:
        place = f"{self.partial} behind line {self.lines_written}"
        return _named_failure(place, "the lines before are kept; make room and add --resume")

    def _write_journal(self) -> None:
        content = {
            "settings": self._settings,
            "mark": asdict(self.mark),
            "output_bytes": self._size,
        }
        new = self.journal.with_name(self.journal.name + ".new")
        new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        new.replace(self.journal)

    def _read_journal(self) -> None:
        try:
            found = json.loads(self.journal.read_text(encoding="utf-8"))
            settings, self._size = found["settings"], found["output_bytes"]
            self.mark = Mark(**found["mark"])
            whole = self.partial.stat().st_size >= self._size
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.partial} cannot be continued: its journal {self.journal} is missing or "
                "unreadable; remove both to start again"
            ) from error
        ours = json.loads(json.dumps(self._settings))
        if settings != ours:
            raise InputError(
                f"{self.partial} was made with other options: {_differences(settings, ours)}; use "
                "the same ones, or remove it to start again"
            )
        if not whole:
            raise InputError(
                f"{self.partial} is shorter than its journal says; remove both to start again"
            )


@contextmanager
def _named_failure(place: str, advice: str) -> Iterator[None]:
    """Say where a write failed; a reader that has gone is no failure to speak of."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(f"cannot write {place}: {error.strerror}; {advice}") from error


def _differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} was {there.get(name)!r} and is {here.get(name)!r}"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    )
