"""``grouped_mm``: each expert's rows by its weight, beside PyTorch's grouped product."""

import torch
from torch.nn import functional

from moe_mt.ops.grouped_mm import grouped_mm, grouped_mm_eager


def test_grouped_mm(measure, experts, shape, tokens) -> None:
    weight = experts.up_proj
    torch_grouped_mm = getattr(functional, "grouped_mm", None) or torch._grouped_mm
    measure(
        lambda one: grouped_mm(one.expert_rows, weight, one.offsets),
        lambda one: grouped_mm_eager(one.expert_rows, weight, one.offsets),
        reads=lambda one: [one.expert_rows],
        weight_numbers=lambda one: one.expert_ids.unique().numel() * weight[0].numel(),
        flops=2 * shape.top_k * tokens * weight[0].numel(),
        peers={
            "torch grouped_mm": lambda one: torch_grouped_mm(
                one.expert_rows, weight.transpose(1, 2), offs=one.offsets[1:].int()
            )
        },
        operation="grouped_mm",
    )
