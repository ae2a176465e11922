"""One mixture-of-experts layer of the 54B as a CUDA graph, beside its floor and its peers.

Six layers with weights, tokens and routing of their own stand in each graph, and the time is
divided by their number: no layer finds its weights in the cache. Timed: router, experts,
combination with the residual. A peer that cannot be captured is timed as it is, with a note.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.agreement import TOLERANCE, check_close
from benchmarks.floors import Work, layer_backward, layer_forward
from benchmarks.graphs import Captured, capture, on_side_stream, time_peer
from benchmarks.memory import extra_memory
from benchmarks.moe.peers import PEERS, TRAINABLE, Layer
from benchmarks.moe.skew import ROUTINGS, router_weight, zipf_bias
from benchmarks.shapes import LayerShape, graph_shape, graph_tokens
from benchmarks.timing import spread
from moe_mt.moe import Experts, MoELayer, Top2Router

TOKEN_DROPOUT = 0.2
"""Expert-output masking of NLLB-MoE: in evaluation, outputs are multiplied by 0.8."""

LAYERS, TOY_LAYERS = 6, 2
ROOT = Path(__file__).parents[2]

FIRST_CALLS = (("forward", 1), ("forward", 1024), ("backward", 1024))


class Case(NamedTuple):
    """A layer and what it is called with."""

    layer: MoELayer
    x: Tensor
    residual: Tensor
    grad: Tensor


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    rehearsal = metafunc.config.getoption("--rehearse")
    if "routing" in metafunc.fixturenames:
        backward = metafunc.function is test_backward
        tokens = graph_tokens(rehearsal=rehearsal, backward=backward)
        metafunc.parametrize("tokens", tokens, ids=[f"T{count}" for count in tokens])
        metafunc.parametrize("routing", ROUTINGS)


@pytest.fixture(scope="module")
def shape(rehearsal: bool) -> LayerShape:
    return graph_shape(rehearsal=rehearsal)


@pytest.fixture(scope="module")
def experts(
    shape: LayerShape, device: torch.device, dtype: torch.dtype, rehearsal: bool
) -> list[Experts]:
    torch.manual_seed(0)
    found = []
    for _ in range(TOY_LAYERS if rehearsal else LAYERS):
        with torch.device("meta"):
            mine = Experts(shape.num_experts, shape.d_model, shape.ffn_dim)
        mine = mine.to(dtype).to_empty(device=device)
        for weight in mine.parameters():
            torch.nn.init.uniform_(weight, -(shape.d_model**-0.5), shape.d_model**-0.5)
        found.append(mine)
    return found


@pytest.fixture
def layers(experts: list[Experts], routing: str, shape: LayerShape, device) -> list[MoELayer]:
    generator = torch.Generator().manual_seed(1)
    found = []
    with torch.inference_mode(mode=False):
        for mine in experts:
            router = Top2Router(shape.d_model, shape.num_experts, bias=routing == "zipf")
            # In float32, as every model here keeps its routers.
            weight = router_weight(shape.num_experts, shape.d_model, generator)
            router.classifier.weight.data.copy_(weight)
            if routing == "zipf":
                router.classifier.bias.data.copy_(zipf_bias(shape.num_experts, generator))
            layer = MoELayer(router.to(device), mine, token_dropout=TOKEN_DROPOUT)
            found.append(layer.eval())
    return found


@pytest.fixture
def cases(tokens: int, shape: LayerShape, layers, device, dtype) -> list[Case]:
    generator = torch.Generator(device).manual_seed(tokens)

    def random() -> Tensor:
        size = tokens, shape.d_model
        return torch.randn(size, generator=generator, device=device).to(dtype)

    with torch.inference_mode(mode=False):
        return [Case(layer, random(), random(), random()) for layer in layers]


@pytest.fixture
def describe(benchmark, sign, clock, ceilings, shape, tokens, routing, cases, device, dtype):
    """Return what times calls and peers and writes the row."""

    def write(
        direction: str,
        calls: list[Callable[[], object]],
        work: Callable[[LayerShape, int, float, int], Work],
        prepare_peer: Callable[[Callable[[MoELayer], Layer]], list[Callable[[], object]]],
        **figures: float,
    ) -> None:
        hit = [case.layer.router(case.x).expert_ids.unique().numel() for case in cases]
        needed = work(shape, tokens, sum(hit) / len(hit), dtype.itemsize)
        captured = capture(calls, device)
        sign(shape.name, direction=direction, routing=routing, T=tokens)
        benchmark.extra_info["seconds"] = clock(captured)
        if captured.note:
            benchmark.extra_info["note"] = captured.note
        benchmark.extra_info["figures"] = {
            "bytes": needed.bytes,
            "flops": needed.flops,
            "floor_s": ceilings.floor_s(needed),
            "copy_bytes_per_s": ceilings.bytes_per_s,
            "product_flops_per_s": ceilings.flops_per_s,
            "distinct_experts": sum(hit) / len(hit),
            **figures,
        }
        benchmark.pedantic(captured.replay, rounds=1)
        benchmark.extra_info["peers"] = {
            name: time_peer(partial(prepare_peer, build), device, clock)
            for name, build in PEERS.items()
            if direction == "forward" or name in TRAINABLE
        }

    return write


def ours(layer: MoELayer) -> Layer:
    return lambda x, residual: layer(x, residual=residual)[0]


def test_forward(describe, clock, cases, device, dtype) -> None:
    first = cases[0]
    expected = PEERS["expert loop"](first.layer)(first.x, first.residual)

    def prepare(build: Callable[[MoELayer], Layer]) -> list[Callable[[], object]]:
        built = [build(case.layer) for case in cases]
        got = built[0](first.x, first.residual)
        check_close(got, expected, TOLERANCE[dtype], "this layer and its definition")
        return [partial(run, case.x, case.residual) for run, case in zip(built, cases, strict=True)]

    calls = prepare(ours)
    launched = clock(Captured(replay=lambda: [call() for call in calls], calls=len(calls)))
    describe(
        "forward",
        calls,
        layer_forward,
        prepare,
        extra_bytes=extra_memory(calls[0], device),
        launched_s=launched["median"],
    )


def test_backward(describe, cases, device, dtype) -> None:
    def prepare(build: Callable[[MoELayer], Layer]) -> list[Callable[[], tuple[Tensor, ...]]]:
        calls = [backward_of(build(case.layer), case, device) for case in cases]
        for got, right in zip(calls[0](), expected, strict=True):
            check_close(got, right, TOLERANCE[dtype], "a gradient of this layer and its own")
        return calls

    with torch.inference_mode(mode=False), torch.enable_grad():
        loop = PEERS["expert loop"](cases[0].layer)
        expected = backward_of(loop, cases[0], device)()
        describe("backward", prepare(ours), layer_backward, prepare)


def backward_of(run: Layer, case: Case, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """Run the forward pass once; return its backward pass, for every weight and the tokens."""
    x, residual = (tensor.detach().requires_grad_() for tensor in (case.x, case.residual))
    with on_side_stream(device):
        out = run(x, residual)
    inputs = [x, residual, *case.layer.parameters()]
    return lambda: torch.autograd.grad(out, inputs, case.grad, retain_graph=True)


@pytest.mark.parametrize(
    ("direction", "tokens"), FIRST_CALLS, ids=[f"{name}-T{count}" for name, count in FIRST_CALLS]
)
def test_first_call(
    benchmark, sign, shape, direction, tokens, device, dtype, rehearsal, tmp_path
) -> None:
    """In a process of its own with an empty cache of compiled kernels, then in one that finds it.

    Counted: from a layer that lies on the device to its first result. Left out: starting Python and
    the device, and making the weights.
    """
    tokens = 4 if rehearsal else tokens
    command = [
        *(sys.executable, "-m", "benchmarks.moe.first_call", direction, str(tokens)),
        *(str(device), str(dtype).removeprefix("torch.")),
        *(str(size) for size in (shape.num_experts, shape.d_model, shape.ffn_dim)),
    ]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "triton")}

    def run() -> float:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, encoding="utf-8"
        )
        return json.loads(done.stdout.splitlines()[-1])["seconds"]

    if device.type == "cuda":
        torch.cuda.empty_cache()  # the other process needs a layer's worth of it
    cold = benchmark.pedantic(run, rounds=1)
    sign(shape.name, direction=direction, T=tokens)
    benchmark.extra_info["seconds"] = spread([cold])
    benchmark.extra_info["figures"] = {"warm_s": run()}
