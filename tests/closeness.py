"""How near a kernel must come to its definition: one table, for every test and every machine."""

import torch
from torch import Tensor

__all__ = ["TOLERANCE", "assert_near", "relative_difference"]

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest norm of a difference as a share of the norm of what is expected, by the dtype computed
in. float32 sums in another order; the halves round inputs, hidden rows and outputs once each."""


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference as a share of the norm of what is expected."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "result") -> None:
    """Fail unless shapes are equal, everything found is finite, and the norms are near."""
    assert found.shape == expected.shape, f"{what}: {found.shape} is not {expected.shape}"
    if expected.numel() == 0:
        return
    assert found.isfinite().all(), f"{what} is not finite everywhere"
    if not expected.any():
        assert not found.any(), f"{what} should be zero"
        return
    difference = relative_difference(found, expected)
    assert difference <= TOLERANCE[dtype], f"{what} differs by {difference:.1e} of its norm"
