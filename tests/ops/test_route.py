import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe_mt.errors import ConfigError
from moe_mt.ops import expert_capacity, route
from moe_mt.ops.backend import use_backend
from moe_mt.ops.route import NORMALIZATIONS, route_eager
from tests.closeness import assert_near

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
    normalize="after",
    batch_prioritized=False,
    noise=None,
):
    """The rules of ``route`` one token and one claim at a time; returns the (T, E) matrix."""
    tokens, num_experts = logits.shape
    probs = logits.softmax(-1)
    chosen = choose_by_hand(logits, top_k, noise if policy == "sampling" else None)
    gates = [[probs[t, e] for e in chosen[t]] for t in range(tokens)]
    if normalize == "before":
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
    if normalize == "after":
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
        {"normalize": "before"},
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
        "normalize": "before" if case["normalize_before_dropping"] else "after",
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
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("capacity", [None, 1, 3])
def test_against_a_loop_over_tokens(policy, normalize, prioritized, capacity):
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
            "normalize": normalize,
            "batch_prioritized": prioritized,
            "noise": None if policy == "all" else torch.rand(shape, generator=generator),
        }
        found = combine_weights(*route(logits, **options), experts)
        expected = route_by_hand(logits, **options)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("capacity", [None, 2])
def test_gradient_of_the_router_logits(normalize, capacity):
    logits = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(7, 4, dtype=torch.float64)
    options = {"capacity": capacity, "normalize": normalize}
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
@pytest.mark.parametrize("options", [{}, {"groups": 3, "batch_prioritized": True}], ids=str)
def test_no_token_at_all(top_k, options):
    padding = torch.zeros(0, dtype=torch.bool)
    expert_ids, gates = route(
        torch.zeros(0, 4), capacity=0, top_k=top_k, padding=padding, **options
    )
    assert expert_ids.shape == gates.shape == (0, top_k)
    assert expert_ids.dtype == torch.int32


@pytest.mark.parametrize("top_k", [1, 3])
def test_gates_that_are_never_normalised_are_the_probabilities(top_k):
    logits = torch.randn(20, 5)
    expert_ids, gates = route(logits, top_k=top_k, capacity=4, normalize="never")
    probs, best = logits.softmax(-1).topk(top_k)
    kept = expert_ids < 5
    assert kept.any()
    assert not kept.all()
    assert torch.equal(expert_ids[kept], best.int()[kept])
    assert torch.equal(gates, probs.masked_fill(~kept, 0))


@pytest.mark.parametrize(
    "options", [{}, {"batch_prioritized": True}, {"policy": "random"}], ids=str
)
def test_every_group_counts_its_claims_by_itself(options):
    logits = torch.randn(21, 4)
    tensors = {"padding": torch.rand(21) < 0.2, "noise": torch.rand(21)}
    options = {"capacity": 2, "top_k": 2, **options}
    expert_ids, gates = route(logits, groups=3, **options, **tensors)
    parts = [
        route(one, **options, padding=padding, noise=noise)
        for one, padding, noise in zip(
            logits.split(7), tensors["padding"].split(7), tensors["noise"].split(7), strict=True
        )
    ]
    assert torch.equal(expert_ids, torch.cat([part[0] for part in parts]))
    assert torch.equal(gates, torch.cat([part[1] for part in parts]))
    # The capacity was at work, and not as that of one group.
    assert ((expert_ids == 4) & ~tensors["padding"][:, None]).any()
    assert not torch.equal(expert_ids, route(logits, **options, **tensors)[0])


def test_a_capacity_no_smaller_than_a_group_drops_nothing():
    # Six tokens in two groups: three claim the same expert in each.
    expert_ids, _ = route(torch.zeros(6, 4), capacity=3, groups=2)
    assert expert_ids.tolist() == [[0, 1]] * 6


def test_a_padded_token_of_nan_claims_nothing_and_changes_no_other():
    logits = torch.randn(6, 4)
    padding = torch.tensor([False, False, True, False, False, False])
    poisoned = logits.clone()
    poisoned[2] = torch.nan
    for prioritized, normalize in itertools.product((False, True), NORMALIZATIONS):
        options = {"capacity": 2, "batch_prioritized": prioritized, "normalize": normalize}
        options["padding"] = padding
        expert_ids, gates = route(poisoned, **options)
        expected_ids, expected_gates = route(logits, **options)
        assert torch.equal(expert_ids, expected_ids)
        assert torch.equal(gates, expected_gates)
        assert expert_ids[2].tolist() == [4, 4]
        assert gates[2].tolist() == [0, 0]


