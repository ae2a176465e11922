import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe_mt.errors import ConfigError
from moe_mt.ops import expert_capacity, route

GOLDENS = Path(__file__).parents[1] / "golden" / "models" / "router"
CASES = json.loads((GOLDENS / "cases.json").read_text())
TENSORS = load_file(GOLDENS / "router.safetensors")


def combine_weights(expert_ids, gates, num_experts):
    """The gates as a (T, E) matrix, dropped claims left out."""
    matrix = torch.zeros(expert_ids.shape[0], num_experts + 1, dtype=gates.dtype)
    return matrix.scatter_add(1, expert_ids.long(), gates)[:, :num_experts]


def choose_by_hand(logits, top_k, noise):
    """Each token's experts: the best, then the best of the rest, with noise if there is any."""
    chosen = []
    for t, row in enumerate(logits):
        first = max(range(len(row)), key=lambda e, row=row: row[e].item())
        scores = row if noise is None else row + noise[t]
        rest = [e for e in range(len(row)) if e != first]
        rest.sort(key=lambda e, scores=scores: -scores[e].item())
        chosen.append([first, *rest[: top_k - 1]])
    return chosen


def normalize_by_hand(row):
    total = torch.stack(row).sum()
    return [gate / total.clamp(min=torch.finfo(total.dtype).eps) for gate in row]


def route_by_hand(
    logits,
    *,
    capacity=None,
    top_k=2,
    padding=None,
    policy="all",
    normalize_before_dropping=False,
    batch_prioritized=False,
    noise=None,
):
    """The rules of ``route`` one token and one claim at a time; returns the (T, E) matrix."""
    tokens, num_experts = logits.shape
    probs = logits.softmax(-1)
    chosen = choose_by_hand(logits, top_k, noise if policy == "sampling" else None)
    gates = [[probs[t, e] for e in chosen[t]] for t in range(tokens)]
    if normalize_before_dropping:
        gates = [normalize_by_hand(row) for row in gates]
    turn = list(range(tokens))
    if batch_prioritized:
        turn.sort(key=lambda t: -probs[t].max().item())
    load = [0] * num_experts
    for k in range(top_k):
        for t in turn:
            claims = padding is None or not padding[t]
            if policy == "random" and k > 0:
                claims = claims and 2 * gates[t][k].item() > noise[t].item()
            load[chosen[t][k]] += bool(claims)
            if not claims or (capacity is not None and load[chosen[t][k]] > capacity):
                gates[t][k] = gates[t][k] * 0
    if not normalize_before_dropping:
        gates = [normalize_by_hand(row) for row in gates]
    matrix = torch.zeros_like(probs)
    for t, k in itertools.product(range(tokens), range(top_k)):
        matrix[t, chosen[t][k]] = matrix[t, chosen[t][k]] + gates[t][k]
    return matrix


SPEC_LOGITS = torch.tensor(
    [[2.0, 1, 0], [2.5, 0.5, 1], [3, 0, 1.5], [0, 2, 1], [1, 0, 2], [0.5, 2.5, 1.5]]
)
A, B, C, D = 0.7311, 0.2689, 0.8176, 0.1824
FULL = [[A, B, 0], [C, 0, D], [C, 0, D], [0, A, B], [B, 0, A], [0, A, B]]
TWO = [[1, 0, 0], [C, 0, D], [0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0]]
TWO_BEFORE = [[A, 0, 0], [C, 0, D], [0, 0, 0], [0, A, 0], [0, 0, A], [0, A, 0]]
TWO_PRIORITIZED = [[0, 0, 0], [1, 0, 0], [C, 0, D], [0, 1, 0], [0, 0, 1], [0, 1, 0]]
TWO_PADDED = [[0, 0, 0], [C, 0, D], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0]]
FOUR = [[A, B, 0], [C, 0, D], [C, 0, D], [0, A, B], [B, 0, A], [0, 1, 0]]
HALF = [[A, B, 0], [C, 0, D], [C, 0, D], [0, 1, 0], [0, 0, 1], [0, 1, 0]]
FIRST_PADDED = torch.tensor([True, False, False, False, False, False])

# Computed once by transformers 4.36's route_tokens: capacity options, route options, result.
VECTORS = {
    "evaluation, fraction 1": ({"training": False}, {}, FULL),
    "training, capacity 2": ({"training": True, "fixed": 2}, {}, TWO),
    "training, capacity 2, normalised before": (
        {"training": True, "fixed": 2},
        {"normalize_before_dropping": True},
        TWO_BEFORE,
    ),
    "training, capacity 2, prioritised": (
        {"training": True, "fixed": 2},
        {"batch_prioritized": True},
        TWO_PRIORITIZED,
    ),
    "training, capacity 2, first token padded": (
        {"training": True, "fixed": 2},
        {"padding": FIRST_PADDED},
        TWO_PADDED,
    ),
    "training, no fixed capacity": ({"training": True}, {}, FOUR),
    "evaluation, fraction 0.5": ({"training": False, "eval_fraction": 0.5}, {}, HALF),
    "evaluation, negative fraction": (
        {"training": False, "eval_fraction": -1.0, "fixed": 2},
        {},
        TWO,
    ),
}


@pytest.mark.parametrize("name", VECTORS)
def test_published_vectors(name):
    capacity_options, options, expected = VECTORS[name]
    capacity = expert_capacity(6, 3, **capacity_options)
    found = combine_weights(*route(SPEC_LOGITS, capacity=capacity, **options), 3)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=5e-5)


