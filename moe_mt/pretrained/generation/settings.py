"""Which settings a call of ``generate`` has: keywords, a given configuration, the model's, ours."""

import copy
import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any, Protocol

from moe_mt.errors import ConfigError
from moe_mt.generation import GenerationConfig
from moe_mt.pretrained.generation.checks import UNSUPPORTED
from moe_mt.pretrained.generation.config import (
    DEFAULTS,
    OUTPUT_FLAGS,
    ModelConfig,
    PublishedGenerationConfig,
)

__all__ = [
    "HasFields",
    "SpecialTokens",
    "refuse_unknown",
    "resolve_settings",
    "sequence_limit",
    "without_source_rules",
]

logger = logging.getLogger(__name__)

DEFAULT_NEW_TOKENS = 20

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")

ONLY_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)

ONLY_BEAMS = ("early_stopping", "length_penalty")

SOURCE_RULES = ("encoder_repetition_penalty", "encoder_no_repeat_ngram_size")


class HasSettings(Protocol):
    """A model, as far as its settings are concerned."""

    @property
    def config(self) -> ModelConfig:
        """Its configuration."""
        ...

    @property
    def generation_config(self) -> PublishedGenerationConfig | None:
        """Its generation configuration."""
        ...


class HasFields(Protocol):
    """A configuration of any class that can say its fields."""

    def to_dict(self) -> dict[str, Any]:
        """Return them."""
        ...


def resolve_settings(
    model: HasSettings,
    given: PublishedGenerationConfig | GenerationConfig | HasFields | None,
    use_model_defaults: bool | None,
    options: Mapping[str, Any],
) -> tuple[PublishedGenerationConfig, dict[str, Any]]:
    """Return a new configuration for one call, and the options that are none of its fields.

    Keywords win over the given configuration, and that over the model's. As in transformers 4.57,
    a model whose ``generation_config.json`` was written before 4.50 adds to a given configuration
    the special tokens alone, unless ``use_model_defaults`` says otherwise.

    Raises:
        ConfigError: If a value is not allowed, or asks for what is not offered here.
    """
    defaults = _model_defaults(model)
    if given is None:
        config = copy.deepcopy(defaults)
    else:
        config = _completed(_published(given), defaults, use_model_defaults)
    unused = config.update(**options)
    for name, neutral in UNSUPPORTED.items():
        if getattr(config, name) not in neutral:
            raise ConfigError(
                f"{name} is {getattr(config, name)!r}, and generate does not offer that; leave it "
                f"at {neutral[0]!r}. There are greedy search, sampling, beam search and beam "
                "sampling"
            )
    if config.do_sample and config.temperature == 0:
        raise ConfigError(
            "temperature is 0, which sampling cannot divide by; set do_sample=False for the most "
            "probable tokens"
        )
    _warn_of_idle(config, options)
    return config, unused


BELONGS_ELSEWHERE = {
    "src_lang": "set it on the tokenizer, before it makes input_ids",
    "tgt_lang": "pass forced_bos_token_id=tokenizer.convert_tokens_to_ids(tgt_lang)",
    "token_type_ids": "these models have none; leave it out of the tokenizer's output",
}
"""What to do with arguments that people pass to ``generate`` and that are meant for another."""


def refuse_unknown(names: Collection[str], known: Collection[str]) -> None:
    """Raise an error that names the first unknown argument, and what it may have been meant to be.

    Raises:
        ConfigError: If a name is not known.
    """
    for name in names:
        if name not in known:
            close = get_close_matches(name, [*known, *DEFAULTS], n=1)
            hint = f"did you mean {close[0]!r}?" if close else "leave it out"
            hint = BELONGS_ELSEWHERE.get(name, hint)
            raise ConfigError(
                f"generate got {name!r}, which neither it nor the model takes; {hint}"
            )


def sequence_limit(
    config: PublishedGenerationConfig,
    options: Mapping[str, Any],
    prompt_length: int,
    positions: int | None,
) -> int:
    """Return the most tokens of a sequence, the prompt counted.

    Args:
        config: From ``resolve_settings``.
        options: The keywords of the call.
        prompt_length: Tokens the decoder begins with.
        positions: ``max_position_embeddings``, which bounds the limit that nobody chose.

    Raises:
        ConfigError: If that leaves no room for a token.
    """
    given = options.get("max_length")
    new = config.max_new_tokens
    if new is not None:
        limit = prompt_length + new
        if given is not None:
            _warn_of_two_limits(given, new, prompt_length, "max_new_tokens" in options)
    elif given is None and config.max_length in (None, DEFAULTS["max_length"]):
        limit = prompt_length + DEFAULT_NEW_TOKENS
        limit = limit if positions is None else min(limit, positions)
        logger.warning(
            "neither max_new_tokens nor max_length says how long a sequence may be; at most %d "
            "tokens are generated: pass max_new_tokens",
            limit - prompt_length,
        )
    else:
        limit = config.max_length or 0
    if limit <= prompt_length:
        raise ConfigError(
            f"max_length is {limit} and the decoder begins with {prompt_length} tokens, which "
            "leaves no room for another; raise max_length, or pass max_new_tokens"
        )
    least = config.min_length or 0
    if config.min_new_tokens is not None:
        least = prompt_length + config.min_new_tokens
    if least > limit:
        logger.warning(
            "at least %d and at most %d tokens are asked for; sequences end at %d: lower "
            "min_new_tokens or min_length, or raise max_new_tokens or max_length",
            least, limit, limit,
        )  # fmt: skip
    return limit


