"""Decide in which order experts see the claims of tokens."""

import torch
from torch import Tensor

from moe_mt.errors import ConfigError
from moe_mt.ops.backend import register_op, use_triton

__all__ = ["expert_order", "expert_order_eager"]


def expert_order(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the ``N = T * K`` claims by expert, tokens in order within each expert.

    A stable sort, so that the result is the same every time. Dropped claims carry the expert id
    ``E`` and stand behind the last expert; nothing is removed, so every shape is known beforehand.

    Args:
        expert_ids: (T, K) int32, values in [0, E]; ``E`` means dropped.
        num_experts: ``E``.

    Returns:
        ``order`` (N,) int64: the claim ``t * K + k`` that stands at each row;
        ``rows`` (T, K) int64: the row of each claim, the inverse of ``order``;
        ``offsets`` (E + 1,) int64: expert ``e`` owns rows ``offsets[e]`` to ``offsets[e + 1]``.

    Raises:
        ConfigError: If the expert ids are not (T, K) integers.
    """
    if expert_ids.dim() != 2 or expert_ids.is_floating_point():
        raise ConfigError(
            f"expert ids are {tuple(expert_ids.shape)} {expert_ids.dtype}; they must be (T, K) and "
            "int32"
        )
    # Which numbers a layer computes with says nothing about its integers.
    if use_triton(expert_ids.new_empty(0, dtype=torch.float32)):
        return _expert_order(expert_ids, num_experts)
    return expert_order_eager(expert_ids, num_experts)


def expert_order_eager(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Define ``expert_order``: a stable sort and its inverse."""
    claims = expert_ids.reshape(-1).to(torch.int64)
    in_order, order = claims.sort(stable=True)
    rows = torch.empty_like(order)
    rows[order] = torch.arange(order.numel(), device=order.device)
    edges = torch.arange(num_experts + 1, device=order.device)
    offsets = torch.searchsorted(in_order, edges)
    return order, rows.view(expert_ids.shape), offsets


def _launch(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    from moe_mt.kernels import expert_order as kernels

    return kernels.expert_order(expert_ids, num_experts)


def _fake(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    order = expert_ids.new_empty(expert_ids.numel(), dtype=torch.int64)
    rows = expert_ids.new_empty(expert_ids.shape, dtype=torch.int64)
    return order, rows, expert_ids.new_empty(num_experts + 1, dtype=torch.int64)


_expert_order = register_op(
    "expert_order(Tensor expert_ids, int num_experts) -> (Tensor, Tensor, Tensor)", _launch, _fake
)
