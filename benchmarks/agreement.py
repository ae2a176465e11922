"""Whether two results are the same function of their inputs, before anything is timed."""

import torch
from torch import Tensor

__all__ = ["TOLERANCE", "check_close", "check_same"]

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Largest norm of a difference as a share of the norm of the result. In half precisions peers
round their gates and every partial sum."""

CHUNK = 2**26
"""Numbers compared at once: the gradient of one stack of weights is 2^31, in float64 17 GB."""


def check_close(got: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Compare two tensors by the norm of their difference, in float64; NaN never passes."""
    assert got.shape == expected.shape, f"{what}: {tuple(got.shape)}, {tuple(expected.shape)}"
    step = max(1, CHUNK // max(1, expected[:1].numel())) if expected.dim() else 1
    pairs = zip(
        got.split(step) if got.dim() else [got],
        expected.split(step) if expected.dim() else [expected],
        strict=True,
    )
    apart = total = 0.0
    for one, other in pairs:
        apart += float((one.double() - other.double()).square().sum())
        total += float(other.double().square().sum())
    difference = (apart / total) ** 0.5 if total else apart**0.5
    assert difference <= tolerance, f"{what} differ by {difference:.1e} of the norm"


def check_same(got: object, expected: object, tolerance: float | None, what: str) -> None:
    """Compare tensors or tuples of them: integers must be equal, floats close.

    Where ``tolerance`` is ``None``, it is that of what is expected: float32 is held to float32.
    """
    if not isinstance(expected, Tensor):
        assert isinstance(got, tuple)
        assert isinstance(expected, tuple)
        for one, other in zip(got, expected, strict=True):
            check_same(one, other, tolerance, what)
        return
    assert isinstance(got, Tensor)
    if expected.is_floating_point():
        check_close(got, expected, tolerance or TOLERANCE[expected.dtype], what)
    else:
        assert torch.equal(got.to(expected.dtype), expected), f"{what} are different integers"
