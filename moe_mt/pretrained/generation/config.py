"""The documented configuration of ``generate``: mutable, open to unknown fields."""

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from moe_mt.checkpoints import HUB_ARGUMENTS, fetch_small_files, read_json
from moe_mt.errors import CheckpointError, ConfigError
from moe_mt.pretrained.generation.checks import CHECKS, UNSUPPORTED, WITHOUT_EFFECT

__all__ = ["DEFAULTS", "OUTPUT_FLAGS", "PublishedGenerationConfig"]

GENERATION_CONFIG_NAME = "generation_config.json"

NOT_SAVED = ("_untouched", "_commit_hash")

OUTPUT_FLAGS = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")


class ModelConfig(Protocol):
    """A model's configuration."""

    def to_dict(self) -> dict[str, Any]:
        """Return its fields."""
        ...


class PublishedGenerationConfig:
    """What ``generation_config.json`` says, as attributes.

    ``None`` switches an option off, or sets one that cannot be off to its default. Fields that
    nobody here knows are kept and written back.
    """

    max_length: int | None = 20
    """Most tokens of a sequence, the decoder's start and prompt counted."""

    max_new_tokens: int | None = None
    """Most tokens that are generated; wins over ``max_length`` wherever it was set."""

    min_length: int | None = 0
    """Fewest tokens of a sequence before an end mark may come."""

    min_new_tokens: int | None = None
    """Fewest generated tokens before an end mark may come; wins over ``min_length``."""

    early_stopping: bool | Literal["never"] = False
    """When beam search leaves a sentence, as in ``moe_mt.GenerationConfig``."""

    max_time: float | None = None
    """Seconds after which no further step begins."""

    stop_strings: str | list[str] | None = None
    """Texts that end a sequence; needs ``tokenizer=`` in the call."""

    do_sample: bool = False
    """Draw tokens at random instead of taking the most probable ones."""

    num_beams: int = 1
    """Hypotheses kept side by side; 1 is greedy search, or sampling."""

    use_cache: bool = True
    """Keep keys and values between steps."""

    temperature: float | None = 1.0
    """Sampling: divisor of the scores."""

    top_k: int | None = 50
    """Sampling: only the so many best tokens may be drawn."""

    top_p: float | None = 1.0
    """Sampling: only the best tokens that together have this probability."""

    min_p: float | None = None
    """Sampling: only tokens with this share of the best one's probability."""

    typical_p: float | None = 1.0
    """Sampling: only the tokens nearest to the entropy that together have this probability."""

    epsilon_cutoff: float | None = 0.0
    """Sampling: only tokens of this probability or more."""

    eta_cutoff: float | None = 0.0
    """Sampling: the same with a threshold that falls with the entropy."""

    repetition_penalty: float | None = 1.0
    """Tokens that came before are made less likely by this factor."""

    encoder_repetition_penalty: float | None = 1.0
    """Tokens of the source are made more likely by this factor."""

    length_penalty: float = 1.0
    """Exponent of the length that beam scores are divided by."""

    no_repeat_ngram_size: int | None = 0
    """No sequence of so many tokens comes twice."""

    encoder_no_repeat_ngram_size: int | None = 0
    """No sequence of so many tokens is one of the source."""

    bad_words_ids: list[list[int]] | None = None
    """Sequences of tokens that must not come."""

    sequence_bias: Mapping[tuple[int, ...], float] | list[list[Any]] | None = None
    """Sequence of tokens -> what is added to the score of its last one; or a list of pairs."""

    renormalize_logits: bool = False
    """Make probabilities sum to one again after all rules."""

    forced_bos_token_id: int | None = None
    """What must follow the decoder's start: the target language."""

    forced_eos_token_id: int | list[int] | None = None
    """What the last token must be when ``max_length`` is reached."""

    remove_invalid_values: bool = False
    """Replace NaN and infinite scores."""

    exponential_decay_length_penalty: tuple[int, float] | None = None
    """(n, factor): after n tokens the end mark's score rises by ``factor ** (length - n)``."""

    suppress_tokens: list[int] | None = None
    """Tokens that never come."""

    begin_suppress_tokens: list[int] | None = None
    """Tokens that do not come first."""

    num_return_sequences: int = 1
    """Sequences returned per sentence."""

    output_attentions: bool = False
    output_hidden_states: bool = False
    output_scores: bool = False
    output_logits: bool | None = None
    return_dict_in_generate: bool = False
    """Return an output object; the four flags above ask for its fields."""

    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    decoder_start_token_id: int | list[int] | None = None
    """What the decoder reads first; one per sentence if a list."""

    def __init__(self, **kwargs: Any) -> None:  # noqa: ANN401
        """Take fields by keyword; what is not given has its default.

        Raises:
            ConfigError: If a value is not allowed.
        """
        self._from_model_config = bool(kwargs.pop("_from_model_config", False))
        self._untouched: dict[str, Any] | None = None
        for name, value in (copy.deepcopy(DEFAULTS) | kwargs).items():
            setattr(self, name, value)
        self.validate()

    def __setattr__(self, name: str, value: object) -> None:
        if value is None and name in CHECKS and not CHECKS[name].optional:
            value = DEFAULTS[name]
        super().__setattr__(name, value)

    def __eq__(self, other: object) -> bool:
        same_class = isinstance(other, PublishedGenerationConfig)
        return same_class and _without_origin(self) == _without_origin(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    def validate(self) -> None:
        """Check every field, and what the fields say together.

        Raises:
            ConfigError: If a value is not allowed.
        """
        for name, check in CHECKS.items():
            value = getattr(self, name)
            if value is not None and not check.allows(value):
                raise ConfigError(
                    f"generation option {name} is {value!r}; expected {check.expected}"
                )
        wanted, beams = self.num_return_sequences, self.num_beams
        if beams > 1 and wanted > beams:
            raise ConfigError(
                f"num_return_sequences is {wanted} and num_beams is {beams}; beam search returns "
                f"at most num_beams sequences, so ask for num_beams={wanted} or fewer sequences"
            )
        if beams == 1 and wanted > 1 and not self.do_sample:
            raise ConfigError(
                f"num_return_sequences is {wanted}, but greedy search finds one sequence; set "
                f"num_beams={wanted} or do_sample=True"
            )

    def update(self, **kwargs: Any) -> dict[str, Any]:  # noqa: ANN401
        """Set those of the given options that are fields; return the others.

        Raises:
            ConfigError: If a value is not allowed.
        """
        unused = {name: value for name, value in kwargs.items() if name not in vars(self)}
        for name in kwargs.keys() - unused.keys():
            setattr(self, name, kwargs[name])
        self.validate()
        return unused

    def repeats_model_config(self) -> bool:
        """Whether this was made of a model's configuration, once, and not changed since."""
        return self._from_model_config and self._untouched == self.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """Return every field."""
        fields = {name: value for name, value in vars(self).items() if name not in NOT_SAVED}
        return copy.deepcopy(fields)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the fields that are not at their defaults."""
        defaults = DEFAULTS | {"_from_model_config": False}
        return {
            name: value
            for name, value in self.to_dict().items()
            if name not in defaults or value != defaults[name]
        }

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return the fields as JSON; with ``use_diff`` without those at their defaults."""
        content = self.to_diff_dict() if use_diff else self.to_dict()
        bias = content.get("sequence_bias")
        if isinstance(bias, Mapping):
            # JSON has no tuples for keys; the list of pairs means the same.
            content["sequence_bias"] = [[list(tokens), value] for tokens, value in bias.items()]
        return json.dumps(content, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write the fields as JSON."""
        Path(json_file_path).write_text(self.to_json_string(use_diff), encoding="utf-8")

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        config_file_name: str | os.PathLike[str] | None = None,
        **_: object,
    ) -> None:
        """Write ``generation_config.json`` into a folder, which is made if there is none.

        Raises:
            CheckpointError: If the folder is a file.
            ConfigError: If a value is not allowed.
        """
        self.validate()
        folder = Path(save_directory)
        if folder.is_file():
            raise CheckpointError(f"{folder} is a file; give a folder to save into")
        folder.mkdir(parents=True, exist_ok=True)
        self.to_json_file(folder / (config_file_name or GENERATION_CONFIG_NAME))

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:  # noqa: ANN401
        """Make a configuration of fields; keywords win over them.

        With ``return_unused_kwargs=True``, return it and the keywords that are no known fields.
        """
        wants_unused = kwargs.pop("return_unused_kwargs", False)
        known = {name: kwargs.pop(name) for name in list(kwargs) if name in DEFAULTS}
        config = cls(**{**config_dict, **known})
        return (config, kwargs) if wants_unused else config

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str | os.PathLike[str],
        config_file_name: str | os.PathLike[str] | None = None,
        *,
        subfolder: str = "",
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Read the ``generation_config.json`` of a hub id or a local folder.

        Args:
            pretrained_model_name: A hub id or a folder.
            config_file_name: Another file name.
            subfolder: A folder within it.
            **kwargs: Hub arguments (``revision``, ``cache_dir``, ``token``,
                ``local_files_only``); fields, which win over the file's;
                ``return_unused_kwargs``.

        Raises:
            CheckpointError: If there is no such model or file, or it cannot be read.
        """
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        folder = fetch_small_files(pretrained_model_name, **hub) / subfolder
        found = cls.from_dict(read_json(folder / (config_file_name or GENERATION_CONFIG_NAME)))
        found._untouched = found.to_dict()
        wants_unused = kwargs.pop("return_unused_kwargs", False)
        unused = found.update(**kwargs)
        return (found, unused) if wants_unused else found

    @classmethod
    def from_model_config(cls, model_config: ModelConfig) -> "PublishedGenerationConfig":
        """Read the generation fields of a model's configuration, where they have no file."""
        fields = {
            name: value
            for name, value in model_config.to_dict().items()
            if name in DEFAULTS and value is not None
        }
        config = cls(**fields, _from_model_config=True)
        if any(getattr(config, flag) for flag in OUTPUT_FLAGS):
            config.return_dict_in_generate = True
        config._untouched = config.to_dict()
        return config


def _without_origin(config: PublishedGenerationConfig) -> dict[str, Any]:
    """Return the fields that say how to generate."""
    origin = ("_from_model_config", "transformers_version")
    return {name: value for name, value in config.to_dict().items() if name not in origin}


DEFAULTS: dict[str, Any] = {
    name: getattr(PublishedGenerationConfig, name)
    for name in PublishedGenerationConfig.__annotations__
}
DEFAULTS |= {name: neutral[0] for name, neutral in UNSUPPORTED.items()}
DEFAULTS |= dict.fromkeys(WITHOUT_EFFECT)
"""The documented fields."""
