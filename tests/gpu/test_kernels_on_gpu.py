"""The kernels at the published model's size, against float64; the same tests at a small size.

A GPU runs both (``make test-gpu``), the interpreter the small size. What only a GPU has (graphs,
streams, a check for hidden synchronisation) is a thin layer around the same calls.
"""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from moe_mt.losses import load_balancing_loss, router_z_loss
from moe_mt.ops import expert_ffn
from moe_mt.ops.route import expert_capacity, route_eager
from tests.closeness import assert_near
from tests.gpu import reference
from tests.gpu.execution import behind_a_long_wait, captured, compiled, no_synchronisation
from tests.gpu.problem import FULL, SMALL, full, leading_tokens, make_layer, normal, small

EACH_SIZE = pytest.mark.parametrize(("size", "count"), small(12) + full(1024))


@pytest.fixture(scope="module")
def layer_of():
    """Return the layer of a size; one at a time, for two and a gradient fit few GPUs."""
    made = {}

    def layer_of(size, device):
        if size not in made:
            made.clear()
            made[size] = make_layer(size, device)
        return made[size].eval()

    return layer_of


def check_routing(layer, routing, x):
    """Scores against float64, and the choices and gates that follow from these very scores."""
    weight = layer.router.classifier.weight
    scores = x.double() @ weight.detach().double().T
    assert_near(routing.router_logits, scores, torch.float32, "router logits")
    capacity = expert_capacity(x.shape[0], weight.shape[0], training=layer.training)
    expert_ids, gates = route_eager(routing.router_logits.detach().cpu(), capacity=capacity)
    assert torch.equal(routing.expert_ids.cpu(), expert_ids)
    assert_near(routing.gates, gates, torch.float32, "gates")


# The decode path with one token and with its most; half a row for each expert, and two, 16 and 64.
@pytest.mark.parametrize(("size", "count"), small(1, 4, 33) + full(1, 8, 32, 128, 1024, 4096))
def test_forward(size, count, layer_of, kernel_device):
    layer = layer_of(size, kernel_device)
    x = leading_tokens(layer, size, count)
    with torch.no_grad():
        found, routing = layer(x)
    check_routing(layer, routing, x)
    assert routing.expert_ids[0, 0] == size.last
    weights = reference.weights_of(layer.experts)
    expected = reference.mixture(x, routing.expert_ids, routing.gates, weights)
    assert_near(found, expected, size.dtype)
    assert_near(found[0], expected[0], size.dtype, "row of the last expert")


def zipf(size, count):
    """The last expert is the most popular one, the one before half as much, and so on."""
    popularity = 1 / torch.arange(size.experts, 0, -1)
    return torch.multinomial(popularity.expand(count, -1), 2)


def one_hot_expert(size, count):
    """Everybody chooses the last expert, and any other one."""
    others = torch.randint(size.last, (count,))
    return torch.stack([torch.full((count,), size.last), others], 1)


def even(size, count):
    """As many rows for each expert as for any other one."""
    first = torch.arange(size.last, size.last - count, -1)
    return torch.stack([first, first - 1], 1) % size.experts


def claims(choose, size, count, device):
    """Expert ids (T, K) and their gates, of which some are dropped."""
    expert_ids = choose(size, count).to(torch.int32)
    gates = torch.rand(count, 2) + 0.1
    dropped = torch.rand(count, 2) < 0.05
    return (
        expert_ids.masked_fill(dropped, size.experts).to(device),
        gates.masked_fill(dropped, 0).to(device),
    )


def run_and_check(size, x, expert_ids, gates, weights, activation="relu", *, of):
    """Compare the mixture and all its gradients with float64; weights' of the experts ``of``."""
    leaves = {"x": x, "gates": gates, **weights}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    arguments = [leaves.pop("x"), expert_ids, leaves.pop("gates")]
    found = expert_ffn(*arguments, **leaves, activation=activation)
    expected = reference.mixture(x, expert_ids, gates, weights, activation)
    assert_near(found, expected, size.dtype)
    grad = torch.randn_like(found)
    wanted = [arguments[0], arguments[2], *leaves.values()]
    grad_x, grad_gates, *grad_weights = torch.autograd.grad(found, wanted, grad)
    right_x, right_gates, right_weights = reference.gradients(
        grad, x, expert_ids, gates, weights, activation, of=of
    )
    assert_near(grad_x, right_x, size.dtype, "gradient of x")
    assert_near(grad_gates, right_gates, size.dtype, "gradient of the gates")
    for name, gradient in zip(leaves, grad_weights, strict=True):
        assert all(part.isfinite().all() for part in gradient), f"gradient of {name} has holes"
        for expert in of:
            right = right_weights[expert][name]
            assert_near(gradient[expert], right, size.dtype, f"gradient of {name}[{expert}]")


