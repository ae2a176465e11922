"""Tile sizes of the grouped products: tables of chosen ones, and a rule for everything else.

Nothing is searched at run time. ``choose_tile`` looks a shape up in the user's table, which
``moe-mt tune`` writes, then in the shipped one, ``tiles.json``, and otherwise follows the rule.
Rows per expert are the expected ones, ``N / E``: the true ones are known to the device alone.
Tables are read once in a process.
"""

import json
import os
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import triton
from torch import Tensor

from moe_mt.errors import ConfigError
from moe_mt.kernels._launch import Accelerator, accelerator_of

__all__ = [
    "BUCKETS",
    "KINDS",
    "SHIPPED_TABLE",
    "TWO_WEIGHTS",
    "Choice",
    "Problem",
    "Tile",
    "choose_tile",
    "memory_limit",
    "memory_of",
    "problem_of",
    "programs_for",
    "read_table",
    "rule",
    "tile_for",
    "use_tiles",
    "user_table",
    "write_table",
]

KINDS = {
    "forward": "rows times a weight",
    "gated": "rows times two weights at once",
    "gated_saved": "the same, keeping both products for the backward pass",
    "hidden_grad": "a gradient times a transposed weight and ReLU's derivative",
    "hidden_grad_saved": "the same with the derivative of what the forward pass kept",
    "grad_input": "a gradient times a transposed weight",
    "grad_input_gated": "two such, added",
    "grad_weight": "a gradient, transposed, times rows",
}
"""The grouped products. They differ in what their programs hold in registers."""

TWO_WEIGHTS = ("gated", "gated_saved")
"""Products whose programs read two weights beside each other."""

BUCKETS = (1, 4, 16, 32, 64, 128)
"""Rows per expert that tiles are chosen for: 1 stands for up to 2, 4 for up to 8, and so on."""

SHIPPED_TABLE = Path(__file__).parent / "tiles.json"

HOPPER_AND_LATER = ("sm_90", "sm_100", "sm_103")
"""GPUs for data centres whose matrix units read operands from shared memory."""

SHARED_MEMORY = {
    **dict.fromkeys(HOPPER_AND_LATER, 232_448),
    "sm_80": 166_912,
    "sm_87": 166_912,
    "sm_75": 65_536,
    "gfx950": 163_840,
}
"""Bytes that one program can have; elsewhere 65,536 on AMD's GPUs and 101,376 on NVIDIA's."""

Tiles = Mapping["Problem", "Tile"]


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How a product is cut: ``rows`` x ``columns`` of its result, in steps of ``inner``."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int
    swap: bool = False
    """Whether the weight is the left operand, which suits few rows."""

    def __post_init__(self) -> None:
        """Refuse what no kernel can be compiled for."""
        for name, least, most in (
            ("rows", 16, 512),
            ("columns", 16, 512),
            ("inner", 16, 512),
            ("num_warps", 1, 16),
            ("num_stages", 1, 8),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}; it must be an integer")
            if not least <= value <= most:
                raise ValueError(f"{name} is {value}; it must be from {least} to {most}")
            if name != "num_stages" and value & (value - 1):
                raise ValueError(f"{name} is {value}; it must be a power of two")
        if not isinstance(self.swap, bool):
            raise TypeError(f"swap is {self.swap!r}; it must be true or false")

    def __str__(self) -> str:
        """Say it in words."""
        swapped = ", weights left" if self.swap else ""
        return (
            f"{self.rows} x {self.columns} x {self.inner}, {self.num_warps} warps, "
            f"{self.num_stages} stages{swapped}"
        )


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a tile is chosen for, and the key of a table."""

    arch: str
    kind: str
    dtype_bytes: int
    outer: int
    """Columns of the result: for ``grad_weight``, rows and columns are ``outer`` x ``inner``."""

    inner: int
    """Length of the sums; for ``grad_weight``, columns of the result."""

    rows_per_expert: int
    """One of ``BUCKETS``."""

    def __post_init__(self) -> None:
        """Refuse what no launcher asks for."""
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; it must be one of {', '.join(KINDS)}")
        if self.rows_per_expert not in BUCKETS:
            raise ValueError(f"rows_per_expert is {self.rows_per_expert}; it must be in {BUCKETS}")

    def __str__(self) -> str:
        """Say it in words."""
        return (
            f"{self.kind} {self.outer} x {self.inner}, {8 * self.dtype_bytes} bits, "
            f"{self.rows_per_expert} rows an expert"
        )


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a table holds for a problem."""

    tile: Tile

    why: str
    """What speaks for it: a measurement, or what was reasoned where there is none."""


def problem_of(kind: str, rows: Tensor, num_experts: int, outer: int, inner: int) -> Problem:
    """Return what a tile is chosen for.

    Args:
        kind: One of ``KINDS``.
        rows: (N, any), for its length, dtype and device.
        num_experts: ``E``.
        outer: See ``Problem``.
        inner: See ``Problem``.
    """
    return Problem(
        arch=accelerator_of(rows).arch,
        kind=kind,
        dtype_bytes=rows.element_size(),
        outer=outer,
        inner=inner,
        rows_per_expert=_bucket(rows.shape[0] / num_experts),
    )