def test_a_padded_token_of_nan_has_no_gradient():
    logits = torch.randn(3, 4)
    logits[1] = torch.nan
    logits.requires_grad_()
    padding = torch.tensor([False, True, False])
    for normalize in NORMALIZATIONS:
        gates = route_eager(logits, padding=padding, normalize=normalize)[1]
        (grad,) = torch.autograd.grad(gates[:, 0].sum(), logits)
        assert (grad[1] == 0).all()
        assert grad.isfinite().all()
        assert grad.any()


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
        ({"normalize": "sometimes"}, "'sometimes'.*never"),
        ({"groups": 2}, "groups is 2.*3 tokens"),
        ({"groups": 0}, "groups is 0"),
        ({"policy": "random"}, "noise"),
        ({"policy": "random", "noise": torch.rand(4)}, r"noise is \(4,\).*needs \(3,\)"),
        ({"policy": "sampling", "noise": torch.rand(3)}, r"noise is \(3,\).*needs \(3, 4\)"),
        ({"padding": torch.zeros(4, dtype=torch.bool)}, r"bool \(4,\); it must be bool \(3,\)"),
        ({"padding": torch.zeros(3)}, "padding is torch.float32"),
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


# Tokens, experts and choices of each case of the kernel, with its reason.
SHAPES = {
    "no token": (0, 4, 2),
    "one token, its one expert (K = E = 1)": (1, 1, 1),
    "every expert chosen (K = E)": (7, 2, 2),
    "K and E that are no power of two": (33, 5, 3),
    "the 54B's experts, one token more than two blocks": (33, 128, 2),
    "eight experts, one token more than two blocks, K = 4": (129, 8, 4),
    "the most choices": (7, 9, 8),
    "one choice a token": (33, 8, 1),
    "more experts than a block has scores": (2, 2500, 2),
}

CAPACITY_SHAPES = [
    "every expert chosen (K = E)",
    "K and E that are no power of two",
    "the 54B's experts, one token more than two blocks",
    "one choice a token",
]

POLICY_OPTIONS = [
    {"policy": "all"},
    {"policy": "sampling"},
    {"policy": "random"},
    {"policy": "all", "normalize": "before"},
    {"policy": "random", "normalize": "before"},
    {"policy": "all", "normalize": "never"},
    {"policy": "random", "normalize": "never"},
]


def case(shape, device, *, policy="all", padded=0.3, **options):
    """Logits, and the options with the noise that the policy needs."""
    tokens, experts, top_k = shape
    generator = torch.Generator().manual_seed(7)
    logits = 2 * torch.randn(tokens, experts, generator=generator)
    noise = torch.rand((tokens, experts) if policy == "sampling" else tokens, generator=generator)
    padding = torch.rand(tokens, generator=generator) < padded
    return logits.to(device).requires_grad_(), {
        "top_k": top_k,
        "policy": policy,
        "noise": None if policy == "all" else noise.to(device),
        "padding": padding.to(device) if padded else None,
        **options,
    }


def grad_of(gates):
    return torch.randn(gates.shape, generator=torch.Generator().manual_seed(8)).to(gates)


def with_gradient(operation, logits, options):
    expert_ids, gates = operation(logits, **options)
    (grad,) = torch.autograd.grad(gates, logits, grad_of(gates))
    return expert_ids, gates, grad


def assert_kernel_is_definition(logits, options):
    """Compare the choices exactly and the floats closely; return the definition's result."""
    with use_backend("triton"):
        expert_ids, gates, grad = with_gradient(route, logits, options)
    expected = with_gradient(route_eager, logits, options)
    assert expert_ids.dtype == torch.int32
    assert torch.equal(expert_ids, expected[0])
    assert_near(gates, expected[1], torch.float32, "gates")
    assert (gates[expert_ids == logits.shape[1]] == 0).all()
    assert grad.shape == logits.shape
    # As a share of what flows in: where gates hardly move, what flows out is all rounding.
    assert (grad - expected[2]).norm() <= 1e-6 * grad_of(gates).norm()
    return expected


@pytest.mark.triton
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", POLICY_OPTIONS, ids=str)
def test_kernel_is_its_definition_without_a_capacity(kernel_device, shape, options):
    assert_kernel_is_definition(*case(SHAPES[shape], kernel_device, **options))


