"""Rules that change the scores of the next token, in the order in which they apply.

In greedy search and sampling the scores are logits, in beam search log-probabilities; the rules
are the same. Scores are float32, (rows, V); a banned token's score is ``-inf``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_mt.generation.config import GenerationConfig

__all__ = ["LogitsProcessor"]

NOT_FORCED = -1


class LogitsProcessor:
    """Every rule of a configuration, applied to the scores of all rows at once.

    Order and formulas are those of transformers 4.57 (``_get_logits_processor``).
    """

    def __init__(
        self,
        config: GenerationConfig,
        forced_tokens: Sequence[Sequence[int]],
        *,
        eos_id: int,
        device: torch.device,
    ) -> None:
        """Prepare the rules.

        Args:
            config: Which rules apply.
            forced_tokens: For each row the tokens that must follow the decoder's start.
            eos_id: The end mark.
            device: Where the scores will be.
        """
        self.config = config
        self.eos_id = eos_id
        # Beam search needs candidates besides the end mark, so its rows keep two tokens or more.
        self.least_kept = 2 if config.num_beams > 1 else 1
        width = max((len(tokens) for tokens in forced_tokens), default=0)
        table = [[*tokens, *[NOT_FORCED] * (width - len(tokens))] for tokens in forced_tokens]
        self._forced = torch.tensor(table, device=device).view(len(table), width)

    def forced_at(self, step: int) -> Tensor | None:
        """Return (rows,) int64: each row's forced token at ``step`` or -1; ``None`` if none is."""
        return self._forced[:, step] if step < self._forced.shape[1] else None

    def __call__(self, scores: Tensor, history: Tensor) -> Tensor:
        """Apply the rules.

        Args:
            scores: (rows, V) float32, for the token that follows the history.
            history: (rows, 1 + step) int64, the decoder's start and what came since.
        """
        config = self.config
        step = history.shape[1] - 1
        if config.repetition_penalty != 1:
            scores = penalize_repetition(scores, history, config.repetition_penalty)
        if config.no_repeat_ngram_size > 0:
            scores = ban_repeated_ngrams(scores, history, config.no_repeat_ngram_size)
        if step < config.new_token_minimum:
            scores = scores.clone()
            scores[:, self.eos_id] = -torch.inf
        forced = self.forced_at(step)
        if forced is not None:
            scores = force(scores, forced)
        if config.do_sample:
            scores = scores / config.temperature
            if config.top_k > 0:
                scores = keep_top_k(scores, max(config.top_k, self.least_kept))
            if config.top_p < 1:
                scores = keep_top_p(scores, config.top_p, self.least_kept)
        return scores


def penalize_repetition(scores: Tensor, history: Tensor, penalty: float) -> Tensor:
    """Multiply the negative and divide the positive scores of tokens in the history.

    Source: CTRL, Keskar et al., arXiv:1909.05858, section 4.1, in its sign-aware form.
    """
    seen = scores.gather(1, history)
    seen = torch.where(seen < 0, seen * penalty, seen / penalty)
    return scores.scatter(1, history, seen)


def ban_repeated_ngrams(scores: Tensor, history: Tensor, size: int) -> Tensor:
    """Ban each token that would complete an n-gram that is in its row's history already."""
    length = history.shape[1]
    if length < size:
        return scores
    ngrams = history.unfold(1, size, 1)
    current = history[:, length - size + 1 :]
    repeats = (ngrams[:, :, :-1] == current[:, None, :]).all(-1)
    hits = torch.zeros_like(scores).scatter_add_(1, ngrams[:, :, -1], repeats.to(scores.dtype))
    return scores.masked_fill(hits > 0, -torch.inf)


def force(scores: Tensor, forced: Tensor) -> Tensor:
    """Where a row's token is forced, give it the score 0 and ban every other."""
    active = (forced != NOT_FORCED)[:, None]
    alone = torch.full_like(scores, -torch.inf).scatter(1, forced.clamp(min=0)[:, None], 0.0)
    return torch.where(active, alone, scores)


def keep_top_k(scores: Tensor, count: int) -> Tensor:
    """Ban all but the ``count`` best tokens and those that equal the last of them."""
    threshold = scores.topk(min(count, scores.shape[-1])).values[:, -1:]
    return scores.masked_fill(scores < threshold, -torch.inf)


def keep_top_p(scores: Tensor, probability: float, least: int) -> Tensor:
    """Keep the smallest set of best tokens that reaches ``probability``, ``least`` at least.

    Source: nucleus sampling, Holtzman et al., arXiv:1904.09751, section 3.1.
    """
    ascending, order = scores.sort()
    banned = ascending.softmax(-1).cumsum(-1) <= 1 - probability
    banned[:, -least:] = False
    return scores.masked_fill(banned.scatter(1, order, banned), -torch.inf)
