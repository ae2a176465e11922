"""When a hypothesis ends."""

from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Criterion", "Stopping"]

Criterion: TypeAlias = Callable[[Tensor], bool | Tensor]
"""``history (rows, length) int64 -> (rows,) bool`` or one bool for all: whether to end there."""


class Stopping:
    """End marks, limits, and whatever else ends a hypothesis."""

    def __init__(
        self,
        limits: Sequence[int],
        eos_ids: Sequence[int],
        device: torch.device,
        criteria: Sequence[Criterion] = (),
    ) -> None:
        """Take the reasons to end.

        Args:
            limits: Most new tokens, one per row in greedy search and per sentence in beam search.
            eos_ids: End marks; there may be none.
            device: Where the search runs.
            criteria: The caller's own.
        """
        self.limits = tuple(limits)
        self.eos_ids = tuple(eos_ids)
        self.criteria = tuple(criteria)
        self._limits = torch.tensor(self.limits, device=device)

    def at_limit(self, new_tokens: int) -> Tensor:
        """Return a bool for each limit: whether so many tokens reach it."""
        return new_tokens >= self._limits

    def select(self, index: Tensor) -> None:
        """Keep some of the limits, (N,) int64, in that order."""
        self._limits = self._limits[index]

    def ends(self, histories: Tensor) -> Tensor:
        """Return (...) bool: whether histories (..., length) end with their last token."""
        tokens = histories[..., -1]
        found = [tokens == eos_id for eos_id in self.eos_ids]
        rows = histories.flatten(0, -2)
        for criterion in self.criteria:
            verdict = torch.as_tensor(criterion(rows), dtype=torch.bool, device=tokens.device)
            found.append(verdict.expand(len(rows)).view(tokens.shape))
        return reduce(or_, found) if found else torch.zeros_like(tokens, dtype=torch.bool)
