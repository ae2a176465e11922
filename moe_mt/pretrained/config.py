"""The documented configurations: mutable, open to unknown fields, turned into ours for a model."""

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch

from moe_mt.checkpoints import HUB_ARGUMENTS, fetch_small_files, parse_config, read_json
from moe_mt.errors import CheckpointError, ConfigError
from moe_mt.models import FAMILIES, TransformerConfig

__all__ = ["M2M100Config", "NllbMoeConfig", "PublishedConfig"]

CONFIG_NAME = "config.json"

Config = TypeVar("Config", bound="PublishedConfig")

COMMON_FIELDS: dict[str, Any] = {
    "return_dict": True,
    "output_hidden_states": False,
    "output_attentions": False,
    "torchscript": False,
    "torch_dtype": None,
    "tie_word_embeddings": True,
    "is_decoder": False,
    "cross_attention_hidden_size": None,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
    "architectures": None,
    "finetuning_task": None,
    "task_specific_params": None,
    "problem_type": None,
    "tokenizer_class": None,
    "prefix": None,
    "sep_token_id": None,
}
"""Fields that every configuration of transformers 4.x has, and their defaults."""

GENERATION_DEFAULTS: dict[str, Any] = {
    "max_length": 20,
    "min_length": 0,
    "do_sample": False,
    "early_stopping": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "num_return_sequences": 1,
    "output_scores": False,
    "return_dict_in_generate": False,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
"""What reading a setting of generation gives that nobody set, as in transformers 4.x. They are not
fields: only one that is set is written, and counts where a model has no generation settings."""

LABELS = {0: "LABEL_0", 1: "LABEL_1"}


class PublishedConfig:
    """What ``config.json`` says, as attributes.

    Fields that nobody here knows are kept and written back. Values are checked when a model is
    built, because code that was written against these classes sets fields one after the other.
    """

    model_type: ClassVar[str] = ""
    attribute_map: ClassVar[dict[str, str]] = {
        "num_attention_heads": "encoder_attention_heads",
        "hidden_size": "d_model",
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    # What code that was written for transformers' base class looks up.
    sub_configs: ClassVar[dict[str, Any]] = {}
    is_composition: ClassVar[bool] = False
    has_no_defaults_at_init: ClassVar[bool] = False
    base_config_key: ClassVar[str] = ""

    num_hidden_layers: int
    name_or_path: str
    _attn_implementation: str = "sdpa"

    def __init__(self, fields: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        """Take the documented fields, and whatever else was given by keyword."""
        extra = dict(extra)
        self.name_or_path = str(extra.pop("name_or_path", extra.pop("_name_or_path", "")))
        num_labels = extra.pop("num_labels", 2)
        id2label = extra.pop("id2label", None) or {i: f"LABEL_{i}" for i in range(num_labels)}
        self.id2label = {int(index): label for index, label in id2label.items()}
        by_label = {label: index for index, label in self.id2label.items()}
        self.label2id = extra.pop("label2id", None) or by_label
        self.num_hidden_layers = fields["encoder_layers"]
        for unused in ("model_type", "transformers_version"):
            extra.pop(unused, None)
        for name, value in {**copy.deepcopy(COMMON_FIELDS), **fields, **extra}.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        name = self.attribute_map.get(name, name)
        if name in ("torch_dtype", "dtype") and isinstance(value, str):
            found = getattr(torch, value, None)
            if not isinstance(found, torch.dtype):
                raise ConfigError(f"{name} is {value!r}; expected a dtype such as 'float32'")
            value = found
        super().__setattr__("torch_dtype" if name == "dtype" else name, value)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        # Called only for what is no attribute, so that an alias costs nothing elsewhere.
        target = type(self).attribute_map.get(name)
        if target is not None:
            return getattr(self, target)
        if name in GENERATION_DEFAULTS:
            return GENERATION_DEFAULTS[name]
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PublishedConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    @property
    def dtype(self) -> torch.dtype | None:
        """The same as ``torch_dtype``."""
        return self.torch_dtype

    @property
    def num_labels(self) -> int:
        """How many labels ``id2label`` names; setting it makes new ones."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        self.id2label = {i: f"LABEL_{i}" for i in range(count)}
        self.label2id = {label: index for index, label in self.id2label.items()}

    @property
    def use_return_dict(self) -> bool:
        """Whether a forward pass returns an output object where the call does not say."""
        return bool(self.return_dict) and not self.torchscript

    def get_text_config(self, decoder: bool = False) -> "PublishedConfig":
        """Return the configuration of the text model: this one."""
        return self

    def update(self, fields: Mapping[str, Any]) -> None:
        """Set fields."""
        for name, value in fields.items():
            setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Return every field, as ``config.json`` has them."""
        content = copy.deepcopy(self.__dict__)
        content["_name_or_path"] = content.pop("name_or_path")
        content.pop("_attn_implementation", None)
        if content["torch_dtype"] is not None:
            content["torch_dtype"] = str(content["torch_dtype"]).removeprefix("torch.")
        return content | {"model_type": self.model_type}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the model's own fields, and of the common ones those that were set."""
        common = COMMON_FIELDS | {"id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}}
        content = self.to_dict()
        # Where it came from is nobody's business who reads the file.
        del content["_name_or_path"]
        return {k: v for k, v in content.items() if k not in common or v != common[k]}

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return the fields as JSON: with ``use_diff`` without common ones at their defaults."""
        content = self.to_diff_dict() if use_diff else self.to_dict()
        return json.dumps(content, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write the fields as JSON."""
        Path(json_file_path).write_text(self.to_json_string(use_diff), encoding="utf-8")

    def save_pretrained(self, save_directory: str | os.PathLike[str], **_: object) -> None:
        """Write ``config.json`` into a folder, which is made if there is none."""
        folder = Path(save_directory)
        if folder.is_file():
            raise CheckpointError(f"{folder} is a file; give a folder to save into")
        folder.mkdir(parents=True, exist_ok=True)
        self.to_json_file(folder / CONFIG_NAME)

    @classmethod
    def from_dict(cls: type[Config], config_dict: Mapping[str, Any], **kwargs: Any) -> Any:  # noqa: ANN401
        """Make a configuration of fields; keywords that are fields win over them.

        With ``return_unused_kwargs=True``, return it and the keywords that are no fields of it.
        """
        wants_unused = kwargs.pop("return_unused_kwargs", False)
        config = cls(**config_dict)
        unused: dict[str, Any] = {}
        for name, value in kwargs.items():
            if hasattr(config, name):
                setattr(config, name, value)
            else:
                unused[name] = value
        return (config, unused) if wants_unused else config

    @classmethod
    def from_json_file(cls: type[Config], json_file: str | os.PathLike[str]) -> Config:
        """Make a configuration of a JSON file.

        Raises:
            CheckpointError: If the file is missing or holds no JSON object.
        """
        return cls(**read_json(Path(json_file)))

    @classmethod
    def from_pretrained(
        cls: type[Config],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str = "",
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Read the ``config.json`` of a hub id or a local folder (or that file itself).

        Args:
            pretrained_model_name_or_path: A hub id, a folder, or a JSON file.
            subfolder: A folder within it.
            **kwargs: Hub arguments (``revision``, ``cache_dir``, ``token``,
                ``local_files_only``); fields, which win over the file's.

        Raises:
            CheckpointError: If there is no such model, or its file cannot be read.
            ConfigError: If the file is that of another family.
        """
        config_dict, kwargs = cls.get_config_dict(
            pretrained_model_name_or_path, subfolder=subfolder, **kwargs
        )
        model_type = str(config_dict.get("model_type", cls.model_type))
        if FAMILIES.get(model_type) is not FAMILIES[cls.model_type]:
            raise ConfigError(
                f"{pretrained_model_name_or_path} has model_type {model_type!r}; {cls.__name__} is "
                f"for {cls.model_type!r}: use the classes of the other family, or "
                "AutoModelForSeq2SeqLM"
            )
        return cls.from_dict(config_dict, **kwargs)

    @classmethod
    def get_config_dict(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str = "",
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the fields of a model's ``config.json``, and the keywords that were not used."""
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        path = Path(os.fspath(pretrained_model_name_or_path))
        if not path.is_file():
            path = fetch_small_files(pretrained_model_name_or_path, **hub) / subfolder / CONFIG_NAME
        return read_json(path), kwargs

    def for_model(self) -> TransformerConfig:
        """Return what a model is built from, every field checked.

        Raises:
            ConfigError: If a field describes no model.
        """
        origin = f"this {type(self).__name__}"
        return parse_config(self.to_dict(), FAMILIES[self.model_type], origin=origin)


class M2M100Config(PublishedConfig):
    """Configuration of M2M100, NLLB-200 dense, WMT21 and SMaLL-100 (``model_type`` m2m_100)."""

    model_type = "m2m_100"

    def __init__(  # noqa: PLR0913
        self,
        vocab_size: int = 128112,
        max_position_embeddings: int = 1024,
        encoder_layers: int = 12,
        encoder_ffn_dim: int = 4096,
        encoder_attention_heads: int = 16,
        decoder_layers: int = 12,
        decoder_ffn_dim: int = 4096,
        decoder_attention_heads: int = 16,
        encoder_layerdrop: float = 0.05,
        decoder_layerdrop: float = 0.05,
        use_cache: bool = True,
        is_encoder_decoder: bool = True,
        activation_function: str = "relu",
        d_model: int = 1024,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        activation_dropout: float = 0.0,
        init_std: float = 0.02,
        decoder_start_token_id: int = 2,
        scale_embedding: bool = True,
        pad_token_id: int = 1,
        bos_token_id: int = 0,
        eos_token_id: int = 2,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Take the documented fields; see ``moe_mt.models.TransformerConfig`` for what they mean.

        Args:
            vocab_size: Rows of the embedding.
            max_position_embeddings: Positions the sinusoid table starts with.
            encoder_layers: Layers of the encoder.
            encoder_ffn_dim: Inner width of its feed-forward networks.
            encoder_attention_heads: Its attention heads.
            decoder_layers: Layers of the decoder.
            decoder_ffn_dim: Inner width of its feed-forward networks.
            decoder_attention_heads: Its attention heads.
            encoder_layerdrop: Probability that training skips an encoder layer.
            decoder_layerdrop: Probability that training skips a decoder layer.
            use_cache: Whether a forward pass returns keys and values where the call does not say.
            is_encoder_decoder: True.
            activation_function: "relu", "gelu" or "silu".
            d_model: Width of a token.
            dropout: On embeddings and on every sublayer's output.
            attention_dropout: On attention weights.
            activation_dropout: After the activation.
            init_std: Standard deviation of fresh weights.
            decoder_start_token_id: First token the decoder reads.
            scale_embedding: Whether embeddings are multiplied by ``sqrt(d_model)``.
            pad_token_id: Padding.
            bos_token_id: Begin of sentence.
            eos_token_id: End of sentence.
            **kwargs: Further fields, which are kept.
        """
        fields = {k: v for k, v in locals().items() if k not in ("self", "kwargs", "__class__")}
        super().__init__(fields, kwargs)


class NllbMoeConfig(PublishedConfig):
    """Configuration of NLLB-MoE (``model_type`` nllb-moe). The defaults are not the 54B's."""

    model_type = "nllb-moe"

    def __init__(  # noqa: PLR0913
        self,
        vocab_size: int = 128112,
        max_position_embeddings: int = 1024,
        encoder_layers: int = 12,
        encoder_ffn_dim: int = 4096,
        encoder_attention_heads: int = 16,
        decoder_layers: int = 12,
        decoder_ffn_dim: int = 4096,
        decoder_attention_heads: int = 16,
        encoder_layerdrop: float = 0.05,
        decoder_layerdrop: float = 0.05,
        use_cache: bool = True,
        is_encoder_decoder: bool = True,
        activation_function: str = "relu",
        d_model: int = 1024,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        activation_dropout: float = 0.0,
        init_std: float = 0.02,
        decoder_start_token_id: int = 2,
        scale_embedding: bool = True,
        router_bias: bool = False,
        router_dtype: str = "float32",
        router_ignore_padding_tokens: bool = False,
        num_experts: int = 128,
        expert_capacity: int | None = 64,
        encoder_sparse_step: int = 4,
        decoder_sparse_step: int = 4,
        router_z_loss_coef: float = 0.001,
        router_aux_loss_coef: float = 0.001,
        second_expert_policy: str = "all",
        normalize_router_prob_before_dropping: bool = False,
        batch_prioritized_routing: bool = False,
        moe_eval_capacity_token_fraction: float = 1.0,
        moe_token_dropout: float = 0.2,
        pad_token_id: int = 1,
        bos_token_id: int = 0,
        eos_token_id: int = 2,
        output_router_logits: bool = False,
        *,
        ffn_output_dropout: Literal["activation_dropout", "dropout"] = "activation_dropout",
        router_aux_loss: Literal["fairseq", "transformers-4"] = "fairseq",
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Take the documented fields: those of ``M2M100Config``, and of the sparse layers these.

        - ``router_bias``: Whether the router's scores have a bias.
        - ``router_dtype``: Precision of the router: float32, float16 or bfloat16.
        - ``router_ignore_padding_tokens``: Whether padding claims experts like any token. The name
          says the opposite, and is the published one.
        - ``num_experts``: Experts in each sparse layer.
        - ``expert_capacity``: Tokens an expert takes in training; ``None`` is fairseq's rule,
          ``2 * ceil(T / E)``.
        - ``encoder_sparse_step``, ``decoder_sparse_step``: Layer i of that side is sparse where
          ``(i + 1) % step == 0``; none is where it is 0.
        - ``router_z_loss_coef``: Weight of the routers' z-loss; 0 switches it off.
        - ``router_aux_loss_coef``: Weight of their load-balancing loss.
        - ``second_expert_policy``: "all", "sampling" or "random".
        - ``normalize_router_prob_before_dropping``: Whether gates are normalised before claims
          are dropped.
        - ``batch_prioritized_routing``: Whether confident tokens claim experts first.
        - ``moe_eval_capacity_token_fraction``: Capacity in evaluation, a fraction of the tokens.
        - ``moe_token_dropout``: Probability of expert-output masking; evaluation scales by one
          minus it.
        - ``output_router_logits``: Whether a forward pass returns them where the call is silent.
        - ``ffn_output_dropout``: Which dropout follows a feed-forward network in training: the
          published classes have "activation_dropout" there, fairseq's model "dropout".
        - ``router_aux_loss``: "fairseq": per sparse layer, from the router's probabilities before
          dropping, summed over layers. "transformers-4": the number that transformers 4.36 to 4.57
          computes from the gates after dropping; it has no z-loss, and mistakes the layers for one
          another where a side has several sparse ones.

        Raises:
            ConfigError: If ``router_dtype``, ``ffn_output_dropout`` or ``router_aux_loss`` is none
                of these.
        """
        fields = {k: v for k, v in locals().items() if k not in ("self", "kwargs", "__class__")}
        for name, allowed in ALLOWED.items():
            if fields[name] not in allowed:
                raise ConfigError(f"{name} is {fields[name]!r}; expected one of {allowed}")
        super().__init__(fields, kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return every field; those that only this package has, where they say something."""
        content = super().to_dict()
        for name in ("ffn_output_dropout", "router_aux_loss"):
            if content[name] == ALLOWED[name][0]:
                del content[name]
        return content

    def for_model(self) -> TransformerConfig:
        """Return what a model is built from, every field checked."""
        config = super().for_model()
        if self.ffn_output_dropout == "dropout":
            config = replace(config, ffn_output_dropout=config.dropout)
        return config


ALLOWED = {
    "router_dtype": ("float32", "float16", "bfloat16"),
    "ffn_output_dropout": ("activation_dropout", "dropout"),
    "router_aux_loss": ("fairseq", "transformers-4"),
}
