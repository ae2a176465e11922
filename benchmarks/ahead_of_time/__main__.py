"""Compile all kernels for GPUs that are not here: ``python -m benchmarks.ahead_of_time``.

Writes what came out to ``benchmarks/results/ahead_of_time/triton-<version>.jsonl``, or checks it
against what is there.
"""

import argparse
import ast
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import triton

from benchmarks.ahead_of_time.cases import EXPECTATIONS, Expectation, all_cases
from benchmarks.ahead_of_time.checks import defects, regressions
from benchmarks.ahead_of_time.compile import Failure, compile_all
from benchmarks.ahead_of_time.launches import Needed, needed
from benchmarks.ahead_of_time.specialise import source_hash
from benchmarks.ahead_of_time.table import (
    Table,
    TableError,
    read_table,
    reason_to_spill,
    row_of,
    show,
    write_table,
)
from benchmarks.ahead_of_time.targets import ALWAYS, TARGETS

__all__ = ["RESULTS", "main"]

RESULTS = Path(__file__).parents[1] / "results" / "ahead_of_time"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, and write, check or show; return the exit code."""
    options = _parse(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.stderr.write("kernels are interpreted, not compiled: unset TRITON_INTERPRET\n")
        return 2
    started = time.monotonic()
    path = options.results / f"triton-{triton.__version__}.jsonl"
    try:
        table = read_table(path)
    except TableError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    targets = [TARGETS[name] for name in options.target or TARGETS]
    wanted, problems = needed(all_cases(), targets, options.show or "", dict(options.set))
    if not wanted:
        sys.stderr.write(f"no kernel is called like {options.show!r}; '' shows all\n")
        return 2
    unchanged = _unchanged(wanted, table) if options.changed else {}
    compiled, failures = _compile([one for one in wanted if one.identity not in unchanged], options)
    rows = {**unchanged, **compiled}
    problems += [*failures, *_defects(rows)]
    if options.show is not None:
        sys.stdout.write(show(rows.values()) + "\n")
    else:
        others = {key: row for key, row in table.items() if row.target not in _names(targets)}
        last = {key: row for key, row in table.items() if key not in others}
        lost = _lost(rows, last)
        if options.check:
            problems += [*lost, *_not_as_written(rows, last, failed=bool(failures))]
        else:
            write_table(path, {**others, **rows}.values())
            sys.stdout.write("".join(f"NOTE {text}\n" for text in lost) + f"wrote {path}\n")
    sys.stdout.write("".join(f"FAIL {text}\n" for text in problems))
    sys.stdout.write(
        f"triton {triton.__version__} for {', '.join(_names(targets))}: {len(compiled)} compiled, "
        f"{len(unchanged)} unchanged, {len(problems)} wrong, {time.monotonic() - started:.0f} s\n"
    )
    return 1 if problems else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ahead_of_time", description=__doc__)
    parser.add_argument(
        "--target", action="append", choices=sorted(TARGETS), help="may be repeated; all"
    )
    parser.add_argument(
        "--check", action="store_true", help="compare with the table, write nothing"
    )
    parser.add_argument(
        "--changed",
        action="store_true",
        help=f"compile for {ALWAYS}, and elsewhere only what is not in the table as it is now",
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile; 2")
    parser.add_argument(
        "--show", metavar="KERNEL", help="only show kernels whose name holds KERNEL ('' for all)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=_setting,
        metavar="NAME=VALUE[,VALUE]",
        help="with --show: try constants, num_warps or num_stages; may be repeated, for a grid",
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    options = parser.parse_args(arguments)
    if options.set and options.show is None:
        parser.error("--set tries what is not shipped; use it with --show")
    return options


def _setting(text: str) -> tuple[str, list[Any]]:
    name, _, values = text.partition("=")
    return name, [ast.literal_eval(value) for value in values.split(",")]


def _names(targets: Iterable[Any]) -> list[str]:
    return [target.name for target in targets]


def _unchanged(wanted: Iterable[Needed], table: Table) -> Table:
    """Return the rows in the table that say what compiling again would."""
    found: Table = {}
    for one in wanted:
        row = table.get(one.identity)
        if row is None or row.target == ALWAYS:
            continue
        if row.source == source_hash(one.compilation.kernel):
            allowed = reason_to_spill(row.kernel, row.target, row.tile)
            found[one.identity] = replace(row, cases=tuple(one.cases), allowed=allowed)
    return found


def _compile(wanted: Sequence[Needed], options: argparse.Namespace) -> tuple[Table, list[str]]:
    """Return the rows of what compiled, and in words what did not."""
    cases = {one.identity: one.cases for one in wanted}
    rows: Table = {}
    failures: list[str] = []
    for compilation, result in compile_all([one.compilation for one in wanted], options.jobs):
        identity = compilation.identity
        if isinstance(result, Failure):
            failures.append(f"{' '.join(map(str, identity))}: {result.reason}")
        else:
            rows[identity] = row_of(compilation, cases[identity], result)
    return rows, failures


def _defects(rows: Table) -> list[str]:
    return [
        f"{row}: {defect}"
        for row in rows.values()
        for defect in defects(row, EXPECTATIONS.get(row.kernel, Expectation()))
    ]


def _lost(rows: Table, last: Table) -> list[str]:
    return [
        f"{row}: {lost}"
        for identity, row in rows.items()
        if identity in last
        for lost in regressions(row, last[identity])
    ]


def _not_as_written(rows: Table, last: Table, *, failed: bool) -> list[str]:
    """Return in words which rows only one of both has."""
    advice = "run make aot and look at the difference"
    new = [f"{rows[key]}: not in the table; {advice}" for key in rows.keys() - last.keys()]
    # What failed to compile is in the table still, and has been named.
    gone = [] if failed else last.keys() - rows.keys()
    return new + [f"{last[key]}: in the table, but no case launches it; {advice}" for key in gone]


if __name__ == "__main__":
    sys.exit(main())
