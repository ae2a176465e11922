"""``expert_order``: claims sorted by expert, beside PyTorch's sort and its inverse."""

import torch

from benchmarks.ops.conftest import Problem
from moe_mt.ops.expert_order import expert_order, expert_order_eager


def test_expert_order(measure, shape) -> None:
    measure(
        lambda one: expert_order(one.expert_ids, shape.num_experts),
        lambda one: expert_order_eager(one.expert_ids, shape.num_experts),
        reads=lambda one: [one.expert_ids],
        peers={"argsort and bincount": lambda one: argsort_bincount(one, shape.num_experts)},
        operation="expert_order",
    )


def argsort_bincount(one: Problem, num_experts: int) -> object:
    claims = one.expert_ids.flatten()
    order = claims.argsort(stable=True)
    counts = claims.bincount(minlength=num_experts)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return order, order.argsort().view(one.expert_ids.shape), offsets
