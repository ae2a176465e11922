"""What the benchmarks of operations share: the data, and the row that each of them writes.

On a GPU an operation is called on six sets of random data in turn, so that it does not find its
operands in the cache; what a row says is the time of one call.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.agreement import TOLERANCE, check_same
from benchmarks.floors import Work
from benchmarks.graphs import capture, time_peer
from benchmarks.shapes import LayerShape, operation_shape, operation_tokens
from moe_mt.moe import Experts
from moe_mt.ops import backend_for, expert_order

PROBLEMS_ON_GPU, PROBLEMS_ON_CPU = 6, 2
Call = Callable[[], object]
Peer = Callable[["Problem"], object]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One set of data, from which each operation takes what it needs."""

    x: Tensor
    """(T, d_model)."""

    logits: Tensor
    """(T, E) float32."""

    expert_ids: Tensor
    """(T, K) int32, uniform."""

    gates: Tensor
    """(T, K) float32."""

    order: Tensor
    rows: Tensor
    offsets: Tensor
    """As ``expert_order`` returns them."""

    expert_rows: Tensor
    """(N, d_model) in expert order."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "tokens" in metafunc.fixturenames:
        options = metafunc.config.option
        tokens = operation_tokens(torch.device(options.device), rehearsal=options.rehearse)
        metafunc.parametrize("tokens", tokens, ids=[f"T{count}" for count in tokens])


@pytest.fixture(scope="session")
def shape(device: torch.device, rehearsal: bool) -> LayerShape:
    return operation_shape(device, rehearsal=rehearsal)


@pytest.fixture(scope="session")
def experts(shape: LayerShape, device: torch.device, dtype: torch.dtype) -> Experts:
    torch.manual_seed(0)
    with torch.device("meta"):
        found = Experts(shape.num_experts, shape.d_model, shape.ffn_dim).to(dtype)
    found.to_empty(device=device).requires_grad_(requires_grad=False)
    for weight in found.parameters():
        weight.uniform_(-(shape.d_model**-0.5), shape.d_model**-0.5)
    return found


@pytest.fixture
def problems(
    tokens: int, shape: LayerShape, device: torch.device, dtype: torch.dtype
) -> list[Problem]:
    generator = torch.Generator(device).manual_seed(tokens)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    found = []
    for _ in range(PROBLEMS_ON_GPU if device.type == "cuda" else PROBLEMS_ON_CPU):
        logits = random(tokens, shape.num_experts)
        scores, chosen = logits.topk(shape.top_k)
        expert_ids = chosen.to(torch.int32)
        order, rows, offsets = expert_order(expert_ids, shape.num_experts)
        found.append(
            Problem(
                x=random(tokens, shape.d_model).to(dtype),
                logits=logits,
                expert_ids=expert_ids,
                gates=scores.softmax(-1),
                order=order,
                rows=rows,
                offsets=offsets,
                expert_rows=random(shape.top_k * tokens, shape.d_model).to(dtype),
            )
        )
    return found


@pytest.fixture
def time_beside(benchmark, sign, clock, ceilings, device):
    """Return a function that times calls and then their peers, and writes the row."""

    def write(
        model: str,
        calls: Sequence[Call],
        work: Work,
        peers: Mapping[str, Callable[[], Sequence[Call]]],
        **fields: object,
    ) -> None:
        captured = capture(calls, device)
        sign(model, **fields)
        extra = benchmark.extra_info
        extra["seconds"] = clock(captured)
        if captured.note:
            extra["note"] = captured.note
        extra["figures"] = {"bytes": work.bytes, "flops": work.flops}
        if ceilings is not None:
            extra["figures"] |= {
                "floor_s": ceilings.floor_s(work),
                "copy_bytes_per_s": ceilings.bytes_per_s,
                "product_flops_per_s": ceilings.flops_per_s,
            }
        benchmark.pedantic(captured.replay, rounds=1)
        extra["peers"] = {
            name: time_peer(prepare, device, clock) for name, prepare in peers.items()
        }

    return write


@pytest.fixture
def measure(time_beside, shape, tokens, problems, device, dtype):
    """Return a function that checks an operation, times it and its peers, and writes the row."""

    def write(
        call: Peer,
        definition: Peer,
        *,
        reads: Callable[[Problem], Sequence[Tensor]],
        peers: Mapping[str, Peer] | None = None,
        weight_numbers: Callable[[Problem], int] = lambda _: 0,
        flops: int = 0,
        **fields: object,
    ) -> None:
        expected = definition(problems[0])

        def prepare(run: Peer) -> list[Call]:
            # What an operation computes in float32, a peer may compute in the layer's dtype.
            tolerance = None if run is call else TOLERANCE[dtype]
            check_same(run(problems[0]), expected, tolerance, "its result and the definition's")
            return [partial(run, one) for one in problems]

        calls = prepare(call)
        moved = [
            size_of(reads(one)) + size_of(call(one)) + weight_numbers(one) * dtype.itemsize
            for one in problems
        ]
        rivals = dict(peers or {})
        if backend_for(device) != "eager PyTorch":
            rivals["definition"] = definition
        time_beside(
            shape.name,
            calls,
            Work(bytes=round(sum(moved) / len(moved)), flops=flops),
            {name: partial(prepare, run) for name, run in rivals.items()},
            **fields,
            T=tokens,
        )

    return write


def size_of(tensors: object) -> int:
    """Return the bytes of a tensor, or of all tensors of a sequence."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    assert isinstance(tensors, Sequence)
    return sum(map(size_of, tensors))
