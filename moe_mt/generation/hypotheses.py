"""What generation returns, and the ended hypotheses that beam search keeps."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["FinishedBeams", "Hypothesis", "hypothesis_from_tokens", "is_repetition_loop"]

NEVER = -1.0e9
"""Added to scores that must not win. Finite and of exactly this size, because it decides which
hypotheses stand in when there are too few; transformers uses the same."""

LOOP_LEAST_REPEATS = 3
LOOP_LEAST_TOKENS = 24
LOOP_LONGEST_UNIT = 64


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A generated sequence and its score."""

    tokens: tuple[int, ...]
    """What follows the decoder's start: forced tokens and, if it came, the end mark included."""

    score: float
    """Sum of log-probabilities over ``length ** length_penalty``; forced tokens add nothing to
    the sum and count in the length."""

    finish_reason: Literal["stop", "length", "repetition"]
    """``"stop"`` when the end mark came, ``"length"`` when the limit did, ``"repetition"`` when
    there is a loop in it, however it ended."""


def hypothesis_from_tokens(
    tokens: Sequence[int], score: float, *, eos_id: int, source: Sequence[int]
) -> Hypothesis:
    """Return the hypothesis with its finish reason.

    A source that is itself a loop may rightly be translated by one, so it excuses a loop.
    """
    if is_repetition_loop(tokens) and not is_repetition_loop(source):
        return Hypothesis(tuple(tokens), score, "repetition")
    stopped = bool(tokens) and tokens[-1] == eos_id
    return Hypothesis(tuple(tokens), score, "stop" if stopped else "length")


def is_repetition_loop(tokens: Sequence[int]) -> bool:
    """Whether a unit of tokens stands three times or more in a row, over 24 tokens or more.

    Units have up to 64 tokens. Ordinary text stays below one bound or the other: the groups of a
    large number, a list with equal separators or a threefold "ha" are too short, and what is
    longer changes from one item to the next. One token must come 24 times, a phrase of eight
    tokens three times.
    """
    longest = min(LOOP_LONGEST_UNIT, len(tokens) // LOOP_LEAST_REPEATS)
    for unit in range(1, longest + 1):
        needed = max(LOOP_LEAST_REPEATS * unit, LOOP_LEAST_TOKENS) - unit
        run = 0
        for earlier, later in zip(tokens, tokens[unit:], strict=False):
            run = run + 1 if earlier == later else 0
            if run >= needed:
                return True
    return False


class FinishedBeams:
    """The best ended hypotheses of every sentence, ``beams`` slots each, best first."""

    def __init__(self, shape: tuple[int, int], *, capacity: int, device: torch.device) -> None:
        """Start with empty slots.

        Args:
            shape: Sentences and slots.
            capacity: Most tokens of a hypothesis.
            device: Where the search runs.
        """
        self.tokens = torch.zeros(*shape, capacity, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(shape, dtype=torch.int64, device=device)
        self.parents = torch.zeros(shape, dtype=torch.int64, device=device)
        self.scores = torch.full(shape, NEVER, device=device)
        self.filled = torch.zeros(shape, dtype=torch.bool, device=device)

    def select(self, sentences: Tensor) -> None:
        """Go on with some of the sentences, (N,) int64, in that order."""
        self.tokens, self.lengths = self.tokens[sentences], self.lengths[sentences]
        self.parents, self.scores = self.parents[sentences], self.scores[sentences]
        self.filled = self.filled[sentences]

    def full(self) -> Tensor:
        """Return (B,) bool: whether all slots of a sentence hold an ended hypothesis."""
        return self.filled.all(-1)

    def worst_scores(self) -> Tensor:
        """Return (B,) float32: the score to beat, which anything does while a slot is empty."""
        return self.scores[:, -1]

    def merge(self, tokens: Tensor, scores: Tensor, ended: Tensor, parents: Tensor) -> None:
        """Let candidates compete with what the slots hold.

        Args:
            tokens: (B, K, length) int64.
            scores: (B, K) float32, by ``NEVER`` lower where a candidate may not enter.
            ended: (B, K) bool, whether the candidate has ended.
            parents: (B, K) int64, the row that each candidate's last token was chosen in.
        """
        length = tokens.shape[-1]
        padded = functional.pad(tokens, (0, self.tokens.shape[-1] - length))
        merged_scores = torch.cat([self.scores, scores], dim=1)
        best = merged_scores.topk(self.scores.shape[1]).indices
        self.scores = merged_scores.gather(1, best)
        self.filled = torch.cat([self.filled, ended], dim=1).gather(1, best)
        lengths = torch.full_like(ended, length, dtype=torch.int64)
        self.lengths = torch.cat([self.lengths, lengths], dim=1).gather(1, best)
        self.parents = torch.cat([self.parents, parents], dim=1).gather(1, best)
        self.tokens = torch.cat([self.tokens, padded], dim=1).take_along_dim(best[:, :, None], 1)

    def best(self, count: int) -> list[list[tuple[list[int], float]]]:
        """Return tokens and score of the best ``count`` hypotheses of every sentence.

        Fewer where fewer exist, because all tokens were forced; never less than one.
        """
        columns = (self.tokens, self.lengths, self.filled, self.scores)
        return [
            _distinct(zip(*slots, strict=True))[:count]
            for slots in zip(*(column.tolist() for column in columns), strict=True)
        ]


def _distinct(
    slots: Iterable[tuple[list[int], int, bool, float]],
) -> list[tuple[list[int], float]]:
    """Return the first slot, and of the others those that are filled and differ from all before.

    Beams differ from each other by what they chose. Where nothing could be chosen, the beams
    beside the first are copies of it that only fill the search's tensors.
    """
    found: list[tuple[list[int], float]] = []
    for tokens, length, filled, score in slots:
        is_new = all(tokens[:length] != other for other, _ in found)
        if not found or (filled and is_new):
            found.append((tokens[:length], score))
    return found
