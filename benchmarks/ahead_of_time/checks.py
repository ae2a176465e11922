"""What is wrong with a compilation: by itself, against the committed table, or across tokens."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from benchmarks.ahead_of_time.cases import Expectation
from benchmarks.ahead_of_time.table import Row
from benchmarks.ahead_of_time.targets import TARGETS

__all__ = ["defects", "depends_on_tokens", "regressions"]

SLACK = 1.10
"""How much more of a resource than in the table is no regression."""

REGISTERS = 65_536
"""Of a multiprocessor, which all threads of one program share; a thread gets multiples of 8."""

WHOLE_TILES = 1024
"""What counts as the width of a copy of whole tiles: more than any load's."""

WIDE_UNIT_ROWS = 64
"""From how many rows of the left operand on newer matrix units than Ampere's can be used."""


def defects(row: Row, expectation: Expectation) -> list[str]:
    """Return in words what is wrong with a row, whatever the table says."""
    figures, target = row.figures, TARGETS[row.target]
    found: list[str] = []
    if (figures.spills or figures.stack) and not row.allowed:
        found.append(f"spills: {figures.spills}, with {figures.stack} bytes of local memory")
    if figures.shared > target.shared_limit:
        found.append(f"takes {figures.shared} bytes of shared memory; {target.shared_limit} exist")
    threads = figures.warps * target.gpu.warp_size
    allocated = -(-figures.registers // 8) * 8
    if target.gpu.backend == "cuda" and allocated * threads > REGISTERS:
        found.append(
            f"takes {figures.registers} registers for each of {threads} threads; {REGISTERS} exist"
        )
    if "atomic" in figures.accesses:
        found.append("adds atomically, so that its result is not the same every time")
    return [*found, *_matrix_defects(row, expectation), *_weight_defects(row, expectation)]


def _matrix_defects(row: Row, expectation: Expectation) -> list[str]:
    element = re.search(rf"\b{expectation.matrix}:\*(\w+)", row.arguments)
    if not expectation.matrix or element is None or element[1] not in expectation.matrix_dtypes:
        return []
    wanted = TARGETS[row.target].matrix
    if wanted != "v_mfma" and _left_rows(row, expectation) < WIDE_UNIT_ROWS:
        wanted = "HMMA"
    if row.figures.matrix.startswith(wanted):
        return []
    return [f"has {row.figures.matrix or 'no matrix instruction'}, but {wanted} was expected"]


def _left_rows(row: Row, expectation: Expectation) -> int:
    constants = dict(constant.split("=") for constant in row.tile.split())
    unswapped, swapped = expectation.left_rows
    return int(constants[swapped if constants.get("SWAP") == "True" else unswapped])


def _weight_defects(row: Row, expectation: Expectation) -> list[str]:
    if not expectation.wide_weights:
        return []
    if not row.figures.weights:
        return ["loads no weights: what a kernel loads from weights is to be called so"]
    bits = narrowest(row.figures.weights)
    return [] if bits >= 128 else [f"loads weights {bits} bits at a time instead of 128"]


def narrowest(accesses: Mapping[str, int], kind: str = "") -> int:
    """Return how many bits the narrowest access of a kind moves for each thread."""
    widths = [
        int(bits or WHOLE_TILES)
        for found, _, bits in (access.partition(" ") for access in accesses)
        if found.startswith(kind)
    ]
    return min(widths, default=WHOLE_TILES)


def regressions(row: Row, last: Row) -> list[str]:
    """Return in words what a row lost against the committed one."""
    now, before = row.figures, last.figures
    lost: list[str] = []
    for name in ("registers", "shared"):
        value, committed = getattr(now, name), getattr(before, name)
        if value > committed * SLACK:
            lost.append(f"{name} grew from {committed} to {value}, by more than 10 %")
    if before.matrix and _unit(now.matrix) != _unit(before.matrix):
        lost.append(f"{before.matrix} was lost for {now.matrix or 'no matrix instruction'}")
    if narrowest(now.weights) < narrowest(before.weights):
        lost.append(
            f"loads of weights narrowed from {narrowest(before.weights)} to "
            f"{narrowest(now.weights)} bits"
        )
    if narrowest(now.accesses, "async") < narrowest(before.accesses, "async"):
        lost.append(f"copies to shared memory narrowed to {narrowest(now.accesses, 'async')} bits")
    return lost


def _unit(matrix: str) -> str:
    """Return the unit that an instruction runs on: its name without its shape."""
    return "v_mfma" if matrix.startswith("v_mfma") else matrix.split(".")[0]


def depends_on_tokens(launches: Iterable[tuple[tuple[str, ...], str]]) -> list[str]:
    """Return in words which kernels a new number of tokens compiles anew.

    Args:
        launches: What a launch is apart from its number of tokens, and its arguments' types.
    """
    seen: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for key, arguments in launches:
        # A tensor beyond 2 GB is addressed otherwise on AMD, however many tokens that takes.
        seen[key].add(arguments.replace("/2GB", ""))
    found: list[str] = []
    for key, variants in seen.items():
        if len(variants) > 1:
            parts = zip(*(variant.split() for variant in sorted(variants)), strict=True)
            differing = {" or ".join(sorted(set(part))) for part in parts if len(set(part)) > 1}
            found.append(
                f"{' '.join(key)}: the number of tokens decides {', '.join(sorted(differing))}; "
                f"put it into do_not_specialize"
            )
    return found
