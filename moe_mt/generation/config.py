"""How to decode: which strategy, how long, and with which rules."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal

from moe_mt.errors import ConfigError

__all__ = ["GenerationConfig"]

logger = logging.getLogger(__name__)

LEAST = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "max_new_tokens": 1,
    "max_length": 2,
    "min_new_tokens": 0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "top_k": 0,
    "seed": 0,
}
"""The integers and their smallest values."""

OPTIONAL = ("max_new_tokens", "max_length", "seed")
"""The integers that may be ``None``."""


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to decode. Names and formulas are those of transformers."""

    num_beams: int = 1
    """Hypotheses kept side by side; 1 is greedy search, or sampling."""

    num_return_sequences: int = 1
    """Hypotheses returned per sentence; at most ``num_beams``, any number when sampling."""

    max_new_tokens: int | None = None
    """Most tokens of a hypothesis, language token and end mark counted, the decoder's start not."""

    max_length: int | None = None
    """The same with the start counted; ``max_new_tokens`` wins over it."""

    min_new_tokens: int = 0
    """Fewest tokens before the end mark may come."""

    min_length: int = 0
    """The same with the start counted."""

    length_penalty: float = 1.0
    """Exponent of the length that scores are divided by; above 0 favours longer hypotheses."""

    early_stopping: bool | Literal["never"] = False
    """When beam search leaves a sentence: ``True`` once ``num_beams`` hypotheses have ended,
    ``False`` when the best open one cannot win at its present length, ``"never"`` when it cannot
    win at any length."""

    no_repeat_ngram_size: int = 0
    """No sequence of so many tokens comes twice; 0 switches the rule off."""

    repetition_penalty: float = 1.0
    """Tokens that came before are made less likely by this factor; 1 switches the rule off."""

    do_sample: bool = False
    """Draw tokens at random instead of taking the most probable ones."""

    temperature: float = 1.0
    """Sampling: divisor of the scores; below 1 is bolder, above 1 more varied."""

    top_k: int = 50
    """Sampling: only the so many best tokens may be drawn; 0 allows all."""

    top_p: float = 1.0
    """Sampling: only the best tokens that together have this probability may be drawn."""

    seed: int | None = None
    """Sampling: the same sentence and seed give the same sample in any batch; ``None`` draws from
    torch's global generator."""

    def __post_init__(self) -> None:
        """Check every field, and what the fields say together."""
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is None and name in OPTIONAL:
                continue
            allowed = isinstance(value, int) and not isinstance(value, bool) and value >= least
            _require(allowed, name, value, f"an integer, at least {least}")
        for name in ("length_penalty", "repetition_penalty", "temperature", "top_p"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            _require(number and math.isfinite(value), name, value, "a finite number")
        for name in ("repetition_penalty", "temperature", "top_p"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "a number above 0")
        _require(self.top_p <= 1, "top_p", self.top_p, "at most 1")
        _require(isinstance(self.do_sample, bool), "do_sample", self.do_sample, "True or False")
        stopping = self.early_stopping
        known = isinstance(stopping, bool) or stopping == "never"
        _require(known, "early_stopping", stopping, 'True, False or "never"')
        self._check_together()

    def _check_together(self) -> None:
        wanted = self.num_return_sequences
        if self.num_beams > 1 and wanted > self.num_beams:
            raise ConfigError(
                f"num_return_sequences is {wanted} and num_beams is {self.num_beams}; beam search "
                f"returns at most num_beams hypotheses, so ask for num_beams={wanted} or fewer "
                "sequences"
            )
        if self.num_beams == 1 and not self.do_sample and wanted > 1:
            raise ConfigError(
                f"num_return_sequences is {wanted}, but greedy search finds one hypothesis; set "
                f"num_beams={wanted} or do_sample=True"
            )
        most = self.new_token_limit
        if most is not None and self.new_token_minimum > most:
            raise ConfigError(
                f"at least {self.new_token_minimum} and at most {most} new tokens are asked for; "
                "lower min_new_tokens or min_length, or raise max_new_tokens or max_length"
            )

    @property
    def new_token_limit(self) -> int | None:
        """Most tokens of a hypothesis, or ``None`` where nothing was said."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return None if self.max_length is None else self.max_length - 1

    @property
    def new_token_minimum(self) -> int:
        """Fewest tokens before the end mark may come."""
        return max(self.min_new_tokens, self.min_length - 1, 0)

    @classmethod
    def from_published(
        cls, generation_config: Mapping[str, Any] | None, config: Mapping[str, Any]
    ) -> "GenerationConfig":
        """Read a checkpoint's defaults.

        Args:
            generation_config: ``generation_config.json``, or ``None`` where there is none; then
                the generation fields of ``config.json`` count, as they do upstream.
            config: ``config.json``.

        Fields that are null or not ours are left at their defaults.
        """
        published = config if generation_config is None else generation_config
        known = {field.name for field in fields(cls)}
        return cls(**{k: v for k, v in published.items() if k in known and v is not None})

    def merged(self, **overrides: Any) -> "GenerationConfig":  # noqa: ANN401
        """Return a copy with the given options; ``None`` leaves an option as it is.

        A length limit given here replaces whichever limit stood before, so that ``max_length``
        is obeyed even where the checkpoint names ``max_new_tokens``.

        Raises:
            ConfigError: If an option is unknown or its value is not allowed.
        """
        known = [field.name for field in fields(self)]
        for name in overrides:
            if name not in known:
                close = get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"choose from {known}"
                raise ConfigError(f"generation option {name!r} is unknown; {hint}")
        given = {name: value for name, value in overrides.items() if value is not None}
        if given.keys() & {"max_new_tokens", "max_length"}:
            given = {"max_new_tokens": None, "max_length": None} | given
        result = replace(self, **given)
        idle = [name for name in ("temperature", "top_k", "top_p") if name in given]
        if idle and not result.do_sample:
            logger.warning("%s has no effect without do_sample=True", " and ".join(idle))
        return result


def _require(condition: bool, name: str, found: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"generation option {name} is {found!r}; expected {expected}")
