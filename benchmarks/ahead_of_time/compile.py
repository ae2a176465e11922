"""Compile without a GPU, several at a time."""

import importlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import triton

from benchmarks.ahead_of_time.binary import Figures, inspect_binary
from benchmarks.ahead_of_time.specialise import Compilation
from benchmarks.ahead_of_time.targets import TARGETS

__all__ = ["Failure", "compile_all", "compile_one"]


@dataclass(frozen=True)
class Failure:
    """Why nothing came out of a compilation."""

    reason: str


def compile_one(compilation: Compilation) -> Figures | Failure:
    """Compile here and read the binary."""
    try:
        compiled = triton.compile(
            compilation.source, target=compilation.target.gpu, options=compilation.options
        )
    except Exception as error:
        return Failure(f"{type(error).__name__}: {error}".strip())
    return inspect_binary(compiled, compilation)


def compile_all(
    compilations: Iterable[Compilation], jobs: int
) -> Iterator[tuple[Compilation, Figures | Failure]]:
    """Compile in ``jobs`` processes; yield each with its result, in no order.

    A process of their own is also what a crash of the compiler needs, which ends the process: what
    was under way is then compiled again, one after the other, to find who crashed it.
    """
    waiting = list(compilations)
    if jobs == 1:
        for compilation in waiting:
            yield compilation, compile_one(compilation)
    elif waiting:
        yield from _in_processes(waiting, min(jobs, len(waiting)))


def _in_processes(
    waiting: list[Compilation], jobs: int
) -> Iterator[tuple[Compilation, Figures | Failure]]:
    left = dict(enumerate(waiting))
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(_compile_packed, _pack(one)): number for number, one in left.items()}
        try:
            for future in as_completed(futures):
                result = future.result()
                yield left.pop(futures[future]), result
            return
        except BrokenProcessPool:
            pass
    for compilation in left.values():
        if len(waiting) > 1:
            yield from _in_processes([compilation], 1)
        else:
            yield compilation, Failure("the compiler crashed and took its process with it")


def _pack(compilation: Compilation) -> dict[str, Any]:
    """Return a compilation as what goes to another process: the kernel and the target by name."""
    function = compilation.kernel.fn
    return {
        **vars(compilation),
        "kernel": (function.__module__, function.__qualname__),
        "target": compilation.target.name,
    }


def _compile_packed(packed: dict[str, Any]) -> Figures | Failure:
    module, name = packed["kernel"]
    kernel = getattr(importlib.import_module(module), name)
    target = TARGETS[packed["target"]]
    return compile_one(Compilation(**{**packed, "kernel": kernel, "target": target}))
