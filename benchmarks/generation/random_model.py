"""A model whose random weights are made where they stay, without a file."""

import math

import torch

from moe_mt.models import Seq2SeqTransformer, TransformerConfig

__all__ = ["random_model"]


def random_model(
    config: TransformerConfig, device: torch.device, dtype: torch.dtype
) -> Seq2SeqTransformer:
    """Return a model in evaluation mode; routers are in float32, as every model here keeps them.

    Args:
        config: What it is.
        device: Where its weights are drawn, one after the other.
        dtype: Of all weights but those of routers.
    """
    with torch.device("meta"):
        model = Seq2SeqTransformer(config)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        module, _, leaf = name.rpartition(".")
        kept = torch.float32 if ".router." in name else dtype
        weight = torch.empty(parameter.shape, dtype=kept, device=device)
        if "norm" in module and leaf == "weight":
            weight.fill_(1)
        else:
            bound = config.init_std if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
            weight.uniform_(-math.sqrt(3) * bound, math.sqrt(3) * bound, generator=generator)
        owner = model.get_submodule(module)
        owner.register_parameter(leaf, torch.nn.Parameter(weight, requires_grad=False))
    model.positions.rebuild(device, dtype)
    return model.eval()
