"""Which tile is fastest: compile all candidates, compare what they compute, time them."""

import math
import signal
import statistics
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from typing import Any, NamedTuple, cast

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.errors import TritonError

from moe_mt.kernels._candidates import candidates
from moe_mt.kernels._configurations import Problem, Tile, use_tiles
from moe_mt.kernels._launch import Accelerator, accelerator_of, record_launches
from moe_mt.kernels._products import Inputs, Layer, Product, products

__all__ = [
    "HOPPER",
    "Compilation",
    "Result",
    "Task",
    "accelerator_on",
    "compilations_of",
    "compile_ahead",
    "fastest",
    "target_of",
    "tasks",
]

HOPPER = Accelerator(arch="sm_90", multiprocessors=132)
"""For which tiles are listed where no GPU is."""

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest norm of the difference of two results' rows as a share of the norm of the row. The same
products are summed in another order, and what is summed is rounded once."""

FLUSHED_BYTES = 1 << 29
"""More than any GPU keeps in its caches: a layer's weights come from memory in real use."""

FEWEST_ROUNDS, MOST_ROUNDS = 5, 25
SECONDS = 0.03
"""What the rounds of one timing may take, where the fewest do."""

NOTICEABLE = 0.99
"""A tile must take less than this share of the rule's time; the rest is noise."""


class Task(NamedTuple):
    """A problem, where it occurs in a layer, and what is tried for it."""

    problem: Problem
    runs: list[tuple[Product, int]]
    """Products and their numbers of tokens."""

    tiles: list[Tile]
    """The rule's first."""


@dataclass(kw_only=True)
class Result:
    """What became of a task."""

    tile: Tile
    seconds: list[float]
    """Of the tile, for each run."""

    speedup: float
    """How many times as fast as the rule, in the geometric mean."""

    failures: dict[Tile, str] = field(default_factory=dict[Tile, str])
    """What was wrong with the tiles that were left out."""


def accelerator_on(device: torch.device) -> Accelerator:
    """Return what is known of a GPU."""
    return accelerator_of(torch.empty(0, device=device))


def tasks(
    layer: Layer,
    tokens: Iterable[int],
    accelerator: Accelerator,
    *,
    forward: bool,
    backward: bool,
) -> list[Task]:
    """Return every problem of a layer once: numbers of tokens may share one, and products."""
    found: dict[Problem, Task] = {}
    with record_launches(accelerator):
        for product in products(gated=layer.gated):
            for number in tokens if (backward if product.backward else forward) else ():
                problem = product.problem(Inputs(layer=layer, tokens=number))
                task = found.setdefault(problem, Task(problem, [], candidates(problem)))
                task.runs.append((product, number))
    return list(found.values())


def fastest(
    task: Task,
    inputs: dict[int, Inputs],
    failures: dict[Tile, str],
    on_tile: Callable[[], None],
) -> Result:
    """Time the tiles of a task and return the fastest of those that compute what the rule does.

    Args:
        task: From ``tasks``.
        inputs: By number of tokens, on the GPU.
        failures: Tiles to leave out, and why.
        on_tile: Called after each tile of each run.
    """
    ruled = task.tiles[0]
    failures = {tile: why for tile, why in failures.items() if tile in task.tiles}
    if ruled in failures:
        raise RuntimeError(f"the rule's own tile fails for {task.problem}: {failures[ruled]}")
    seconds: dict[Tile, list[float]] = {tile: [] for tile in task.tiles}
    for product, tokens in task.runs:
        expected = results_of(product, inputs[tokens], ruled)
        for tile in task.tiles:
            if tile not in failures:
                found = _checked(product, inputs[tokens], tile, expected)
                if isinstance(found, str):
                    failures[tile] = found
                else:
                    seconds[tile].append(found)
            on_tile()
        del expected
    best = min(
        (tile for tile in task.tiles if tile not in failures),
        key=lambda tile: _share(seconds[tile], seconds[ruled]),
    )
    if best != ruled:
        # The fastest of many measurements is also the luckiest, so both race again.
        again = [_raced(product, inputs[tokens], best, ruled) for product, tokens in task.runs]
        mine, theirs = [pair[0] for pair in again], [pair[1] for pair in again]
        share = _share(mine, theirs)
        if share < NOTICEABLE:
            return Result(tile=best, seconds=mine, speedup=1 / share, failures=failures)
    return Result(tile=ruled, seconds=seconds[ruled], speedup=1.0, failures=failures)


