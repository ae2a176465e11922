"""Which elements dropout keeps, as a function of a seed: the kernels' own bits, in PyTorch."""

from typing import cast

import torch
from torch import Tensor

__all__ = ["dropped_below", "keep_mask", "kept_share", "philox"]

ROUNDS = 7
"""The fewest that pass the test batteries of the paper; kernels draw bits for every score."""

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_THRESHOLD_BITS = 24

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(seed: Tensor, counter: Words, rounds: int = ROUNDS) -> Words:
    """Return the four 32-bit words of Philox4x32 for each counter.

    Args:
        seed: () or (1,) int64. Its two halves are the key.
        counter: Four int64 tensors that broadcast together, each in [0, 2^32).
        rounds: How often the words are mixed.

    Returns:
        Four int64 tensors in [0, 2^32).

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
    """
    c0, c1, c2, c3 = cast(Words, torch.broadcast_tensors(*counter))  # pyright: ignore
    key = [seed & _WORD, (seed >> 32) & _WORD]
    for _ in range(rounds):
        # 64 bits hold the product but for its sign, which masks the high word's out again.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (second >> 32) & _WORD ^ c1 ^ key[0], (first >> 32) & _WORD ^ c3 ^ key[1]
        c1, c3 = second & _WORD, first & _WORD
        key = [(k + step) & _WORD for k, step in zip(key, _KEY_STEPS, strict=True)]
    return c0, c1, c2, c3


def dropped_below(probability: float) -> int:
    """Return the number of 24 bits below which an element's bits drop it."""
    return int(probability * (1 << _THRESHOLD_BITS))


def kept_share(probability: float) -> float:
    """Return the share that is kept, which dropout divides by: ``1 - probability`` to 24 bits."""
    return 1 - dropped_below(probability) / (1 << _THRESHOLD_BITS)


def keep_mask(
    seed: Tensor,
    probability: float,
    *,
    sentences: int,
    heads: int,
    queries: int,
    keys: int,
    first_sentence: int = 0,
) -> Tensor:
    """Return which attention weights dropout keeps: (B, H, L, S) bool.

    Four neighbouring keys share a counter, one word each, of which the upper 24 bits decide: the
    mask depends on the seed and on the place (sentence, head, query, key) alone.

    Args:
        seed: () or (1,) int64.
        probability: Share that is dropped, to 24 bits.
        sentences: B.
        heads: H.
        queries: L.
        keys: S.
        first_sentence: Number of the first of the sentences.
    """

    def places(count: int, first: int = 0) -> Tensor:
        return torch.arange(first, first + count, dtype=torch.int64, device=seed.device)

    counter = (
        places(-(-keys // 4)),
        places(queries)[:, None],
        places(heads)[:, None, None],
        places(sentences, first_sentence)[:, None, None, None],
    )
    words = torch.stack(philox(seed, counter), -1).flatten(-2)[..., :keys]
    return words >> (32 - _THRESHOLD_BITS) >= dropped_below(probability)