def choose_tile(kind: str, rows: Tensor, num_experts: int, outer: int, inner: int) -> Tile:
    """Return the tile for a product over ``rows`` of all experts; arguments as of ``problem_of``.

    Raises:
        ConfigError: If the user's table cannot be read.
    """
    return tile_for(problem_of(kind, rows, num_experts, outer, inner))


def tile_for(problem: Problem) -> Tile:
    """Return the tile that the package takes for a problem.

    Raises:
        ConfigError: If the user's table cannot be read.
    """
    tile = _used.get(problem)
    if tile is None and problem.arch != "interpreter":
        tile = _tables().get(problem)
    return rule(problem) if tile is None else tile


_used: Tiles = {}


@contextmanager
def use_tiles(tiles: Tiles) -> Generator[None]:
    """Choose these tiles before those of any table, inside the block."""
    global _used
    before, _used = _used, {**_used, **tiles}
    try:
        yield
    finally:
        _used = before


def programs_for(tile: Tile, rows: Tensor, num_experts: int, outer: int, weights: int = 1) -> int:
    """Return how many programs share the tiles of a product: those that run at once, or fewer.

    ``N`` rows of ``E`` experts fill at most ``E - 1 + ceil((N - E + 1) / tile.rows)`` row blocks,
    and at most ``N``; how many they do fill is known to the device alone.

    Args:
        tile: From ``choose_tile``.
        rows: (N, any), for its length, dtype and device.
        num_experts: ``E``.
        outer: Columns of the result.
        weights: Weights that a program reads beside each other.
    """
    beyond = max(rows.shape[0] - num_experts + 1, 0)
    blocks = min(rows.shape[0], num_experts - 1 + triton.cdiv(beyond, tile.rows))
    accelerator = accelerator_of(rows)
    resident = accelerator.multiprocessors * _resident(tile, rows, accelerator, weights)
    return min(blocks * triton.cdiv(outer, tile.columns), resident)


