"""Put (token, choice) rows into expert order."""

import torch
from torch import Tensor

__all__ = ["permute"]


def permute(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
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
    """
    claims = expert_ids.reshape(-1).to(torch.int64)
    in_order, order = claims.sort(stable=True)
    rows = torch.empty_like(order)
    rows[order] = torch.arange(order.numel(), device=order.device)
    edges = torch.arange(num_experts + 1, device=order.device)
    offsets = torch.searchsorted(in_order, edges)
    return order, rows.view(expert_ids.shape), offsets
