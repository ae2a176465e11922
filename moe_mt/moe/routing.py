"""What a router decided, as frozen data."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Permutation", "Routing"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """Which experts each token goes to, and what their outputs weigh."""

    expert_ids: Tensor
    """(T, K) int32; ``E`` means dropped."""

    gates: Tensor
    """(T, K) float32; zero where dropped."""

    router_logits: Tensor
    """(T, E) in the router's dtype, without noise."""

    padding: Tensor | None
    """(T,) bool, true for tokens that were kept out of routing, or ``None``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Permutation:
    """The order that puts claims of one device in expert order."""

    order: Tensor
    """(N,) int64: the claim ``t * K + k`` at each row."""

    rows: Tensor
    """(T, K) int64: the row of each claim."""

    offsets: Tensor
    """(E + 1,) int64: expert ``e`` owns rows ``offsets[e]`` to ``offsets[e + 1]``."""