@pytest.mark.parametrize("choose", [even, zipf, one_hot_expert])
@pytest.mark.parametrize(("size", "count"), small(12) + full(256, 2048))
def test_gradients(size, count, choose, layer_of, kernel_device):
    layer = layer_of(size, kernel_device)
    x = normal(count, size.d_model, dtype=size.dtype, device=kernel_device)
    expert_ids, gates = claims(choose, size, count, kernel_device)
    idle = set(range(size.experts)) - set(expert_ids.unique().tolist())
    weights = reference.weights_of(layer.experts)
    run_and_check(size, x, expert_ids, gates, weights, of={0, size.last, *sorted(idle)[:1]})


# The stack of both halves has 2^32 elements at the full size. Few tokens and many: two paths.
@pytest.mark.parametrize(("size", "count"), small(4, 12) + full(4, 256))
def test_halves_of_a_fused_stack(size, count, kernel_device):
    def stack(*shape, std):
        return normal(size.experts, *shape, std=std, dtype=size.dtype, device=kernel_device)

    fused = stack(2 * size.ffn_dim, size.d_model, std=size.d_model**-0.5)
    if size == FULL:
        assert fused.numel() == 2**32
    weights = {
        "gate_proj": fused[:, : size.ffn_dim],
        "up_proj": fused[:, size.ffn_dim :],
        "down_proj": stack(size.d_model, size.ffn_dim, std=size.ffn_dim**-0.5),
    }
    x = normal(count, size.d_model, dtype=size.dtype, device=kernel_device)
    expert_ids, gates = claims(even, size, count, kernel_device)
    expert_ids[0, 0], gates[0, 0] = size.last, 0.5
    with torch.no_grad():
        found = expert_ffn(x, expert_ids, gates, **weights, activation="silu")
    expected = reference.mixture(x, expert_ids, gates, weights, "silu")
    assert_near(found, expected, size.dtype)
    run_and_check(size, x, expert_ids, gates, weights, "silu", of={size.last})


