"""Scalars that training minimises, from logits and routings."""

import torch
from torch import Tensor
from torch.nn import functional

from moe_mt.moe import Routing
from moe_mt.ops import router_statistics

__all__ = [
    "IGNORED_LABEL",
    "label_smoothed_cross_entropy",
    "load_balancing_loss",
    "router_z_loss",
]

IGNORED_LABEL = -100


def label_smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the mean cross entropy over labels that are not -100, with label smoothing.

    Args:
        logits: (B, L, V), any float dtype; the loss is taken in float32 at least.
        labels: (B, L) int64; -100 is ignored. Padding is not ignored by itself.
        smoothing: Probability mass that is spread evenly over the vocabulary.

    Source: Szegedy et al., arXiv:1512.00567, section 7.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    return functional.cross_entropy(
        logits.flatten(0, 1).to(wide),
        labels.flatten(),
        ignore_index=IGNORED_LABEL,
        label_smoothing=smoothing,
    )


def load_balancing_loss(routing: Routing) -> Tensor:
    """Return ``E * sum_e f_e * p_e`` of one layer; 1 where the load is even.

    ``p_e`` is the mean router probability of expert ``e``; ``f_e`` the share of tokens whose first
    choice it is, before anything is dropped. Both are taken over real tokens only.

    Source: GShard, arXiv:2006.16668, section 2.2, as fairseq's top-2 gate computes it; there the
    denominators count padding too, which ties the loss to the batch's padding.
    """
    first_choices, probs, _ = router_statistics(routing.router_logits, routing.padding)
    # Of no token at all, nothing is out of balance: 0 and not 0 / 0.
    tokens = first_choices.sum().clamp(min=1)
    return len(probs) * (first_choices * probs).sum() / tokens**2


def router_z_loss(routing: Routing) -> Tensor:
    """Return the mean over real tokens of ``logsumexp(router_logits) ** 2``.

    Source: ST-MoE, arXiv:2202.08906, section 3.
    """
    first_choices, _, squares = router_statistics(routing.router_logits, routing.padding)
    return squares / first_choices.sum().clamp(min=1)