@pytest.mark.triton
@pytest.mark.parametrize("shape", CAPACITY_SHAPES)
@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("options", POLICY_OPTIONS, ids=str)
def test_kernel_is_its_definition_under_a_capacity(kernel_device, shape, prioritized, options):
    experts = SHAPES[shape][1]
    logits, options = case(SHAPES[shape], kernel_device, **options)
    free = route_eager(logits, **options)[0]
    load = torch.bincount(free.flatten().cpu(), minlength=experts)[:experts].max().item()
    # At work, and not on one claim alone.
    options = {**options, "capacity": load // 2, "batch_prioritized": prioritized}
    expert_ids, _, _ = assert_kernel_is_definition(logits, options)
    assert (expert_ids == experts).sum() > (free == experts).sum()


@pytest.mark.triton
@pytest.mark.parametrize("capacity", [0, 1, 32, 33, 34, None])
def test_kernel_at_the_edges_of_the_capacity(kernel_device, capacity):
    # All tokens want the same two experts: 33 claims each.
    logits = torch.tensor([5.0, 1, 4, 0, 0], device=kernel_device).repeat(33, 1).requires_grad_()
    expert_ids, gates = route(logits, capacity=capacity)
    expected = route_eager(logits, capacity=capacity)
    assert torch.equal(expert_ids, expected[0])
    assert torch.allclose(gates, expected[1])
    assert (expert_ids[:, 0] == 0).sum() == min(33, 33 if capacity is None else capacity)


@pytest.mark.triton
@pytest.mark.parametrize("capacity", [None, 3, 11])
def test_groups_under_kernels_are_those_of_the_definition(kernel_device, capacity):
    logits, options = case((33, 5, 2), kernel_device, capacity=capacity, groups=3)
    expert_ids, _, _ = assert_kernel_is_definition(logits, options)
    claims = expert_ids[~options["padding"]]
    assert (claims == 5).any() == (capacity == 3)


@pytest.mark.triton
@pytest.mark.parametrize("prioritized", [False, True])
def test_kernel_with_every_token_padded(kernel_device, prioritized):
    options = {"padded": 1.0, "capacity": 3, "batch_prioritized": prioritized}
    logits, options = case((33, 8, 2), kernel_device, **options)
    for capacity in (3, None):
        options["capacity"] = capacity
        expert_ids, gates, grad = with_gradient(route, logits, options)
        assert (expert_ids == 8).all()
        assert (gates == 0).all()
        assert (grad == 0).all()


NAN, INFINITE = float("nan"), float("inf")

ODD_LOGITS = {
    "all equal": [0.0] * 6,
    "all negative": [-3.0, -1.0, -1.5, -9.0, -1.0, -2.0],
    "huge": [1e30, 3e38, -3e38, 3e38, 1e30, 0.0],
    "hugely negative": [-3e38, -1e38, -2e38, -1e38, -3e38, -3e38],
    "equal ones apart": [1.0, 2.0, 0.0, 2.0, 2.0, 1.0],
    "signed zeros are equal": [-0.0, 0.0, -0.0, 0.0, -1.0, -1.0],
    "denormal": [1e-42, 2e-42, 0.0, 3e-42, 0.0, 0.0],
    "a NaN is the largest": [1.0, 2.0, NAN, INFINITE, 0.0, 0.0],
    "NaN alone": [NAN] * 6,
    "two NaN": [0.0, 9.0, NAN, 1.0, NAN, 2.0],
    "infinite": [0.0, 1.0, INFINITE, 2.0, INFINITE, 3.0],
    "all but one minus infinity": [-INFINITE, -INFINITE, 3.0, *[-INFINITE] * 3],
    "minus infinity alone": [-INFINITE] * 6,
}


@pytest.mark.triton
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize("row", ODD_LOGITS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("capacity", [None, 2])
def test_kernel_chooses_like_argmax_from_odd_logits(kernel_device, row, normalize, capacity):
    logits = torch.randn(5, 6)
    logits[[1, 3]] = torch.tensor(ODD_LOGITS[row])
    logits = logits.to(kernel_device)
    for top_k in (1, 2, 6):
        options = {"top_k": top_k, "normalize": normalize, "capacity": capacity}
        expert_ids, gates = route(logits, **options)
        expected_ids, expected_gates = route_eager(logits, **options)
        assert torch.equal(expert_ids, expected_ids)
        torch.testing.assert_close(gates, expected_gates, rtol=1e-5, atol=1e-30, equal_nan=True)
        assert expert_ids.min() >= 0
        assert expert_ids.max() <= 6


@pytest.mark.triton
@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("capacity", [None, 3])
def test_kernel_keeps_a_padded_nan_to_its_token(kernel_device, prioritized, capacity):
    options = {"padded": 0.3, "capacity": capacity, "batch_prioritized": prioritized}
    logits, options = case((7, 4, 2), kernel_device, **options)
    options["padding"][2] = True
    poisoned = logits.detach().clone()
    poisoned[2] = torch.nan
    expected = with_gradient(route, logits, options)
    found = with_gradient(route, poisoned.requires_grad_(), options)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)
    assert (found[2][2] == 0).all()


@pytest.mark.triton
def test_kernel_keeps_a_nan_to_its_token(kernel_device):
    logits, options = case((7, 4, 2), kernel_device, padded=0)
    poisoned = logits.detach().clone()
    poisoned[2, 1] = torch.nan
    others = torch.arange(7, device=kernel_device) != 2
    found = with_gradient(route, poisoned.requires_grad_(), options)
    expected = with_gradient(route, logits, options)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine[others], theirs[others])
    assert found[0][2, 0] == 1
    assert found[1][2].isnan().all()


