"""The best of a vocabulary, found without sorting or writing more of it than that takes."""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["best_token", "log_prob_of", "top_k"]

BLOCK = 64
"""Scores that are looked at together: on a CPU, maxima of blocks are found at the speed of memory,
while sorting or searching single scores takes three to forty times as long."""


def best_token(scores: Tensor) -> Tensor:
    """Return (rows,) int64: where each row of scores (rows, V) is largest; of equals the first."""
    if not _in_blocks(scores, 1):
        return scores.argmax(-1)
    blocks, rest = _blocks(scores)
    first = blocks.amax(-1).argmax(-1, keepdim=True)
    within = blocks.take_along_dim(first[:, :, None], 1).squeeze(1)
    if rest.shape[1] == 0:
        return (first * BLOCK + within.argmax(-1, keepdim=True)).squeeze(1)
    # What is left over stands behind the block, so that of equals the first still wins.
    place = torch.cat([within, rest], 1).argmax(-1, keepdim=True)
    start = torch.where(place < BLOCK, first * BLOCK, blocks.shape[1] * BLOCK - BLOCK)
    return (start + place).squeeze(1)


def top_k(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ``count`` largest of each row of scores (rows, V), sorted, and where they stand.

    The largest scores lie in the blocks whose maxima are largest, so only these are searched.
    Which of equal scores are taken is open, as in ``torch.topk``.

    Returns:
        Scores and indices, each (rows, count).
    """
    if not _in_blocks(scores, count):
        return scores.topk(count)
    blocks, rest = _blocks(scores)
    chosen = blocks.amax(-1).topk(count).indices
    within = blocks.take_along_dim(chosen[:, :, None], 1).flatten(1)
    values, places = torch.cat([within, rest], 1).topk(count)
    block = (places // BLOCK).clamp(max=count - 1)
    indices = chosen.gather(1, block) * BLOCK + places % BLOCK
    left_over = places - count * BLOCK
    return values, torch.where(left_over >= 0, blocks.shape[1] * BLOCK + left_over, indices)


def log_prob_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return (rows,) float32: the log-probability of one token a row under logits (rows, V)."""
    return -functional.cross_entropy(logits, tokens, reduction="none")


def _in_blocks(scores: Tensor, count: int) -> bool:
    """Whether blocks pay: on a CPU, if most of them need not be searched."""
    return scores.device.type == "cpu" and scores.shape[1] >= 4 * count * BLOCK


def _blocks(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return (rows, V // BLOCK, BLOCK) and what is left over."""
    whole = scores.shape[1] // BLOCK * BLOCK
    return scores[:, :whole].unflatten(1, (-1, BLOCK)), scores[:, whole:]