def _resident(tile: Tile, rows: Tensor, accelerator: Accelerator, weights: int) -> int:
    """Return how many programs one multiprocessor holds, as far as warps and memory say."""
    arch = accelerator.arch
    memory = memory_of(tile, arch, rows.element_size(), weights)
    return max(1, min(16 // tile.num_warps, memory_limit(arch) // memory))


def memory_of(tile: Tile, arch: str, dtype_bytes: int, weights: int = 1) -> int:
    """Return the shared memory of a program: its steps under way, of rows and of weights.

    Matrix units that take operands from registers leave the memory of a step free meanwhile.
    """
    steps = tile.num_stages if arch in HOPPER_AND_LATER else max(1, tile.num_stages - 1)
    return (tile.rows + weights * tile.columns) * tile.inner * dtype_bytes * steps


def memory_limit(arch: str) -> int:
    """Return how many bytes of shared memory a program can have."""
    return SHARED_MEMORY.get(arch, 65_536 if arch.startswith("gfx") else 101_376)


def _bucket(rows_per_expert: float) -> int:
    """Return the bucket of a number of rows: 2 is still 1's, 8 still 4's, then halfway up."""
    bounds = (2, 8, 24, 48, 96)
    return BUCKETS[sum(rows_per_expert > bound for bound in bounds)]


def rule(problem: Problem) -> Tile:
    """Return the tile that follows from the problem alone."""
    if problem.arch == "interpreter":
        return _interpreted(problem)
    if problem.dtype_bytes == 4:
        return _for_float32(problem)
    if problem.kind == "grad_weight":
        return _for_grad_weight(problem)
    return _for_rows(problem)


def _interpreted(problem: Problem) -> Tile:
    """Small tiles, so that small tests have several of them; both operand orders."""
    if problem.kind == "grad_weight":
        return Tile(rows=32, columns=16, inner=16, num_warps=4, num_stages=2)
    swap = problem.rows_per_expert == 1
    return Tile(rows=16, columns=32, inner=32, num_warps=4, num_stages=2, swap=swap)


def _for_float32(problem: Problem) -> Tile:
    # No matrix unit multiplies float32 exactly; ordinary ones want small tiles.
    if problem.kind == "grad_weight":
        return Tile(rows=64, columns=32, inner=16, num_warps=4, num_stages=2)
    rows = 16 if problem.rows_per_expert <= 4 else 64
    columns = 64 if problem.kind in ("forward", "grad_input") else 32
    return Tile(rows=rows, columns=columns, inner=32, num_warps=4, num_stages=2)


def _for_grad_weight(problem: Problem) -> Tile:
    few = problem.rows_per_expert
    inner = 16 if few <= 4 else 32
    # Up to some hundred rows the time is that of storing the gradient, and a program that stores
    # does nothing else: several on a multiprocessor fill the gaps. Smaller tiles read more, but
    # rows are few, and in the cache.
    if few <= 16:
        return Tile(rows=64, columns=128, inner=inner, num_warps=4, num_stages=2)
    if few <= 64 or problem.arch not in HOPPER_AND_LATER:
        stages = 3 if problem.arch == "sm_80" else 2
        return Tile(rows=128, columns=128, inner=inner, num_warps=8, num_stages=stages)
    return Tile(rows=128, columns=256, inner=64, num_warps=8, num_stages=3)


def _for_rows(problem: Problem) -> Tile:
    if problem.rows_per_expert <= 16:
        return _for_few_rows(problem)
    amd = problem.arch.startswith("gfx")
    # Every step reads rows from the cache for as many columns of weights as the tile has: wide
    # tiles spare the cache. Larger ones than these run out of registers: those of two products,
    # of four operands at once, and on Ampere all.
    wide = 64 if problem.kind in TWO_WEIGHTS else 128
    if problem.kind == "hidden_grad_saved":
        tile = Tile(rows=64, columns=64, inner=64, num_warps=8, num_stages=4)
    elif problem.rows_per_expert <= 32:
        tile = Tile(rows=64, columns=wide, inner=64, num_warps=4, num_stages=4)
    else:
        widened = ("forward", "grad_input")
        if amd or problem.arch == "sm_90":
            widened = (*widened, "gated")
        if problem.kind in widened and (amd or problem.arch in HOPPER_AND_LATER):
            wide *= 2
        tile = Tile(rows=128, columns=wide, inner=64, num_warps=8, num_stages=4)
    # AMD's units are kept busy by more programs, not by more steps under way.
    return replace(tile, num_stages=2) if amd else _fitting(tile, problem, memory_limit)


def _for_few_rows(problem: Problem) -> Tile:
    few = problem.rows_per_expert
    amd = problem.arch.startswith("gfx")
    wide = 64 if problem.kind in (*TWO_WEIGHTS, "hidden_grad_saved") else 128
    # Two products after each other run out of registers where steps are long and wide.
    long = few <= 1 or (few <= 4 and problem.kind != "grad_input_gated")
    tile = Tile(
        rows=16 if few <= 4 else 32,
        columns=64 if few <= 1 else wide,
        inner=128 if long and not amd else 64,
        num_warps=4,
        num_stages=4,
        # Hopper's matrix units take 64 left rows at once, so weights go there; those of others
        # take 16, and read weights from the right without a detour.
        swap=problem.arch in HOPPER_AND_LATER,
    )
    # Two programs share a multiprocessor: while one stores, the other's weights keep coming.
    return _fitting(tile, problem, lambda arch: memory_limit(arch) // 2)


def _fitting(tile: Tile, problem: Problem, limit: Callable[[str], int]) -> Tile:
    """Return the tile with as many stages, at least two, as fit into memory."""
    weights = 2 if problem.kind in TWO_WEIGHTS else 1

    def fits() -> bool:
        memory = memory_of(tile, problem.arch, problem.dtype_bytes, weights)
        return memory <= limit(problem.arch)

    while tile.num_stages > 2 and not fits():
        tile = replace(tile, num_stages=tile.num_stages - 1)
    return tile


@cache
def _tables() -> dict[Problem, Tile]:
    """Return the shipped table under the user's."""
    tables = read_table(SHIPPED_TABLE) | read_table(user_table())
    return {problem: choice.tile for problem, choice in tables.items()}


def user_table() -> Path:
    """Return where the user's table is: in ``$MOE_MT_CACHE``, or ``~/.cache/moe_mt``."""
    folder = os.environ.get("MOE_MT_CACHE")
    return (Path(folder) if folder else Path.home() / ".cache" / "moe_mt") / "tiles.json"


def read_table(path: Path) -> dict[Problem, Choice]:
    """Return what a table file holds; nothing where there is none.

    Raises:
        ConfigError: If the file is not such a table, or cannot be read.
    """
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return {
            Problem(**row["problem"]): Choice(tile=Tile(**row["tile"]), why=row["why"])
            for row in rows
        }
    except FileNotFoundError:
        return {}
    except (OSError, TypeError, KeyError, ValueError) as error:
        raise ConfigError(
            f"{path} is not a table of tiles ({type(error).__name__}: {error}); delete it, or "
            "write it again with moe-mt tune"
        ) from error


def write_table(path: Path, choices: Mapping[Problem, Choice]) -> None:
    """Write a table file, one line a problem, in the order of the problems.

    The old file stays until the new one is whole.
    """

    def order(problem: Problem) -> tuple[Any, ...]:
        return tuple(asdict(problem).values())

    lines = [
        json.dumps({"problem": asdict(problem), **asdict(choices[problem])})
        for problem in sorted(choices, key=order)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    partial.replace(path)
    _tables.cache_clear()
