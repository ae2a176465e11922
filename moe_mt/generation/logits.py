"""What rules do to the scores of the next token; ``rules.py`` says which apply, and in what order.

In greedy search and sampling the scores are logits, in beam search log-probabilities; the rules
are the same. Scores are float32, (rows, V); a banned token's score is ``-inf``. No function changes
the scores it is given. The formulas are those of transformers 4.57.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = [
    "NOT_FORCED",
    "SequenceBias",
    "ban",
    "ban_repeated_ngrams",
    "force",
    "force_any",
    "keep_min_p",
    "keep_probable",
    "keep_probable_by_entropy",
    "keep_top_k",
    "keep_top_p",
    "keep_typical",
    "penalize_repetition",
    "raise_end",
    "replace_invalid",
]

NOT_FORCED = -1


class SequenceBias:
    """Add a number to the score of a token that would complete a given sequence."""

    def __init__(self, biases: Mapping[tuple[int, ...], float], device: torch.device) -> None:
        """Prepare the sequences.

        Args:
            biases: Sequence of tokens -> what is added to its last one's score; ``-inf`` bans it.
            device: Where the scores will be.
        """
        lengths = sorted({len(sequence) for sequence in biases})
        self._groups: list[tuple[int, Tensor, Tensor]] = []
        for length in lengths:
            group = [(tokens, bias) for tokens, bias in biases.items() if len(tokens) == length]
            tokens = torch.tensor([tokens for tokens, _ in group], device=device)
            values = torch.tensor([bias for _, bias in group], dtype=torch.float32, device=device)
            self._groups.append((length, tokens, values))

    def __call__(self, history: Tensor, scores: Tensor) -> Tensor:
        """Return the scores (rows, V) after a history (rows, length) with what is added."""
        bias = torch.zeros_like(scores)
        for length, tokens, values in self._groups:
            # transformers leaves out a sequence that is longer than the history, although its
            # beginning alone would fit.
            if 1 < length and length > history.shape[1]:
                continue
            before = history[:, history.shape[1] - length + 1 :]
            matches = (before[:, None, :] == tokens[:, :-1]).all(-1)
            bias.index_add_(1, tokens[:, -1], torch.where(matches, values, 0.0))
        return scores + bias


def ban(scores: Tensor, tokens: Tensor) -> Tensor:
    """Ban tokens (N,) int64 in every row."""
    return scores.index_fill(1, tokens, -torch.inf)


def penalize_repetition(scores: Tensor, history: Tensor, penalty: float) -> Tensor:
    """Multiply the negative and divide the positive scores of tokens in the history.

    Source: CTRL, Keskar et al., arXiv:1909.05858, section 4.1, in its sign-aware form.
    """
    seen = scores.gather(1, history)
    seen = torch.where(seen < 0, seen * penalty, seen / penalty)
    return scores.scatter(1, history, seen)


def ban_repeated_ngrams(
    scores: Tensor, history: Tensor, size: int, text: Tensor | None = None
) -> Tensor:
    """Ban each token that would complete an n-gram that is in its row's history already.

    Or, with a text (rows, S), an n-gram that is in that.
    """
    length = history.shape[1]
    text = history if text is None else text
    if length < size - 1 or text.shape[1] < size:
        return scores
    ngrams = text.unfold(1, size, 1)
    current = history[:, length - size + 1 :]
    repeats = (ngrams[:, :, :-1] == current[:, None, :]).all(-1)
    hits = torch.zeros_like(scores).scatter_add_(1, ngrams[:, :, -1], repeats.to(scores.dtype))
    return scores.masked_fill(hits > 0, -torch.inf)


def force(scores: Tensor, forced: Tensor) -> Tensor:
    """Where a row's token is forced, give it the score 0 and ban every other."""
    active = (forced != NOT_FORCED)[:, None]
    alone = torch.full_like(scores, -torch.inf).scatter(1, forced.clamp(min=0)[:, None], 0.0)
    return torch.where(active, alone, scores)


def force_any(scores: Tensor, tokens: Tensor) -> Tensor:
    """Give each of the tokens (N,) the score 0 and ban every other, in all rows."""
    return torch.full_like(scores, -torch.inf).index_fill(1, tokens, 0.0)


def replace_invalid(scores: Tensor) -> Tensor:
    """Put 0 for NaN, and the largest and smallest float for what is infinite."""
    limits = torch.finfo(scores.dtype)
    return scores.nan_to_num(nan=0.0, posinf=limits.max, neginf=limits.min)


def raise_end(scores: Tensor, end_tokens: Tensor, factor: float) -> Tensor:
    """Raise the scores of end marks (N,) by ``factor`` times their size; banned ones stay so."""
    ends = scores[:, end_tokens]
    raised = torch.where(ends.isinf(), ends, ends + ends.abs() * factor)
    return scores.index_copy(1, end_tokens, raised)


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


def keep_min_p(scores: Tensor, share: float, least: int) -> Tensor:
    """Keep tokens with at least ``share`` of the best one's probability, ``least`` at least.

    Source: min-p sampling, Nguyen et al., arXiv:2407.01082, section 3.
    """
    probabilities = scores.softmax(-1)
    banned = probabilities < share * probabilities.amax(-1, keepdim=True)
    best = scores.topk(least).indices
    return scores.masked_fill(banned.scatter(1, best, False), -torch.inf)


def keep_typical(scores: Tensor, mass: float, least: int) -> Tensor:
    """Keep the tokens whose information is nearest to the entropy, until they have ``mass``.

    Source: locally typical sampling, Meister et al., arXiv:2202.00666, section 4.
    """
    log_probs = scores.log_softmax(-1)
    entropy = -(log_probs * log_probs.exp()).nansum(-1, keepdim=True)
    distances, order = (-log_probs - entropy).abs().sort()
    reached = scores.gather(1, order).softmax(-1).cumsum(-1) < mass
    last = reached.sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
    banned = distances > distances.gather(1, last)
    banned[:, :least] = False
    return scores.masked_fill(banned.scatter(1, order, banned), -torch.inf)


def keep_probable(scores: Tensor, threshold: float | Tensor, least: int) -> Tensor:
    """Keep tokens at least as probable as a threshold (a number, or (rows, 1)), ``least`` at least.

    Source: epsilon sampling, Hewitt et al., arXiv:2210.15191, section 3.
    """
    banned = scores.softmax(-1) < threshold
    worst_kept = scores.topk(min(least, scores.shape[-1])).values[:, -1:]
    return scores.masked_fill(banned & (scores < worst_kept), -torch.inf)


def keep_probable_by_entropy(scores: Tensor, epsilon: float, least: int) -> Tensor:
    """Keep probable tokens, by a threshold that falls with the entropy of a row.

    Source: eta sampling, Hewitt et al., arXiv:2210.15191, section 4.
    """
    log_probs = scores.log_softmax(-1)
    finite = log_probs.clamp(min=torch.finfo(scores.dtype).min)
    entropy = -(finite * log_probs.exp()).sum(-1, keepdim=True)
    threshold = (epsilon**0.5 * (-entropy).exp()).clamp(max=epsilon)
    return keep_probable(scores, threshold, least)
