from dataclasses import replace

import pytest
import torch

from moe_mt.moe import Experts, MoELayer, Top2Router

D_MODEL, FFN_DIM = 8, 12


def make_layer(num_experts=4, *, token_dropout=0.0, dtype=torch.float64, **router_options):
    generator = torch.Generator().manual_seed(1)
    router = Top2Router(D_MODEL, num_experts, router_dtype=dtype, **router_options)
    layer = MoELayer(router, Experts(num_experts, D_MODEL, FFN_DIM), token_dropout=token_dropout)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer.to(dtype).eval()


def random_tokens(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*shape, D_MODEL, generator=generator, dtype=dtype)


def by_hand(layer, x, routing, scale=1.0):
    """``scale * sum_k gate_k * expert_k(x)``, token by token, with gradients through the gates."""
    experts = layer.experts
    out = []
    for t in range(len(x)):
        total = torch.zeros_like(x[t])
        for expert, gate in zip(routing.expert_ids[t].tolist(), routing.gates[t], strict=True):
            if expert < experts.num_experts:
                hidden = torch.relu(experts.up_proj[expert] @ x[t] + experts.up_bias[expert])
                output = experts.down_proj[expert] @ hidden + experts.down_bias[expert]
                total = total + scale * gate * output
        out.append(total)
    return torch.stack(out)


# Options of the layer and number of tokens; every one has its reason.
CASES = {
    "one token": ({}, 1),
    "two experts, so that every token reaches both": ({"num_experts": 2}, 9),
    "fewer tokens than experts": ({"num_experts": 16}, 3),
    "tokens are dropped": ({"eval_capacity_fraction": 0.3}, 20),
    "dropped after normalisation": (
        {"eval_capacity_fraction": 0.3, "normalize_before_dropping": True},
        20,
    ),
    "expert outputs are scaled": ({"token_dropout": 0.2}, 12),
    "router bias": ({"bias": True}, 12),
}


@pytest.mark.parametrize("name", CASES)
def test_definition_and_every_gradient_the_routers_included(name):
    options, count = CASES[name]
    layer, x = make_layer(**options), random_tokens(count).requires_grad_()
    ours, routing = layer(x)
    expected = by_hand(layer, x, routing, 1 - options.get("token_dropout", 0.0))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    inputs = {"x": x, **dict(layer.named_parameters())}
    weights = torch.randn(ours.shape, dtype=ours.dtype)
    mine = torch.autograd.grad((ours * weights).sum(), list(inputs.values()), retain_graph=True)
    theirs = torch.autograd.grad((expected * weights).sum(), list(inputs.values()))
    for key, got, wanted in zip(inputs, mine, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10, msg=f"gradient of {key}")
    assert mine[list(inputs).index("router.classifier.weight")].abs().max() > 1e-6


def test_router_gradient_agrees_with_finite_differences():
    layer, x = make_layer(), random_tokens(6)
    weight = layer.router.classifier.weight.detach().clone().requires_grad_()

    def mixture(weight):
        return torch.func.functional_call(layer, {"router.classifier.weight": weight}, (x,))[0]

    assert torch.autograd.gradcheck(mixture, weight, eps=1e-7, atol=1e-5)


def test_leading_axes_are_flattened_sentence_by_sentence():
    layer, x = make_layer(eval_capacity_fraction=0.3), random_tokens(3, 5)
    mixture, routing = layer(x)
    flat, flat_routing = layer(x.reshape(15, D_MODEL))
    assert mixture.shape == x.shape
    assert torch.equal(mixture.reshape(15, D_MODEL), flat)
    assert torch.equal(routing.expert_ids, flat_routing.expert_ids)


def test_no_token_at_all():
    mixture, routing = make_layer()(random_tokens(0))
    assert mixture.shape == (0, D_MODEL)
    assert routing.expert_ids.shape == (0, 2)


def test_padded_tokens_get_zero_and_their_content_reaches_nobody():
    layer, x = make_layer(), random_tokens(2, 5)
    padding = torch.tensor([[False] * 5, [False, False, True, True, True]])
    poisoned = x.clone()
    poisoned[padding] = torch.nan
    clean, _ = layer(x, padding)
    mixture, _ = layer(poisoned, padding)
    assert torch.equal(mixture, clean)
    assert (mixture[padding] == 0).all()
    assert (mixture[~padding] != 0).any(-1).all()


