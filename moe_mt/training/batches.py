"""Which pairs make a batch, and the tensors of one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_mt.losses import IGNORED_LABEL
from moe_mt.training.pairs import TokenPairs

__all__ = ["TokenBatch", "plan_batches"]

POOL_BATCHES = 50
"""Pairs are sorted by length within pools of about so many batches: little padding, much mixing."""


@dataclass(frozen=True)
class TokenBatch:
    """The tensors of one training step."""

    source_tokens: Tensor
    """(B, S) int64, padded on the right."""

    source_mask: Tensor
    """(B, S) bool, true where a source token is real."""

    target_tokens: Tensor
    """(B, L) int64: decoder start, then the labels but the last."""

    target_mask: Tensor
    """(B, L) bool, true where the decoder reads a real token."""

    labels: Tensor
    """(B, L) int64; -100 behind the end."""

    @classmethod
    def collate(
        cls, pairs: TokenPairs, indices: Sequence[int], pad_id: int, start_id: int
    ) -> "TokenBatch":
        """Pad the pairs ``indices`` to one batch."""
        rows = [pairs[index] for index in indices]
        source_tokens = _pad([source for source, _ in rows], pad_id)
        labels = _pad([target for _, target in rows], IGNORED_LABEL)
        target_tokens = labels.roll(1, dims=1)
        target_tokens[:, 0] = start_id
        # Column j reads label j - 1: it is real exactly where label j is.
        target_mask = labels != IGNORED_LABEL
        return cls(
            source_tokens=source_tokens,
            source_mask=source_tokens != pad_id,
            target_tokens=target_tokens.masked_fill(~target_mask, pad_id),
            target_mask=target_mask,
            labels=labels,
        )

    def to(self, device: torch.device) -> "TokenBatch":
        """Return the batch on ``device``."""
        return TokenBatch(*(tensor.to(device) for tensor in vars(self).values()))


def plan_batches(pairs: TokenPairs, max_batch_tokens: int, seed: int) -> list[list[int]]:
    """Cut all pairs into batches for one epoch.

    A pure function of its arguments: an interrupted epoch is continued by planning it again.

    Args:
        pairs: The training data.
        max_batch_tokens: Most padded tokens a batch holds, on the longer side; a longer pair
            stands alone.
        seed: Of the shuffles.

    Returns:
        Indices of pairs, batch by batch; every pair once.
    """
    generator = torch.Generator().manual_seed(seed)
    longest = pairs.lengths().amax(1)
    order = torch.randperm(len(pairs), generator=generator)
    mean = float(longest.float().mean()) if len(pairs) else 1.0
    pool_size = max(1, int(POOL_BATCHES * max_batch_tokens / mean))
    batches: list[list[int]] = []
    for pool in order.split(pool_size):
        batch: list[int] = []
        for index in pool[longest[pool].argsort(stable=True)].tolist():
            if batch and (len(batch) + 1) * int(longest[index]) > max_batch_tokens:
                batches.append(batch)
                batch = []
            batch.append(index)
        if batch:
            batches.append(batch)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def _pad(sequences: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        [sequence.long() for sequence in sequences], batch_first=True, padding_value=value
    )
