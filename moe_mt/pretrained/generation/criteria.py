"""What ends a sequence besides end marks and limits."""

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from moe_mt.errors import ConfigError
from moe_mt.generation import Criterion
from moe_mt.pretrained.generation.config import PublishedGenerationConfig
from moe_mt.pretrained.generation.observers import Recording

__all__ = ["ScoredCriterion", "as_list", "make_criteria"]

ScoredCriterion: TypeAlias = Callable[[Tensor, Any], bool | Tensor]
"""``(input_ids (rows, length), scores) -> (rows,) bool`` or one bool for all. The scores are those
of all steps so far if ``output_scores``, else ``None``."""


def as_list(given: Any, name: str) -> list[Any]:  # noqa: ANN401
    """Return one function or several as a list.

    Raises:
        ConfigError: If there is something that cannot be called.
    """
    if given is None:
        return []
    functions = list(given) if isinstance(given, Sequence) else [given]
    for function in functions:
        if not callable(function):
            raise ConfigError(
                f"{name} holds {function!r}, which cannot be called; give a list of functions of "
                "input_ids and scores"
            )
    return functions


def make_criteria(
    config: PublishedGenerationConfig,
    given: Sequence[ScoredCriterion],
    recording: Recording,
    tokenizer: Any,  # noqa: ANN401
) -> list[Criterion]:
    """Return what ends a sequence: time, texts, and the caller's functions.

    Args:
        config: ``max_time`` counts from now.
        given: The caller's.
        recording: Holds the scores they are given.
        tokenizer: For ``stop_strings``.

    Raises:
        ConfigError: If there are stop strings and no tokenizer.
    """
    criteria: list[Criterion] = []
    if config.max_time is not None:
        deadline = time.monotonic() + config.max_time
        criteria.append(lambda _: time.monotonic() > deadline)
    if config.stop_strings is not None:
        if tokenizer is None:
            raise ConfigError("stop_strings need the model's tokenizer; pass tokenizer=")
        strings = config.stop_strings
        criteria.append(StopStrings(tokenizer, [strings] if isinstance(strings, str) else strings))
    return criteria + [_with_scores(criterion, recording) for criterion in given]


def _with_scores(criterion: ScoredCriterion, recording: Recording) -> Criterion:
    return lambda history: criterion(history, recording.scores)


class StopStrings:
    """End a row when its last token completes one of some texts."""

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:  # noqa: ANN401
        """Take the texts, and what turns tokens into text."""
        self.tokenizer = tokenizer
        self.strings = strings

    def __call__(self, history: Tensor) -> Tensor:
        """Return (rows,) bool for a history (rows, length)."""
        ended = [self._completes(tokens) for tokens in history.tolist()]
        return torch.tensor(ended, device=history.device)

    def _completes(self, tokens: list[int]) -> bool:
        # The text before is needed whole: decoding drops the space that a text begins with.
        before, text = self.tokenizer.decode(tokens[:-1]), self.tokenizer.decode(tokens)
        return any(text.count(string) > before.count(string) for string in self.strings)
