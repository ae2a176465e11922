"""One hypothesis a row: the most probable token of every step, or a drawn one."""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_mt.generation.rules import ForcedTokens, Rule, rows_of, select_rows
from moe_mt.generation.stopping import Stopping
from moe_mt.generation.vocabulary import best_token, log_prob_of

__all__ = ["GreedySearch", "take_best"]


def take_best(scores: Tensor, step: int) -> Tensor:
    """Return (rows,) int64: the token with the best score."""
    return best_token(scores)


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
        rows_per_sentence: int = 1,
        length_penalty: float = 1.0,
    ) -> None:
        """Start every row with its prompt.

        Args:
            prompts: (rows, P) int64, the decoder's start token and what may follow it.
            processor: The rules, prepared for as many rows.
            stopping: When a row ends.
            choose: ``(scores (rows, V), step) -> tokens (rows,)``.
            pad_id: What rows that have ended go on with; ``None``: with what they would say.
            forced: Tokens that add nothing to the log-probability of a row; one of the rules.
            rows_per_sentence: Rows that belong to one sentence and stand next to each other.
            length_penalty: Exponent of the length that log-probabilities are divided by.
        """
        self.rows_per_sentence = rows_per_sentence
        self.length_penalty = length_penalty
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
        gains = log_prob_of(logits, tokens)
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

    def sentences_done(self) -> Tensor:
        """Return (B,) bool: whether all rows of a sentence have ended."""
        return self.done.view(-1, self.rows_per_sentence).all(1)

    def select(self, sentences: Tensor) -> None:
        """Go on with some of the sentences, (N,) int64, in that order."""
        rows = rows_of(sentences, self.rows_per_sentence)
        for part in (self.processor, self.choose):
            select_rows(part, rows)
        self.stopping.select(rows)
        self.history, self.log_probs = self.history[rows], self.log_probs[rows]
        self.lengths, self.done = self.lengths[rows], self.done[rows]

    def results(self) -> list[list[tuple[list[int], float]]]:
        """Return for every sentence what follows the prompts of its rows, and the scores."""
        scores = self.log_probs / self.lengths.float() ** self.length_penalty
        generated = self.history[:, self.prompt_length :].tolist()
        rows = zip(generated, self.lengths.tolist(), scores.tolist(), strict=True)
        found = [(tokens[:length], score) for tokens, length, score in rows]
        count = self.rows_per_sentence
        return [found[first : first + count] for first in range(0, len(found), count)]
