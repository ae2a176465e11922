"""The decoder: causal layers over the target that attend to the memory."""

from typing import Any

import torch
from torch import Tensor, nn

from moe_mt.models.config import TransformerConfig
from moe_mt.models.kv_cache import KVCache
from moe_mt.models.layers import DecoderLayer, DecoderMasks
from moe_mt.moe import Routing

__all__ = ["Decoder"]


class Decoder(nn.Module):
    """A stack of decoder layers and a final norm."""

    def __init__(self, config: TransformerConfig) -> None:
        """Build the layers; which of them are sparse follows from the configuration."""
        super().__init__()
        self.layerdrop = config.decoder_layerdrop
        self.layers = nn.ModuleList(
            DecoderLayer(
                config,
                config.decoder_heads,
                config.decoder_ffn_dim,
                config.decoder_layer_is_sparse(index),
            )
            for index in range(config.decoder_layers)
        )
        self.norm = nn.LayerNorm(config.d_model)

    def forward(
        self, x: Tensor, memory: Tensor, memory_mask: Tensor | None, padding: Tensor | None
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Decode whole target sequences, as in training.

        Args:
            x: (B, L, d_model). Embedded target.
            memory: (B, S, d_model).
            memory_mask: (B, S) bool, true where the memory may be attended to, or ``None``.
            padding: (B, L) bool, true where a target token is padding, or ``None``.

        Returns:
            (B, L, d_model) and the routing of every sparse layer that ran.
        """
        routings: list[Routing] = []
        for layer in self.layers:
            if self.training and self.layerdrop > 0 and torch.rand(()).item() < self.layerdrop:
                continue
            output = layer(x, memory, memory_mask, padding)
            x = output.x
            if output.routing is not None:
                routings.append(output.routing)
        return self.norm(x), tuple(routings)

    def new_cache(
        self, memory: Tensor, memory_mask: Tensor | None, beams: int, capacity: int
    ) -> KVCache:
        """Return an empty cache that holds the memory (B, S, d_model) as keys and values."""
        layers: list[Any] = list(self.layers)
        cross = [layer.cross_attention.project_key_value(memory) for layer in layers]
        return KVCache(cross, memory_mask, beams, capacity)

    def step(self, x: Tensor, cache: KVCache) -> Tensor:
        """Decode new positions (B * beams, new, d_model) behind those in the cache.

        The cache has room for them, and is told afterwards to advance: what happens here is
        tensors alone, so that it can be compiled once.
        """
        new = x.shape[1]
        layers = cache.open(new)
        padding = None
        if cache.idle is not None:
            padding = cache.idle.repeat_interleave(cache.beams)[:, None].expand(-1, new)
        masks = DecoderMasks(
            target=cache.visible(new, x.dtype), memory=cache.memory_mask, padding=padding
        )
        for layer, layer_cache in zip(self.layers, layers, strict=True):
            assert isinstance(layer, DecoderLayer)
            x = layer.step(x, layer_cache, masks, beams=cache.beams).x
        return self.norm(x)
