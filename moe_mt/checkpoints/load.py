"""A folder of published files → a model, each weight read once and never held twice."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from moe_mt.checkpoints.fill import FLOAT_DTYPES, Filling
from moe_mt.checkpoints.fit import check_fits, measure_free_bytes, model_bytes
from moe_mt.checkpoints.free_bytes import give_back_freed_bytes
from moe_mt.checkpoints.published_config import read_config
from moe_mt.checkpoints.shards import open_shards
from moe_mt.errors import ConfigError
from moe_mt.models import Seq2SeqTransformer
from moe_mt.ops import packing_obstacle

__all__ = ["load"]

TIDIED_BYTES = 128_000_000
"""Bytes of weights that are packed before freed memory is given back; that takes a millisecond."""


def load(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    pack: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Seq2SeqTransformer:
    """Load a model from a folder in the published layout.

    Before a weight is read, the model's size is compared with the free memory, and the names in
    the files with those that the model needs.

    Args:
        folder: Holds ``config.json`` and the weights, as .safetensors or .bin, whole or sharded.
        device: Where the model is to go.
        dtype: What its weights become; routers stay in float32.
        pack: One of ``ops.PACKED_KINDS``: each weight is packed as it comes, for inference on the
            CPU; ``None`` keeps weights as they are.
        on_progress: Called with the bytes of the model that are done, and all of them.

    Returns:
        The model in evaluation mode; if nothing is packed, its parameters can be trained.

    Raises:
        CheckpointError: If a file is missing, damaged, or does not hold exactly this model.
        ConfigError: If the configuration describes no model, or it cannot be packed like that.
        PlacementError: If the model does not fit.
    """
    if dtype not in FLOAT_DTYPES:
        raise ConfigError(f"dtype {dtype} was asked for; choose one of {FLOAT_DTYPES}")
    folder, device = Path(folder), torch.device(device)
    obstacle = None if pack is None else packing_obstacle(pack, device, dtype)
    if obstacle is not None:
        raise ConfigError(f"packing as {pack!r} was asked for, but {obstacle}")
    family, config = read_config(folder)
    free = measure_free_bytes(device, folder)
    check_fits(config, name=str(folder), device=device, dtype=dtype, free=free, pack=pack)
    shards = open_shards(folder)
    filling = Filling(family, config, device, dtype, pack=pack, source=str(folder))
    filling.check_names(shards.keys)
    done, total, tidy = 0, model_bytes(config, dtype), 0
    # What packing a large tensor needs beside it is then needed while little else is there.
    for key, read in shards if pack is None else shards.largest_first(filling.size_of):
        if not filling.ignores(key):
            done += filling.place(key, read())
            if pack is not None and (done - tidy > TIDIED_BYTES or done == total):
                # What packing used and freed lies between what it made.
                give_back_freed_bytes()
                tidy = done
            if on_progress is not None:
                on_progress(done, total)
    return filling.finish()
