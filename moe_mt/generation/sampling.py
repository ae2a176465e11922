"""Random choices: the same for a sentence in whatever batch it stands, or as torch draws them.

For the former all randomness is a table of uniform numbers, fixed before the first step; choosing
is then a function of scores and table. For the latter, torch's global generator decides, and a
step is one draw for the whole batch, as in transformers.
"""

from collections.abc import Sequence
from hashlib import sha256

import torch
from torch import Tensor

__all__ = [
    "DrawnCandidates",
    "DrawnTokens",
    "draw",
    "draw_several",
    "draw_several_together",
    "draw_together",
    "uniform_table",
]


def uniform_table(
    sentences: Sequence[Sequence[int]],
    steps: int,
    draws: int,
    *,
    seed: int | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Return (B, steps, draws) float64 uniform in [0, 1), on the CPU.

    With a seed, a sentence's numbers depend on the seed and its own tokens alone: not on its
    batch, and not on the device. Equal sentences get equal numbers.

    Args:
        sentences: The tokens that tell sentences apart, without padding.
        steps: Most steps there will be.
        draws: Numbers a step.
        seed: ``None`` draws all numbers from ``generator``, or from torch's global one.
        generator: A CPU generator; wins over the seed.
    """
    if generator is not None or seed is None:
        shape = (len(sentences), steps, draws)
        return torch.rand(shape, dtype=torch.float64, generator=generator)
    tables: list[Tensor] = []
    for tokens in sentences:
        digest = sha256(repr((seed, tuple(tokens))).encode()).digest()
        own = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        tables.append(torch.rand(steps, draws, dtype=torch.float64, generator=own))
    return torch.stack(tables)


class DrawnTokens:
    """A choice of tokens that follows from a table of uniform numbers."""

    def __init__(self, uniforms: Tensor) -> None:
        """Take the numbers (B, steps, rows of a sentence) in [0, 1)."""
        self._uniforms = uniforms.transpose(1, 2).flatten(0, 1)

    def __call__(self, scores: Tensor, step: int) -> Tensor:
        """Return (rows,) int64: one token a row of scores (rows, V)."""
        return draw(scores, self._uniforms[:, step])

    def select(self, rows: Tensor) -> None:
        """Go on with some of the rows, (N,) int64, in that order."""
        self._uniforms = self._uniforms[rows]


class DrawnCandidates:
    """A choice of candidates, without replacement, that follows from a table of numbers."""

    def __init__(self, uniforms: Tensor) -> None:
        """Take the numbers (B, steps, candidates) in [0, 1)."""
        self._uniforms = uniforms

    def __call__(self, log_probs: Tensor, scores: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return totals and their places, (B, candidates); see ``beam.Choice``."""
        totals = (log_probs + scores[:, :, None]).flatten(1)
        return draw_several(totals, self._uniforms[:, step])

    def select(self, rows: Tensor) -> None:
        """Go on with some of the sentences, (N,) int64, in that order."""
        self._uniforms = self._uniforms[rows]


def draw(scores: Tensor, uniforms: Tensor) -> Tensor:
    """Return (rows,) int64: one index a row, drawn with probability ``softmax(scores)``.

    Args:
        scores: (rows, N) float32.
        uniforms: (rows,) float64; each picks the index at which the cumulated probability
            passes it. Cumulated in float64, since N can be a vocabulary of 256,000.
    """
    cumulated = scores.double().softmax(-1).cumsum(-1)
    targets = uniforms[:, None] * cumulated[:, -1:]
    chosen = torch.searchsorted(cumulated, targets, right=True).squeeze(1)
    return chosen.clamp(max=scores.shape[1] - 1)


def draw_several(scores: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw without replacement, one after the other; return scores and indices, (rows, draws).

    Args:
        scores: (rows, N) float32.
        uniforms: (rows, draws) float64.
    """
    left = scores.clone()
    values: list[Tensor] = []
    indices: list[Tensor] = []
    for column in uniforms.unbind(1):
        index = draw(left, column)[:, None]
        values.append(left.gather(1, index))
        indices.append(index)
        left.scatter_(1, index, -torch.inf)
    return torch.cat(values, dim=1), torch.cat(indices, dim=1)


def draw_together(scores: Tensor, step: int) -> Tensor:
    """Return (rows,) int64: one index a row of scores (rows, N), drawn by torch's generator."""
    return scores.softmax(-1).multinomial(1).squeeze(1)


def draw_several_together(
    count: int, log_probs: Tensor, scores: Tensor, step: int
) -> tuple[Tensor, Tensor]:
    """Draw ``count`` candidates of a sentence without replacement by torch's generator.

    Returns:
        Totals and their places, each (B, count), in the order in which they were drawn; see
        ``beam.Choice``.
    """
    totals = (log_probs + scores[:, :, None]).flatten(1)
    indices = totals.softmax(-1).multinomial(count)
    return totals.gather(1, indices), indices
