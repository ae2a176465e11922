"""Tuning: which tiles the grouped products take on the GPU at hand, and the tables that say so.

Nothing is tuned unasked. ``tune`` times tiles and writes a table, which kernels read before the one
in the package; where neither knows a shape, a rule decides.
"""

# pyright: reportPrivateUsage=false
# What kernels share has names with underscores, and this is its door.

import importlib.metadata
import importlib.util
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moe_mt.errors import BackendUnavailableError, ConfigError
from moe_mt.ops.backend import KERNEL_DTYPES

if TYPE_CHECKING:
    # Named apart from what functions import when they run.
    from moe_mt.kernels import _configurations as configurations
    from moe_mt.kernels import _products as made
    from moe_mt.kernels import _tuning as tuning

__all__ = ["ExpertShape", "TunedProblem", "TuningProblem", "tile_tables", "tune", "tuning_problems"]

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """A layer of experts whose products are tuned."""

    d_model: int
    ffn_dim: int
    num_experts: int
    top_k: int = 2
    gated: bool = False
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("d_model", "ffn_dim", "num_experts", "top_k"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.top_k > self.num_experts:
            raise ConfigError(f"top_k is {self.top_k}; there are only {self.num_experts} experts")
        if self.dtype not in KERNEL_DTYPES:
            raise ConfigError(
                f"dtype is {self.dtype}; kernels compute float32, float16 and bfloat16"
            )


@dataclass(frozen=True, kw_only=True)
class TuningProblem:
    """A problem that would be tuned."""

    name: str
    tokens: tuple[int, ...]
    """The numbers of tokens at which it would be timed."""

    tiles: tuple[str, ...]
    """What would be tried, the rule's tile first."""


@dataclass(frozen=True, kw_only=True)
class TunedProblem:
    """A problem that was tuned."""

    name: str
    tile: str
    """The fastest."""

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    """Of one product at each of ``tokens``."""

    speedup: float
    """How many times as fast as with the rule's tile, in the geometric mean."""

    failures: tuple[str, ...]
    """Tiles that do not compile, take too much, or compute wrong."""


def tuning_problems(
    shape: ExpertShape,
    tokens: Sequence[int],
    *,
    device: torch.device | None,
    forward: bool = True,
    backward: bool = True,
) -> list[TuningProblem]:
    """Return what ``tune`` would do.

    Args:
        shape: Of the layer.
        tokens: Numbers of tokens in a call of the layer.
        device: A GPU; ``None`` for what would be done on an H200.
        forward: Whether to list the products of the forward pass.
        backward: Whether to list those that only training needs.

    Raises:
        BackendUnavailableError: If Triton is not installed.
        ConfigError: If a number of tokens is not positive, or a table cannot be read.
    """
    return [
        TuningProblem(
            name=str(task.problem),
            tokens=tuple(number for _, number in task.runs),
            tiles=tuple(map(str, task.tiles)),
        )
        for task in _tasks(shape, tokens, device, forward=forward, backward=backward)
    ]


def tune(
    shape: ExpertShape,
    tokens: Sequence[int],
    *,
    device: torch.device,
    forward: bool = True,
    backward: bool = True,
    table: Path | None = None,
    jobs: int = 8,
    on_progress: OnProgress | None = None,
) -> Generator[TunedProblem]:
    """Find the fastest tile for every problem of a layer, and write it into a table at once.

    Every tile's results are compared with those of the rule's before it is timed. What the table
    holds of other problems stays there.

    Args:
        shape: Of the layer.
        tokens: Numbers of tokens in a call of the layer.
        device: The GPU.
        forward: Whether to tune the products of the forward pass.
        backward: Whether to tune those that only training needs.
        table: File to write; where ``None``, the one that kernels read.
        jobs: Processes that compile beside each other.
        on_progress: Called with what is being done, how much of it is done, and of how much.

    Yields:
        Each problem when it is in the table.

    Raises:
        BackendUnavailableError: If there is no GPU, or no Triton.
        ConfigError: If a number of tokens is not positive, or a table cannot be read.
    """
    if device.type != "cuda":
        raise BackendUnavailableError(
            f"tiles are timed on a GPU, not on {device}; run this where torch finds one"
        )
    tasks = _tasks(shape, tokens, device, forward=forward, backward=backward)
    from moe_mt.kernels import _configurations, _products

    path = table or _configurations.user_table()
    choices = _configurations.read_table(path)
    report = on_progress or _say_nothing
    failures = _compile(_layer(shape), tasks, device, jobs, report)
    layer = _layer(shape, device)
    inputs = {number: _products.Inputs(layer=layer, tokens=number) for number in tokens}
    for task, result in _time(tasks, inputs, failures, report):
        choices[task.problem] = _choice(task, result, device)
        _configurations.write_table(path, choices)
        yield TunedProblem(
            name=str(task.problem),
            tile=str(result.tile),
            tokens=tuple(number for _, number in task.runs),
            seconds=tuple(result.seconds),
            speedup=result.speedup,
            failures=tuple(f"{tile}: {why}" for tile, why in result.failures.items()),
        )


def tile_tables() -> dict[Path, int]:
    """Return the tables of tiles that kernels read and how many problems each holds.

    The first to be asked comes first; a table that is not there holds none.

    Raises:
        BackendUnavailableError: If Triton is not installed.
        ConfigError: If a table cannot be read.
    """
    _require_triton()
    from moe_mt.kernels import _configurations

    paths = (_configurations.user_table(), _configurations.SHIPPED_TABLE)
    return {path: len(_configurations.read_table(path)) for path in paths}


def _say_nothing(stage: str, done: int, total: int) -> None:
    del stage, done, total


def _tasks(
    shape: ExpertShape,
    tokens: Sequence[int],
    device: torch.device | None,
    *,
    forward: bool,
    backward: bool,
) -> "list[tuning.Task]":
    _require_triton()
    from moe_mt.kernels import _tuning

    if not tokens or min(tokens) < 1:
        raise ConfigError(f"tokens are {list(tokens)}; name numbers of tokens, each at least 1")
    accelerator = _tuning.HOPPER if device is None else _tuning.accelerator_on(device)
    distinct = sorted(set(tokens))
    return _tuning.tasks(_layer(shape), distinct, accelerator, forward=forward, backward=backward)


def _require_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise BackendUnavailableError(
            "tiles are those of Triton kernels, and the package triton is not installed"
        )


def _layer(shape: ExpertShape, device: torch.device | None = None) -> "made.Layer":
    from moe_mt.kernels import _products

    return _products.Layer(**asdict(shape), device=device or torch.device("meta"))


def _compile(
    layer: "made.Layer",
    tasks: "list[tuning.Task]",
    device: torch.device,
    jobs: int,
    report: OnProgress,
) -> "dict[tuple[made.Product, configurations.Tile], str]":
    """Compile all tiles; return what failed, and why."""
    from moe_mt.kernels import _tuning

    wanted = _tuning.compilations_of(layer, tasks)
    target, accelerator = _tuning.target_of(device), _tuning.accelerator_on(device)
    failures: dict[tuple[made.Product, configurations.Tile], str] = {}
    report("compiling", 0, len(wanted))
    compiled = _tuning.compile_ahead(wanted, target, accelerator, jobs)
    for done, (one, failure) in enumerate(compiled, start=1):
        if failure:
            failures[one.product, one.tile] = failure
        report("compiling", done, len(wanted))
    return failures


def _time(
    tasks: "list[tuning.Task]",
    inputs: "dict[int, made.Inputs]",
    failures: "dict[tuple[made.Product, configurations.Tile], str]",
    report: OnProgress,
) -> "Iterator[tuple[tuning.Task, tuning.Result]]":
    from moe_mt.kernels import _tuning

    done, total = 0, sum(len(task.tiles) * len(task.runs) for task in tasks)

    def on_tile() -> None:
        nonlocal done
        done += 1
        report("timing", done, total)

    report("timing", 0, total)
    for task in tasks:
        ran = [product for product, _ in task.runs]
        known = {tile: why for (product, tile), why in failures.items() if product in ran}
        yield task, _tuning.fastest(task, inputs, known, on_tile)


def _choice(
    task: "tuning.Task", result: "tuning.Result", device: torch.device
) -> "configurations.Choice":
    """Return what the table is told: the tile, and where and how fast it was."""
    from moe_mt.kernels import _configurations

    times = ", ".join(
        f"{1e6 * seconds:.1f} us at {tokens} tokens"
        for seconds, (_, tokens) in zip(result.seconds, task.runs, strict=True)
    )
    where = (
        f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, "
        f"triton {importlib.metadata.version('triton')}"
    )
    compared = f"{result.speedup:.2f} times as fast as the rule's tile"
    return _configurations.Choice(tile=result.tile, why=f"measured: {times}, {compared}; {where}")
