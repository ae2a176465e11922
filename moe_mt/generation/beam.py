"""Beam search, and beam sampling."""

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from moe_mt.generation.hypotheses import NEVER, FinishedBeams
from moe_mt.generation.rules import Rule, rows_of, select_rows
from moe_mt.generation.stopping import Stopping
from moe_mt.generation.vocabulary import top_k

__all__ = ["BeamSearch", "Choice", "candidates_per_beam", "take_best_several"]


def candidates_per_beam(end_marks: int) -> int:
    """Should all beams end at once, with any of the end marks, as many are left to go on."""
    return 1 + max(1, end_marks)


Choice: TypeAlias = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""``(log_probs (B, num_beams, V), scores (B, num_beams), step)`` → the totals of the candidates of
a step, (B, K), and where each stands among the ``num_beams * V`` possible ones."""


def take_best_several(
    count: int, log_probs: Tensor, scores: Tensor, step: int
) -> tuple[Tensor, Tensor]:
    """Return the ``count`` best totals (B, count) and where they stand; see ``Choice``.

    The best of a sentence are among the best of its beams, so that scores of beams are added to
    ``num_beams * count`` numbers and not to all.
    """
    sentences, num_beams, vocab_size = log_probs.shape
    count = min(count, num_beams * vocab_size)
    values, tokens = top_k(log_probs.flatten(0, 1), min(count, vocab_size))
    totals = values.view(sentences, num_beams, -1) + scores[:, :, None]
    places = tokens.view_as(totals) + torch.arange(num_beams, device=tokens.device)[:, None] * (
        vocab_size
    )
    best, chosen = totals.flatten(1).topk(count)
    return best, places.flatten(1).gather(1, chosen)


class BeamSearch:
    """Keep the ``num_beams`` best open hypotheses of every sentence, and the best ended ones.

    Agrees with ``_beam_search`` of transformers 4.57 on the same logits, where all sentences have
    one limit; here each can have its own, so that no sentence's result depends on another.
    """

    def __init__(
        self,
        prompts: Tensor,
        processor: Rule,
        stopping: Stopping,
        choose: Choice,
        *,
        length_penalty: float,
        early_stopping: bool | Literal["never"],
    ) -> None:
        """Start every beam with its prompt; only the first beam of a sentence counts at first.

        Args:
            prompts: (B, num_beams, P) int64, the decoder's start token and what may follow it.
            processor: The rules, prepared for ``B * num_beams`` rows.
            stopping: When a hypothesis ends; one limit per sentence.
            choose: What the candidates of a step are.
            length_penalty: Exponent of the length that scores are divided by.
            early_stopping: When to leave a sentence, as in ``GenerationConfig``.
        """
        self.processor = processor
        self.stopping = stopping
        self.choose = choose
        self.length_penalty = length_penalty
        self.early_stopping = early_stopping
        sentences, self.num_beams, self.prompt_length = prompts.shape
        device = prompts.device
        self.histories = prompts
        self.scores = torch.full((sentences, self.num_beams), NEVER, device=device)
        self.scores[:, 0] = 0
        self.finished = FinishedBeams(
            (sentences, self.num_beams), capacity=max(stopping.limits), device=device
        )
        penalties = [limit**length_penalty for limit in stopping.limits]
        self.limit_penalties = torch.tensor(penalties, device=device)
        self.can_improve = torch.ones(sentences, dtype=torch.bool, device=device)
        self.done = torch.zeros_like(self.can_improve)
        self.first_rows = torch.arange(sentences, device=device)[:, None] * self.num_beams
        self.continued: list[Tensor] = []

    def advance(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Take the logits of the next token and choose how the beams go on.

        Args:
            logits: (B * num_beams, V), any float dtype.

        Returns:
            The tokens (B * num_beams,) to read next, and the rows (B * num_beams,) they continue.
        """
        step = self.histories.shape[2] - self.prompt_length
        totals, parents, tokens = self._candidates(logits, step)
        histories = self.histories.take_along_dim(parents[:, :, None], 1)
        histories = torch.cat([histories, tokens[:, :, None]], dim=2)
        at_limit = self.stopping.at_limit(step + 1)
        ends = self.stopping.ends(histories) | at_limit[:, None]

        totals_open = totals + ends.float() * NEVER
        kept = totals_open.topk(self.num_beams).indices
        self.scores = totals_open.gather(1, kept)
        self.histories = histories.take_along_dim(kept[:, :, None], 1)
        rows = parents + self.first_rows
        self._finish(histories[:, :, self.prompt_length :], totals, ends, rows)
        self._judge(step + 1, at_limit, ends)

        continued = rows.gather(1, kept).flatten()
        self.continued.append(continued)
        return tokens.gather(1, kept).flatten(), continued

    def _candidates(self, logits: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return accumulated scores, parent beams and tokens of the candidates, each (B, K)."""
        vocab_size = logits.shape[-1]
        log_probs = self.processor(self.histories.flatten(0, 1), logits.float().log_softmax(-1))
        log_probs = log_probs.view(*self.scores.shape, vocab_size)
        totals, picks = self.choose(log_probs, self.scores, step)
        return totals, picks // vocab_size, picks % vocab_size

    def _finish(self, tokens: Tensor, totals: Tensor, ends: Tensor, rows: Tensor) -> None:
        """Let candidates (B, K, length) that ended compete for the slots of ended hypotheses.

        Only those that rank among the first ``num_beams``: the rest are there to go on.
        """
        ends = ends.clone()
        ends[:, self.num_beams :] = False
        scores = totals / tokens.shape[-1] ** self.length_penalty
        shut = ~self.can_improve
        if self.early_stopping is True:
            shut = shut | self.finished.full()
        self.finished.merge(tokens, scores + (shut[:, None] | ~ends).float() * NEVER, ends, rows)

    def _judge(self, length: int, at_limit: Tensor, ends: Tensor) -> None:
        """Decide which sentences are done after ``length`` tokens."""
        penalty = length**self.length_penalty
        if self.early_stopping == "never" and self.length_penalty > 0:
            penalty = self.limit_penalties
        hope = self.scores[:, 0] / penalty
        hopeful = hope > self.finished.worst_scores()
        self.can_improve = self.can_improve & hopeful & ~at_limit
        self.done = ~self.can_improve
        if self.early_stopping is True:
            self.done = self.done | self.finished.full()
        if self.stopping.criteria:
            self.done = self.done | ends.all()

    def all_done(self) -> bool:
        """Whether every sentence is done; waits for the device."""
        return bool(self.done.all())

    def sentences_done(self) -> Tensor:
        """Return (B,) bool: whether a sentence is done."""
        return self.done

    def select(self, sentences: Tensor) -> None:
        """Go on with some of the sentences, (N,) int64, in that order; then ``paths`` fails."""
        select_rows(self.processor, rows_of(sentences, self.num_beams))
        select_rows(self.choose, sentences)
        self.stopping.select(sentences)
        self.finished.select(sentences)
        self.histories, self.scores = self.histories[sentences], self.scores[sentences]
        self.limit_penalties = self.limit_penalties[sentences]
        self.can_improve, self.done = self.can_improve[sentences], self.done[sentences]
        self.first_rows = self.first_rows[: len(sentences)]
        self.continued.clear()

    def results(self, count: int | None = None) -> list[list[tuple[list[int], float]]]:
        """Return tokens and score of every sentence's ``count`` best hypotheses, or of all."""
        return self.finished.best(count or self.num_beams)

    def paths(self) -> Tensor:
        """Return (B, num_beams, steps) int64: the row in which each token was chosen.

        Of the ended hypotheses, best first; -1 behind their last token.
        """
        rows, lengths = self.finished.parents, self.finished.lengths
        columns: list[Tensor] = []
        for step in reversed(range(len(self.continued))):
            reached = step < lengths
            if step + 1 < len(self.continued):
                # What ends later was, a step before, the row that its row continues.
                later = step + 1 < lengths
                rows = torch.where(later, self.continued[step][rows], rows)
            columns.append(rows.masked_fill(~reached, -1))
        return torch.stack(columns[::-1], dim=-1)
