"""What the fields of the documented generation configuration may be."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_mt.errors import ConfigError

__all__ = ["CHECKS", "UNSUPPORTED", "WITHOUT_EFFECT", "check_tokens"]

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "num_beam_groups": (1, None),
    "diversity_penalty": (0.0, None),
    "constraints": (None,),
    "force_words_ids": (None,),
    "penalty_alpha": (None, 0),
    "guidance_scale": (None, 1),
    "forced_decoder_ids": (None,),
    "low_memory": (None, False),
    "dola_layers": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "token_healing": (False, None),
    "watermarking_config": (None,),
}
"""Fields of what is not offered here -> the values with which it is off, the default first."""

WITHOUT_EFFECT = (
    "cache_implementation",
    "cache_config",
    "return_legacy_cache",
    "prefill_chunk_size",
    "compile_config",
    "disable_compile",
)
"""Fields about how transformers computes, which change no result."""


@dataclass(frozen=True)
class Check:
    """What a field may be."""

    allows: Callable[[Any], bool]
    expected: str
    optional: bool = True
    """Whether ``None`` switches it off."""


def _integer(least: int, *, optional: bool = True) -> Check:
    def allows(value: Any) -> bool:  # noqa: ANN401
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    return Check(allows, f"an integer, at least {least}", optional)


def _is_number(value: Any) -> bool:  # noqa: ANN401
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _is_token(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, int) and value >= 0


def _is_list(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_tokens(value: Any) -> bool:  # noqa: ANN401
    return _is_list(value) and all(map(_is_token, value))


COUNT = _integer(0)
PROBABILITY = Check(lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1")
POSITIVE = Check(lambda value: _is_number(value) and value > 0, "a number above 0")
FLAG = Check(lambda value: isinstance(value, bool), "True or False", optional=False)
TOKENS = Check(_is_tokens, "a list of token ids")

CHECKS: dict[str, Check] = {
    "max_length": _integer(1),
    "max_new_tokens": _integer(1),
    "min_length": COUNT,
    "min_new_tokens": COUNT,
    "num_beams": _integer(1, optional=False),
    "num_return_sequences": _integer(1, optional=False),
    "no_repeat_ngram_size": COUNT,
    "encoder_no_repeat_ngram_size": COUNT,
    "top_k": COUNT,
    "length_penalty": Check(_is_number, "a finite number", optional=False),
    "max_time": Check(lambda value: _is_number(value) and value >= 0, "a number of seconds"),
    # Zero is a habit of those who switch sampling off; while sampling it is refused.
    "temperature": Check(lambda value: _is_number(value) and value >= 0, "0 or a number above it"),
    "repetition_penalty": POSITIVE,
    "encoder_repetition_penalty": POSITIVE,
    "top_p": PROBABILITY,
    "min_p": PROBABILITY,
    "typical_p": PROBABILITY,
    "epsilon_cutoff": PROBABILITY,
    "eta_cutoff": PROBABILITY,
    "early_stopping": Check(
        lambda value: isinstance(value, bool) or value == "never",
        'True, False or "never"',
        optional=False,
    ),
    "do_sample": FLAG,
    "use_cache": FLAG,
    "suppress_tokens": TOKENS,
    "begin_suppress_tokens": TOKENS,
    "bad_words_ids": Check(
        lambda value: _is_list(value) and all(_is_tokens(word) and word for word in value),
        "a list of lists of token ids",
    ),
    "exponential_decay_length_penalty": Check(
        lambda value: _is_list(value) and len(value) == 2 and all(map(_is_number, value)),
        "a pair of numbers",
    ),
}
"""Field -> what it may be; fields that are not here may be anything."""


def check_tokens(fields: Mapping[str, Any], vocab_size: int) -> None:
    """Check that options about tokens name tokens that the model has.

    Args:
        fields: The options, of allowed values.
        vocab_size: How many tokens there are.

    Raises:
        ConfigError: If one is below 0 or beyond the vocabulary.
    """
    for name, nested in TOKEN_OPTIONS.items():
        given = fields[name]
        words = [] if given is None else _words(given) if nested else [given]
        for word in words:
            tokens = list(word) if _is_list(word) else [word]
            texts = [token for token in tokens if isinstance(token, str)]
            if texts:
                raise ConfigError(
                    f"generation option {name} has {texts[0]!r}; expected a token's id: "
                    f"tokenizer.convert_tokens_to_ids({texts[0]!r})"
                )
            wrong = [token for token in tokens if not 0 <= token < vocab_size]
            if wrong:
                raise ConfigError(
                    f"generation option {name} has the token {wrong[0]}; the model has tokens 0 to "
                    f"{vocab_size - 1}"
                )


TOKEN_OPTIONS = {
    "forced_bos_token_id": False,
    "forced_eos_token_id": False,
    "suppress_tokens": False,
    "begin_suppress_tokens": False,
    "decoder_start_token_id": False,
    "bad_words_ids": True,
    "sequence_bias": True,
}
"""Options about tokens -> whether they hold sequences of them."""


def _words(given: Any) -> list[Any]:  # noqa: ANN401
    """Return the sequences of tokens of a list of them, of a mapping, or of a list of pairs."""
    if isinstance(given, Mapping):
        return list(given)
    return [entry[0] if _is_list(entry[0]) else entry for entry in given]
