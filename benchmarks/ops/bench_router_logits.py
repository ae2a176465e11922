"""``router_logits``: float32 scores of tokens that are not, beside a product in their own dtype."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moe_mt.ops.router_logits import router_logits, router_logits_eager


@pytest.fixture(scope="module")
def weight(shape, device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    size = shape.num_experts, shape.d_model
    return torch.randn(size, generator=generator, device=device) * shape.d_model**-0.5


def test_router_logits(measure, weight, shape, tokens) -> None:
    measure(
        lambda one: router_logits(one.x, weight),
        lambda one: router_logits_eager(one.x, weight),
        reads=lambda one: [one.x, weight],
        flops=2 * tokens * shape.d_model * shape.num_experts,
        peers={"inexact linear": lambda one: functional.linear(one.x, weight.to(one.x)).float()},
        operation="router_logits",
    )
