"""One mixture-of-experts layer, alone and beside the one of transformers 4.57.

Both run on the same weights in the same storage, so that the layer is held once. The input is
random and differs from round to round, so that rounds hit different experts. Excluded: building
the layer, and the residual connection and normalisation around it.
"""

from itertools import cycle

import pytest
import torch
from torch import Tensor

from benchmarks.agreement import TOLERANCE, check_close
from benchmarks.graphs import PeerUnavailable
from benchmarks.memory import extra_memory
from benchmarks.moe.peers import transformers_layer
from benchmarks.shapes import LayerShape, layer_shape, layer_tokens
from benchmarks.timing import Rival, affordable_rounds, spread
from moe_mt.moe import Experts, MoELayer, Top2Router

TOKEN_DROPOUT = 0.2
"""Expert-output masking of NLLB-MoE: in evaluation, outputs are multiplied by 0.8."""

SECONDS_ALONE, SECONDS_BESIDE = 8, 16
"""What the rounds of one row may take together, so that all rows stay under four minutes."""

INPUTS = 4
CHECKED_TOKENS = 4


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    tokens = layer_tokens(torch.device(metafunc.config.getoption("--device")))
    metafunc.parametrize("tokens", tokens, ids=[f"T{count}" for count in tokens])


@pytest.fixture(scope="module")
def shape(device: torch.device) -> LayerShape:
    return layer_shape(device)


@pytest.fixture(scope="module")
def layer(shape: LayerShape, device: torch.device, dtype: torch.dtype) -> MoELayer:
    torch.manual_seed(0)
    # Drawn once, and not at birth too.
    with torch.device("meta"):
        experts = Experts(shape.num_experts, shape.d_model, shape.ffn_dim).to(dtype)
    experts.to_empty(device=device)
    with device:
        router = Top2Router(shape.d_model, shape.num_experts)
    layer = MoELayer(router, experts, token_dropout=TOKEN_DROPOUT).eval().to(dtype)
    layer.requires_grad_(requires_grad=False)
    for weight in experts.parameters():
        weight.uniform_(-(shape.d_model**-0.5), shape.d_model**-0.5)
    return layer


@pytest.fixture
def inputs(
    tokens: int, shape: LayerShape, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(1, tokens, shape.d_model, generator=generator).to(device, dtype)
        for _ in range(INPUTS)
    ]


def test_layer(benchmark, sign, layer, shape, tokens, inputs, device, dtype) -> None:
    check_definition(layer, inputs[0], TOLERANCE[dtype])
    sign(shape.name, T=tokens)
    benchmark.extra_info["figures"] = figures(layer, shape, inputs, device)
    turns = cycle(inputs)
    benchmark.pedantic(
        layer,
        setup=lambda: ((next(turns),), {}),
        rounds=affordable_rounds(lambda: layer(inputs[0]), SECONDS_ALONE),
        warmup_rounds=1,
    )


def test_layer_beside_transformers(
    benchmark, sign, layer, shape, tokens, inputs, device, dtype
) -> None:
    try:
        peer = transformers_layer(layer)
    except PeerUnavailable as reason:
        pytest.skip(str(reason))
    for x in inputs:
        check_close(layer(x)[0], peer.layer(x), TOLERANCE[dtype], f"this layer and {peer.name}")
    sign(shape.name, peer=peer.name, T=tokens)
    benchmark.extra_info["figures"] = figures(layer, shape, inputs, device)
    peer_memory = extra_memory(lambda: peer.layer(inputs[0]), device)
    rival = Rival(peer.layer, inputs)
    count = affordable_rounds(lambda: (layer(inputs[0]), peer.layer(inputs[0])), SECONDS_BESIDE)
    benchmark.pedantic(
        layer,
        setup=rival.prepare,
        teardown=rival.follow,
        rounds=count,
        warmup_rounds=1,
    )
    if benchmark.enabled:
        ours, theirs = benchmark.stats.stats.data, rival.seconds[1:]  # without the warm-up
        ratios = [peer_s / our_s for our_s, peer_s in zip(ours, theirs, strict=True)]
        benchmark.extra_info["peer"] = {
            "name": peer.name,
            "seconds": spread(theirs),
            "extra_bytes": peer_memory,
        }
        benchmark.extra_info["speedup"] = spread(ratios)


def figures(
    layer: MoELayer, shape: LayerShape, inputs: list[Tensor], device: torch.device
) -> dict[str, int]:
    """Return extra memory, and the bytes and operations that a roofline is drawn from."""
    claims = [layer(x)[1].expert_ids for x in inputs]
    hit = sum(ids.unique().numel() for ids in claims) / len(claims)
    bytes_per_expert = shape.expert_weights * layer.experts.up_proj.element_size()
    return {
        "extra_bytes": extra_memory(lambda: layer(inputs[0]), device),
        "weight_bytes_read": round(hit * bytes_per_expert),
        "flops": 2 * claims[0].numel() * shape.expert_weights,
    }


def check_definition(layer: MoELayer, x: Tensor, tolerance: float) -> None:
    """Compare the first tokens with the layer's definition, written out token by token."""
    experts, router = layer.experts, layer.router.classifier.weight
    expected: list[Tensor] = []
    for token in x[0, :CHECKED_TOKENS]:
        probs, chosen = (router.float() @ token.float()).softmax(0).topk(2)
        mixture = torch.zeros_like(token, dtype=torch.float64)
        for gate, expert in zip(probs / probs.sum(), chosen, strict=True):
            up, down = experts.up_proj[expert].double(), experts.down_proj[expert].double()
            hidden = (up @ token.double() + experts.up_bias[expert].double()).relu()
            mixture += gate * (down @ hidden + experts.down_bias[expert].double())
        expected.append((1 - TOKEN_DROPOUT) * mixture)
    got = layer(x)[0][0, :CHECKED_TOKENS]
    check_close(got, torch.stack(expected), tolerance, "this layer and its definition")
