"""Where tokens go: on one device, into expert order and back."""

from typing import Protocol

from torch import Tensor

from moe_mt.moe.routing import Permutation, Routing
from moe_mt.ops import combine, permute

__all__ = ["Dispatcher", "LocalDispatcher"]


class Dispatcher(Protocol):
    """Send tokens to the experts of a layer and bring their outputs back."""

    def dispatch(self, x: Tensor, routing: Routing, num_experts: int) -> tuple[Tensor, Permutation]:
        """Return the tokens that local experts see, and the order they see them in."""
        ...

    def combine(self, expert_rows: Tensor, permutation: Permutation, gates: Tensor) -> Tensor:
        """Return (T, d_model): expert rows in token order, weighted by gates (T, K)."""
        ...


class LocalDispatcher:
    """All experts on one device: dispatching moves no token, it only decides an order."""

    def dispatch(self, x: Tensor, routing: Routing, num_experts: int) -> tuple[Tensor, Permutation]:
        """Return ``x`` (T, d_model) itself and the order in which experts read its rows."""
        order, rows, offsets = permute(routing.expert_ids, num_experts)
        return x, Permutation(order=order, rows=rows, offsets=offsets)

    def combine(self, expert_rows: Tensor, permutation: Permutation, gates: Tensor) -> Tensor:
        """Return (T, d_model): expert rows (N, d_model) in token order, weighted by gates."""
        return combine(expert_rows, permutation.rows, gates)
