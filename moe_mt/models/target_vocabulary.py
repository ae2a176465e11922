"""Decoding over some of a vocabulary: a smaller head, and tokens numbered anew."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_mt.errors import ConfigError, InputError
from moe_mt.models.config import TransformerConfig
from moe_mt.models.embedding import SinusoidalPositions, TokenEmbedding
from moe_mt.models.kv_cache import KVCache
from moe_mt.models.transformer import Seq2SeqTransformer

__all__ = ["TargetVocabulary"]


class TargetVocabulary:
    """The decoder of a model, over the tokens that a target language needs.

    The head of these models is half of what a step reads. Scores of allowed tokens are those of
    the whole head; probabilities are among allowed tokens, as if the others were banned.
    """

    def __init__(self, model: Seq2SeqTransformer, tokens: Iterable[int]) -> None:
        """Copy the head's rows of some tokens.

        Args:
            model: In evaluation mode; packed weights give a packed head.
            tokens: Those that may be generated. The model's special tokens are added.

        Raises:
            ConfigError: If one of them is not in the model's vocabulary.
        """
        config = model.config
        special = {config.pad_id, config.eos_id, config.decoder_start_id}
        ids = sorted({*map(int, tokens)} | special)
        if ids[0] < 0 or ids[-1] >= config.vocab_size:
            raise ConfigError(
                f"target_vocab holds {ids[0]} to {ids[-1]}; give token ids of the model, integers "
                f"from 0 to {config.vocab_size - 1}"
            )
        self._model = model
        self._ids = torch.tensor(ids, device=model.embedding.weight.device)
        self._tokens = ids
        self._places = {token: place for place, token in enumerate(ids)}
        self._head = _head_of(model.embedding, self._ids)

    def __len__(self) -> int:
        """Return how many tokens may be generated."""
        return len(self._places)

    @property
    def config(self) -> TransformerConfig:
        """The model's."""
        return self._model.config

    @property
    def positions(self) -> SinusoidalPositions:
        """The model's."""
        return self._model.positions

    def narrow(self, tokens: Sequence[int]) -> list[int]:
        """Return where tokens stand in this vocabulary.

        Raises:
            InputError: If one is not in it.
        """
        missing = [token for token in tokens if token not in self._places]
        if missing:
            raise InputError(
                f"tokens {missing} must be generated, for the target language or a prefix, and are "
                "not in target_vocab; add them"
            )
        return [self._places[token] for token in tokens]

    def widen(self, tokens: Sequence[int]) -> list[int]:
        """Return the model's tokens for tokens of this vocabulary."""
        return [self._tokens[place] for place in tokens]

    def decode_step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Read new tokens (rows, 1); return the logits (rows, N); all of this vocabulary."""
        self._model.reserve(cache, tokens.shape[1])
        logits = self.decode(tokens, cache)
        cache.advance(tokens.shape[1])
        return logits

    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Do what ``decode_step`` does, within a cache that has room."""
        return self._head.project(self._model.decode_hidden(self._ids[tokens], cache))


def _head_of(embedding: Any, ids: Tensor) -> Any:  # noqa: ANN401
    """Return an embedding of some rows, packed as the whole one is."""
    with torch.no_grad():
        rows = embedding(ids)
        head = TokenEmbedding(*rows.shape, pad_id=0)
        head.weight = torch.nn.Parameter(rows, requires_grad=False)
        head.train(embedding.training)
    return head if type(embedding) is TokenEmbedding else type(embedding)(head)
