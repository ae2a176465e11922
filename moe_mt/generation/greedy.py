"""One hypothesis a row: the most probable token of every step, or a drawn one."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_mt.generation.config import GenerationConfig
from moe_mt.generation.logits import LogitsProcessor
from moe_mt.models import TransformerConfig

__all__ = ["GreedySearch", "take_best"]


def take_best(scores: Tensor, step: int) -> Tensor:
    """Return (rows,) int64: the token with the best score."""
    return scores.argmax(-1)


class GreedySearch:
    """Extend every row by one token a step until it ends; rows know nothing of each other."""

    def __init__(
        self,
        config: GenerationConfig,
        model_config: TransformerConfig,
        processor: LogitsProcessor,
        limits: Sequence[int],
        choose: Callable[[Tensor, int], Tensor],
        device: torch.device,
    ) -> None:
        """Start every row with the decoder's start token.

        Args:
            config: For the length penalty of the scores.
            model_config: For the special tokens.
            processor: The rules, prepared for as many rows.
            limits: Most tokens of each row.
            choose: ``(scores (rows, V), step) -> tokens (rows,)``.
            device: Where the model runs.
        """
        self.config = config
        self.model_config = model_config
        self.processor = processor
        self.choose = choose
        rows = len(limits)
        self.limits = torch.tensor(limits, device=device)
        start = model_config.decoder_start_id
        self.history = torch.full((rows, 1), start, dtype=torch.int64, device=device)
        self.log_probs = torch.zeros(rows, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.done = torch.zeros(rows, dtype=torch.bool, device=device)

    def advance(self, logits: Tensor) -> tuple[Tensor, None]:
        """Take the logits (rows, V) of the next token; return the tokens (rows,) to read next."""
        step = self.history.shape[1] - 1
        logits = logits.float()
        tokens = self.choose(self.processor(logits, self.history), step)
        gains = logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(-1)
        forced = self.processor.forced_at(step)
        if forced is not None:
            gains = gains.masked_fill(forced == tokens, 0)
        self.log_probs = self.log_probs + gains.masked_fill(self.done, 0)
        self.lengths = self.lengths + ~self.done
        tokens = tokens.masked_fill(self.done, self.model_config.pad_id)
        self.history = torch.cat([self.history, tokens[:, None]], dim=1)
        self.done = self.done | (tokens == self.model_config.eos_id) | (step + 1 >= self.limits)
        return tokens, None

    def all_done(self) -> bool:
        """Whether every row has ended; waits for the device."""
        return bool(self.done.all())

    def results(self) -> list[list[tuple[list[int], float]]]:
        """Return tokens and score of every sentence's hypotheses."""
        scores = self.log_probs / self.lengths.float() ** self.config.length_penalty
        rows = zip(self.history.tolist(), self.lengths.tolist(), scores.tolist(), strict=True)
        found = [(history[1 : 1 + length], score) for history, length, score in rows]
        count = self.config.num_return_sequences
        return [found[first : first + count] for first in range(0, len(found), count)]
