"""``moe-mt tune``: find the fastest tiles for a layer on the GPU at hand."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from moe_mt.checkpoints import fetch_small_files, read_config
from moe_mt.cli.progress import progress_hidden
from moe_mt.errors import BackendUnavailableError, ConfigError, InputError
from moe_mt.ops import ExpertShape, TunedProblem, tune, tuning_problems

__all__ = ["add_parser"]

LOGGER = logging.getLogger(__name__)
DTYPES = ("bfloat16", "float16", "float32")
TOKENS = (32, 128, 512, 1024, 2048, 4096, 16384)

SHAPE: dict[str, tuple[int, str]] = {
    "d_model": (2048, "width of a token"),
    "ffn_dim": (8192, "inner width of an expert"),
    "experts": (128, "experts of the layer"),
    "top_k": (2, "experts of a token"),
}


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:  # noqa: ANN401
    """Add the command to the parser's sub-commands."""
    parser = commands.add_parser(
        "tune",
        parents=[common],
        help="find the fastest tiles for a layer on the GPU at hand",
        description="Time tiles of the products of a layer of experts, by default of that of "
        "NLLB-MoE 54B, and keep the fastest where kernels look them up.",
    )
    parser.set_defaults(run=run)
    layer = parser.add_argument_group("layer")
    layer.add_argument("-m", "--model", help="the layers of a model: hub id, local folder or tiny")
    for name, (default, text) in SHAPE.items():
        flag = f"--{name.replace('_', '-')}"
        layer.add_argument(flag, type=int, help=f"{text} (default: {default})")
    layer.add_argument("--gated", action="store_true", help="experts have a gate, as in SwiGLU")
    layer.add_argument(
        "--dtype", choices=DTYPES, default=DTYPES[0], help="of the weights (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=TOKENS,
        metavar="T",
        help=f"tokens in a call (default: {' '.join(map(str, TOKENS))})",
    )
    one_pass = parser.add_mutually_exclusive_group()
    one_pass.add_argument("--forward-only", action="store_true", help="what inference needs")
    one_pass.add_argument("--backward-only", action="store_true", help="what only training needs")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 … (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, help="table to write, instead of the user's")
    parser.add_argument(
        "--jobs", type=int, help="processes that compile (default: one a core, 16 at most)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list what would be tried; needs no GPU"
    )


def run(options: argparse.Namespace) -> int:
    """Tune and return the exit code."""
    device = _gpu(options.device)
    parts = {"forward": not options.backward_only, "backward": not options.forward_only}
    shapes = _shapes(options)
    if options.dry_run:
        if device is None:
            LOGGER.warning("no GPU is here: listed is what would be tried on an H200")
        for shape in shapes:
            for problem in tuning_problems(shape, options.tokens, device=device, **parts):
                _print(f"{problem.name} (at {_joined(problem.tokens)} tokens)")
                for tile in problem.tiles:
                    _print(f"    {tile}")
        return 0
    if device is None:
        raise BackendUnavailableError(
            f"tiles are timed on a GPU, and torch finds no {options.device} here; --dry-run lists "
            "what would be tried"
        )
    jobs = _jobs(options.jobs)
    for shape in shapes:
        with _progress(options) as on_progress:
            for problem in tune(
                shape,
                options.tokens,
                device=device,
                table=options.output,
                jobs=jobs,
                on_progress=on_progress,
                **parts,
            ):
                _print(_line(problem))
                for failure in problem.failures:
                    LOGGER.warning("left out: %s", failure)
    return 0


def _gpu(name: str) -> torch.device | None:
    """Return the GPU that is asked for; ``None`` if it is not here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is unknown; choose 'cuda', or 'cuda:1' …") from error
    if device.type != "cuda":
        raise ConfigError(f"device {name!r} is no GPU; choose 'cuda', or 'cuda:1' …")
    index = device.index or 0
    return torch.device("cuda", index) if index < torch.cuda.device_count() else None


def _shapes(options: argparse.Namespace) -> list[ExpertShape]:
    dtype = getattr(torch, options.dtype)
    given = {name: getattr(options, name) for name in SHAPE}
    if options.model is None:
        sizes = {name: SHAPE[name][0] if size is None else size for name, size in given.items()}
        sizes["num_experts"] = sizes.pop("experts")
        return [ExpertShape(**sizes, gated=options.gated, dtype=dtype)]
    if options.gated or any(size is not None for size in given.values()):
        raise InputError("--model says what the layers are; leave out the sizes, or --model")
    _, config = read_config(fetch_small_files(options.model))
    if config.moe is None:
        raise ConfigError(f"{options.model} has no layer of experts, so there is nothing to tune")
    experts = config.moe.num_experts
    return [
        ExpertShape(d_model=config.d_model, ffn_dim=ffn_dim, num_experts=experts, dtype=dtype)
        for ffn_dim in sorted({config.encoder_ffn_dim, config.decoder_ffn_dim})
    ]


def _jobs(asked: int | None) -> int:
    jobs = min(os.cpu_count() or 1, 16) if asked is None else asked
    if jobs < 1:
        raise InputError(f"--jobs is {jobs}; it must be at least 1")
    return jobs


@contextmanager
def _progress(options: argparse.Namespace) -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar of tiles and yield the callback that moves it, ``(stage, done, total)``."""
    with tqdm(unit="tile", disable=progress_hidden(options), leave=False) as bar:

        def on_progress(stage: str, done: int, total: int) -> None:
            if done == 0:
                bar.set_description(stage)
                bar.reset(total)
            bar.update(done - bar.n)

        yield on_progress


def _line(problem: TunedProblem) -> str:
    times = ", ".join(
        f"{1e6 * seconds:.1f} us at {tokens} tokens"
        for seconds, tokens in zip(problem.seconds, problem.tokens, strict=True)
    )
    return (
        f"{problem.name}: {problem.tile}: {times}, {problem.speedup:.2f} times as fast as the rule"
    )


def _joined(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


def _print(line: str) -> None:
    """Write a line to standard output, above whatever bar stands there, at once."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()
