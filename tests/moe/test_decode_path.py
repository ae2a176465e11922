"""A sparse layer while decoding: few operations, none that waits for a value, one graph."""

import importlib

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from moe_mt.moe import Experts, MoELayer, PackedExperts, Top2Router
from moe_mt.ops import route, use_backend
from tests.closeness import assert_near

D_MODEL, FFN_DIM, EXPERTS = 16, 32, 8
KINDS = [None, "float32", "int8-dynamic"]


def make_layer(kind=None, *, device="cpu", **router_options):
    torch.manual_seed(1)
    with torch.device(device):
        experts = Experts(EXPERTS, D_MODEL, FFN_DIM)
        router = Top2Router(D_MODEL, EXPERTS, **router_options)
        for parameter in (*experts.parameters(), *router.parameters()):
            torch.nn.init.normal_(parameter, std=0.3)
    if kind is not None:
        experts = PackedExperts.pack(experts, kind)
    return MoELayer(router, experts, token_dropout=0.2).eval()


def step(tokens, device="cpu"):
    """New positions of a decoding step: (rows, 1, d_model)."""
    return torch.randn(tokens, 1, D_MODEL, device=device)


class Recorder(TorchDispatchMode):
    """Names every operation that reaches a device, and those whose result waits for values.

    ``tolist`` reads the memory of a CPU without an operation; a meta tensor and a compiler that
    makes one graph refuse it.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.waiting = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations.append(str(func))
        # Of the first kind are item, equal and the like; of the second nonzero, a mask as index.
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        if tags & set(func.tags):
            self.waiting.append(str(func))
        return func(*args, **kwargs or {})


def record(layer, *arguments, **options):
    with torch.no_grad(), Recorder() as recorder:
        layer(*arguments, **options)
    return recorder


@pytest.mark.parametrize(
    "read",
    [lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: bool(x.any())],
    ids=["item", "nonzero", "mask", "branch"],
)
def test_the_recorder_sees_what_waits(read):
    with Recorder() as recorder:
        read(torch.randn(3))
    assert recorder.waiting


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 4, 32])
def test_few_operations_and_none_waits_for_a_value(tokens, kind):
    layer, x = make_layer(kind), step(tokens)
    with use_backend("eager"):
        recorder = record(layer, x, residual=x)
    assert len(recorder.operations) < 25, recorder.operations
    assert recorder.waiting == []


def test_padding_costs_operations_but_no_waiting():
    layer, x = make_layer(), step(4)
    padding = torch.tensor([[False], [True], [False], [False]])
    with use_backend("eager"):
        recorder = record(layer, x, padding, residual=x)
    assert len(recorder.operations) < 40, recorder.operations
    assert recorder.waiting == []


@pytest.mark.parametrize("tokens", [1, 4, 32])
def test_few_operations_with_kernels_and_none_waits_for_a_value(tokens):
    pytest.importorskip("triton")
    layer, x = make_layer(device="meta"), step(tokens, "meta")
    with use_backend("triton"):
        recorder = record(layer, x, residual=x)
    assert {"moe_mt.route.default", "moe_mt.expert_ffn.default"} <= set(recorder.operations)
    assert len(recorder.operations) < 25, recorder.operations
    assert recorder.waiting == []


@pytest.mark.parametrize("normalize", ["after", "before", "never"])
def test_routing_without_a_limit_is_routing_within_one_that_nothing_reaches(normalize):
    logits, seed = torch.randn(9, EXPERTS).requires_grad_(), torch.randn(9, 2)
    nobody = torch.zeros(9, dtype=torch.bool)
    found = []
    for padding in (None, nobody):
        with use_backend("eager"):
            ids, gates = route(logits, capacity=9, padding=padding, normalize=normalize)
        found.append((ids, gates, *torch.autograd.grad(gates, logits, seed)))
    assert all(torch.equal(short, long) for short, long in zip(*found, strict=True))


LAUNCHERS = {
    "router_logits": "_router_logits",
    "route": "_route",
    "expert_ffn": "_expert_ffn",
    "expert_order": "_expert_order",
    "combine": "_combine",
}
"""File of the operation → the operator in it, whose launcher is ``_launch``."""


@pytest.mark.triton
@pytest.mark.parametrize("tokens", [1, 32], ids=["without an order", "with an order"])
def test_launchers_of_kernels_wait_for_no_value(tokens, kernel_device, monkeypatch):
    # What an operator does inside is hidden from the recorder, so launchers take its place.
    launched = []
    for name, operator in LAUNCHERS.items():
        file = importlib.import_module(f"moe_mt.ops.{name}")

        def launch(*arguments, _name=name, _launch=file._launch):
            launched.append(_name)
            return _launch(*arguments)

        monkeypatch.setattr(file, operator, launch)

    def refuse(tensor):
        raise AssertionError("the host waited for a list of values")

    monkeypatch.setattr(torch.Tensor, "tolist", refuse, raising=False)
    layer, x = make_layer(device=kernel_device), step(tokens, kernel_device)
    with use_backend("triton"):
        recorder = record(layer, x, residual=x)
    assert {"router_logits", "route", "expert_ffn"} <= set(launched)
    assert recorder.waiting == []


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_for_each_number_of_tokens_and_the_same_bits(kind):
    torch._dynamo.reset()
    layer = make_layer(kind)
    frames = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend=frames)
    with torch.no_grad(), use_backend("eager"):
        for graphs, tokens in enumerate((1, 4, 32), start=1):
            for _ in range(2):
                x = step(tokens)
                ours, routing = compiled(x, residual=x)
                theirs, expected = layer(x, residual=x)
                assert torch.equal(ours, theirs)
                assert torch.equal(routing.expert_ids, expected.expert_ids)
                assert torch.equal(routing.gates, expected.gates)
                assert frames.frame_count == graphs


def test_one_graph_for_any_number_of_tokens():
    torch._dynamo.reset()
    layer = make_layer()
    frames = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=frames)
    with torch.no_grad(), use_backend("eager"):
        for tokens in (4, 5, 32):
            x = step(tokens)
            assert torch.equal(compiled(x, residual=x)[0], layer(x, residual=x)[0])
    assert frames.frame_count == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, in its compiler
@pytest.mark.parametrize("kind", KINDS)
def test_inductor_takes_the_layer_whole(kind):
    torch._dynamo.reset()
    layer = make_layer(kind)
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend="inductor")
    with torch.no_grad(), use_backend("eager"):
        x = step(4)
        ours, routing = compiled(x, residual=x)
        theirs, expected = layer(x, residual=x)
    assert torch.equal(routing.expert_ids, expected.expert_ids)
    assert_near(ours, theirs, torch.float32)
