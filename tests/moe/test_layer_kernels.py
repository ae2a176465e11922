"""The layer on its kernels: what PyTorch may do with it, and the same results as eager."""

from copy import deepcopy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from moe_mt.errors import BackendUnavailableError, ConfigError
from moe_mt.moe import Experts, MoELayer, Top2Router
from moe_mt.ops import backend_for, use_backend
from tests.closeness import assert_near

pytestmark = pytest.mark.triton

D_MODEL, FFN_DIM, EXPERTS = 16, 24, 4


def make_layer(device, *, dtype=torch.float32, gated=False, **router_options):
    torch.manual_seed(1)
    experts = Experts(
        EXPERTS, D_MODEL, FFN_DIM, activation="silu" if gated else "relu", gated=gated
    )
    layer = MoELayer(Top2Router(D_MODEL, EXPERTS, **router_options), experts, token_dropout=0.2)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer.to(device, dtype).eval()


def tokens(count, device, dtype=torch.float32):
    return torch.randn(count, D_MODEL, generator=torch.Generator().manual_seed(2)).to(device, dtype)


# Options of the router and number of tokens; every one has its reason.
CASES = {
    "few tokens": ({}, 3),
    "many tokens": ({}, 40),
    "tokens are dropped": ({"eval_capacity_fraction": 0.3}, 40),
    "tokens are dropped by priority": (
        {"eval_capacity_fraction": 0.3, "batch_prioritized": True},
        40,
    ),
    "dropped after normalisation": (
        {"eval_capacity_fraction": 0.3, "normalize_before_dropping": True},
        40,
    ),
    "router bias": ({"bias": True}, 12),
    "no token": ({}, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_eager_path_with_every_gradient(name, kernel_device):
    options, count = CASES[name]
    layer = make_layer(kernel_device, **options)
    x = tokens(count, kernel_device).requires_grad_()
    padding = (torch.arange(count) % 5 == 4).to(kernel_device)
    wanted = {"x": x, **dict(layer.named_parameters())}
    results = {}
    for backend in ("eager", "triton"):
        with use_backend(backend):
            mixture, routing = layer(x, padding, residual=2 * x)
            gradients = torch.autograd.grad(
                mixture.square().sum(), list(wanted.values()), materialize_grads=True
            )
        results[backend] = mixture, routing, gradients
    (ours, routing, mine), (theirs, expected, right) = results["triton"], results["eager"]
    assert torch.equal(routing.expert_ids, expected.expert_ids)
    assert_near(ours, theirs, torch.float32)
    for key, got, gradient in zip(wanted, mine, right, strict=True):
        assert_near(got, gradient, torch.float32, f"gradient of {key}")


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("gated", [False, True], ids=["relu", "swiglu"])
def test_compiles_without_a_graph_break(dynamic, gated, kernel_device):
    torch._dynamo.reset()
    layer = make_layer(kernel_device, gated=gated)
    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=frames)
    compilations = []
    for count in (20, 21, 35):
        x = tokens(count, kernel_device).requires_grad_()
        ours, theirs = compiled(x)[0], layer(x)[0]
        assert_near(ours, theirs, torch.float32)
        for mine, expected in zip(
            torch.autograd.grad(ours.sum(), [x, *layer.parameters()]),
            torch.autograd.grad(theirs.sum(), [x, *layer.parameters()]),
            strict=True,
        ):
            assert_near(mine, expected, torch.float32)
        compilations.append(frames.frame_count)
    if dynamic:  # one compilation serves all sizes
        assert len(set(compilations)) == 1


def test_switching_the_backend_recompiles_and_back_does_not(kernel_device):
    torch._dynamo.reset()
    layer = make_layer(kernel_device)
    frames = CompileCounterWithBackend("aot_eager")
    router = torch.compile(layer.router, backend=frames)
    x = tokens(20, kernel_device)
    with torch.no_grad():
        for backend in ("triton", "eager", "triton", "eager"):
            with use_backend(backend):
                router(x)
    assert frames.frame_count == 2


def test_exports(kernel_device):
    layer = make_layer(kernel_device)
    x = tokens(20, kernel_device)
    size = torch.export.Dim("tokens", min=3, max=1000)
    with torch.no_grad():
        program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: size}})
        again = tokens(33, kernel_device)
        assert torch.equal(program.module()(again)[0], layer(again)[0])
    graphs = [module.graph for module in program.graph_module.modules()]
    called = {str(node.target) for graph in graphs for node in graph.nodes}
    assert {"moe_mt.route.default", "moe_mt.expert_ffn.default"} <= called


def test_inference_mode_and_copies(kernel_device):
    layer = make_layer(kernel_device)
    x = tokens(20, kernel_device)
    with torch.no_grad():
        expected = layer(x)[0]
    with torch.inference_mode():
        assert torch.equal(layer(x)[0], expected)
    other = deepcopy(layer)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(layer.state_dict())
    with torch.no_grad():
        assert torch.equal(other(x)[0], expected)


def test_meta_tensors_give_shapes():
    layer = make_layer("meta")
    x = torch.empty(2, 10, D_MODEL, device="meta")
    mixture, routing = layer(x, residual=x)
    assert mixture.shape == x.shape
    assert mixture.is_meta
    assert routing.expert_ids.shape == (20, 2)
    mixture.sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in layer.parameters())


def test_autocast_computes_experts_in_its_dtype_and_the_router_in_float32(kernel_device):
    layer = make_layer(kernel_device)
    x = tokens(20, kernel_device)
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.copy_(parameter.bfloat16())
    plain, routing = layer(x)
    with torch.autocast(kernel_device.type, torch.bfloat16):
        mixture, same = layer(x)
    assert mixture.dtype == torch.bfloat16
    assert same.router_logits.dtype == torch.float32
    assert torch.equal(same.gates, routing.gates)
    assert_near(mixture.float(), plain, torch.bfloat16)
    mixture.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


def test_float64_takes_the_definition_and_says_so_when_kernels_are_asked_for(kernel_device):
    layer = make_layer(kernel_device, dtype=torch.float64)
    x = tokens(20, kernel_device, torch.float64)
    assert layer(x)[0].dtype == torch.float64
    with use_backend("triton"), pytest.raises(BackendUnavailableError, match=r"not torch\.float64"):
        layer(x)


def test_an_unknown_backend_is_named():
    with (
        pytest.raises(ConfigError, match=r"backend 'cuda' is unknown.*triton"),
        use_backend("cuda"),
    ):
        pass


def test_backends_are_left_as_they_were_after_an_error(kernel_device):
    before = backend_for(kernel_device)

    def fail():
        with use_backend("eager"):
            assert backend_for(kernel_device) == "eager PyTorch"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert backend_for(kernel_device) == before
