"""``route``: two experts a token, without a limit and under the capacity of training."""

import pytest

from benchmarks.ops.conftest import Problem
from moe_mt.ops import expert_capacity
from moe_mt.ops.route import route, route_eager


@pytest.mark.parametrize("capacity", ["none", "training"])
def test_route(measure, shape, tokens, capacity) -> None:
    limit = None
    if capacity == "training":
        limit = expert_capacity(tokens, shape.num_experts, training=True)
    measure(
        lambda one: route(one.logits, capacity=limit),
        lambda one: route_eager(one.logits, capacity=limit),
        reads=lambda one: [one.logits],
        peers={"softmax and topk": softmax_topk} if limit is None else {},
        operation="route",
        capacity=capacity,
    )


def softmax_topk(one: Problem) -> object:
    gates, expert_ids = one.logits.softmax(-1).topk(2)
    return expert_ids.int(), gates / gates.sum(-1, keepdim=True)
