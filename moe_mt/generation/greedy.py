"""One hypothesis a row: the most probable token of every step, or a drawn one."""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_mt.generation.rules import ForcedTokens, Rule
from moe_mt.generation.stopping import Stopping

__all__ = ["GreedySearch", "take_best"]


def take_best(scores: Tensor, step: int) -> Tensor:
    """Return (rows,) int64: the token with the best score."""
    return scores.argmax(-1)


class GreedySearch:
    """Extend every row by one token a step until it ends; rows know nothing of each other."""

    def __init__(
        self,
        prompts: Tensor,
        processor: Rule,
        stopping: Stopping,
        choose: Callable[[Tensor, int], Tensor],
        *,
        pad_id: int | None,
        forced: ForcedTokens | None = None,
    ) -> None:
        """Start every row with its prompt.

        Args:
            prompts: (rows, P) int64, the decoder's start token and what may follow it.
            processor: The rules, prepared for as many rows.
            stopping: When a row ends.
            choose: ``(scores (rows, V), step) -> tokens (rows,)``.
            pad_id: What rows that have ended go on with; ``None``: with what they would say.
            forced: Tokens that add nothing to the log-probability of a row.
        """
        self.processor = processor
        self.stopping = stopping
        self.choose = choose
        self.pad_id = pad_id
        self.forced = forced
        rows, self.prompt_length = prompts.shape
        self.history = prompts
        self.log_probs = torch.zeros(rows, device=prompts.device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=prompts.device)
        self.done = torch.zeros(rows, dtype=torch.bool, device=prompts.device)

    def advance(self, logits: Tensor) -> tuple[Tensor, None]:
        """Take the logits (rows, V) of the next token; return the tokens (rows,) to read next."""
        step = self.history.shape[1] - self.prompt_length
        logits = logits.float()
        tokens = self.choose(self.processor(self.history, logits), step)
        gains = logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(-1)
        forced = None if self.forced is None else self.forced.at(step)
        if forced is not None:
            gains = gains.masked_fill(forced == tokens, 0)
        self.log_probs = self.log_probs + gains.masked_fill(self.done, 0)
        self.lengths = self.lengths + ~self.done
        if self.pad_id is not None:
            tokens = tokens.masked_fill(self.done, self.pad_id)
        self.history = torch.cat([self.history, tokens[:, None]], dim=1)
        ended = self.stopping.ends(self.history) | self.stopping.at_limit(step + 1)
        self.done = self.done | ended
        return tokens, None

    def all_done(self) -> bool:
        """Whether every row has ended; waits for the device."""
        return bool(self.done.all())

    def results(self, length_penalty: float, count: int) -> list[list[tuple[list[int], float]]]:
        """Return what follows the prompts, and its score.

        Args:
            length_penalty: Exponent of the length that log-probabilities are divided by.
            count: Rows that belong to one sentence.
        """
        scores = self.log_probs / self.lengths.float() ** length_penalty
        generated = self.history[:, self.prompt_length :].tolist()
        rows = zip(generated, self.lengths.tolist(), scores.tolist(), strict=True)
        found = [(tokens[:length], score) for tokens, length, score in rows]
        return [found[first : first + count] for first in range(0, len(found), count)]
