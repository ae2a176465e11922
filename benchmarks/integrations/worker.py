"""One layer in one version of transformers: ``python -m benchmarks.integrations.worker``.

Arguments: the layer's name, device, dtype, threads. The layer is held once: for a call of this
package's it is patched and unpatched around the clock, which changes the class of the module and
no weight, once the first patch has stacked the weights where there is nothing stacked yet.

Requests come as lines of JSON and are answered in lines of JSON: first the version and the systems
there are; ``save`` writes the outputs of systems to a file; ``order`` times one call of each;
``memory`` asks for the extra memory of each.
"""

import importlib.metadata
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.graphs import PeerUnavailable
from benchmarks.integrations.layers import (
    LAYERS,
    OURS,
    build,
    draw_input,
    transformers_major,
)
from benchmarks.memory import extra_memory
from benchmarks.process import answering
from benchmarks.timing import synchronized
from moe_mt import patch, unpatch

INPUTS = 4
"""Rounds take them in turn, so that they hit different experts."""

MOST_GATHERED_CLAIMS = 64
"""Weights that ``batched_mm`` copies: at the width of a quarter 44 MB for every one of these."""

ROUND_SECONDS, MOST_REPEATS = 1e-2, 200
"""A call that is shorter than this is timed several times behind each other."""


class Systems:
    """A layer, and everything that can compute it."""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype) -> None:
        """Build the layer."""
        self.layer = LAYERS[name]
        self.device, self.dtype = device, dtype
        self._built = build(self.layer, device, dtype)
        self._model = nn.ModuleDict({"layer": self._built.block})
        self._repeats: dict[tuple[str, int], int] = {}
        start = perf_counter()
        patch(self._model, force=True)
        self.first_patch_s = perf_counter() - start
        unpatch(self._model)
        self.names = [*self.layer.implementations(transformers_major()), OURS]

    def outputs(self, systems: list[str], tokens: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the output (1, T, d_model) of systems, and why one has none."""
        x = self._input(tokens, 0)
        found: dict[str, Tensor] = {}
        notes: dict[str, str] = {}
        for system in systems:
            try:
                with self._computing(system, tokens):
                    found[system] = self._built.call(x)
                    start = synchronized()
                    self._built.call(x)
                    once = synchronized() - start
            except Exception as error:
                if system == OURS:
                    raise
                notes[system] = str(error).strip().partition("\n")[0] or type(error).__name__
                continue
            repeats = math.ceil(ROUND_SECONDS / once) if once else MOST_REPEATS
            self._repeats[system, tokens] = max(1, min(MOST_REPEATS, repeats))
        return found, notes

    def seconds(self, system: str, tokens: int, index: int) -> float:
        """Return the seconds of one call."""
        x = self._input(tokens, index)
        repeats = self._repeats[system, tokens]
        with self._computing(system, tokens):
            start = synchronized()
            for _ in range(repeats):
                self._built.call(x)
            return (synchronized() - start) / repeats

    def extra_bytes(self, system: str, tokens: int) -> int:
        """Return the most that one call holds beyond what was held before it."""
        x = self._input(tokens, 0)
        with self._computing(system, tokens):
            return extra_memory(lambda: self._built.call(x), self.device)

    def wake(self, tokens: int, index: int) -> None:
        """Compute a little: threads that have slept while others were measured take a moment.

        Few tokens reach other experts in every round: whoever came first would pay for all that
        their weights have not been read for long.
        """
        few = tokens <= MOST_GATHERED_CLAIMS // 2
        self._built.call(self._input(tokens, index) if few else self._input(2, 0))

    def _input(self, tokens: int, index: int) -> Tensor:
        return draw_input(self.layer, tokens, index % INPUTS, self.device, self.dtype)

    @contextmanager
    def _computing(self, system: str, tokens: int) -> Iterator[None]:
        claims = tokens * self.layer.top_k
        if system == "batched_mm" and claims > MOST_GATHERED_CLAIMS:
            most = MOST_GATHERED_CLAIMS // self.layer.top_k
            raise PeerUnavailable(f"it copies the weights of every claim; measured to T = {most}")
        if system == OURS:
            patch(self._model, force=True)
            try:
                yield
            finally:
                unpatch(self._model)
        else:
            self._built.choose(system)
            yield


@torch.inference_mode()
def respond(systems: Systems, request: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a request."""
    tokens = request["tokens"]
    if "save" in request:
        found, notes = systems.outputs(request["systems"], tokens)
        torch.save(found, request["save"])
        return {"notes": notes}
    if "order" in request:
        index = request["index"]
        systems.wake(tokens, index)
        return {name: systems.seconds(name, tokens, index) for name in request["order"]}
    return {name: systems.extra_bytes(name, tokens) for name in request["memory"]}


def main(arguments: list[str]) -> int:
    """Answer requests until there are no more."""
    name, device, dtype, threads = arguments
    answer = answering()
    torch.set_num_threads(int(threads))
    systems = Systems(name, torch.device(device), getattr(torch, dtype))
    answer(
        {
            "transformers": importlib.metadata.version("transformers"),
            "systems": systems.names,
            "first_patch_s": systems.first_patch_s,
        }
    )
    for line in sys.stdin:
        answer(respond(systems, json.loads(line)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
