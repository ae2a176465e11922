"""Bring expert rows back to token order, weighted by their gates."""

import torch
from torch import Tensor

__all__ = ["combine"]


def combine(expert_rows: Tensor, rows: Tensor, gates: Tensor) -> Tensor:
    """Compute ``out[t] = sum_k gates[t, k] * expert_rows[rows[t, k]]``.

    Summed over k in order, in float32 (float64 for float64 rows), so that the result is the same
    every time and does not depend on what else stands in the batch.

    Args:
        expert_rows: (N, d_model), rows in expert order.
        rows: (T, K) int64, from ``permute``: the row of each claim.
        gates: (T, K) float; zero where a claim was dropped.

    Returns:
        (T, d_model) in the dtype of ``expert_rows``.
    """
    wide = torch.promote_types(expert_rows.dtype, torch.float32)
    gates = gates.to(wide)
    out = expert_rows[rows[:, 0]].to(wide) * gates[:, :1]
    for k in range(1, rows.shape[1]):
        out = torch.addcmul(out, expert_rows[rows[:, k]].to(wide), gates[:, k : k + 1])
    return out.to(expert_rows.dtype)
