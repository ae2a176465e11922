"""A family of checkpoints: how its published files are spelled."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from moe_mt.models.config import TransformerConfig
from moe_mt.models.transformer import Seq2SeqTransformer

__all__ = ["TIED_KEYS", "Family", "Location"]

TIED_KEYS = (
    "shared.weight",
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "lm_head.weight",
)
"""The four published names of the one embedding; a file holds any non-empty subset of them."""

IGNORED_KEYS = (
    "*.embed_positions.weights",
    "encoder.version",
    "decoder.version",
    "decoder.output_projection.weight",
    "*._float_tensor",
    "final_logits_bias",
)
"""Keys of old files that hold nothing a model needs: computed tables and version marks."""

STACKED = {"up_proj": ("fc1", "weight"), "up_bias": ("fc1", "bias")} | {
    "down_proj": ("fc2", "weight"),
    "down_bias": ("fc2", "bias"),
}


@dataclass(frozen=True, slots=True)
class Location:
    """Where a published tensor goes."""

    parameter: str
    """Name of the parameter in ``Seq2SeqTransformer``."""

    expert: int | None
    """Which slice of a stacked parameter, or ``None`` for the whole parameter."""

    shape: tuple[int, ...]
    """Shape of the published tensor."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """The facts that tell one family of checkpoints from another."""

    name: str
    """Our name for it, as in ``TransformerConfig.family``."""

    model_types: tuple[str, ...]
    """Spellings of ``model_type`` in ``config.json``; the first one is written."""

    architecture: str
    """The class that published files name."""

    module_names: Mapping[str, str]
    """Our module's name in a layer → the published one."""

    config_from_published: Callable[[Mapping[str, Any]], TransformerConfig]
    """``config.json`` → our configuration."""

    config_to_published: Callable[[TransformerConfig], dict[str, Any]]
    """The reverse."""

    def locations(self, config: TransformerConfig) -> dict[str, Location]:
        """Map every published key, without the ``model.`` prefix, to where it goes.

        The four tied names all lead to the one embedding.
        """
        with torch.device("meta"):
            model = Seq2SeqTransformer(config)
        found: dict[str, Location] = {}
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            if name == "embedding.weight":
                found |= {key: Location(name, None, shape) for key in TIED_KEYS}
            else:
                found.update(self._published(name, shape))
        return found

    def _published(self, name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Location]]:
        module, _, leaf = name.rpartition(".")
        if module.endswith("feed_forward.experts"):
            prefix = module.removesuffix("feed_forward.experts")
            layer, kind = STACKED[leaf]
            for expert in range(shape[0]):
                key = f"{prefix}ffn.experts.expert_{expert}.{layer}.{kind}"
                yield key, Location(name, expert, shape[1:])
            return
        for ours, published in self.module_names.items():
            if f".{ours}." in name:
                name_published = name.replace(f".{ours}.", f".{published}.")
                yield name_published, Location(name, None, shape)
                return
        yield name.replace(".norm.", ".layer_norm."), Location(name, None, shape)

    @staticmethod
    def strip_prefix(key: str) -> str:
        """Return ``key`` without the ``model.`` that some files have before every name."""
        return key.removeprefix("model.")

    @staticmethod
    def ignores(key: str) -> bool:
        """Whether ``key``, without its prefix, is known to hold nothing a model needs."""
        return any(fnmatchcase(key, pattern) for pattern in IGNORED_KEYS)
