import pytest
import torch

from moe_mt.errors import ConfigError
from moe_mt.ops import expert_order
from moe_mt.ops.expert_order import expert_order_eager

CASES = {
    "every expert hit": ([[0, 1], [2, 0], [1, 2]], 3),
    "an expert with no token": ([[0, 3], [3, 0], [0, 3]], 4),
    "all tokens to one expert": ([[1], [1], [1], [1]], 3),
    "one token": ([[2, 0]], 3),
    "one choice a token (K = 1)": ([[2], [0], [1], [0]], 3),
    "every expert for every token (K = E)": ([[0, 1, 2], [2, 1, 0]], 3),
    "dropped claims carry the id E": ([[0, 3], [3, 3], [2, 0]], 3),
    "everything dropped": ([[2, 2], [2, 2]], 2),
    "no token at all": ([], 3),
}

# Tokens, experts, choices, smallest and largest expert id.
SHAPES = {
    "no token": (0, 4, 2, 0, 4),
    "one token": (1, 128, 2, 0, 127),
    "one expert": (33, 1, 1, 0, 1),
    "two experts, so that ranks are large": (33, 2, 2, 0, 2),
    "fewer claims than experts": (7, 128, 2, 0, 127),
    "experts that are no power of two": (33, 6, 2, 0, 6),
    "experts that are a power of two leave no room to count the dropped": (33, 16, 2, 0, 16),
    "all claims to the last expert": (33, 128, 4, 127, 127),
    "everything dropped": (33, 8, 2, 8, 8),
    "one block exactly": (64, 8, 2, 0, 8),
    "one claim more than the small block": (129, 8, 1, 0, 8),
    "two launches": (129, 128, 4, 0, 128),
    "two launches, all to one expert": (150, 8, 2, 3, 3),
    "two launches, everything dropped": (150, 8, 2, 8, 8),
    "more experts than a step of a count has rows for": (70, 1024, 4, 0, 1024),
}


def claims(name: str) -> tuple[torch.Tensor, int]:
    ids, num_experts = CASES[name]
    top_k = len(ids[0]) if ids else 2
    return torch.tensor(ids, dtype=torch.int32).view(len(ids), top_k), num_experts


def random_claims(tokens, num_experts, top_k, lowest=0, highest=None):
    highest = num_experts if highest is None else highest
    return torch.randint(lowest, highest + 1, (tokens, top_k), dtype=torch.int32)


def assert_is_the_order(found, expert_ids, num_experts):
    expected = expert_order_eager(expert_ids.cpu(), num_experts)
    for what, ours, theirs in zip(("order", "rows", "offsets"), found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.cpu(), theirs), f"{what}: {ours.tolist()} not {theirs.tolist()}"


@pytest.mark.parametrize("name", CASES)
def test_rows_are_grouped_by_expert_with_tokens_in_order(name):
    expert_ids, num_experts = claims(name)
    order, _, offsets = expert_order(expert_ids, num_experts)
    flat = expert_ids.flatten().tolist()
    by_hand = [
        claim for expert in range(num_experts + 1) for claim, e in enumerate(flat) if e == expert
    ]
    assert order.tolist() == by_hand
    assert offsets.tolist() == [sum(e < expert for e in flat) for expert in range(num_experts + 1)]


@pytest.mark.parametrize("name", CASES)
def test_rows_invert_the_order(name):
    expert_ids, num_experts = claims(name)
    order, rows, _ = expert_order(expert_ids, num_experts)
    assert rows.shape == expert_ids.shape
    assert order[rows.flatten()].tolist() == list(range(expert_ids.numel()))


def test_is_stable_where_an_unstable_sort_would_not_be():
    # More claims than fit a sorting network: 500 tokens that all want one of two experts.
    expert_ids = torch.randint(0, 2, (500, 1), dtype=torch.int32)
    order, _, offsets = expert_order(expert_ids, 2)
    first, second = order[: offsets[1]], order[offsets[1] :]
    assert (first.diff() > 0).all()
    assert (second.diff() > 0).all()


@pytest.mark.parametrize(
    "expert_ids",
    [torch.zeros(4, dtype=torch.int32), torch.zeros(4, 2)],
    ids=["one-dimensional", "floating point"],
)
def test_what_are_no_expert_ids_is_named(expert_ids):
    with pytest.raises(ConfigError, match=r"expert ids are .*\(T, K\)"):
        expert_order(expert_ids, 2)


@pytest.mark.triton
@pytest.mark.parametrize("name", SHAPES)
def test_kernel(name, kernel_device):
    tokens, num_experts, top_k, lowest, highest = SHAPES[name]
    expert_ids = random_claims(tokens, num_experts, top_k, lowest, highest).to(kernel_device)
    assert_is_the_order(expert_order(expert_ids, num_experts), expert_ids, num_experts)


@pytest.mark.triton
@pytest.mark.parametrize("block", [16, 32, 64, 256])
def test_kernel_gives_the_same_whatever_the_block(block, kernel_device):
    from moe_mt.kernels import expert_order as kernels

    expert_ids = random_claims(75, 8, 2).to(kernel_device)
    assert_is_the_order(kernels.expert_order(expert_ids, 8, block=block), expert_ids, 8)


@pytest.mark.triton
def test_kernel_takes_the_block_counts_in_steps(kernel_device, monkeypatch):
    from moe_mt.kernels import expert_order as kernels

    # As at a million claims: more blocks than one step reads the counts of.
    monkeypatch.setattr(kernels, "MOST_BLOCKS", 2)
    expert_ids = random_claims(40, 4, 2).to(kernel_device)
    assert_is_the_order(kernels.expert_order(expert_ids, 4, block=16), expert_ids, 4)


@pytest.mark.triton
@pytest.mark.parametrize("tokens", [40, 150], ids=["one launch", "two launches"])
def test_kernel_takes_ids_of_any_strides(tokens, kernel_device):
    wide = random_claims(tokens, 8, 6).to(kernel_device)
    for expert_ids in (wide[:, 1:5:2], wide[::3], wide[:, :2].T):
        assert not expert_ids.is_contiguous()
        assert_is_the_order(expert_order(expert_ids, 8), expert_ids, 8)


@pytest.mark.triton
@pytest.mark.parametrize("tokens", [0, 40, 150])
def test_kernel_as_an_operator(tokens, kernel_device):
    expert_ids = random_claims(tokens, 8, 2).to(kernel_device)
    torch.library.opcheck(torch.ops.moe_mt.expert_order.default, (expert_ids, 8))
    with torch.inference_mode():
        assert_is_the_order(expert_order(expert_ids, 8), expert_ids, 8)
    shapes = [t.shape for t in expert_order(expert_ids.to("meta"), 8)]
    assert shapes == [t.shape for t in expert_order(expert_ids, 8)]


@pytest.mark.triton
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_kernel_compiles_without_a_break(dynamic, kernel_device):
    compiled = torch.compile(expert_order, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (5, 9):
        expert_ids = random_claims(tokens, 4, 2).to(kernel_device)
        assert_is_the_order(compiled(expert_ids, 4), expert_ids, 4)