def case_arguments(case):
    logits = TENSORS[f"logits_{case['experts']}"]
    capacity = expert_capacity(
        len(logits),
        case["experts"],
        training=case["training"],
        eval_fraction=case.get("fraction", 1.0),
        fixed=case.get("fixed"),
    )
    return logits, {
        "capacity": capacity,
        "padding": TENSORS["padding"] if case["padding"] else None,
        "policy": case["policy"],
        "normalize_before_dropping": case["normalize_before_dropping"],
        "batch_prioritized": case["batch_prioritized"],
        "noise": TENSORS.get(f"noise_{case['number']}"),
    }


def test_sweep_covers_every_combination_the_published_router_gets_right():
    # 3 sizes, 5 capacities, padding or not, priority or not; policies by normalisation: 3 * 2 - 1.
    assert len(CASES) == 3 * 5 * 2 * 2 * 5


@pytest.mark.parametrize("policy", ["all", "sampling", "random"])
@pytest.mark.parametrize("experts", [2, 4, 7])
def test_sweep_against_the_published_router(policy, experts):
    cases = [c for c in CASES if c["policy"] == policy and c["experts"] == experts]
    for case in cases:
        logits, options = case_arguments(case)
        found = combine_weights(*route(logits, **options), experts)
        expected = TENSORS[f"combine_{case['number']}"]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=str(case))


@pytest.mark.parametrize("policy", ["all", "sampling", "random"])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("capacity", [None, 1, 3])
def test_against_a_loop_over_tokens(policy, before, prioritized, capacity):
    # Holds also "random" with normalisation before dropping, where the published router differs.
    for seed, (tokens, experts, top_k) in enumerate([(9, 4, 2), (5, 3, 3), (6, 5, 1), (1, 2, 2)]):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(tokens, experts, generator=generator) * 2
        shape = (tokens, experts) if policy == "sampling" else (tokens,)
        options = {
            "capacity": capacity,
            "top_k": top_k,
            "padding": torch.rand(tokens, generator=generator) < 0.3,
            "policy": policy,
            "normalize_before_dropping": before,
            "batch_prioritized": prioritized,
            "noise": None if policy == "all" else torch.rand(shape, generator=generator),
        }
        found = combine_weights(*route(logits, **options), experts)
        expected = route_by_hand(logits, **options)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("capacity", [None, 2])
def test_gradient_of_the_router_logits(before, capacity):
    logits = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(7, 4, dtype=torch.float64)
    options = {"capacity": capacity, "normalize_before_dropping": before}
    ours = combine_weights(*route(logits, **options), 4)
    theirs = route_by_hand(logits, **options)
    (mine,) = torch.autograd.grad((ours * weights).sum(), logits)
    (expected,) = torch.autograd.grad((theirs * weights).sum(), logits)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)


def test_no_expert_exceeds_its_capacity_and_kept_gates_sum_to_one():
    logits = torch.randn(200, 5) + torch.tensor([3.0, 0, 0, 0, 0])
    expert_ids, gates = route(logits, capacity=30)
    load = torch.bincount(expert_ids.flatten().long(), minlength=6)
    # The popular expert is full, so the capacity was at work.
    assert load[0] == 30
    assert load[:5].max() <= 30
    reached = (expert_ids < 5).any(-1)
    assert not reached.all()
    torch.testing.assert_close(gates[reached].sum(-1), torch.ones(int(reached.sum())))
    assert (gates[expert_ids == 5] == 0).all()


def test_equal_logits_take_the_lowest_experts():
    expert_ids, gates = route(torch.zeros(3, 6))
    assert expert_ids.tolist() == [[0, 1]] * 3
    torch.testing.assert_close(gates, torch.full((3, 2), 0.5))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_no_token_at_all(top_k):
    expert_ids, gates = route(torch.zeros(0, 4), capacity=0, top_k=top_k)
    assert expert_ids.shape == gates.shape == (0, top_k)
    assert expert_ids.dtype == torch.int32


def test_a_padded_token_of_nan_claims_nothing_and_changes_no_other():
    logits = torch.randn(6, 4)
    padding = torch.tensor([False, False, True, False, False, False])
    poisoned = logits.clone()
    poisoned[2] = torch.nan
    for prioritized in (False, True):
        options = {"capacity": 2, "padding": padding, "batch_prioritized": prioritized}
        expert_ids, gates = route(poisoned, **options)
        expected_ids, expected_gates = route(logits, **options)
        assert torch.equal(expert_ids, expected_ids)
        assert torch.equal(gates, expected_gates)
        assert expert_ids[2].tolist() == [4, 4]
        assert gates[2].tolist() == [0, 0]


def test_inputs_are_left_alone():
    # The published router adds its Gumbel noise to the caller's logits.
    logits = torch.randn(5, 3)
    before = logits.clone()
    route(logits, policy="sampling", noise=torch.rand(5, 3), capacity=2)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 5}, "4 experts"),
        ({"policy": "best"}, "'best'"),
        ({"policy": "random"}, "noise"),
    ],
)
def test_what_cannot_be_routed_is_named(options, message):
    with pytest.raises(ConfigError, match=message):
        route(torch.zeros(3, 4), **options)


@pytest.mark.parametrize(
    ("tokens", "options", "expected"),
    [
        # Evaluation: the fraction of all tokens, rounded up.
        (10, {"training": False}, 10),
        (10, {"training": False, "eval_fraction": 0.25}, 3),
        (0, {"training": False, "eval_fraction": 0.25}, 0),
        # Training: the fixed capacity, else twice the even share.
        (10, {"training": True, "fixed": 64}, 64),
        (4096, {"training": True}, 2 * math.ceil(4096 / 128)),
        # A fraction that is not positive means the training rule.
        (10, {"training": False, "eval_fraction": -1.0, "fixed": 5}, 5),
        (10, {"training": False, "eval_fraction": 0.0}, 2),
    ],
)
def test_capacity(tokens, options, expected):
    assert expert_capacity(tokens, 128, **options) == expected
