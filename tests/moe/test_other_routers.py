"""``TopKRouter`` and ``Top1Router``; what all routers share is in ``test_router.py``."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from moe_mt.errors import ConfigError
from moe_mt.losses import load_balancing_loss, router_z_loss
from moe_mt.moe import Experts, MoELayer, Top1Router, TopKRouter
from moe_mt.ops.backend import use_backend
from tests.closeness import assert_near

D_MODEL, EXPERTS = 6, 5


def tokens(*shape):
    return torch.randn(*shape, D_MODEL, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("top_k", [1, 3, EXPERTS])
def test_the_best_of_all_experts_by_their_probabilities(top_k, normalize, bias):
    router, x = TopKRouter(D_MODEL, EXPERTS, top_k, normalize=normalize, bias=bias), tokens(20)
    routing = router(x)
    logits = torch.nn.functional.linear(x, router.classifier.weight, router.classifier.bias)
    gates, expert_ids = logits.softmax(-1).topk(top_k)
    if normalize:
        gates = gates / gates.sum(-1, keepdim=True)
    assert routing.expert_ids.dtype == torch.int32
    assert torch.equal(routing.expert_ids.long(), expert_ids)
    torch.testing.assert_close(routing.gates, gates)
    torch.testing.assert_close(routing.router_logits, logits)


@pytest.mark.parametrize("top_k", [0, EXPERTS + 1])
def test_more_choices_than_experts_are_refused_at_once(top_k):
    with pytest.raises(ConfigError, match=f"top_k is {top_k}.*{EXPERTS} experts"):
        TopKRouter(D_MODEL, EXPERTS, top_k)


@pytest.mark.parametrize("training", [False, True])
def test_capacity_is_counted_in_every_sequence_in_order(training):
    router = Top1Router(D_MODEL, EXPERTS, capacity=3).train(training)
    x = tokens(1, 1).expand(2, 7, D_MODEL).clone()
    x[1, 3] *= -1
    routing = router(x)
    best = routing.router_logits.argmax(-1).view(2, 7)
    popular, other = best[0, 0].item(), best[1, 3].item()
    assert popular != other
    # Without the batch axis, all fourteen tokens are one sequence.
    assert routing.expert_ids.view(2, 7).tolist() == [
        [popular] * 3 + [EXPERTS] * 4,
        [popular] * 3 + [other] + [EXPERTS] * 3,
    ]
    flat = router(x.view(14, D_MODEL))
    assert flat.expert_ids[:, 0].tolist() == [popular] * 3 + [EXPERTS] * 7 + [other] + [EXPERTS] * 3


def test_a_token_weighs_its_expert_by_the_probability():
    routing = Top1Router(D_MODEL, EXPERTS)(tokens(3, 8))
    assert routing.gates.shape == routing.expert_ids.shape == (24, 1)
    probs, expert_ids = routing.router_logits.softmax(-1).max(-1)
    assert torch.equal(routing.expert_ids[:, 0].long(), expert_ids)
    assert torch.equal(routing.gates[:, 0], probs)


def test_padding_takes_no_place_from_a_later_token():
    x = tokens(1, 1).expand(2, 4, D_MODEL)
    padding = torch.tensor([[True, True, False, False], [False, False, False, True]])
    taken = Top1Router(D_MODEL, EXPERTS, capacity=2)(x, padding).expert_ids.view(2, 4) < EXPERTS
    assert taken.tolist() == [[False, False, True, True], [True, True, False, False]]
    routed = Top1Router(D_MODEL, EXPERTS, capacity=2, route_padding=True)(x, padding)
    assert (routed.expert_ids.view(2, 4) < EXPERTS).tolist() == [[True, True, False, False]] * 2
    assert routed.padding is None


def test_jitter_moves_scores_in_training_and_leaves_the_tokens_alone():
    router, x = Top1Router(D_MODEL, EXPERTS, jitter=0.1), tokens(4, 8)
    before = x.clone()
    torch.manual_seed(5)
    jittered = router.train()(x).router_logits
    assert torch.equal(x, before)
    plain = router.eval()(x).router_logits
    assert torch.equal(plain, Top1Router.forward(router, x).router_logits)
    torch.manual_seed(5)
    factors = torch.empty(32, D_MODEL).uniform_(0.9, 1.1)
    torch.testing.assert_close(jittered, (x.view(32, -1) * factors) @ router.classifier.weight.T)
    assert not torch.allclose(jittered, plain)
    # In the router's dtype, so that noise below the model's resolution is felt.
    assert router.train()(x.bfloat16()).router_logits.dtype == torch.float32


ROUTERS = {
    "normalised": lambda: TopKRouter(D_MODEL, EXPERTS, 3),
    "probabilities": lambda: TopKRouter(D_MODEL, EXPERTS, 2, normalize=False),
    "Switch": lambda: Top1Router(D_MODEL, EXPERTS, capacity=2),
}


def make_layer(name):
    torch.manual_seed(3)
    experts = Experts(EXPERTS, D_MODEL, 8, activation="silu", gated=True, bias=False)
    return MoELayer(ROUTERS[name](), experts)


def by_hand(layer, x, routing):
    experts, out = layer.experts, []
    for t, row in enumerate(x):
        total = torch.zeros_like(row)
        for expert, gate in zip(routing.expert_ids[t].tolist(), routing.gates[t], strict=True):
            if expert < EXPERTS:
                gated = torch.nn.functional.silu(experts.gate_proj[expert] @ row)
                hidden = gated * (experts.up_proj[expert] @ row)
                total = total + gate * (experts.down_proj[expert] @ hidden)
        out.append(total)
    return torch.stack(out)


@pytest.mark.parametrize("name", ROUTERS)
def test_layer_and_gradients_are_those_of_the_definition(name):
    layer, x = make_layer(name), tokens(3, 6).requires_grad_()
    found, routing = layer(x)
    expected = by_hand(layer, x.view(18, D_MODEL), routing).view_as(x)
    torch.testing.assert_close(found, expected)
    inputs = [x, *layer.parameters()]
    weights = torch.randn_like(found)
    mine = torch.autograd.grad((found * weights).sum(), inputs, retain_graph=True)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    for got, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert mine[1].abs().max() > 1e-4


@pytest.mark.parametrize("name", ROUTERS)
def test_losses_take_the_routing_of_any_number_of_choices(name):
    layer, x = make_layer(name), tokens(3, 6)
    padding = torch.arange(6).expand(3, 6) >= 4
    routing = layer(x, padding)[1]
    logits = routing.router_logits.view(3, 6, EXPERTS)[:, :4].reshape(12, EXPERTS)
    shares = torch.bincount(logits.argmax(-1), minlength=EXPERTS) / 12
    balance = EXPERTS * (shares * logits.softmax(-1).mean(0)).sum()
    torch.testing.assert_close(load_balancing_loss(routing), balance)
    torch.testing.assert_close(router_z_loss(routing), logits.logsumexp(-1).square().mean())
    load_balancing_loss(routing).backward()
    assert layer.router.classifier.weight.grad.any()


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0,)])
def test_no_token_at_all(name, shape):
    mixture, routing = make_layer(name)(tokens(*shape))
    assert mixture.shape == (*shape, D_MODEL)
    assert len(routing.expert_ids) == len(routing.gates) == 0


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_layer_compiles_whole(name, dynamic):
    torch._dynamo.reset()
    layer = make_layer(name).eval()
    frames = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=frames)
    with torch.no_grad(), use_backend("eager"):
        for shape in ((2, 9), (3, 7)):
            x = tokens(*shape)
            (ours, mine), (theirs, expected) = compiled(x), layer(x)
            assert torch.equal(ours, theirs)
            assert torch.equal(mine.expert_ids, expected.expert_ids)
    assert frames.frame_count == (1 if dynamic else 2)


@pytest.mark.triton
@pytest.mark.parametrize("name", ROUTERS)
def test_kernels_compute_what_the_definition_does(kernel_device, name):
    layer, x = make_layer(name).to(kernel_device), tokens(3, 6).to(kernel_device)
    padding = torch.zeros(3, 6, dtype=torch.bool, device=kernel_device)
    padding[:, 5] = True
    found = {}
    for backend in ("triton", "eager"):
        with use_backend(backend):
            mixture, routing = layer(x.requires_grad_(), padding)
            loss = mixture.square().sum() + load_balancing_loss(routing)
            gradients = torch.autograd.grad(loss, [x, *layer.parameters()])
            found[backend] = [routing.gates, mixture, *gradients]
    for mine, theirs in zip(found["triton"], found["eager"], strict=True):
        assert_near(mine, theirs, torch.float32)
