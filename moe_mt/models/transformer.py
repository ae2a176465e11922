"""The one model: an encoder-decoder transformer, dense or with experts."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_mt.models.config import TransformerConfig
from moe_mt.models.decoder import Decoder
from moe_mt.models.embedding import SinusoidalPositions, TokenEmbedding
from moe_mt.models.encoder import Encoder
from moe_mt.models.kv_cache import KVCache
from moe_mt.moe import Routing

__all__ = ["Seq2SeqTransformer", "TransformerOutput"]


@dataclass(frozen=True, kw_only=True)
class TransformerOutput:
    """What a whole forward pass gives."""

    logits: Tensor
    """(B, L, V) in the model's dtype."""

    memory: Tensor
    """(B, S, d_model). Encoder output."""

    encoder_routings: tuple[Routing, ...]
    """One per sparse encoder layer."""

    decoder_routings: tuple[Routing, ...]
    """One per sparse decoder layer."""


class Seq2SeqTransformer(nn.Module):
    """M2M100, NLLB-200 and NLLB-MoE: pre-norm layers, sinusoidal positions, one tied embedding.

    Source: Fan et al., arXiv:2010.11125 (M2M100); NLLB Team, arXiv:2207.04672. Agreement with the
    published classes is tested in ``tests/models/test_transformer.py``.
    """

    def __init__(self, config: TransformerConfig) -> None:
        """Build the model; off the meta device, its weights are those of ``reset_parameters``."""
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config.vocab_size, config.d_model, config.pad_id)
        self.embedding_scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        self.positions = SinusoidalPositions(config.max_positions, config.d_model, config.pad_id)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        # Drawing numbers on the meta device draws none, and costs seconds of imports.
        if not self.embedding.weight.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights from N(0, ``init_std``); biases zero, norms one, padding embedding zero."""
        norms = {id(m.weight) for m in self.modules() if isinstance(m, nn.LayerNorm)}
        for name, parameter in self.named_parameters():
            if id(parameter) in norms:
                parameter.fill_(1)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(0, self.config.init_std)
        self.embedding.weight[self.config.pad_id].zero_()

    def encode(
        self, source_tokens: Tensor, source_mask: Tensor | None = None
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Encode sources.

        Args:
            source_tokens: (B, S) int64.
            source_mask: (B, S) bool, true where a token is real; ``None`` where all are.

        Returns:
            The memory (B, S, d_model) and the routing of every sparse encoder layer.
        """
        return self.encoder(self._embed(source_tokens, 0), source_mask)

    def forward(
        self,
        source_tokens: Tensor,
        target_tokens: Tensor,
        source_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> TransformerOutput:
        """Compute the logits of whole target sequences, as in training.

        Args:
            source_tokens: (B, S) int64.
            target_tokens: (B, L) int64, beginning with the decoder's start token.
            source_mask: (B, S) bool, true where a token is real; ``None`` where all are.
            target_mask: (B, L) bool; padding on the right claims no expert. Attention is causal
                and needs no mask for it.
        """
        memory, encoder_routings = self.encode(source_tokens, source_mask)
        padding = None if target_mask is None else ~target_mask
        hidden, decoder_routings = self.decoder(
            self._embed(target_tokens, 0), memory, source_mask, padding
        )
        return TransformerOutput(
            logits=self._logits(hidden),
            memory=memory,
            encoder_routings=encoder_routings,
            decoder_routings=decoder_routings,
        )

    def new_cache(
        self, memory: Tensor, source_mask: Tensor | None, beams: int = 1, capacity: int = 32
    ) -> KVCache:
        """Return an empty cache for decoding ``beams`` rows per sentence of the memory.

        Args:
            memory: (B, S, d_model), from ``encode``.
            source_mask: (B, S) bool, true where a source token is real, or ``None``.
            beams: Rows per sentence.
            capacity: Steps there is room for before the cache grows.
        """
        return self.decoder.new_cache(memory, source_mask, beams, capacity)

    def decode_step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Read new tokens and return the logits (B * beams, V) behind the last of them.

        Args:
            tokens: (B * beams, new) int64; the first call begins with the decoder's start token.
            cache: From ``new_cache``; it is extended.
        """
        self.reserve(cache, tokens.shape[1])
        logits = self.decode(tokens, cache)
        cache.advance(tokens.shape[1])
        return logits

    def reserve(self, cache: KVCache, new: int) -> None:
        """Make room for ``new`` positions more, in the cache and among the positions."""
        cache.reserve(new)
        self.positions.reserve(cache.capacity)

    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Do what ``decode_step`` does within a cache that has room and is advanced afterwards.

        Tensors in place and out, and no number that changes from step to step: this is what is
        compiled and captured.
        """
        return self._logits(self.decode_hidden(tokens, cache))

    def decode_hidden(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Do what ``decode`` does but for the head; return (B * beams, d_model)."""
        past = cache.positions[:, None].expand(-1, cache.beams).reshape(-1, 1)
        return self.decoder.step(self._embed(tokens, past), cache)[:, -1]

    def _embed(self, tokens: Tensor, past_length: int | Tensor) -> Tensor:
        embedded = self.embedding(tokens) * self.embedding_scale
        embedded = embedded + self.positions(tokens, past_length)
        return functional.dropout(embedded, self.config.dropout, self.training)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.embedding.project(hidden)
