"""``expert_ffn``: the gated mixture of expert FFNs, beside PyTorch's grouped products."""

from typing import Any

from benchmarks.moe.peers import mixture_by_grouped_mm
from moe_mt.ops.expert_ffn import expert_ffn, expert_ffn_eager


def test_expert_ffn(measure, experts, shape, tokens) -> None:
    weights: dict[str, Any] = dict(experts.named_parameters())
    measure(
        lambda one: expert_ffn(one.x, one.expert_ids, one.gates, **weights),
        lambda one: expert_ffn_eager(one.x, one.expert_ids, one.gates, **weights),
        reads=lambda one: [one.x, *[one.expert_rows] * 2],  # expert rows are written and read
        weight_numbers=lambda one: (
            one.expert_ids.unique().numel() * shape.expert_weights
            + 2 * one.expert_ids.numel() * shape.ffn_dim  # and so are hidden rows
        ),
        flops=2 * shape.top_k * tokens * shape.expert_weights,
        peers={
            "torch grouped_mm": lambda one: mixture_by_grouped_mm(
                experts, one.x, one.expert_ids.long(), one.gates
            )
        },
        operation="expert_ffn",
    )
