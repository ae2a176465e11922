"""Where lines come from."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import IO

from moe_mt.errors import InputError

__all__ = ["Lines", "count_lines", "open_lines"]


class Lines:
    r"""Lines of a byte stream, split at "\n" only.

    A line that cannot be read, or is not UTF-8, ends the lines before it, so that these are still
    translated; what is wrong with it is left in ``error``.
    """

    def __init__(self, stream: IO[bytes], name: str) -> None:
        """Begin at the first line.

        Args:
            stream: The bytes.
            name: What messages call it.
        """
        self.count = 0
        self.error: InputError | None = None
        self._stream = stream
        self._name = name
        self._digest = sha256()

    @property
    def sha256(self) -> str:
        """Digest of the lines read so far."""
        return self._digest.hexdigest()

    def skip(self, count: int) -> None:
        """Read ``count`` lines, or as many as there are, without looking at them."""
        for raw in islice(self._stream, count):
            self._take(raw)

    def __iter__(self) -> Iterator[str]:
        place = "not readable"
        try:
            for raw in self._stream:
                line = raw.removesuffix(b"\n").decode("utf-8")
                self._take(raw)
                yield line
        except UnicodeDecodeError as error:
            place = f"not UTF-8 ({error.reason} at byte {error.start} of the line)"
        except OSError as error:
            place = f"not readable ({error.strerror})"
        else:
            return
        self.error = InputError(
            f"{self._name}, line {self.count + 1}: {place}; the {self.count} lines before it were "
            "translated. Mend the line and run again, with --resume if -o was used"
        )

    def _take(self, raw: bytes) -> None:
        self._digest.update(raw)
        self.count += 1


@contextmanager
def open_lines(name: str) -> Iterator[Lines]:
    """Yield the lines of the file that ``--input`` names, or of standard input.

    Raises:
        InputError: If it cannot be opened.
    """
    if name == "-":
        yield Lines(sys.stdin.buffer, "standard input")
        return
    try:
        stream = Path(name).open("rb")
    except OSError as error:
        raise InputError(
            f"cannot read {name}: {error.strerror}; name a file with -i, or - for standard input"
        ) from error
    with stream:
        yield Lines(stream, name)


def count_lines(name: str) -> int | None:
    """Return how many lines a file has; ``None`` if it can be read only once."""
    if not Path(name).is_file():
        return None
    with Path(name).open("rb") as file:
        return sum(1 for _ in file)
