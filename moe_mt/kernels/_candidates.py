"""Which tiles ``moe-mt tune`` tries for a problem.

About twenty: what the package would take, tiles that others measured to be fast for as many rows
(vLLM's tables, the heuristics of triton_kernels), and the neighbours of the rule's tile. All
combinations would be thousands, most of which cannot win.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from moe_mt.kernels._configurations import (
    TWO_WEIGHTS,
    Problem,
    Tile,
    memory_limit,
    memory_of,
    rule,
    tile_for,
)

__all__ = ["candidates"]

MOST = 24
SUMS_PER_THREAD = 128
"""Sums in float32 that a thread can hold beside all else that it holds: half of its registers."""

LOADING_AT_THE_END = ("gated_saved", "hidden_grad_saved")
"""Products whose tiles meet others of their size when they are stored, and need room for those."""

# Rows, columns, inner, warps, stages, and whether the weight is left.
_Numbers = tuple[int, int, int, int, int, bool]

SEEDS: dict[int, tuple[_Numbers, ...]] = {
    1: (
        (16, 64, 128, 4, 3, True),
        (16, 64, 128, 4, 5, True),
        (16, 64, 256, 4, 3, True),
        (16, 128, 64, 4, 5, True),
        (16, 128, 128, 4, 3, True),
        (16, 64, 128, 4, 4, False),
        (16, 64, 256, 4, 2, False),
        (16, 128, 128, 4, 3, False),
    ),
    4: (
        (16, 64, 128, 4, 5, True),
        (16, 128, 64, 4, 5, True),
        (16, 256, 64, 8, 4, True),
        (32, 128, 128, 4, 2, True),
        (16, 128, 128, 4, 3, False),
        (16, 128, 256, 4, 2, False),
        (32, 128, 128, 4, 2, False),
        (32, 256, 64, 8, 3, False),
    ),
    16: (
        (16, 128, 128, 4, 3, True),
        (32, 128, 64, 4, 5, True),
        (32, 128, 128, 4, 2, True),
        (32, 256, 64, 8, 4, True),
        (64, 128, 64, 4, 4, True),
        (32, 128, 128, 4, 2, False),
        (32, 256, 128, 8, 2, False),
        (64, 128, 64, 4, 4, False),
        (64, 256, 64, 8, 3, False),
    ),
    32: (
        (32, 128, 64, 4, 4, True),
        (64, 128, 64, 4, 3, True),
        (64, 256, 64, 8, 3, True),
        (64, 128, 64, 4, 4, False),
        (64, 128, 64, 8, 4, False),
        (64, 256, 64, 4, 3, False),
        (64, 256, 64, 8, 4, False),
        (128, 128, 64, 8, 3, False),
    ),
    64: (
        (64, 128, 64, 4, 4, False),
        (64, 256, 64, 4, 3, False),
        (64, 256, 64, 8, 4, False),
        (128, 128, 64, 4, 3, False),
        (128, 128, 64, 8, 4, False),
        (128, 256, 64, 8, 3, False),
        (128, 256, 64, 8, 4, False),
        (128, 256, 64, 8, 3, True),
    ),
    128: (
        (64, 256, 64, 4, 4, False),
        (128, 128, 64, 4, 4, False),
        (128, 128, 64, 8, 4, False),
        (128, 256, 32, 8, 4, False),
        (128, 256, 64, 8, 3, False),
        (128, 256, 64, 8, 4, False),
        (256, 128, 64, 8, 3, False),
        (256, 128, 64, 8, 4, False),
    ),
}
"""By rows per expert; columns are halved where two weights are read at once."""

GRAD_WEIGHT_SEEDS: tuple[_Numbers, ...] = (
    (64, 64, 32, 4, 2, False),
    (64, 128, 16, 4, 2, False),
    (64, 128, 32, 4, 2, False),
    (64, 128, 64, 4, 3, False),
    (64, 256, 16, 4, 2, False),
    (64, 256, 32, 4, 3, False),
    (128, 128, 16, 4, 2, False),
    (128, 128, 32, 8, 3, False),
    (128, 128, 64, 4, 3, False),
    (128, 128, 64, 8, 3, False),
    (128, 256, 16, 8, 2, False),
    (128, 256, 32, 8, 4, False),
    (128, 256, 64, 8, 3, False),
    (128, 256, 64, 8, 4, False),
    (256, 128, 64, 8, 3, False),
)


def candidates(problem: Problem) -> list[Tile]:
    """Return the tiles to try, each once: the rule's first, then what a table has today."""
    ruled = rule(problem)
    others = [*_seeds(problem), *_neighbours(ruled, problem)]
    fitting = [tile for tile in others if _fits(tile, problem)]
    return list(dict.fromkeys([ruled, tile_for(problem), *fitting]))[:MOST]


def _seeds(problem: Problem) -> Iterator[Tile]:
    if problem.dtype_bytes != 2:
        return
    divisor = 2 if problem.kind in TWO_WEIGHTS else 1
    seeds = GRAD_WEIGHT_SEEDS if problem.kind == "grad_weight" else SEEDS[problem.rows_per_expert]
    for rows, columns, inner, num_warps, num_stages, swap in seeds:
        yield Tile(
            rows=rows,
            columns=columns // divisor,
            inner=inner,
            num_warps=num_warps,
            num_stages=num_stages,
            swap=swap,
        )


def _neighbours(tile: Tile, problem: Problem) -> Iterator[Tile]:
    """Yield what differs from a tile in one size by a factor of two, or in one stage."""
    for name in ("rows", "columns", "inner", "num_warps"):
        size = getattr(tile, name)
        for other in (size // 2, size * 2):
            if (2 <= other <= 8) if name == "num_warps" else (16 <= other <= 256):
                yield replace(tile, **{name: other})
    for stages in (tile.num_stages - 1, tile.num_stages + 1):
        if 2 <= stages <= 6:
            yield replace(tile, num_stages=stages)
    if problem.kind != "grad_weight":
        yield replace(tile, swap=not tile.swap)


def _fits(tile: Tile, problem: Problem) -> bool:
    """Return whether a tile fits into registers and memory, as far as one knows beforehand."""
    weights = 2 if problem.kind in TWO_WEIGHTS else 1
    sums = tile.rows * tile.columns * weights // (32 * tile.num_warps)
    most = SUMS_PER_THREAD
    if problem.kind in LOADING_AT_THE_END or problem.dtype_bytes == 4:
        most //= 2
    if problem.arch.startswith("gfx"):
        # Wavefronts of 64, and as many registers again for sums alone.
        sums //= 2
    memory = memory_of(tile, problem.arch, problem.dtype_bytes, weights)
    return sums <= most and memory <= memory_limit(problem.arch) and _divides(tile, problem)


def _divides(tile: Tile, problem: Problem) -> bool:
    """Return whether a tile is no wider than what it cuts, so that none of it is always empty."""
    sizes: Iterable[tuple[int, int]] = [(tile.columns, problem.outer), (tile.inner, problem.inner)]
    if problem.kind == "grad_weight":
        sizes = [(tile.rows, problem.outer), (tile.columns, problem.inner)]
    return all(block < 2 * size for block, size in sizes)
