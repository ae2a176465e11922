"""The command line's front: which command runs, and what its errors are worth."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

import torch

from moe_mt.cli import doctor, languages, train, translate, tune
from moe_mt.cli.progress import LogBesideBars
from moe_mt.errors import CheckpointError, MoeMtError
from moe_mt.version import __version__

__all__ = ["main"]

UNEXPECTED, USAGE, MODEL, MEMORY, INTERRUPTED = 1, 2, 3, 4, 130
COMMANDS = (translate, languages, train, tune, doctor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    level = logging.ERROR if options.quiet else logging.WARNING - 10 * min(options.verbose, 2)
    logging.basicConfig(
        format="moe-mt: %(message)s", level=level, handlers=[LogBesideBars()], force=True
    )
    code = _run(options)
    _flush_or_drop_output()
    return code


def _run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code, or that of its error."""
    try:
        code = options.run(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("moe-mt: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`moe-mt … | head`): nothing is left to do, and nobody to tell.
        return UNEXPECTED
    except (MoeMtError, MemoryError, OSError, RuntimeError) as error:
        code = _exit_code(error)
        if code is None:
            raise
        if options.verbose > 1:
            logging.exception("the command failed")
        print(f"moe-mt: {str(error) or type(error).__name__}", file=sys.stderr)
        return code


def _exit_code(error: Exception) -> int | None:
    """Return what an error is worth; ``None`` for one that nobody foresaw."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return MEMORY
    if isinstance(error, RuntimeError) and not isinstance(error, MoeMtError):
        # On the CPU torch has no class of its own for this.
        return MEMORY if "DefaultCPUAllocator" in str(error) else None
    if isinstance(error, CheckpointError):
        return MODEL
    return USAGE if isinstance(error, MoeMtError) else UNEXPECTED


def _flush_or_drop_output() -> None:
    """Leave nothing for the interpreter to write at its end, where a failure changes the code."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moe-mt",
        description="Translate with M2M100, NLLB-200 and NLLB-MoE.",
        epilog="exit codes: 0 done; 1 unexpected; 2 usage or input; 3 model missing or unreadable; "
        "4 does not fit; 5 done but flagged (--strict); 130 interrupted",
    )
    parser.add_argument("--version", action="version", version=f"moe-mt {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-q", "--quiet", action="store_true", help="only errors, no progress")
    common.add_argument("-v", "--verbose", action="count", default=0, help="more log; -vv traces")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in COMMANDS:
        command.add_parser(commands, common)
    return parser
