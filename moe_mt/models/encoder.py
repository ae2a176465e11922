"""The encoder: layers in both directions over the source."""

import torch
from torch import Tensor, nn

from moe_mt.models.config import TransformerConfig
from moe_mt.models.layers import EncoderLayer
from moe_mt.moe import Routing

__all__ = ["Encoder"]


class Encoder(nn.Module):
    """A stack of encoder layers and a final norm."""

    def __init__(self, config: TransformerConfig) -> None:
        """Build the layers; which of them are sparse follows from the configuration."""
        super().__init__()
        self.layerdrop = config.encoder_layerdrop
        self.layers = nn.ModuleList(
            EncoderLayer(
                config,
                config.encoder_heads,
                config.encoder_ffn_dim,
                config.encoder_layer_is_sparse(index),
            )
            for index in range(config.encoder_layers)
        )
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, tuple[Routing, ...]]:
        """Encode.

        Args:
            x: (B, S, d_model). Embedded source.
            mask: (B, S) bool, true where a token is real, or ``None`` where all are.

        Returns:
            The memory (B, S, d_model) and the routing of every sparse layer that ran.
        """
        attention_mask = None if mask is None else mask[:, None, None, :]
        padding = None if mask is None else ~mask
        routings: list[Routing] = []
        for layer in self.layers:
            if self.training and self.layerdrop > 0 and torch.rand(()).item() < self.layerdrop:
                continue
            output = layer(x, attention_mask, padding)
            x = output.x
            if output.routing is not None:
                routings.append(output.routing)
        return self.norm(x), tuple(routings)
