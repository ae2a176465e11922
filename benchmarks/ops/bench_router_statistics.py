"""``router_statistics``: what the losses that balance a router are made of."""

from moe_mt.ops.router_statistics import router_statistics, router_statistics_eager


def test_router_statistics(measure) -> None:
    measure(
        lambda one: router_statistics(one.logits),
        lambda one: router_statistics_eager(one.logits),
        reads=lambda one: [one.logits],
        operation="router_statistics",
    )
