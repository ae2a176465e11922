"""What a router decided, as frozen data."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Routing"]


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


# So that torch.export can return it.
torch.export.register_dataclass(Routing, serialized_type_name="moe_mt.Routing")
