"""From a name to a translator."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moe_mt.checkpoints import (
    check_fits,
    fetch_small_files,
    load,
    measure_free_bytes,
    read_config,
    read_json,
    resolve,
)
from moe_mt.errors import ConfigError
from moe_mt.generation import GenerationConfig
from moe_mt.tokenizers import load_tokenizer
from moe_mt.translator.translator import Translator

__all__ = ["from_pretrained", "resolve_device", "resolve_dtype"]

LOGGER = logging.getLogger(__name__)
DTYPES = ("float32", "bfloat16", "float16", "float64")


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device that ``device`` means; ``"auto"`` is the first GPU, else the CPU.

    Raises:
        ConfigError: If there is no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"device {device!r} is unknown; choose 'auto', 'cpu' or 'cuda'"
        ) from error
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {device!r} is not supported; choose 'auto', 'cpu' or 'cuda'")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {device!r} was asked for and {torch.cuda.device_count()} CUDA devices are "
            "here; choose 'cpu', or 'auto'"
        )
    return found


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype that ``dtype`` means on a device.

    ``"auto"`` is bfloat16 on a GPU that computes it natively, float16 on older ones, and float32
    on the CPU.

    Raises:
        ConfigError: If it is no floating-point dtype that models run in.
    """
    if dtype == "auto":
        if device.type != "cuda":
            return torch.float32
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(
            f"dtype {dtype!r} is unknown; choose 'auto' or one of {', '.join(DTYPES)}"
        )
    return getattr(torch, name)


def from_pretrained(
    name: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Translator:
    """Open a model and return a translator.

    Args:
        name: A hub id (``"facebook/nllb-moe-54b"``), a local folder in the published layout, or
            ``"tiny"``, the small mixture-of-experts model in this package.
        device: ``"auto"`` (first GPU, else CPU), ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
        dtype: ``"auto"`` (bfloat16 where the device computes it natively, float16 on older GPUs,
            float32 on the CPU) or the name of a dtype.
        revision: Branch, tag or commit on the hub.
        cache_dir: Where hub files are kept instead of the hub library's own cache.
        token: Access token of the hub.
        local_files_only: Whether to use only what is in the cache.
        on_progress: Called with bytes done and bytes in all while weights are read.

    Raises:
        CheckpointError: If the model is missing, incomplete or unreadable.
        PlacementError: If it cannot fit; raised before its weights are fetched or read.
        ConfigError: If the device or dtype is unknown.
    """
    target_device = resolve_device(device)
    target_dtype = resolve_dtype(dtype, target_device)
    hub: dict[str, Any] = {
        "revision": revision,
        "cache_dir": cache_dir,
        "token": token,
        "local_files_only": local_files_only,
    }
    folder = fetch_small_files(name, **hub)
    # First of all, also of the tokenizer's files: what cannot fit need not be complete.
    check_fits(
        read_config(folder)[1],
        name=str(name),
        device=target_device,
        dtype=target_dtype,
        free=measure_free_bytes(target_device, folder),
    )
    config = read_json(folder / "config.json")
    tokenizer = load_tokenizer(folder, config.get("model_type"))
    folder = resolve(name, device=target_device, dtype=target_dtype, **hub)
    model = load(folder, device=target_device, dtype=target_dtype, on_progress=on_progress)
    ours: dict[str, Any] = config.get("moe_mt") or {}
    if "description" in ours:
        LOGGER.warning("%s: %s", name, ours["description"])
    return Translator(
        model,
        tokenizer,
        _generation_config(folder, config),
        languages=ours.get("languages"),
        folder=folder,
    )


def _generation_config(folder: Path, config: dict[str, Any]) -> GenerationConfig:
    """Return the checkpoint's defaults but for its length limit.

    Published limits are one constant, commonly 200, that cuts long sentences and lets short ones
    loop; here the limit follows the source where the caller names none.
    """
    path = folder / "generation_config.json"
    published = GenerationConfig.from_published(read_json(path) if path.exists() else None, config)
    return replace(published, max_new_tokens=None, max_length=None)
