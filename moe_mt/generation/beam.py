"""Beam search, and beam sampling."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_mt.generation.config import GenerationConfig
from moe_mt.generation.hypotheses import NEVER, FinishedBeams
from moe_mt.generation.logits import LogitsProcessor
from moe_mt.generation.sampling import draw_several
from moe_mt.models import TransformerConfig

__all__ = ["CANDIDATES_PER_BEAM", "BeamSearch"]

CANDIDATES_PER_BEAM = 2
"""Twice as many candidates as beams: should all beams end at once, as many are left to go on."""


class BeamSearch:
    """Keep the ``num_beams`` best open hypotheses of every sentence, and the best ended ones.

    Agrees with ``_beam_search`` of transformers 4.57 on the same logits, where all sentences have
    one limit; here each has its own, so that no sentence's result depends on another.
    """

    def __init__(
        self,
        config: GenerationConfig,
        model_config: TransformerConfig,
        processor: LogitsProcessor,
        limits: Sequence[int],
        uniforms: Tensor | None,
        device: torch.device,
    ) -> None:
        """Start every beam with the decoder's start token; only the first beam counts at first.

        Args:
            config: Beams, length penalty and when to stop.
            model_config: For the special tokens.
            processor: The rules, prepared for ``B * num_beams`` rows.
            limits: Most tokens of each sentence.
            uniforms: (B, steps, 2 * num_beams) float64 for beam sampling, or ``None``.
            device: Where the model runs.
        """
        self.config = config
        self.eos_id = model_config.eos_id
        self.processor = processor
        self.uniforms = uniforms
        shape = (len(limits), config.num_beams)
        start = model_config.decoder_start_id
        self.histories = torch.full((*shape, 1), start, dtype=torch.int64, device=device)
        self.scores = torch.full(shape, NEVER, device=device)
        self.scores[:, 0] = 0
        self.finished = FinishedBeams(shape, capacity=max(limits), device=device)
        self.limits = torch.tensor(limits, device=device)
        penalties = [limit**config.length_penalty for limit in limits]
        self.limit_penalties = torch.tensor(penalties, device=device)
        self.can_improve = torch.ones(len(limits), dtype=torch.bool, device=device)
        self.done = torch.zeros_like(self.can_improve)

    def advance(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Take the logits of the next token and choose how the beams go on.

        Args:
            logits: (B * num_beams, V), any float dtype.

        Returns:
            The tokens (B * num_beams,) to read next, and the rows (B * num_beams,) they continue.
        """
        step = self.histories.shape[2] - 1
        totals, parents, tokens = self._candidates(logits, step)
        histories = self.histories.take_along_dim(parents[:, :, None], 1)
        histories = torch.cat([histories, tokens[:, :, None]], dim=2)
        at_limit = step + 1 >= self.limits
        ends = (tokens == self.eos_id) | at_limit[:, None]

        totals_open = totals + ends.float() * NEVER
        kept = totals_open.topk(self.config.num_beams).indices
        self.scores = totals_open.gather(1, kept)
        self.histories = histories.take_along_dim(kept[:, :, None], 1)
        self._finish(histories[:, :, 1:], totals, ends)
        self._judge(step + 1, at_limit)

        first_rows = torch.arange(len(totals), device=totals.device) * self.config.num_beams
        rows = parents.gather(1, kept) + first_rows[:, None]
        return tokens.gather(1, kept).flatten(), rows.flatten()

    def _candidates(self, logits: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return accumulated scores, parent beams and tokens of the candidates, each (B, K)."""
        vocab_size = logits.shape[-1]
        log_probs = self.processor(logits.float().log_softmax(-1), self.histories.flatten(0, 1))
        totals = log_probs.view(*self.scores.shape, vocab_size) + self.scores[:, :, None]
        totals = totals.flatten(1)
        if self.uniforms is None:
            totals, picks = totals.topk(CANDIDATES_PER_BEAM * self.config.num_beams)
        else:
            totals, picks = draw_several(totals, self.uniforms[:, step])
        return totals, picks // vocab_size, picks % vocab_size

    def _finish(self, tokens: Tensor, totals: Tensor, ends: Tensor) -> None:
        """Let candidates (B, K, length) that ended compete for the slots of ended hypotheses.

        Only those that rank among the first ``num_beams``: the rest are there to go on.
        """
        ends = ends.clone()
        ends[:, self.config.num_beams :] = False
        scores = totals / tokens.shape[-1] ** self.config.length_penalty
        shut = ~self.can_improve
        if self.config.early_stopping is True:
            shut = shut | self.finished.full()
        self.finished.merge(tokens, scores + (shut[:, None] | ~ends).float() * NEVER, ends)

    def _judge(self, length: int, at_limit: Tensor) -> None:
        """Decide which sentences are done after ``length`` tokens."""
        penalty = length**self.config.length_penalty
        if self.config.early_stopping == "never" and self.config.length_penalty > 0:
            penalty = self.limit_penalties
        hope = self.scores[:, 0] / penalty
        hopeful = hope > self.finished.worst_scores()
        self.can_improve = self.can_improve & hopeful & ~at_limit
        self.done = ~self.can_improve
        if self.config.early_stopping is True:
            self.done = self.done | self.finished.full()

    def all_done(self) -> bool:
        """Whether every sentence is done; waits for the device."""
        return bool(self.done.all())

    def results(self) -> list[list[tuple[list[int], float]]]:
        """Return tokens and score of every sentence's hypotheses, best first."""
        return self.finished.best(self.config.num_return_sequences)
