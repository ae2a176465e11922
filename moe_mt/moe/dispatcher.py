"""Where tokens go: to experts on this device."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

__all__ = ["Dispatcher", "LocalDispatcher"]


class Dispatcher(Protocol):
    """Send tokens to the experts of a layer, wherever these are, and bring the mixture back."""

    def dispatch(
        self,
        experts: Callable[..., Tensor],
        x: Tensor,
        expert_ids: Tensor,
        gates: Tensor,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Return the mixture (T, d_model) of the chosen experts, plus the residual.

        Args:
            experts: ``(x, expert_ids, gates, residual) -> mixture``, as ``Experts`` is. On another
                device than the token's it is called with one claim a row and no residual.
            x: (T, d_model).
            expert_ids: (T, K) int32; ``E`` means dropped.
            gates: (T, K) float32; zero where dropped.
            residual: (T, d_model) or ``None``.
        """
        ...


class LocalDispatcher:
    """All experts on one device: no token moves."""

    def dispatch(
        self,
        experts: Callable[..., Tensor],
        x: Tensor,
        expert_ids: Tensor,
        gates: Tensor,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Return what ``experts`` makes of all tokens."""
        return experts(x, expert_ids, gates, residual)
