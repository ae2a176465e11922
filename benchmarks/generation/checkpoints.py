"""Checkpoints of random weights in the published layout, made once and kept in ``build``."""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_mt.models import FAMILIES, Family, TransformerConfig

__all__ = ["CHECKPOINTS", "random_checkpoint", "random_tensors"]

CHECKPOINTS = Path(__file__).parents[2] / "build" / "checkpoints"

TIED_KEY = "shared.weight"
"""The one of the four tied names that is written."""

EMBEDDING_STD, BIAS_STD = 0.02, 0.02
GAIN = 3.0
"""Entries of a matrix have the standard deviation ``GAIN / sqrt(inputs)``, and rows behind a ReLU
the mean 0. With smaller weights every sentence becomes one token repeated, for which a router
chooses the same experts; with larger ones rounding grows by more than a hundred to the logits."""

RECIPE = 2
"""Raise it with every change of the numbers drawn here: old files are then made anew."""

MOST_SHARD_BYTES = 2**31


def random_checkpoint(config: TransformerConfig, name: str, folder: Path = CHECKPOINTS) -> Path:
    """Return the folder of a model with random weights; it is written if it is not there.

    Args:
        config: What the model is.
        name: What its folder is called, before a digest of the configuration.
        folder: Where that is.
    """
    facts = json.dumps([RECIPE, asdict(config)], sort_keys=True)
    digest = hashlib.sha256(facts.encode()).hexdigest()[:8]
    target = folder / f"{name}-{digest}"
    if not target.exists():
        unfinished = target.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        _write(config, unfinished)
        unfinished.rename(target)
    return target


def random_tensors(config: TransformerConfig, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield every published tensor of a model, each tied one once, in float32."""
    generator = torch.Generator().manual_seed(seed)
    for key, location in _family(config).locations(config).items():
        tied = location.parameter == "embedding.weight"
        if not tied or key == TIED_KEY:
            weight = torch.randn(location.shape, generator=generator)
            yield f"model.{key}", _scaled(key, weight, config.pad_id)


def _scaled(key: str, weight: Tensor, pad_id: int) -> Tensor:
    if key == TIED_KEY:
        weight *= EMBEDDING_STD
        weight[pad_id] = 0
    elif key.endswith("bias"):
        weight *= BIAS_STD
    elif weight.dim() == 1:  # of a normalisation
        weight.mul_(BIAS_STD).add_(1)
    else:
        if key.endswith("fc2.weight"):
            weight -= weight.mean(1, keepdim=True)
        weight *= GAIN / math.sqrt(weight.shape[1])
    return weight


def _write(config: TransformerConfig, folder: Path) -> None:
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(_shards(random_tensors(config))):
        name = f"model-{index:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    family = _family(config)
    published = family.config_to_published(config) | {
        "model_type": family.model_types[0],
        "architectures": [family.architecture],
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(published, indent=2), encoding="utf-8")


def _shards(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Yield tensors in parts of ``MOST_SHARD_BYTES``, so that few are held at a time."""
    shard: dict[str, Tensor] = {}
    held = 0
    for key, tensor in tensors:
        if held and held + tensor.nbytes > MOST_SHARD_BYTES:
            yield shard
            shard, held = {}, 0
        shard[key] = tensor
        held += tensor.nbytes
    yield shard


def _family(config: TransformerConfig) -> Family:
    return next(family for family in FAMILIES.values() if family.name == config.family)
