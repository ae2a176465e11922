"""A layer's experts one after the other, as a CPU computes them without gradients."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from moe_mt.ops.combine import combine_eager, dtype_of
from moe_mt.ops.expert_order import expert_order_eager

__all__ = ["mix_one_by_one"]


def mix_one_by_one(
    x: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    residual: Tensor | None,
    num_experts: int,
    expert: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """Compute ``residual[t] + sum_k gates[t, k] * expert(expert_ids[t, k], x[t])``.

    Reads expert ids on the host, so it may run inside an opaque operator only. An expert that no
    token chose is not called. The mixture of a token depends on the batch no more than the
    outputs of ``expert`` do.

    Args:
        x: (T, d_model).
        expert_ids: (T, K) in [0, num_experts]; ``num_experts`` means dropped.
        gates: (T, K) float; a claim whose gate is zero adds nothing.
        residual: (T, d_model) or ``None``.
        num_experts: ``E``.
        expert: ``(index, rows (M, d_model)) -> outputs (M, d_model)`` in the dtype of ``x``.

    Returns:
        (T, d_model), a tensor of its own, in the dtype that ``combine`` gives.
    """
    if x.shape[0] == 1:
        return _mix_one_token(x, expert_ids, gates, residual, num_experts, expert)
    order, rows, offsets = expert_order_eager(expert_ids, num_experts)
    bounds = cast(list[int], offsets.tolist())  # pyright: ignore[reportUnknownMemberType]
    tokens = order // max(expert_ids.shape[1], 1)
    # Every expert's outputs take the place of its inputs.
    expert_rows = x.index_select(0, tokens)
    for index, (start, stop) in enumerate(pairwise(bounds)):
        if start < stop:
            block = expert_rows[start:stop]
            block.copy_(expert(index, block))
    expert_rows[bounds[-1] :] = 0
    return combine_eager(expert_rows, rows, gates, residual)


def _mix_one_token(
    x: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    residual: Tensor | None,
    num_experts: int,
    expert: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """Compute what ``combine_eager`` would, rounding by rounding, without an order of claims."""
    wide = torch.promote_types(x.dtype, torch.float32)
    mixture = None
    claims = zip(*map(_numbers, (expert_ids, gates)), gates.to(wide).unbind(1), strict=True)
    for index, weight, gate in claims:
        if index == num_experts or weight == 0:
            continue
        output = expert(index, x).to(wide)
        mixture = output * gate if mixture is None else torch.addcmul(mixture, output, gate)
    if mixture is None:
        mixture = torch.zeros_like(x, dtype=wide)
    if residual is not None:
        mixture = residual.to(wide) + mixture
    return mixture.to(dtype_of(x, residual))


def _numbers(row: Tensor) -> list[Any]:
    return row[0].tolist()  # pyright: ignore