def test_dropped_tokens_get_zero():
    layer, x = make_layer(eval_capacity_fraction=0.2), random_tokens(20)
    mixture, routing = layer(x)
    dropped = (routing.expert_ids == 4).all(-1)
    assert dropped.any()
    assert torch.equal((mixture == 0).all(-1), dropped)


def test_without_dropping_a_token_does_not_depend_on_its_batch():
    layer, x = make_layer(dtype=torch.float32), random_tokens(30, dtype=torch.float32)
    whole, _ = layer(x)
    for t in (0, 17, 29):
        torch.testing.assert_close(layer(x[t : t + 1])[0], whole[t : t + 1])
    shuffled = torch.randperm(30)
    torch.testing.assert_close(layer(x[shuffled])[0], whole[shuffled])


def test_training_masks_whole_expert_outputs_without_rescaling():
    # Scores of zero make both gates one half, and one token repeated shows the masks alone: its
    # mixture is nothing, half of one expert's output, half of the other's, or both halves.
    layer = make_layer(num_experts=2, token_dropout=0.3, train_capacity=2000).train()
    with torch.no_grad():
        layer.router.classifier.weight.zero_()
    x = random_tokens(1).expand(2000, D_MODEL)
    mixture, routing = layer(x)
    halves = [
        by_hand(layer, x[:1], replace(routing, gates=torch.tensor([gates], dtype=x.dtype)))[0]
        for gates in ([0.5, 0], [0, 0.5])
    ]
    outcomes = [torch.zeros_like(halves[0]), halves[0], halves[1], halves[0] + halves[1]]
    counts = [int(torch.isclose(mixture, outcome).all(-1).sum()) for outcome in outcomes]
    assert sum(counts) == 2000
    for count, probability in zip(counts, (0.09, 0.21, 0.21, 0.49), strict=True):
        deviation = (2000 * probability * (1 - probability)) ** 0.5
        assert abs(count - 2000 * probability) < 5 * deviation


def test_experts_are_a_seam():
    # Experts that return their input: the mixture is the input times the sum of its gates.
    class Identity(torch.nn.Module):
        def forward(self, x, expert_ids, gates, residual=None):
            assert torch.equal(gates == 0, expert_ids == 4)
            mixture = x * gates.sum(-1, keepdim=True)
            return mixture if residual is None else residual + mixture

    layer = make_layer(eval_capacity_fraction=0.3)
    layer.experts = Identity()
    x = random_tokens(20)
    mixture, routing = layer(x)
    torch.testing.assert_close(mixture, x * routing.gates.sum(-1, keepdim=True))
    torch.testing.assert_close(layer(x, residual=x)[0], x + mixture)


def test_the_dispatcher_is_a_seam():
    # One that sends every claim to the experts by itself, as one to other devices does.
    class ByClaim:
        def dispatch(self, experts, x, expert_ids, gates, residual=None):
            top_k = expert_ids.shape[1]
            claims = x.repeat_interleave(top_k, 0), expert_ids.view(-1, 1), gates.view(-1, 1)
            return experts(*claims).view(-1, top_k, x.shape[1]).sum(1) + residual

    layer = make_layer(eval_capacity_fraction=0.3)
    x, residual = random_tokens(20), torch.randn(20, D_MODEL, dtype=torch.float64)
    expected, _ = layer(x, residual=residual)
    layer.dispatcher = ByClaim()
    torch.testing.assert_close(layer(x, residual=residual)[0], expected)


def test_the_residual_is_added_and_is_all_that_dropped_tokens_get():
    layer, x = make_layer(eval_capacity_fraction=0.2), random_tokens(2, 10)
    residual = torch.randn_like(x)
    mixture, routing = layer(x)
    found, _ = layer(x, residual=residual)
    torch.testing.assert_close(found, mixture + residual)
    dropped = (routing.expert_ids == 4).all(-1).view(2, 10)
    assert dropped.any()
    assert torch.equal(found[dropped], residual[dropped])
