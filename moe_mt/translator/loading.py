"""From a name to a translator."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

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
from moe_mt.ops import packing_obstacle
from moe_mt.tokenizers import load_tokenizer
from moe_mt.translator.translator import Translator

__all__ = ["from_pretrained", "resolve_device", "resolve_dtype", "resolve_packing"]

LOGGER = logging.getLogger(__name__)
DTYPES = ("float32", "bfloat16", "float16", "float64")
QUANTIZATIONS = ("int8-dynamic",)


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


def resolve_packing(
    quantization: str | None, prepack: str | bool, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Return how weights are to be packed, or ``None`` if they stay as they are.

    Args:
        quantization: As of ``from_pretrained``.
        prepack: As of ``from_pretrained``.
        device: Where the model goes.
        dtype: What its weights become.

    Raises:
        ConfigError: If a value is unknown, or what was asked for cannot be had.
    """
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ConfigError(
            f"quantization {quantization!r} is unknown; choose None or {', '.join(QUANTIZATIONS)}"
        )
    if prepack != "auto" and not isinstance(prepack, bool):
        raise ConfigError(f"prepack {prepack!r} is unknown; choose 'auto', True or False")
    if prepack is False:
        if quantization is not None:
            raise ConfigError(
                f"quantization {quantization!r} packs weights and prepack is False; leave one out"
            )
        return None
    kind = quantization or "float32"
    obstacle = packing_obstacle(kind, device, dtype)
    if obstacle is None:
        return kind
    if quantization is not None:
        raise ConfigError(
            f"quantization {quantization!r} cannot be had here: {obstacle}; leave it out, or use "
            'device="cpu" with dtype="float32"'
        )
    if prepack is True:
        raise ConfigError(
            f'prepack=True cannot be had here: {obstacle}; leave it out, or use device="cpu" '
            'with dtype="float32"'
        )
    return None


def from_pretrained(  # noqa: PLR0913
    name: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    *,
    quantization: str | None = None,
    prepack: str | bool = "auto",
    compile: bool | Literal["auto"] = "auto",
    batch_invariant: bool = False,
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
        quantization: ``None``, or ``"int8-dynamic"``: int8 weights and inputs for dense layers,
            experts and the output head, on the CPU.
        prepack: Whether weights are kept in the layout of the CPU's products, which is faster and
            keeps a second copy of the embedding; such a model cannot be trained or saved.
            ``"auto"`` does so for float32 on an x86-64 CPU.
        compile: Whether the decoder's step is compiled, once for each size of batch, and replayed
            as a CUDA graph on a GPU. ``"auto"`` does so on a GPU; on a CPU it gains or loses a
            tenth and takes a minute. ``Translator.warmup`` compiles ahead of the first translation.
        batch_invariant: Whether a sentence's scores are bit-identical alone and in any batch, on
            one device; its tokens are the same in any case. Sentences are then computed one after
            the other.
        revision: Branch, tag or commit on the hub.
        cache_dir: Where hub files are kept instead of the hub library's own cache.
        token: Access token of the hub.
        local_files_only: Whether to use only what is in the cache.
        on_progress: Called with bytes done and bytes in all while weights are read.

    Raises:
        CheckpointError: If the model is missing, incomplete or unreadable.
        PlacementError: If it cannot fit; raised before its weights are fetched or read.
        ConfigError: If an option is unknown, or what it asks for cannot be had.
    """
    target_device = resolve_device(device)
    target_dtype = resolve_dtype(dtype, target_device)
    pack = resolve_packing(quantization, prepack, target_device, target_dtype)
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
        pack=pack,
    )
    config = read_json(folder / "config.json")
    tokenizer = load_tokenizer(folder, config.get("model_type"))
    placing: dict[str, Any] = {"device": target_device, "dtype": target_dtype, "pack": pack}
    folder = resolve(name, **placing, **hub)
    model = load(folder, **placing, on_progress=on_progress)
    ours: dict[str, Any] = config.get("moe_mt") or {}
    if "description" in ours:
        LOGGER.warning("%s: %s", name, ours["description"])
    return Translator(
        model,
        tokenizer,
        _generation_config(folder, config),
        languages=ours.get("languages"),
        folder=folder,
        compile=compile,
        batch_invariant=batch_invariant,
    )


def _generation_config(folder: Path, config: dict[str, Any]) -> GenerationConfig:
    """Return the checkpoint's defaults but for its length limit.

    Published limits are one constant, commonly 200, that cuts long sentences and lets short ones
    loop; here the limit follows the source where the caller names none.
    """
    path = folder / "generation_config.json"
    published = GenerationConfig.from_published(read_json(path) if path.exists() else None, config)
    return replace(published, max_new_tokens=None, max_length=None)
