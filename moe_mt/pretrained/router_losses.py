"""What the routers of one side of a model add to the training loss."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from moe_mt.losses import load_balancing_loss, router_z_loss
from moe_mt.pretrained.outputs import RouterOutput

__all__ = ["balancing_loss", "transformers_4_balancing_loss", "z_loss"]


def balancing_loss(routers: Sequence[RouterOutput | None]) -> Tensor | None:
    """Return the sum of the sparse layers' load-balancing losses; ``None`` of no sparse layer.

    Source: fairseq's trainer, which sums ``l_aux`` over layers.
    """
    losses = [load_balancing_loss(router.routing) for router in routers if router is not None]
    return torch.stack(losses).sum() if losses else None


def z_loss(routers: Sequence[RouterOutput | None]) -> Tensor | None:
    """Return the sum of the sparse layers' z-losses; ``None`` of no sparse layer."""
    losses = [router_z_loss(router.routing) for router in routers if router is not None]
    return torch.stack(losses).sum() if losses else None


def transformers_4_balancing_loss(routers: Sequence[tuple[Tensor, Tensor] | None]) -> Tensor | None:
    """Return the number that transformers 4.36 to 4.57 has in this place.

    It reads the gates after dropping, side by side for all layers, and counts first choices as if
    all layers' experts were the first layer's. For one sparse layer it is ``E * sum_e f_e * p_e``.

    Args:
        routers: Per layer gates (T, E) and first choices (T,), ``None`` for a dense one.
    """
    sparse = [router for router in routers if router is not None]
    if not sparse:
        return None
    gates = torch.cat([probs for probs, _ in sparse], dim=1)
    columns = gates.shape[1]
    firsts = torch.cat([index for _, index in sparse])
    shares = functional.one_hot(firsts, columns).float().mean(0)
    return columns**2 * (shares * gates.mean(0)).mean()
