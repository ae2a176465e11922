"""Progress bars: on standard error, and only where that is a terminal."""

import argparse
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

__all__ = ["LogBesideBars", "byte_progress", "progress_hidden"]


class LogBesideBars(logging.Handler):
    """Writes log lines to standard error, above whatever bar stands there."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        tqdm.write(self.format(record), file=sys.stderr)


def progress_hidden(options: argparse.Namespace) -> bool:
    """Whether no progress bar is shown: on request, and where standard error is no terminal."""
    return options.quiet or not sys.stderr.isatty()


@contextmanager
def byte_progress(
    options: argparse.Namespace, description: str
) -> Iterator[Callable[[int, int], None]]:
    """Show a bar of bytes and yield the callback that moves it, ``(done, total)``."""
    with tqdm(
        desc=description,
        unit="B",
        unit_scale=True,
        disable=progress_hidden(options),
        leave=False,
    ) as bar:

        def on_progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield on_progress
