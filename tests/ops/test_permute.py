import pytest
import torch

from moe_mt.ops import permute

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


def claims(name: str) -> tuple[torch.Tensor, int]:
    ids, num_experts = CASES[name]
    top_k = len(ids[0]) if ids else 2
    return torch.tensor(ids, dtype=torch.int32).view(len(ids), top_k), num_experts


@pytest.mark.parametrize("name", CASES)
def test_rows_are_grouped_by_expert_with_tokens_in_order(name):
    expert_ids, num_experts = claims(name)
    order, _, offsets = permute(expert_ids, num_experts)
    flat = expert_ids.flatten().tolist()
    by_hand = [
        claim for expert in range(num_experts + 1) for claim, e in enumerate(flat) if e == expert
    ]
    assert order.tolist() == by_hand
    assert offsets.tolist() == [sum(e < expert for e in flat) for expert in range(num_experts + 1)]


@pytest.mark.parametrize("name", CASES)
def test_rows_invert_the_order(name):
    expert_ids, num_experts = claims(name)
    order, rows, _ = permute(expert_ids, num_experts)
    assert rows.shape == expert_ids.shape
    assert order[rows.flatten()].tolist() == list(range(expert_ids.numel()))


def test_is_stable_where_an_unstable_sort_would_not_be():
    # More claims than fit a sorting network: 500 tokens that all want one of two experts.
    expert_ids = torch.randint(0, 2, (500, 1), dtype=torch.int32)
    order, _, offsets = permute(expert_ids, 2)
    first, second = order[: offsets[1]], order[offsets[1] :]
    assert (first.diff() > 0).all()
    assert (second.diff() > 0).all()