@pytest.mark.triton
def test_no_gradient_flows_through_gates_too_small_to_normalise(kernel_device):
    # Where the kept probabilities are below epsilon, the definition divides by the constant.
    # The first claim of token 1 goes beyond the capacity; what is left is about epsilon / 2.
    logits = [[9.0, 0, 0, 0], [18.5, 0, 1, 2], [1.0, 4, 3, 2]]
    logits = torch.tensor(logits, device=kernel_device).requires_grad_()
    options = {"capacity": 1, "top_k": 2}
    expected_ids, expected_gates, expected_grad = assert_kernel_is_definition(logits, options)
    assert expected_ids[1].tolist() == [4, 3]
    assert 0.3 < expected_gates[1, 1] < 0.9
    # By itself too: beside the other tokens' it would not be seen.
    grad = with_gradient(route, logits, options)[2]
    torch.testing.assert_close(grad[1], expected_grad[1], rtol=1e-5, atol=0)


@pytest.mark.triton
@pytest.mark.parametrize("policy", ["all", "sampling", "random"])
def test_kernel_takes_strided_inputs(kernel_device, policy):
    logits, options = case((7, 5, 2), kernel_device, policy=policy, capacity=2)
    expected = with_gradient(route_eager, logits, options)
    wide = torch.zeros(7, 12, device=kernel_device)[:, 3:8].copy_(logits.detach())
    columns = logits.detach().T.contiguous().T
    options["padding"] = options["padding"].repeat_interleave(2)[::2]
    if policy == "sampling":
        options["noise"] = torch.zeros(7, 9, device=kernel_device)[:, :5].copy_(options["noise"])
    if policy == "random":
        options["noise"] = torch.zeros(14, device=kernel_device)[::2].copy_(options["noise"])
    for strided in (wide, columns):
        assert not strided.is_contiguous()
        expert_ids, gates, grad = with_gradient(route, strided.requires_grad_(), options)
        assert torch.equal(expert_ids, expected[0])
        assert_near(gates, expected[1], torch.float32)
        assert_near(grad, expected[2], torch.float32)


@pytest.mark.triton
def test_kernel_s_gradient_takes_an_expanded_one(kernel_device):
    logits, options = case((7, 5, 2), kernel_device, capacity=2, normalize="before")
    (mine,) = torch.autograd.grad(route(logits, **options)[1].sum(), logits)
    (theirs,) = torch.autograd.grad(route_eager(logits, **options)[1].sum(), logits)
    assert theirs.abs().max() > 1e-3
    assert_near(mine, theirs, torch.float32)


@pytest.mark.triton
@pytest.mark.parametrize("prioritized", [False, True])
def test_kernel_gives_the_same_bits_every_time(kernel_device, prioritized):
    options = {"capacity": 9, "batch_prioritized": prioritized}
    logits, options = case((129, 8, 2), kernel_device, **options)
    for mine, again in zip(
        with_gradient(route, logits, options), with_gradient(route, logits, options), strict=True
    ):
        assert torch.equal(mine, again)


