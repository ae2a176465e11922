"""Layers of transformers 4.57 and 5 as they are, and after ``moe_mt.patch``.

Every version has a process of its own, in the environment that make builds for it; where the
running one alone has transformers, that version stands alone. The layer is held once in each, and
computes in turns: as transformers does, with each experts implementation that it has, and patched.
Patching is not timed: after the first time it changes the class of a module and no weight. All of
them see the same weights and, in a round, the same input.

``-k "mixtral and T4-"`` measures one of the layers at one number of tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import pytest
import torch

from benchmarks.integrations.layers import OURS, PeerLayer, layers
from benchmarks.integrations.turns import (
    MAJORS,
    Found,
    LayerProcess,
    beside,
    measure_in_turns,
    start_processes,
)
from benchmarks.shapes import CPU_TOKENS, TOY_TOKENS
from benchmarks.timing import spread


class Case(NamedTuple):
    """A layer at a number of tokens, patched in one version of transformers."""

    layer: PeerLayer
    tokens: int
    major: int

    def __str__(self) -> str:
        return f"{self.layer.name}-T{self.tokens}-transformers-{self.major}"


class Session:
    """Keeps the processes of one layer, and what was measured with them."""

    def __init__(self, device: torch.device, dtype: torch.dtype, *, rehearsal: bool) -> None:
        """Start nothing yet."""
        self.missing: dict[int, str] = {}
        self.processes: dict[int, LayerProcess] = {}
        self._device, self._dtype = device, dtype
        # A rehearsal is about no time.
        self._options = {"pause": 0, "rounds": lambda _: 1} if rehearsal else {}
        self._layer: PeerLayer | None = None
        self._known: dict[int, Found] = {}
        self._stack = ExitStack()

    def take(self, layer: PeerLayer) -> None:
        """End the processes of another layer and start those of this one."""
        if layer is self._layer:
            return
        self.stop()
        self._layer, self._known = layer, {}
        self.processes, self.missing = start_processes(
            layer, self._device, self._dtype, torch.get_num_threads(), self._stack
        )

    def measure(self, tokens: int) -> Found:
        """Return what all systems take, measured once."""
        assert self._layer is not None
        if tokens not in self._known:
            self._known[tokens] = measure_in_turns(
                self._layer, tokens, self.processes, self._device, self._dtype, **self._options
            )
        return self._known[tokens]

    def stop(self) -> None:
        """End all processes."""
        self._stack.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    rehearsal = option("--rehearse")
    cases = [
        Case(layer, tokens, major)
        for layer in layers(torch.device(option("--device")), rehearsal=rehearsal)
        for tokens in (TOY_TOKENS if rehearsal else CPU_TOKENS)
        for major in MAJORS
    ]
    metafunc.parametrize("case", cases, ids=str)


@pytest.fixture(scope="module")
def session(device: torch.device, dtype: torch.dtype, rehearsal: bool) -> Iterator[Session]:
    found = Session(device, dtype, rehearsal=rehearsal)
    yield found
    found.stop()


def test_patched_layer(benchmark, sign: Callable[..., None], session: Session, case: Case) -> None:
    session.take(case.layer)
    if case.major in session.missing:
        pytest.skip(session.missing[case.major])
    found = benchmark.pedantic(partial(session.measure, case.tokens), rounds=1)
    mine = found[case.major, OURS]
    versions = [f"transformers-{process.version}" for process in session.processes.values()]
    sign(case.layer.name, peer="+".join(versions), transformers=case.major, T=case.tokens)
    benchmark.extra_info["seconds"] = spread(mine.seconds)
    benchmark.extra_info["figures"] = {
        "extra_bytes": mine.extra_bytes,
        "first_patch_s": session.processes[case.major].first_patch_s,
    }
    benchmark.extra_info["peers"] = {
        f"transformers {major} {system}".strip(): beside(mine, theirs)
        for (major, system), theirs in found.items()
        if system != OURS
    } | {f"transformers {major}": {"note": why} for major, why in session.missing.items()}