@pytest.mark.parametrize(("size", "count"), small(20) + full(2**17 + 64))
def test_hidden_rows_beyond_32_bits(size, count, layer_of, kernel_device):
    """Hidden rows have more than 2^31 elements; those of the last expert are the last of them."""
    layer = layer_of(size, kernel_device)
    weights = reference.weights_of(layer.experts)
    few = min(count // 2, 64)
    x = normal(count, size.d_model, dtype=size.dtype, device=kernel_device)
    expert_ids = torch.stack([torch.arange(count), torch.arange(count) + 1], 1) % size.last
    expert_ids[-few:, 0] = size.last
    expert_ids = expert_ids.to(kernel_device, torch.int32)
    gates = torch.rand(count, 2, device=kernel_device) + 0.1
    if size == FULL:
        assert (expert_ids.numel() - few) * size.ffn_dim > 2**31
    x.requires_grad_()
    found = expert_ffn(x, expert_ids, gates, **weights)
    ends = x.detach()[-few:], expert_ids[-few:], gates[-few:]
    assert_near(found[-few:], reference.mixture(*ends, weights), size.dtype)
    grad = torch.randn_like(found)
    wanted = {"x": x, "up_proj": weights["up_proj"], "down_proj": weights["down_proj"]}
    right_x, _, right_weights = reference.gradients(grad[-few:], *ends, weights, of={size.last})
    found = torch.autograd.grad(found, list(wanted.values()), grad)
    assert_near(found[0][-few:], right_x, size.dtype, "gradient of x")
    for name, gradient in zip(list(wanted)[1:], found[1:], strict=True):
        right = right_weights[size.last][name]
        assert_near(gradient[size.last], right, size.dtype, f"gradient of {name}")


@EACH_SIZE
def test_training_drops_what_is_beyond_the_capacity(size, count, layer_of, kernel_device):
    """The whole layer under the training rule; gradients of tokens and of the router's weight."""
    layer = layer_of(size, kernel_device).train()
    # A direction that all tokens share makes them agree on experts, more than these take.
    shared = normal(1, size.d_model, dtype=size.dtype, device=kernel_device)
    x = (leading_tokens(layer, size, count) + shared).requires_grad_()
    mixture, routing = layer(x, residual=x)
    check_routing(layer, routing, x.detach())
    dropped = routing.expert_ids == size.experts
    assert 0 < int(dropped.sum()) < dropped.numel()
    grad = torch.randn_like(mixture)
    router = layer.router.classifier.weight
    found_x, found_router = torch.autograd.grad(mixture, [x, router], grad)

    weights = reference.weights_of(layer.experts)
    chosen = x.detach(), routing.expert_ids, routing.gates.detach(), weights
    expected = reference.mixture(*chosen) + x.detach().double()
    assert_near(mixture, expected, size.dtype)
    experts_x, experts_gates, _ = reference.gradients(grad, *chosen)
    wide_x, wide_router = (t.detach().double().requires_grad_() for t in (x, router))
    probs = (wide_x @ wide_router.T).softmax(-1)
    kept = probs.gather(1, routing.expert_ids.long() % size.experts).masked_fill(dropped, 0)
    total = kept.sum(1, keepdim=True)
    gates = kept / torch.where(total > 0, total, 1)
    through = torch.autograd.grad(gates, [wide_x, wide_router], experts_gates)
    assert_near(found_x, experts_x + grad.double() + through[0], size.dtype, "gradient of x")
    assert_near(found_router, through[1], size.dtype, "gradient of the router")


def other_inputs(layer, size, count):
    """Return three batches of which each is routed in another way than the one before."""
    one, two, three = (leading_tokens(layer, size, count) for _ in range(3))
    # What chooses an expert first, negated, chooses it last; and all to one expert first.
    return one, -two, three[:1].expand(count, -1).contiguous()


def check_replays(function, layer, size, count):
    """Replay a graph with inputs other than the captured ones: the bits of running it anew."""
    batches = other_inputs(layer, size, count)
    first = -leading_tokens(layer, size, count)
    replay = captured(function, first)
    choices = [layer.router(x).expert_ids for x in (first, *batches)]
    assert not any(torch.equal(*pair) for pair in pairwise(choices)), "the routing should change"
    for x in (*batches, batches[0]):
        for found, expected in zip(replay(x), function(x), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize(("size", "count"), small(1, 12) + full(1, 8, 32, 1024))
def test_a_captured_graph_takes_another_routing(size, count, layer_of, kernel_device):
    layer = layer_of(size, kernel_device)

    def forward(x):
        mixture, routing = layer(x, residual=x)
        return mixture, routing.expert_ids, routing.gates

    with torch.no_grad():
        check_replays(forward, layer, size, count)


@pytest.mark.parametrize(("size", "count"), small(12) + full(32))
def test_a_captured_graph_takes_another_routing_backward(size, count, layer_of, kernel_device):
    layer = layer_of(size, kernel_device).train()

    def forward_and_backward(x):
        x = x.detach().requires_grad_()
        mixture, routing = layer(x, residual=x)
        loss = mixture.float().square().sum() + load_balancing_loss(routing)
        gradients = torch.autograd.grad(loss, [x, layer.router.classifier.weight])
        return mixture.detach(), *gradients

    check_replays(forward_and_backward, layer, size, count)


@EACH_SIZE
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_training_never_waits_for_the_gpu(size, count, layer_of, kernel_device):
    layer = layer_of(size, kernel_device).train()
    x = leading_tokens(layer, size, count).requires_grad_()
    padding = (torch.arange(count) % 7 == 6).to(kernel_device)
    wanted = [x, *layer.parameters()]

    def step():
        mixture, routing = layer(x, padding, residual=x)
        loss = mixture.float().square().mean()
        loss = loss + 0.01 * load_balancing_loss(routing) + 0.001 * router_z_loss(routing)
        gradients = torch.autograd.grad(loss, wanted)
        with torch.no_grad():
            return gradients, layer.eval()(x)[0], layer(x[:1])[0]

    step()  # Loading a kernel may wait.
    layer.train()
    with no_synchronisation(kernel_device):
        gradients, many, one = step()
    assert all(found.isfinite().all() for found in (gradients[0], gradients[1], many, one))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_waiting_for_the_gpu_would_be_noticed():
    with (
        no_synchronisation(torch.device("cuda")),
        pytest.raises(RuntimeError, match="synchronizing"),
    ):
        torch.ones(1, device="cuda").item()


@EACH_SIZE
def test_three_runs_give_the_same_bits(size, count, layer_of, kernel_device):
    layer = layer_of(size, kernel_device).train()
    x = leading_tokens(layer, size, count).requires_grad_()

    def run():
        mixture, routing = layer(x)
        loss = mixture.float().square().sum() + load_balancing_loss(routing)
        return mixture.detach(), *torch.autograd.grad(loss, [x, *layer.parameters()])

    first = run()
    for _ in range(2):
        again = run()
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@EACH_SIZE
@pytest.mark.filterwarnings("ignore")  # The compiler's advice, which depends on the GPU.
def test_compiled_training(size, count, layer_of, kernel_device):
    layer = layer_of(size, kernel_device).train()
    x = leading_tokens(layer, size, count).requires_grad_()
    wanted = {"x": x, **dict(layer.named_parameters())}
    grad = torch.randn_like(x)

    def run(layer):
        mixture, routing = layer(x, residual=x)
        outputs = [mixture, load_balancing_loss(routing)]
        return mixture, torch.autograd.grad(outputs, list(wanted.values()), [grad, None])

    expected, right = run(layer)
    found, gradients = run(compiled(layer, kernel_device))
    assert_near(found, expected, size.dtype)
    for name, ours, theirs in zip(wanted, gradients, right, strict=True):
        if ours.dim() == 3:  # The last expert stands for all; what is expected is on the host.
            ours, theirs = ours[size.last], theirs[size.last]
        assert_near(ours, theirs, size.dtype, f"gradient of {name}")


@pytest.mark.parametrize(("size", "count"), small(12) + full(1, 128))
@pytest.mark.filterwarnings("ignore")  # As above.
def test_compiled_into_a_graph(size, count, layer_of, kernel_device):
    layer = layer_of(size, kernel_device)
    fast = compiled(layer, kernel_device, mode="reduce-overhead")
    with torch.no_grad():
        # Twice over: the first calls warm up and capture, the later ones replay.
        for x in 2 * other_inputs(layer, size, count):
            found, expected = fast(x)[0].clone(), layer(x)[0]
            assert_near(found, expected, size.dtype)


@pytest.mark.parametrize(("size", "count"), small(3, 12) + full(4, 128))
def test_kernels_run_on_the_current_stream(size, count, layer_of, kernel_device):
    layer = layer_of(size, kernel_device)
    x = leading_tokens(layer, size, count)
    with torch.no_grad():
        expected = layer(x, residual=x)[0]
        late = torch.zeros_like(x)
        with behind_a_long_wait(kernel_device):
            late.copy_(x)
            found = layer(late, residual=late)[0]
    assert torch.equal(found, expected)


@pytest.mark.gpu
def test_kernels_run_on_the_device_of_their_tensors():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    layer = make_layer(SMALL, torch.device("cuda:1"))
    for count in (3, 20):
        x = leading_tokens(layer, SMALL, count)
        with torch.cuda.device(0):
            found = layer(x)[0]
        with torch.cuda.device(1):
            assert torch.equal(found, layer(x)[0])


@pytest.mark.parametrize(("size", "count"), small(12) + full(64))
def test_decoding_agrees_with_a_larger_batch(size, count, layer_of, kernel_device):
    """The most tokens that are decoded, in the batch of others that is put into expert order."""
    most = min(8, size.experts // 2)
    layer = layer_of(size, kernel_device)
    x = leading_tokens(layer, size, count)
    with torch.no_grad():
        many, routing = layer(x)
        few, same = layer(x[:most])
        one, _ = layer(x[:1])
    assert torch.equal(same.expert_ids, routing.expert_ids[:most])
    assert_near(few, many[:most], size.dtype)
    assert torch.equal(one, few[:1])


@pytest.mark.parametrize(("size", "count"), small(20) + full(1024))
def test_the_first_call_is_not_long(size, count, kernel_device, tmp_path, capsys):
    """What users wait for once: the kernels of a call, compiled into an empty cache."""
    name = "FULL" if size == FULL else "SMALL"
    found = subprocess.run(
        [sys.executable, "-m", "tests.gpu.first_call", kernel_device.type, name, str(count)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    seconds = dict(zip(("decoding", "many tokens"), map(float, found.stdout.split()), strict=True))
    with capsys.disabled():
        sys.stdout.write(f"\nseconds of the first calls: {seconds}\n")
    assert max(seconds.values()) < 15
