"""Who looks on while ``generate`` searches: what is returned later, and a streamer."""

from typing import Protocol

import torch
from torch import Tensor

from moe_mt.generation import Rule, Strategy

__all__ = ["ObservedSearch", "Recording", "Streamer"]


class Streamer(Protocol):
    """Is told tokens as they come."""

    def put(self, value: Tensor) -> None:
        """Take the prompts (rows, P), later the tokens (rows,) of a step; on the CPU."""
        ...

    def end(self) -> None:
        """Learn that no more will come."""
        ...


class Recording:
    """The scores of every step, before and after the rules."""

    def __init__(self, *, scores: bool, logits: bool) -> None:
        """Say what to keep."""
        self._scores: list[Tensor] | None = [] if scores else None
        self._logits: list[Tensor] | None = [] if logits else None

    def of(self, rules: Rule) -> Rule:
        """Return the rules so that what they make of the scores is kept."""

        def recorded(history: Tensor, scores: Tensor) -> Tensor:
            scores = rules(history, scores)
            if self._scores is not None:
                self._scores.append(scores)
            return scores

        return recorded

    def keep_logits(self, logits: Tensor) -> None:
        """Keep the logits (rows, V) of a step; copied, since a caller's rule may write on them."""
        if self._logits is not None:
            self._logits.append(logits.to(torch.float32, copy=True))

    @property
    def scores(self) -> tuple[Tensor, ...] | None:
        """Per step (rows, V) float32."""
        return None if self._scores is None else tuple(self._scores)

    @property
    def logits(self) -> tuple[Tensor, ...] | None:
        """Per step (rows, V) float32."""
        return None if self._logits is None else tuple(self._logits)


class ObservedSearch:
    """A strategy under observation."""

    def __init__(self, strategy: Strategy, recording: Recording, streamer: Streamer | None) -> None:
        """Take the strategy and who looks on."""
        self.strategy = strategy
        self.recording = recording
        self.streamer = streamer

    def advance(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the tokens to read next and the rows they continue."""
        self.recording.keep_logits(logits)
        tokens, parents = self.strategy.advance(logits)
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())
        return tokens, parents

    def all_done(self) -> bool:
        """Whether nothing is left to decode."""
        return self.strategy.all_done()
