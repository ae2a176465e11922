"""Files → weights, and back: fetch, check, load and save models in the published layout."""

from moe_mt.checkpoints.fill import copy_checked
from moe_mt.checkpoints.fit import FreeBytes, check_fits, measure_free_bytes, model_bytes
from moe_mt.checkpoints.load import load
from moe_mt.checkpoints.published_config import parse_config, read_config, read_json
from moe_mt.checkpoints.resolve import HUB_ARGUMENTS, fetch_small_files, resolve
from moe_mt.checkpoints.save import save, save_tensors
from moe_mt.checkpoints.shards import open_shards

__all__ = [
    "HUB_ARGUMENTS",
    "FreeBytes",
    "check_fits",
    "copy_checked",
    "fetch_small_files",
    "load",
    "measure_free_bytes",
    "model_bytes",
    "open_shards",
    "parse_config",
    "read_config",
    "read_json",
    "resolve",
    "save",
    "save_tensors",
]
