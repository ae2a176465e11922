"""``route``: two experts a token, within limits or without, and one expert in each sequence."""

import pytest

from benchmarks.ops.conftest import Problem
from moe_mt.ops import expert_capacity
from moe_mt.ops.route import route, route_eager

SEQUENCES = 8


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


def test_route_by_plain_probabilities(measure) -> None:
    measure(
        lambda one: route(one.logits, normalize="never"),
        lambda one: route_eager(one.logits, normalize="never"),
        reads=lambda one: [one.logits],
        peers={"softmax and topk": plain_softmax_topk},
        operation="route",
        capacity="none",
        normalize="never",
    )


def test_route_in_sequences(measure, shape, tokens) -> None:
    groups = SEQUENCES if tokens % SEQUENCES == 0 else 1
    limit = expert_capacity(tokens // groups, shape.num_experts, training=True)
    options = {"capacity": limit, "top_k": 1, "normalize": "never", "groups": groups}
    measure(
        lambda one: route(one.logits, **options),
        lambda one: route_eager(one.logits, **options),
        reads=lambda one: [one.logits],
        operation="route",
        capacity=f"training, in {groups} sequences",
        normalize="never",
    )


def softmax_topk(one: Problem) -> object:
    expert_ids, gates = plain_softmax_topk(one)
    return expert_ids, gates / gates.sum(-1, keepdim=True)


def plain_softmax_topk(one: Problem) -> tuple:
    gates, expert_ids = one.logits.softmax(-1).topk(2)
    return expert_ids.int(), gates
