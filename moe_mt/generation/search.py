"""The loop of decoding: one decoder step, one choice."""

from typing import Protocol

from torch import Tensor

from moe_mt.models import KVCache

__all__ = ["CachedDecoder", "CachedModel", "StepDecoder", "Strategy", "search"]


class Strategy(Protocol):
    """Choose tokens from logits, and remember what was chosen."""

    def advance(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the tokens to read next and the rows they continue, ``None`` for each its own."""
        ...

    def all_done(self) -> bool:
        """Whether nothing is left to decode."""
        ...


class StepDecoder(Protocol):
    """Read tokens, and remember what was read."""

    def step(self, tokens: Tensor) -> Tensor:
        """Read tokens (rows, new) and return the logits (rows, V) behind the last of them."""
        ...

    def reorder(self, parents: Tensor) -> None:
        """Let row ``i`` continue what row ``parents[i]`` has read."""
        ...


class CachedModel(Protocol):
    """A model that decodes with a cache."""

    def decode_step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Read new tokens (rows, new) and return the logits (rows, V) behind the last of them."""
        ...


class CachedDecoder:
    """A model and its cache; the memory is there once per sentence."""

    def __init__(self, model: CachedModel, cache: KVCache) -> None:
        """Take a cache from the model's ``new_cache``."""
        self.model = model
        self.cache = cache

    def step(self, tokens: Tensor) -> Tensor:
        """Read tokens (rows, new) and return the logits (rows, V) behind the last of them."""
        return self.model.decode_step(tokens, self.cache)

    def reorder(self, parents: Tensor) -> None:
        """Let row ``i`` continue what row ``parents[i]`` has read."""
        self.cache.reorder(parents)


def search(decoder: StepDecoder, strategy: Strategy, prompts: Tensor) -> None:
    """Let a strategy choose until it is done; what it found, it knows.

    Args:
        decoder: Has read nothing yet.
        strategy: Has chosen nothing yet.
        prompts: (rows, P) int64, what the decoder reads first.
    """
    tokens = prompts
    while True:
        chosen, parents = strategy.advance(decoder.step(tokens))
        if strategy.all_done():
            return
        if parents is not None:
            decoder.reorder(parents)
        tokens = chosen[:, None]
