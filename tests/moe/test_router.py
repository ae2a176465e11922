import pytest
import torch

from moe_mt.moe import Top2Router
from moe_mt.ops import route
from moe_mt.ops.backend import use_backend
from tests.closeness import assert_near

D_MODEL, EXPERTS = 6, 4


def make_router(**options):
    torch.manual_seed(3)
    return Top2Router(D_MODEL, EXPERTS, **options)


def tokens(count=10):
    return torch.randn(count, D_MODEL, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("bias", [False, True])
def test_routes_by_the_linear_scores(bias):
    router, x = make_router(bias=bias).eval(), tokens()
    routing = router(x)
    logits = x @ router.classifier.weight.T
    if bias:
        logits = logits + router.classifier.bias
    torch.testing.assert_close(routing.router_logits, logits)
    expert_ids, gates = route(logits)
    assert torch.equal(routing.expert_ids, expert_ids)
    torch.testing.assert_close(routing.gates, gates)
    assert routing.padding is None


def most_loaded(routing):
    return torch.bincount(routing.expert_ids.flatten().long(), minlength=EXPERTS + 1)[
        :EXPERTS
    ].max()


def test_capacity_follows_the_mode_and_is_never_remembered():
    # The published router keeps the evaluation's capacity and trains on with it.
    x = torch.ones(12, D_MODEL)
    router = make_router(train_capacity=2)
    assert most_loaded(router.train()(x)) == 2
    assert most_loaded(router.eval()(x)) == 12
    assert most_loaded(router.train()(x)) == 2


def test_training_without_a_fixed_capacity_takes_twice_the_even_share():
    assert most_loaded(make_router(train_capacity=None).train()(torch.ones(12, D_MODEL))) == 6


def test_evaluation_takes_its_fraction_of_the_tokens():
    router = make_router(eval_capacity_fraction=0.25).eval()
    assert most_loaded(router(torch.ones(12, D_MODEL))) == 3


def test_a_forward_pass_changes_nothing():
    router = make_router(policy="sampling", train_capacity=2).train()
    before = {name: value.clone() for name, value in router.state_dict().items()}
    attributes = {k: v for k, v in vars(router).items() if not k.startswith("_")}
    router(tokens())
    assert all(torch.equal(before[name], value) for name, value in router.state_dict().items())
    assert attributes == {k: v for k, v in vars(router).items() if not k.startswith("_")}


def test_padding_claims_no_expert_unless_it_is_told_to():
    x, padding = tokens(), torch.arange(10) >= 7
    routing = make_router().eval()(x, padding)
    assert (routing.expert_ids[7:] == EXPERTS).all()
    assert (routing.expert_ids[:7] < EXPERTS).all()
    assert torch.equal(routing.padding, padding)
    routed = make_router(route_padding=True).eval()(x, padding)
    assert (routed.expert_ids < EXPERTS).all()
    assert routed.padding is None


def test_scores_are_float32_whatever_the_model_is():
    # In bfloat16 these two experts tie and the first would win.
    router = make_router().eval()
    with torch.no_grad():
        router.classifier.weight.zero_()
        router.classifier.weight[:2, 0] = torch.tensor([1.0, 1.001])
    x = torch.zeros(1, D_MODEL, dtype=torch.bfloat16)
    x[0, 0] = 1
    routing = router(x)
    assert routing.router_logits.dtype == routing.gates.dtype == torch.float32
    assert routing.expert_ids.tolist() == [[1, 0]]


def test_router_dtype_is_obeyed():
    routing = make_router(router_dtype=torch.bfloat16).eval()(tokens())
    assert routing.router_logits.dtype == torch.bfloat16


@pytest.mark.parametrize("policy", ["sampling", "random"])
def test_noise_comes_from_the_global_generator_in_the_published_order(policy):
    router, x = make_router(policy=policy).eval(), tokens(40)
    torch.manual_seed(9)
    routing = router(x)
    torch.manual_seed(9)
    if policy == "sampling":
        noise = torch.distributions.Gumbel(0, 1).rsample((40, EXPERTS))
    else:
        noise = torch.rand_like(x[:, 0])
    expert_ids, gates = route(routing.router_logits, policy=policy, noise=noise)
    assert torch.equal(routing.expert_ids, expert_ids)
    assert torch.equal(routing.gates, gates)
    # The noise made a difference, or this test would say nothing.
    assert not torch.equal(expert_ids, route(routing.router_logits)[0])


def test_published_prioritised_example():
    # transformers' own router test: 40 tokens, capacity 4, the last token reaches expert 0.
    torch.manual_seed(0)
    logits = torch.rand(40, 4)
    noise = torch.rand(40)
    expert_ids, _ = route(logits, capacity=4, policy="random", noise=noise, batch_prioritized=True)
    assert expert_ids[-1, 0] == 0


def test_autocast_leaves_the_router_s_dtype_alone():
    router = Top2Router(64, 8).eval()
    x = torch.randn(256, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = router(x)
    assert found.router_logits.dtype == torch.float32
    assert torch.equal(found.expert_ids, router(x).expert_ids)


@pytest.mark.triton
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_route_like_the_definition(kernel_device, bias, training, dtype):
    router = make_router(bias=bias, train_capacity=5).to(kernel_device).train(training)
    x = tokens(33).to(kernel_device, dtype).requires_grad_()
    padding = torch.arange(33, device=kernel_device) >= 30
    inputs = [x, *router.parameters()]
    found = {}
    for backend in ("triton", "eager"):
        with use_backend(backend):
            routing = router(x, padding)
            loss = (routing.gates[:, 0] * x[:, 0].detach()).sum() + routing.router_logits.sum()
            found[backend] = routing, torch.autograd.grad(loss, inputs)
    (mine, my_grads), (theirs, their_grads) = found["triton"], found["eager"]
    assert torch.equal(mine.expert_ids, theirs.expert_ids)
    assert_near(mine.router_logits, theirs.router_logits, torch.float32)
    assert_near(mine.gates, theirs.gates, torch.float32)
    for my_grad, their_grad in zip(my_grads, their_grads, strict=True):
        assert my_grad.dtype == their_grad.dtype
        assert_near(my_grad, their_grad, my_grad.dtype)


@pytest.mark.triton
def test_kernels_leave_the_router_s_dtype_to_the_router(kernel_device):
    x = tokens().to(kernel_device)
    halves = make_router(router_dtype=torch.bfloat16).to(kernel_device).eval()(x)
    assert halves.router_logits.dtype == halves.gates.dtype == torch.bfloat16
    router = make_router().to(kernel_device).eval()
    with torch.autocast(kernel_device.type, torch.bfloat16):
        found = router(x)
    assert found.router_logits.dtype == torch.float32
    assert torch.equal(found.router_logits, router(x).router_logits)


@pytest.mark.triton
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_router_of_kernels_compiles_whole(kernel_device, dynamic):
    router = make_router(eval_capacity_fraction=0.25).to(kernel_device).eval()

    def routed(x, padding):
        routing = router(x, padding)
        return routing.expert_ids, routing.gates

    compiled = torch.compile(routed, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for count in (12, 40):
        x = tokens(count).to(kernel_device)
        padding = torch.arange(count, device=kernel_device) >= 10
        for mine, theirs in zip(compiled(x, padding), routed(x, padding), strict=True):
            assert torch.equal(mine, theirs)