def without_source_rules(config: PublishedGenerationConfig) -> PublishedGenerationConfig:
    """Return the configuration without rules about source tokens, for where none are known."""
    rules = [name for name in SOURCE_RULES if getattr(config, name) not in (None, DEFAULTS[name])]
    if rules:
        logger.warning("%s needs input_ids and has no effect without", " and ".join(rules))
        config = copy.deepcopy(config)
        config.update(**dict.fromkeys(rules))
    return config


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """The tokens that generation itself deals with."""

    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    start: int | list[int]
    """What the decoder reads first; one for each sentence if a list."""

    @classmethod
    def of(cls, config: PublishedGenerationConfig) -> "SpecialTokens":
        """Read them from a configuration.

        Raises:
            ConfigError: If nothing says what the decoder starts with.
        """
        eos = config.eos_token_id
        eos_ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        pad = config.pad_token_id
        if pad is None and eos_ids:
            pad = eos_ids[0]
            logger.warning(
                "pad_token_id is not set; sequences are padded with the end mark %d", pad
            )
        start = config.decoder_start_token_id
        start = config.bos_token_id if start is None else start
        if start is None:
            raise ConfigError(
                "decoder_start_token_id and bos_token_id are both None; set one of them, so that "
                "the decoder has something to start with"
            )
        return cls(bos_id=config.bos_token_id, eos_ids=eos_ids, pad_id=pad, start=start)


def _model_defaults(model: HasSettings) -> PublishedGenerationConfig:
    """Return the model's generation configuration.

    One that was made of the model's configuration follows what is set there later, as code for
    transformers 4.x does.
    """
    stored = model.generation_config
    if stored is None:
        return PublishedGenerationConfig.from_model_config(model.config)
    if not isinstance(stored, PublishedGenerationConfig):
        # Another class's says how to generate; special tokens are the model's.
        named = {name: v for name, v in vars(_published(stored)).items() if _is_set(name, v)}
        defaults = PublishedGenerationConfig.from_model_config(model.config)
        defaults.update(**named)
        return defaults
    if not stored.repeats_model_config():
        return stored
    current = PublishedGenerationConfig.from_model_config(model.config)
    followed = copy.deepcopy(stored)
    followed.update(
        **{name: value for name, value in vars(current).items() if _is_set(name, value)}
    )
    return followed


def _is_set(name: str, value: object) -> bool:
    return name in DEFAULTS and value != DEFAULTS[name]


def _published(
    given: PublishedGenerationConfig | GenerationConfig | HasFields,
) -> PublishedGenerationConfig:
    """Return a copy of a given configuration, of whatever class, as the documented one."""
    if isinstance(given, GenerationConfig):
        if given.seed is not None:
            raise ConfigError(
                f"generation_config has the seed {given.seed}, which is for Translator; here "
                "torch's generator decides: call torch.manual_seed"
            )
        values = {f.name: v for f in fields(given) if (v := asdict(given)[f.name]) != f.default}
        return PublishedGenerationConfig(**values)
    if not hasattr(given, "to_dict"):
        raise ConfigError(
            f"generation_config is a {type(given).__name__}; give a PublishedGenerationConfig, a "
            "GenerationConfig, or options by keyword"
        )
    return PublishedGenerationConfig.from_dict(given.to_dict())


def _completed(
    config: PublishedGenerationConfig,
    defaults: PublishedGenerationConfig,
    use_model_defaults: bool | None,
) -> PublishedGenerationConfig:
    """Fill the configuration's unset fields from the model's defaults."""
    if use_model_defaults is None:
        use_model_defaults = _written_since_4_50(defaults)
    names = DEFAULTS if use_model_defaults else TOKENS
    for name in names:
        if not _is_set(name, getattr(config, name)):
            setattr(config, name, copy.deepcopy(getattr(defaults, name)))
    return config


def _written_since_4_50(config: PublishedGenerationConfig) -> bool:
    version = re.match(r"(\d+)\.(\d+)", str(getattr(config, "transformers_version", "")))
    return version is None or (int(version[1]), int(version[2])) >= (4, 50)


def _warn_of_two_limits(given: int, new: int, prompt_length: int, both_given: bool) -> None:
    if both_given:
        logger.warning(
            "max_length=%d and max_new_tokens=%d were both passed; max_new_tokens wins: pass one",
            given, new,
        )  # fmt: skip
        return
    logger.warning(
        "max_length=%d has no effect, because the generation configuration has max_new_tokens=%d, "
        "which wins: up to %d tokens are generated; pass max_new_tokens=%d instead, or "
        "max_new_tokens=None with it",
        given, new, new, max(1, given - prompt_length),
    )  # fmt: skip


def _warn_of_idle(config: PublishedGenerationConfig, options: Mapping[str, Any]) -> None:
    """Name the keywords that change nothing, and what they wait for."""
    waits = {
        "do_sample=True": () if config.do_sample else ONLY_SAMPLING,
        "num_beams above 1": () if config.num_beams > 1 else ONLY_BEAMS,
        "return_dict_in_generate=True": () if config.return_dict_in_generate else OUTPUT_FLAGS,
    }
    for condition, names in waits.items():
        idle = [name for name in names if options.get(name) not in (None, DEFAULTS[name])]
        if idle:
            logger.warning("%s has no effect without %s", " and ".join(idle), condition)
