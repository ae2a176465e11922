"""From a checkpoint's ``model_type`` to the documented classes of its family."""

import os
from typing import Any, ClassVar

from moe_mt.checkpoints import HUB_ARGUMENTS
from moe_mt.errors import CheckpointError, ConfigError
from moe_mt.models import FAMILIES
from moe_mt.pretrained.config import M2M100Config, NllbMoeConfig, PublishedConfig
from moe_mt.pretrained.m2m100 import M2M100ForConditionalGeneration, M2M100Model
from moe_mt.pretrained.nllb_moe import NllbMoeForConditionalGeneration, NllbMoeModel

__all__ = ["AutoConfig", "AutoModel", "AutoModelForSeq2SeqLM"]

CONFIGS: dict[str, type[PublishedConfig]] = {"m2m100": M2M100Config, "nllb_moe": NllbMoeConfig}


class AutoConfig:
    """The configuration of whichever family a checkpoint is of."""

    def __init__(self) -> None:
        """Refuse: there is nothing to make."""
        raise ConfigError("AutoConfig is not made itself; call AutoConfig.from_pretrained(name)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Read a configuration; arguments as of ``M2M100Config.from_pretrained``.

        Raises:
            CheckpointError: If there is no such model, or it is of no family known here.
        """
        fields, kwargs = PublishedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
        family = FAMILIES.get(str(fields.get("model_type")))
        if family is None:
            raise CheckpointError(
                f"{pretrained_model_name_or_path} has model_type {fields.get('model_type')!r}; the "
                f"models that run here have one of {', '.join(FAMILIES)}"
            )
        return CONFIGS[family.name].from_dict(fields, **kwargs)


class _AutoModel:
    classes: ClassVar[dict[type[PublishedConfig], Any]]

    def __init__(self) -> None:
        """Refuse: there is nothing to make."""
        name = type(self).__name__
        raise ConfigError(f"{name} is not made itself; call {name}.from_pretrained(name)")

    @classmethod
    def from_config(cls, config: PublishedConfig) -> Any:  # noqa: ANN401
        """Return a model with fresh weights.

        Raises:
            ConfigError: If the configuration is none of the documented ones.
        """
        return cls._class_for(config)(config)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: PublishedConfig | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Load a model; arguments and errors as of ``M2M100Model.from_pretrained``."""
        if config is None:
            where = ("subfolder", *HUB_ARGUMENTS)
            config = AutoConfig.from_pretrained(
                pretrained_model_name_or_path,
                **{name: kwargs[name] for name in where if name in kwargs},
            )
            # Read again there, as keywords may be fields of it.
            return cls._class_for(config).from_pretrained(pretrained_model_name_or_path, **kwargs)
        model_class = cls._class_for(config)
        return model_class.from_pretrained(pretrained_model_name_or_path, config=config, **kwargs)

    @classmethod
    def _class_for(cls, config: Any) -> Any:  # noqa: ANN401
        for config_class, model_class in cls.classes.items():
            if isinstance(config, config_class):
                return model_class
        raise ConfigError(
            f"config is a {type(config).__name__}; {cls.__name__} knows "
            f"{', '.join(known.__name__ for known in cls.classes)}"
        )


class AutoModel(_AutoModel):
    """The model without a head, of whichever family."""

    classes: ClassVar = {M2M100Config: M2M100Model, NllbMoeConfig: NllbMoeModel}


class AutoModelForSeq2SeqLM(_AutoModel):
    """The model with its head, of whichever family."""

    classes: ClassVar = {
        M2M100Config: M2M100ForConditionalGeneration,
        NllbMoeConfig: NllbMoeForConditionalGeneration,
    }
