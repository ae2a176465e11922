"""``NllbMoeTop2Router`` and ``NllbMoeSparseMLP`` as documented: spec 4.1 to 4.9."""

import pytest
import torch

from moe_mt import ConfigError, InputError
from moe_mt.pretrained import NllbMoeSparseMLP, NllbMoeTop2Router
from moe_mt.pretrained.outputs import RouterOutput
from tests.pretrained.tiny_models import TRAINING_BATCH, build, config_of

LOGITS = torch.tensor(
    [
        [2.0, 1.0, 0.0],
        [2.5, 0.5, 1.0],
        [3.0, 0.0, 1.5],
        [0.0, 2.0, 1.0],
        [1.0, 0.0, 2.0],
        [0.5, 2.5, 1.5],
    ]
)
# sigmoid(1) and sigmoid(1.5): what is left of two choices whose logits differ by so much.
BIG, SMALL = 0.731059, 0.268941
MORE, LESS = 0.817574, 0.182426
NOTHING_DROPPED = [
    [BIG, SMALL, 0],
    [MORE, 0, LESS],
    [MORE, 0, LESS],
    [0, BIG, SMALL],
    [SMALL, 0, BIG],
    [0, BIG, SMALL],
]
TWO_EACH = [[1, 0, 0], [MORE, 0, LESS], [0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0]]
FIRST_IS_PADDING = torch.tensor([1, 0, 0, 0, 0, 0])
TRAINING, CAPACITY = True, "expert_capacity"
FRACTION = "moe_eval_capacity_token_fraction"
# Spec 4.8: mode, configuration, padding, gates.
VECTORS = {
    "evaluation": (False, {}, None, NOTHING_DROPPED),
    "training with room for two": (TRAINING, {CAPACITY: 2}, None, TWO_EACH),
    "gates before dropping": (
        TRAINING,
        {CAPACITY: 2, "normalize_router_prob_before_dropping": True},
        None,
        [[BIG, 0, 0], [MORE, 0, LESS], [0, 0, 0], [0, BIG, 0], [0, 0, BIG], [0, BIG, 0]],
    ),
    "confident tokens first": (
        TRAINING,
        {CAPACITY: 2, "batch_prioritized_routing": True},
        None,
        [[0, 0, 0], [1, 0, 0], [MORE, 0, LESS], [0, 1, 0], [0, 0, 1], [0, 1, 0]],
    ),
    "the first token is padding": (
        TRAINING,
        {CAPACITY: 2},
        FIRST_IS_PADDING,
        [[0, 0, 0], [MORE, 0, LESS], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0]],
    ),
    "padding is routed": (
        TRAINING,
        {CAPACITY: 2, "router_ignore_padding_tokens": True},
        FIRST_IS_PADDING,
        TWO_EACH,
    ),
    "fairseq's capacity": (
        TRAINING,
        {CAPACITY: None},
        None,
        [*NOTHING_DROPPED[:5], [0, 1, 0]],
    ),
    "half of the tokens in evaluation": (
        False,
        {FRACTION: 0.5},
        None,
        [*NOTHING_DROPPED[:3], [0, 1, 0], [0, 0, 1], [0, 1, 0]],
    ),
    "the capacity of training in evaluation": (
        False,
        {FRACTION: -1.0, CAPACITY: 2},
        None,
        TWO_EACH,
    ),
}


def router_of(training=False, **changes):
    router = NllbMoeTop2Router(config_of("moe", **{"num_experts": 3} | changes))
    return router.train(training)


@pytest.mark.parametrize("case", VECTORS)
def test_tokens_go_where_the_specification_says(case):
    training, changes, padding, expected = VECTORS[case]
    router = router_of(training, **changes)
    given = LOGITS.clone()
    mask, gates = router.route_tokens(given, padding_mask=padding)
    torch.testing.assert_close(gates, torch.tensor(expected).float(), rtol=0, atol=5e-7)
    # A mask, not an index: 1 where the first choice found room.
    firsts = LOGITS.argmax(1)
    found_room = (gates[torch.arange(6), firsts] > 0).long()
    assert mask.dtype == torch.int64
    assert torch.equal(mask, torch.nn.functional.one_hot(firsts, 3) * found_room[:, None])
    assert torch.equal(given, LOGITS)


