"""The committed table: one row for each compilation."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.ahead_of_time.binary import Figures
from benchmarks.ahead_of_time.cases import ALLOWED
from benchmarks.ahead_of_time.specialise import Compilation, Identity, source_hash

__all__ = [
    "Row",
    "Table",
    "TableError",
    "read_table",
    "reason_to_spill",
    "row_of",
    "show",
    "write_table",
]


class TableError(ValueError):
    """A file that is no table of this tool."""


COLUMNS: tuple[str, ...] = (
    *("kernel", "target", "tile", "fixed", "warps", "stages", "registers", "spills", "shared"),
    *("matrix", "weights", "memory", "cases"),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One compilation: what was compiled, and what came out."""

    kernel: str
    target: str
    tile: str
    arguments: str
    num_warps: int
    num_stages: int
    cases: tuple[str, ...]
    source: str
    allowed: str
    """Why it may spill; empty where it may not."""

    figures: Figures

    @property
    def identity(self) -> Identity:
        """What this row shares with the row of the same compilation in another table."""
        return (
            *(self.kernel, self.target, self.tile, self.arguments),
            *(self.num_warps, self.num_stages),
        )

    def __str__(self) -> str:
        return (
            f"{self.kernel} for {self.target} ({self.tile} num_warps={self.num_warps} "
            f"num_stages={self.num_stages}; {self.cases[0]})"
        )


Table = dict[Identity, Row]


def row_of(compilation: Compilation, cases: Iterable[str], figures: Figures) -> Row:
    """Return the row of a compilation that all of ``cases`` need."""
    kernel, target, tile, arguments, num_warps, num_stages = compilation.identity
    return Row(
        kernel=kernel,
        target=target,
        tile=tile,
        arguments=arguments,
        num_warps=num_warps,
        num_stages=num_stages,
        cases=tuple(cases),
        source=source_hash(compilation.kernel),
        allowed=reason_to_spill(kernel, target, tile),
        figures=figures,
    )


def reason_to_spill(kernel: str, target: str, tile: str) -> str:
    """Return why a kernel in these tiles may spill; nothing where it may not."""
    return next(
        (
            reason
            for (its_kernel, its_target, part), reason in ALLOWED.items()
            if (its_kernel, its_target) == (kernel, target) and part in tile
        ),
        "",
    )


def read_table(path: Path) -> Table:
    """Return the rows of a table; none where there is no file.

    Raises:
        TableError: If the file is something else.
    """
    if not path.exists():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [_row(json.loads(line)) for line in lines]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise TableError(
            f"{path} is not a table of python -m benchmarks.ahead_of_time ({error!r}); delete it "
            f"and write it anew with make aot"
        ) from error
    return {row.identity: row for row in rows}


def _row(fields: dict[str, Any]) -> Row:
    own = {name: fields.pop(name) for name in Row.__dataclass_fields__ if name != "figures"}
    return Row(**{**own, "cases": tuple(own["cases"])}, figures=Figures(**fields))


def write_table(path: Path, rows: Iterable[Row]) -> None:
    """Write rows in their order, one a line, so that a difference shows what changed."""
    lines = [json.dumps(_fields(row)) for row in sorted(rows, key=lambda row: row.identity)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _fields(row: Row) -> dict[str, Any]:
    """Return what a row holds: what a reader looks for first, and what is long last."""
    fields = asdict(row)
    figures = fields.pop("figures")
    last = {name: fields.pop(name) for name in ("source", "arguments", "cases")}
    return {**fields, **figures, **last}


def show(rows: Iterable[Row]) -> str:
    """Return rows as columns of text."""
    cells = [_cells(row) for row in sorted(rows, key=lambda row: row.identity)]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *cells, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in (COLUMNS, *cells)
    )


def _cells(row: Row) -> tuple[str, ...]:
    """Return what stands in the row's ``COLUMNS``."""
    figures = row.figures
    fixed = [argument for argument in row.arguments.split() if ":=" in argument]
    first, *others = row.cases
    more = f" and {len(others)} more" if others else ""
    return (
        *(row.kernel, row.target, row.tile, " ".join(fixed).replace(":=", "=")),
        *(str(figures.warps), str(row.num_stages), str(figures.registers)),
        *(str(figures.spills or figures.stack), str(figures.shared), figures.matrix),
        *(_counted(figures.weights), _counted(figures.accesses), first + more),
    )


def _counted(accesses: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {access}" for access, count in accesses.items())