@pytest.mark.triton
def test_equal_tokens_claim_in_order_even_if_prioritised(kernel_device):
    logits = torch.tensor([2.0, 0, 1], device=kernel_device).repeat(20, 1)
    for prioritized in (False, True):
        expert_ids, _ = route(logits, capacity=4, batch_prioritized=prioritized)
        assert expert_ids[:4].tolist() == [[0, 2]] * 4
        assert (expert_ids[4:] == 3).all()


@pytest.mark.triton
def test_kernel_against_the_published_router(kernel_device):
    # One case of every policy, normalisation, priority and padding, with a capacity.
    names = ("policy", "normalize_before_dropping", "batch_prioritized", "padding")
    cases = [c for c in CASES if c["training"] and c["experts"] == 7]
    chosen = {tuple(c[name] for name in names): c for c in cases}
    assert len(chosen) == 5 * 2 * 2
    for published in chosen.values():
        logits, options = case_arguments(published)
        options = {
            name: value.to(kernel_device) if isinstance(value, torch.Tensor) else value
            for name, value in options.items()
        }
        expert_ids, gates = route(logits.to(kernel_device), **options)
        found = combine_weights(expert_ids.cpu(), gates.cpu(), published["experts"])
        expected = TENSORS[f"combine_{published['number']}"]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=str(published))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_in_half_precision_are_the_definition_s(kernel_device, dtype):
    logits, options = case((33, 8, 2), kernel_device, capacity=5)
    logits = logits.detach().to(dtype)
    expert_ids, gates = route(logits, **options)
    expected_ids, expected_gates = route_eager(logits, **options)
    assert gates.dtype == dtype
    assert torch.equal(expert_ids, expected_ids)
    assert torch.equal(gates, expected_gates)


@pytest.mark.triton
@pytest.mark.parametrize("policy", ["all", "sampling", "random"])
@pytest.mark.parametrize("capacity", [None, 2])
def test_kernel_is_an_operator(kernel_device, policy, capacity):
    logits, options = case((7, 4, 2), kernel_device, policy=policy)
    given = (options["padding"], options["noise"], capacity, 2, policy, "after", True)
    torch.library.opcheck(torch.ops.moe_mt.route.default, (logits, *given))
    gates, expert_ids, choices = torch.ops.moe_mt.route(logits, *given)
    torch.library.opcheck(
        torch.ops.moe_mt.route_backward.default,
        (logits.detach(), expert_ids, choices, gates.detach(), "after"),
    )


@pytest.mark.triton
@pytest.mark.parametrize("dynamic", [None, True])
def test_kernel_compiles_whole(kernel_device, dynamic):
    def half_full(logits, noise):
        capacity = expert_capacity(logits.shape[0], 8, training=False, eval_fraction=0.25)
        return route(logits, capacity=capacity, policy="random", noise=noise)

    compiled = torch.compile(half_full, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (12, 40):
        logits, options = case((tokens, 8, 2), kernel_device, policy="random")
        given = {"noise": options["noise"]}
        found = with_gradient(compiled, logits, given)
        expected = with_gradient(half_full, logits, given)
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.triton
def test_kernel_in_inference_mode_and_on_the_meta_device(kernel_device):
    logits, options = case((7, 4, 2), kernel_device, padded=0, capacity=2)
    with torch.inference_mode():
        expert_ids, gates = route(logits, **options)
    assert torch.equal(expert_ids, route_eager(logits, **options)[0])
    expert_ids, gates = route(logits.detach().to("meta"), **options)
    assert expert_ids.is_meta
    assert expert_ids.dtype == torch.int32
    assert expert_ids.shape == gates.shape == (7, 2)


@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=pytest.mark.triton)])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_a_dropped_claim_of_a_nan_has_a_gate_of_zero(normalize, backend, request):
    # Beside a NaN, a dropped gate of zero divided by their sum would be NaN too.
    device = request.getfixturevalue("kernel_device") if backend == "triton" else "cpu"
    one = route if backend == "triton" else route_eager
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [0.0, 1.0, 2.0, torch.nan]], device=device)
    logits = logits[[0, 1, 1]]
    options = {"normalize": normalize}
    for capacity, noise in ((1, None), (None, torch.ones(3, device=device))):
        policy = "all" if noise is None else "random"
        expert_ids, gates = one(logits, capacity=capacity, policy=policy, noise=noise, **options)
        dropped = expert_ids == 4
        assert dropped[1:].any()
        assert not gates[dropped].any()
