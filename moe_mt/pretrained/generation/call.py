"""What one call of ``generate`` asks for, found out before anything runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from moe_mt.generation import GenerationConfig
from moe_mt.pretrained.generation.checks import check_tokens
from moe_mt.pretrained.generation.config import PublishedGenerationConfig
from moe_mt.pretrained.generation.decoders import GeneratingModel
from moe_mt.pretrained.generation.inputs import (
    MODEL_ARGUMENTS,
    DecoderStart,
    Source,
    decoder_start,
    find_source,
)
from moe_mt.pretrained.generation.settings import (
    HasFields,
    SpecialTokens,
    refuse_unknown,
    resolve_settings,
    sequence_limit,
    without_source_rules,
)

__all__ = ["Call", "GivenConfig", "resolve_call"]

GivenConfig: TypeAlias = PublishedGenerationConfig | GenerationConfig | HasFields


@dataclass(frozen=True, kw_only=True)
class Call:
    """Settings and inputs of one call."""

    config: PublishedGenerationConfig
    special: SpecialTokens

    arguments: Mapping[str, Any]
    """Those for the model."""

    source: Source
    start: DecoderStart

    limit: int
    """Most tokens of a sequence, its prompt counted."""

    @property
    def rows_per_sentence(self) -> int:
        """Beams, or samples."""
        return max(self.config.num_beams, self.config.num_return_sequences)

    @property
    def rows(self) -> int:
        """Of all sentences."""
        return self.source.sentences * self.rows_per_sentence

    @property
    def prompts(self) -> Tensor:
        """(rows, P) int64."""
        return self.start.prompts.repeat_interleave(self.rows_per_sentence, 0)

    @property
    def prompt_length(self) -> int:
        """P."""
        return self.start.prompts.shape[1]

    def shows(self, name: str) -> bool:
        """Whether an output is asked for, ``"attentions"`` for instance."""
        wanted = getattr(self.config, f"output_{name}")
        return bool(wanted and self.config.return_dict_in_generate)


def resolve_call(
    model: GeneratingModel,
    inputs: Tensor | None,
    generation_config: GivenConfig | None,
    use_model_defaults: bool | None,
    options: Mapping[str, Any],
) -> Call:
    """Find out what a call asks for; arguments as of ``generate``.

    Raises:
        ConfigError: If an option is unknown, not offered, or its value not allowed.
        InputError: If inputs are missing, double, or of the wrong shape.
    """
    options = {name: _plain(value) for name, value in options.items()}
    config, arguments = resolve_settings(model, generation_config, use_model_defaults, options)
    arguments = {name: value for name, value in arguments.items() if value is not None}
    refuse_unknown(arguments, MODEL_ARGUMENTS)
    check_tokens(vars(config), model.config.vocab_size)
    special = SpecialTokens.of(config)
    source = find_source(inputs, arguments, special, model.device)
    start = decoder_start(arguments, special, source)
    limit = sequence_limit(
        config, options, start.prompts.shape[1], model.config.max_position_embeddings
    )
    if source.tokens is None:
        config = without_source_rules(config)
    return Call(
        config=config, special=special, arguments=arguments, source=source, start=start, limit=limit
    )


def _plain(value: Any) -> Any:  # noqa: ANN401
    """Return a number that was given as a tensor or an array without dimensions."""
    return value.item() if getattr(value, "ndim", None) == 0 else value