@pytest.mark.parametrize("input_dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_gates_have_the_dtype_of_the_input(input_dtype):
    mask, gates = router_of().route_tokens(LOGITS, input_dtype)
    assert gates.dtype == input_dtype
    expected = torch.tensor(NOTHING_DROPPED).to(input_dtype)
    torch.testing.assert_close(
        gates, expected, rtol=0, atol=5e-3 if input_dtype.itemsize < 4 else 1e-6
    )
    assert mask.sum(1).tolist() == [1] * 6


# Two sentences of three tokens; the first token of each is padding.
PADDED = torch.tensor([[True, False, False], [True, False, False]])
ADDED = torch.where(PADDED, torch.finfo(torch.float32).min, 0.0)


@pytest.mark.parametrize(
    "padding",
    [
        PADDED,
        PADDED.long(),
        PADDED.flatten(),
        # Added to scores: of four dimensions the last row counts.
        ADDED[:, None, None],
        torch.cat([torch.zeros(2, 1, 2, 3), ADDED[:, None, None]], dim=2),
    ],
    ids=["(B, S) bool", "(B, S) int", "(T,)", "(B, 1, 1, S)", "(B, 1, S, S)"],
)
def test_padding_is_understood_in_every_form(padding):
    mask, gates = router_of(TRAINING, expert_capacity=2).route_tokens(LOGITS, padding_mask=padding)
    # First choices of the rest fill expert 0 and half of 2; the second ones' order decides.
    expected = [[0, 0, 0], [MORE, 0, LESS], [1, 0, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0]]
    torch.testing.assert_close(gates, torch.tensor(expected).float(), rtol=0, atol=5e-7)
    assert mask.tolist() == [[0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0]]


def test_padding_of_too_few_tokens_is_refused():
    with pytest.raises(InputError, match=r"padding_mask.*\(5,\).*6 tokens"):
        router_of().route_tokens(LOGITS, padding_mask=torch.zeros(5))


def test_evaluation_leaves_no_trace_in_the_capacity_of_training():
    router = router_of(TRAINING, expert_capacity=2)
    before = router.route_tokens(LOGITS)
    router.eval().route_tokens(torch.cat([LOGITS] * 10))
    assert router.expert_capacity == 2
    after = router.train().route_tokens(LOGITS)
    assert torch.equal(after[1], before[1])


def test_documented_attributes_are_those_that_act():
    config = config_of("moe", num_experts=3, expert_capacity=7, router_dtype="bfloat16")
    router = NllbMoeTop2Router(config)
    assert (router.num_experts, router.expert_capacity, router.dtype) == (3, 7, torch.bfloat16)
    assert router.second_expert_policy == "all"
    assert not router.router_ignore_padding_tokens
    assert not router.batch_prioritized_routing
    assert not router.normalize_router_prob_before_dropping
    assert router.moe_eval_capacity_token_fraction == 1.0
    router.dtype = torch.float32
    router.expert_capacity = 2
    expected = torch.tensor(TWO_EACH).float()
    torch.testing.assert_close(router.train().route_tokens(LOGITS)[1], expected, rtol=0, atol=5e-7)
    router.batch_prioritized_routing = True
    assert not router.route_tokens(LOGITS)[1][0].any()
    with pytest.raises(AttributeError, match="nonsense"):
        router.nonsense  # noqa: B018


def test_sampling_adds_its_noise_to_the_logits_it_is_given():
    router = router_of(second_expert_policy="sampling")
    given = LOGITS.clone()
    torch.manual_seed(3)
    noise = torch.distributions.Gumbel(0.0, 1.0).rsample(LOGITS.shape)
    torch.manual_seed(3)
    mask, gates = router.route_tokens(given)
    torch.testing.assert_close(given, LOGITS + noise)
    # First choices are made before the noise.
    assert torch.equal(mask.argmax(1), LOGITS.argmax(1))
    others = (LOGITS + noise).scatter(1, LOGITS.argmax(1)[:, None], -torch.inf)
    assert torch.equal((gates * (1 - mask)).argmax(1), others.argmax(1))


def test_sampling_does_not_write_to_logits_that_want_a_gradient():
    router = router_of(second_expert_policy="sampling")
    given = LOGITS.clone().requires_grad_()
    router.route_tokens(given)[1].square().sum().backward()
    assert torch.equal(given, LOGITS)
    assert given.grad.any()


def test_random_keeps_a_second_choice_by_its_probability():
    router = router_of(second_expert_policy="random")
    kept = 0
    for seed in range(300):
        torch.manual_seed(seed)
        _, gates = router.route_tokens(LOGITS)
        kept += (gates > 0).sum(1) - 1
    probability = (2 * LOGITS.softmax(1).topk(2).values[:, 1]).clamp(max=1)
    torch.testing.assert_close(kept / 300, probability, rtol=0, atol=0.08)
    torch.manual_seed(9)
    drawn = torch.rand(6)
    torch.manual_seed(9)
    _, gates = router.route_tokens(LOGITS)
    assert torch.equal((gates > 0).sum(1) == 2, probability > drawn)


def test_a_router_scores_tokens_itself():
    router = router_of(router_bias=True)
    hidden = torch.randn(2, 3, 16)
    scores = hidden.flatten(0, 1) @ router.classifier.weight.T + router.classifier.bias
    padding = torch.tensor([[0, 0, 1], [0, 0, 0]])
    found, expected = router(hidden, padding), router.route_tokens(scores, padding_mask=padding)
    torch.testing.assert_close(found, expected)
    assert set(router.state_dict()) == {"classifier.weight", "classifier.bias"}
    assert "classifier.bias" not in router_of().state_dict()


def test_a_router_computes_in_its_dtype_and_keeps_its_weights():
    router = router_of().half()
    hidden = torch.randn(2, 3, 16).half()
    mask, gates = router(hidden)
    scores = hidden.float().flatten(0, 1) @ router.classifier.weight.float().T
    expected = router.route_tokens(scores, torch.float16)
    assert torch.equal(gates, expected[1])
    assert torch.equal(mask, expected[0])
    # The published class casts them for good in its first call.
    assert router.classifier.weight.dtype == torch.float16


def test_a_router_is_drawn_as_a_linear_layer_alone_is():
    # So that what is drawn after it is what users' seeds gave them.
    torch.manual_seed(4)
    router = NllbMoeTop2Router(config_of("moe"))
    after = torch.rand(3)
    torch.manual_seed(4)
    expected = torch.nn.Linear(16, 4, bias=False)
    assert torch.equal(router.classifier.weight, expected.weight)
    assert torch.equal(after, torch.rand(3))


def sparse_layer(**changes):
    torch.manual_seed(2)
    return NllbMoeSparseMLP(config_of("moe", **changes), 12).eval()


@pytest.mark.parametrize("padding", [False, None, torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0]])])
def test_a_sparse_layer_returns_the_mixture_and_what_its_router_said(padding):
    layer = sparse_layer()
    hidden = torch.randn(2, 4, 16)
    mixture, router_output = layer(hidden, padding)
    probs, first = router_output
    given = padding if isinstance(padding, torch.Tensor) else None
    mask, gates = layer.router(hidden, given)
    assert isinstance(router_output, tuple)
    assert torch.equal(probs, gates)
    assert torch.equal(first, mask.argmax(1))
    expected = torch.zeros(8, 16)
    for index, expert in enumerate(layer.experts.values()):
        expected += 0.8 * gates[:, index, None] * expert(hidden.flatten(0, 1))
    torch.testing.assert_close(mixture, expected.view(2, 4, 16))
    assert mixture[0, 3].any() == (given is None)