def _share(mine: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the geometric mean of ``mine / theirs``."""
    shares = [math.log(a / b) for a, b in zip(mine, theirs, strict=True)]
    return math.exp(sum(shares) / len(shares))


def _raced(product: Product, inputs: Inputs, *tiles: Tile) -> list[float]:
    rounds = [[seconds_of(product, inputs, tile) for tile in tiles] for _ in range(3)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def _checked(
    product: Product, inputs: Inputs, tile: Tile, expected: Sequence[Tensor]
) -> float | str:
    """Return a tile's time, or why it has none: no number from a kernel that computes wrong."""
    try:
        wrong = difference(results_of(product, inputs, tile), expected)
        return wrong or seconds_of(product, inputs, tile)
    except TritonError as error:
        return _first_line(error)


def results_of(product: Product, inputs: Inputs, tile: Tile) -> list[Tensor]:
    """Return a product's results with a tile, such that those of other tiles can be compared.

    Memory that nobody writes is NaN, not what the tile before left there.
    """
    problem = product.problem(inputs)
    with _fresh_memory_is_nan(), use_tiles({problem: tile}):
        results = [result for result in product.launch(inputs) if result is not None]
    if product.kind.startswith("hidden_grad"):
        # Of the last there is one column for each block of columns; the sum is what counts.
        results[-1] = results[-1].sum(1)[None]
    return results


@contextmanager
def _fresh_memory_is_nan() -> Generator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warned)


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    """Return in words where results differ by more than rounding; ``""`` if they do not."""
    for mine, theirs in zip(found, expected, strict=True):
        largest = torch.zeros((), device=mine.device)
        rows = mine.flatten(0, -2), theirs.flatten(0, -2)
        # In pieces: in float32 a weight's gradient would be twice as large again.
        for a, b in zip(*(tensor.split(1 << 14) for tensor in rows), strict=True):
            a, b = a.float(), b.float()
            shares = (a - b).norm(dim=1) / b.norm(dim=1).clamp(min=1e-30)
            largest = torch.maximum(largest, shares.nan_to_num(nan=torch.inf).max())
        if largest.item() > TOLERANCE[mine.dtype]:
            return f"computes wrong: a row differs from the rule's by {largest:.1e} of its norm"
    return ""


def seconds_of(product: Product, inputs: Inputs, tile: Tile) -> float:
    """Return the median time of a product on the GPU, its inputs not in the caches.

    Timed is the replay of a graph: what the host needs to launch is no matter of tiles.
    """
    device = inputs.layer.device
    with torch.cuda.device(device):
        flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)
        graph = torch.cuda.CUDAGraph()
        with use_tiles({product.problem(inputs): tile}):
            product.launch(inputs)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                product.launch(inputs)
        first = _replay(graph, flushed)
        rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(SECONDS / first)))
        return statistics.median(_replay(graph, flushed) for _ in range(rounds))


def _replay(graph: torch.cuda.CUDAGraph, flushed: Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flushed.zero_()
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


class Compilation(NamedTuple):
    """A tile for a product, to be compiled before it is run."""

    layer: Layer
    """On the meta device."""

    tokens: int
    product: Product
    tile: Tile


def compilations_of(layer: Layer, wanted: Iterable[Task]) -> list[Compilation]:
    """Return what the tasks of a layer need, each once: no binary depends on the tokens."""
    shapes = replace(layer, device=torch.device("meta"))
    found = {
        (product, tile): Compilation(shapes, tokens, product, tile)
        for task in wanted
        for product, tokens in task.runs
        for tile in task.tiles
    }
    return list(found.values())


def target_of(device: torch.device) -> GPUTarget:
    """Return what kernels for a GPU are compiled for, in Triton's words."""
    with torch.cuda.device(device):
        return cast(Any, triton.runtime.driver.active).get_current_target()


def compile_ahead(
    compilations: Sequence[Compilation], target: GPUTarget, accelerator: Accelerator, jobs: int
) -> Generator[tuple[Compilation, str]]:
    """Compile into Triton's cache, ``jobs`` at a time; yield each with what is wrong with it.

    In processes of their own, which need no GPU: most of what tuning takes is compiling, and a
    compiler that crashes takes its process with it. Who crashed it is then found one by one.
    """
    if not compilations:
        return
    left = dict(enumerate(compilations))
    with ProcessPoolExecutor(
        min(jobs, len(left)),
        mp_context=get_context("spawn"),
        # An interrupt is the parent's to handle.
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    ) as pool:
        futures = {pool.submit(_compile, one, target, accelerator): n for n, one in left.items()}
        try:
            for future in as_completed(futures):
                failure = future.result()
                yield left.pop(futures[future]), failure
        except BrokenProcessPool:
            pass
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for one in left.values():
        if len(compilations) == 1:
            yield one, "crashes the compiler"
        else:
            yield from compile_ahead([one], target, accelerator, 1)


class _Compiler:
    """What Triton asks of a driver while it compiles: a GPU that need not be here."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        del device
        return 0


def _compile(compilation: Compilation, target: GPUTarget, accelerator: Accelerator) -> str:
    """Compile one tile; return what went wrong, or ``""``."""
    triton.runtime.driver.set_active(cast(Any, _Compiler(target)))
    product = compilation.product
    inputs = Inputs(layer=compilation.layer, tokens=compilation.tokens)
    with record_launches(accelerator) as launches:
        problem, _ = product.problem(inputs), inputs.routing
        launches.clear()
        with use_tiles({problem: compilation.tile}):
            product.launch(inputs)
    try:
        for one in launches:
            options = {"num_warps": one.num_warps, "num_stages": one.num_stages}
            kernel: Any = one.kernel
            kernel.warmup(**one.arguments, **options, enable_fp_fusion=True, grid=(1,))
    except Exception as error:
        # Whatever the compiler raises: one tile more that cannot be had.
        return _first_line(error)
    return ""


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
