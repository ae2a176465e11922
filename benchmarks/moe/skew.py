"""Routers that choose as text does: a few experts often, most of them rarely."""

import math

import torch
from torch import Tensor

__all__ = ["ROUTINGS", "router_weight", "zipf_bias"]

ROUTINGS = ("uniform", "zipf")

GUMBEL_DEVIATION = math.pi / math.sqrt(6)


def router_weight(num_experts: int, d_model: int, generator: torch.Generator) -> Tensor:
    """Return (E, d_model) whose scores of random tokens spread like Gumbel noise.

    The largest of log-probabilities plus such noise is a draw from these probabilities, which is
    what makes ``zipf_bias`` mean what it says.
    """
    weight = torch.randn(num_experts, d_model, generator=generator)
    return weight * (GUMBEL_DEVIATION / math.sqrt(d_model))


def zipf_bias(num_experts: int, generator: torch.Generator) -> Tensor:
    """Return (E,) float32: the logarithm of how often each expert is to be the first choice.

    The expert of rank ``r`` in proportion to ``1 / r``, ranks in random order.
    """
    weights = 1 / (1 + torch.randperm(num_experts, generator=generator))
    return (weights / weights.sum()).log()
