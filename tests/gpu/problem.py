"""The layer of the 54B, and a small one of the same make for machines where kernels are slow."""

from dataclasses import dataclass

import pytest
import torch

from moe_mt.moe import Experts, MoELayer, Top2Router

__all__ = ["FULL", "SMALL", "Size", "full", "leading_tokens", "make_layer", "normal", "small"]


@dataclass(frozen=True, kw_only=True)
class Size:
    """What decides the shapes of a layer."""

    experts: int
    d_model: int
    ffn_dim: int
    dtype: torch.dtype

    @property
    def last(self) -> int:
        """The expert whose weights lie behind all others: in ``FULL``, just below 2^31."""
        return self.experts - 1


# float16, because the interpreter only truncates to bfloat16.
SMALL = Size(experts=8, d_model=16, ffn_dim=24, dtype=torch.float16)
FULL = Size(experts=128, d_model=2048, ffn_dim=8192, dtype=torch.bfloat16)


def small(*cases):
    """Return pytest's parameters for cases at the small size: the interpreter's, and a GPU's."""
    return [pytest.param(SMALL, c, marks=pytest.mark.triton, id=f"small-{c}") for c in cases]


def full(*cases):
    """Return pytest's parameters for cases at the full size, which only a GPU can run."""
    return [pytest.param(FULL, c, marks=pytest.mark.gpu, id=f"full-{c}") for c in cases]


def normal(*shape, std=1.0, dtype, device):
    """Return normal numbers, made without a copy: a stack of the full size has 2^31 of them."""
    made = torch.empty(shape, dtype=dtype, device=device)
    for part in made:
        part.normal_(std=std)
    return made


def make_layer(size, device):
    """Return a layer with random weights and a router in float32, in evaluation."""
    with torch.device("meta"):
        experts = Experts(size.experts, size.d_model, size.ffn_dim).to(size.dtype)
        layer = MoELayer(Top2Router(size.d_model, size.experts), experts)
    layer.to_empty(device=device)
    stds = {
        "router.classifier.weight": 2 * size.d_model**-0.5,
        "experts.up_proj": size.d_model**-0.5,
        "experts.down_proj": size.ffn_dim**-0.5,
        "experts.up_bias": 0.1,
        "experts.down_bias": 0.1,
    }
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            for part in parameter:
                part.normal_(std=stds[name])
    return layer.eval()


def leading_tokens(layer, size, count):
    """Return tokens (T, d_model) of which the first one chooses the last expert first."""
    weight = layer.router.classifier.weight
    x = normal(count, size.d_model, dtype=size.dtype, device=weight.device)
    favourite = weight[size.last].detach()
    x[0] = favourite / favourite.square().mean().sqrt()
    return x
