"""Sentences that are decoded together: some leave when they end, others take their place."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe_mt.generation.decode_step import DecodeStep
from moe_mt.generation.rules import rows_of
from moe_mt.models import KVCache

__all__ = ["BatchStrategy", "Found", "Newcomers", "RunningBatch"]

Found = list[tuple[list[int], float]]
"""Tokens and score of a sentence's hypotheses, best first."""

STEPS_BETWEEN_LOOKS = 8
"""Steps a GPU takes before it is asked who has ended: asking waits for it."""

COMPACT_BELOW = 0.75
"""Share of sentences still open below which the others are taken out; moving costs a step or so."""


class BatchStrategy(Protocol):
    """A search for several sentences that can go on with some of them."""

    def advance(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the tokens to read next and the rows they continue, ``None`` for each its own."""
        ...

    def sentences_done(self) -> Tensor:
        """Return (B,) bool."""
        ...

    def select(self, sentences: Tensor) -> None:
        """Go on with some of the sentences, (N,) int64, in that order."""
        ...

    def results(self) -> list[Found]:
        """Return what was found for every sentence."""
        ...


@dataclass(frozen=True, kw_only=True)
class Newcomers:
    """Sentences that start together."""

    numbers: Sequence[int]
    """What the caller calls them."""

    strategy: BatchStrategy
    cache: KVCache
    prompts: Tensor
    """(rows, 1) int64: what their rows read first."""

    longest: int
    """Most steps that one of them takes."""


class _Cohort:
    """Sentences that started together, and so have come equally far."""

    def __init__(self, newcomers: Newcomers) -> None:
        self.numbers = list(newcomers.numbers)
        self.strategy = newcomers.strategy
        self.steps = 0
        self.longest = newcomers.longest
        self.memory_length = newcomers.cache.memory_length
        self.is_open = [True] * len(self.numbers)

    def take_done(self, done: list[bool]) -> list[tuple[int, Found]]:
        """Return number and hypotheses of the sentences that are newly done."""
        new = [i for i, ended in enumerate(done) if ended and self.is_open[i]]
        if not new:
            return []
        results = self.strategy.results()
        for index in new:
            self.is_open[index] = False
        return [(self.numbers[index], results[index]) for index in new]

    def drop_closed(self, device: torch.device) -> None:
        kept = [i for i, is_open in enumerate(self.is_open) if is_open]
        if len(kept) < len(self.numbers):
            self.strategy.select(torch.tensor(kept, dtype=torch.int64, device=device))
            self.numbers = [self.numbers[i] for i in kept]
            self.is_open = [True] * len(kept)


class RunningBatch:
    """Cohorts of sentences behind each other in one cache, decoded by one step for all.

    Each cohort has a search of its own, so that no search needs to know of sentences that are
    elsewhere in their translation; the model sees rows.
    """

    def __init__(self, step: DecodeStep, beams: int, *, is_fixed: bool) -> None:
        """Start empty.

        Args:
            step: Runs the decoder.
            beams: Rows per sentence.
            is_fixed: Whether the number of rows must not change while anything is open.
        """
        self._step = step
        self._beams = beams
        self._is_fixed = is_fixed
        self._cohorts: list[_Cohort] = []
        self._cache: KVCache | None = None
        self._tokens = torch.empty(0, 1, dtype=torch.int64)

    @property
    def open_sentences(self) -> int:
        """How many are still being decoded."""
        return sum(sum(cohort.is_open) for cohort in self._cohorts)

    @property
    def memory_length(self) -> int:
        """Positions of the longest memory; 0 where nobody is decoded."""
        return max((cohort.memory_length for cohort in self._cohorts), default=0)

    @torch.inference_mode()
    def join(self, newcomers: Newcomers) -> None:
        """Let sentences join; those that are done leave."""
        self._regroup(newcomers.cache)
        self._cohorts.append(_Cohort(newcomers))
        self._tokens = torch.cat([self._tokens.to(newcomers.prompts.device), newcomers.prompts])

    @torch.inference_mode()
    def advance(self) -> list[tuple[int, Found]]:
        """Take some steps; return number and hypotheses of the sentences that are done then."""
        on_gpu = self._tokens.device.type != "cpu"
        least = min(cohort.longest - cohort.steps for cohort in self._cohorts)
        for _ in range(min(STEPS_BETWEEN_LOOKS, least) if on_gpu else 1):
            self._take_step()
        return self._collect()

    def _take_step(self) -> None:
        assert self._cache is not None, "nobody has joined"
        if self._step.is_full(self._cache):
            self._regroup()
        cache = self._cache
        logits = self._step.run(self._tokens, cache)
        chosen: list[Tensor] = []
        parents: list[Tensor] = []
        start = 0
        for cohort in self._cohorts:
            rows = len(cohort.numbers) * self._beams
            tokens, continued = cohort.strategy.advance(logits[start : start + rows])
            chosen.append(tokens)
            if continued is not None:
                parents.append(continued + start)
            start += rows
            cohort.steps += 1
        self._tokens = torch.cat(chosen)[:, None]
        if parents:
            cache.reorder(torch.cat(parents))

    def _collect(self) -> list[tuple[int, Found]]:
        flags = torch.cat([cohort.strategy.sentences_done() for cohort in self._cohorts]).tolist()
        found: list[tuple[int, Found]] = []
        start = 0
        for cohort in self._cohorts:
            stop = start + len(cohort.numbers)
            found += cohort.take_done(flags[start:stop])
            start = stop
        still_open = self.open_sentences
        if still_open == 0:
            self._cohorts.clear()
            self._cache = None
            self._tokens = self._tokens[:0]
        elif not self._is_fixed and self._is_worth_regrouping(still_open / len(flags)):
            self._regroup()
        return found

    def _is_worth_regrouping(self, share_open: float) -> bool:
        # A cohort that is done must go in any case: its search has an end.
        return share_open <= COMPACT_BELOW or not all(any(c.is_open) for c in self._cohorts)

    def _regroup(self, joining: KVCache | None = None) -> None:
        """Take out whoever is done, unless rows are fixed, and let a cache join."""
        joining_length = 0 if joining is None else joining.memory_length
        if self._cache is None:
            assert joining is not None, "nobody is here and nobody joins"
            self._cache = self._step.place(joining, length=0, memory_length=joining_length)
            return
        stays = [
            is_open or self._is_fixed for cohort in self._cohorts for is_open in cohort.is_open
        ]
        kept = [i for i, stay in enumerate(stays) if stay]
        keep = torch.tensor(kept, dtype=torch.int64, device=self._tokens.device)
        if len(kept) < len(stays):
            for cohort in self._cohorts:
                cohort.drop_closed(keep.device)
            self._cohorts = [cohort for cohort in self._cohorts if cohort.numbers]
            self._tokens = self._tokens[rows_of(keep, self._beams)]
        self._cache = self._step.place(
            self._cache,
            keep=keep,
            joining=joining,
            length=max((cohort.steps for cohort in self._cohorts), default=0),
            memory_length=max(self.memory_length, joining_length),
        )