def test_a_sparse_layer_has_the_documented_attributes():
    layer = sparse_layer(moe_token_dropout=0.3)
    assert (layer.num_experts, layer.moe_token_dropout) == (4, 0.3)
    assert list(layer.experts) == ["expert_0", "expert_1", "expert_2", "expert_3"]
    assert layer.router.num_experts == 4


def test_the_mixture_of_a_sparse_layer_can_be_trained():
    layer = sparse_layer().train()
    layer(torch.randn(1, 40, 16))[0].square().mean().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert layer.router.classifier.weight.grad.any()


def test_router_outputs_of_a_model_name_each_layer():
    model = build("moe")
    with torch.no_grad():
        output = model(**TRAINING_BATCH, output_router_logits=True)
    assert output.encoder_router_logits[0] is None
    for side, layer, tokens in (("encoder", 1, 10), ("decoder", 0, 8), ("decoder", 1, 8)):
        router = output[f"{side}_router_logits"][layer]
        assert type(router) is RouterOutput
        probs, first = router
        assert probs.shape == (tokens, 4)
        assert torch.equal(probs.argmax(1), first)
    # The last two source tokens are padding and claim nothing.
    assert not output.encoder_router_logits[1][0][-2:].any()


@pytest.mark.parametrize("policy", ["all", "sampling", "random"])
def test_every_policy_runs_in_a_model(policy):
    model = build("moe", second_expert_policy=policy).train()
    model(**TRAINING_BATCH, output_router_logits=True).loss.backward()
    assert model.model.decoder.layers[0].ffn.router.classifier.weight.grad.any()


def test_an_unknown_policy_is_refused():
    with pytest.raises(ConfigError, match="second_expert_policy"):
        router_of(second_expert_policy="best")
