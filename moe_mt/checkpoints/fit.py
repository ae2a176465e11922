"""Whether a model fits, asked before any of its weights is fetched or read."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_mt.checkpoints.free_bytes import free_device_bytes, free_disk_bytes, free_host_bytes
from moe_mt.errors import PlacementError
from moe_mt.models import Seq2SeqTransformer, TransformerConfig, packed_bytes
from moe_mt.ops import packing_obstacle

__all__ = ["FreeBytes", "check_fits", "measure_free_bytes", "model_bytes", "parameter_dtype"]

HEADROOM_BYTES = 500_000_000
"""What a process needs beside the weights while it loads them."""

PUBLISHED_PARAMETERS = {
    "facebook/nllb-200-3.3B": 3_344_863_232,
    "facebook/nllb-200-1.3B": 1_370_638_336,
    "facebook/nllb-200-distilled-600M": 615_073_792,
    "facebook/m2m100_418M": 483_905_536,
}
"""Models to name to somebody whose choice does not fit, largest first."""


@dataclass(frozen=True, kw_only=True)
class FreeBytes:
    """Room in bytes; ``None`` where it is unknown or not asked for."""

    host: int | None = None
    """In this process's main memory."""

    device: int | None = None
    """In the memory of the device that will hold the model, where it has its own."""

    disk: int | None = None
    """Where a download would go."""


def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a parameter has in a model of ``dtype``.

    Routers stay in float32: they are tiny, and rounding them would change which experts are
    chosen.
    """
    return torch.float32 if ".router." in name else dtype


def model_bytes(config: TransformerConfig, dtype: torch.dtype, pack: str | None = None) -> int:
    """Return the bytes that a model's parameters take; the one embedding counts once.

    Args:
        config: What the model is.
        dtype: What its weights become; routers stay in float32.
        pack: How weights are packed, or ``None``. A packed head is a second embedding.
    """
    with torch.device("meta"):
        model = Seq2SeqTransformer(config)
    if pack is not None:
        return packed_bytes(model, pack)
    return sum(
        parameter.numel() * parameter_dtype(name, dtype).itemsize
        for name, parameter in model.named_parameters()
    )


def largest_tensor_bytes(config: TransformerConfig) -> int:
    """Return the bytes of the largest tensor that a float32 checkpoint stores."""
    widest_ffn = max(config.encoder_ffn_dim, config.decoder_ffn_dim, config.d_model)
    return max(config.vocab_size, widest_ffn) * config.d_model * torch.float32.itemsize


def measure_free_bytes(device: torch.device, folder: Path) -> FreeBytes:
    """Return the room that there is now for a model on ``device``, downloaded to ``folder``."""
    return FreeBytes(
        host=free_host_bytes(),
        device=free_device_bytes(device),
        disk=free_disk_bytes(folder),
    )


def check_fits(
    config: TransformerConfig,
    *,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    free: FreeBytes,
    download_bytes: int = 0,
    pack: str | None = None,
) -> None:
    """Raise unless a model fits where it is to go.

    The place that holds the model needs its bytes at ``dtype``, those of the largest tensor that
    passes through, and 0.5 GB. Room that is unknown is not checked.

    Args:
        config: What the model is.
        name: What the caller called it.
        device: Where it is to go.
        dtype: What its weights become; routers stay in float32.
        free: The room there is.
        download_bytes: What is still to be fetched.
        pack: How weights are to be packed, or ``None``.

    Raises:
        PlacementError: With the figures and the options.
    """
    passing = largest_tensor_bytes(config) + HEADROOM_BYTES
    needed = model_bytes(config, dtype, pack) + passing
    disk = _Demand("disk, to download", download_bytes, free.disk)
    if free.device is None:
        home, others = _Demand("host memory", needed, free.host), ()
    else:
        home = _Demand(f"memory of {device}", needed, free.device)
        others = (_Demand("host memory", passing, free.host),)
    demands = (disk, home, *others)
    if any(demand.is_too_much for demand in demands):
        table = "\n".join(str(demand) for demand in demands if demand.required)
        smaller = _smaller_form(config, device, dtype, pack)
        options = (smaller, *_options(config, dtype, passing, home=home, disk=disk))
        raise PlacementError(
            f"{name} does not fit: {_name(dtype)} was asked for on {device}\n"
            f"  {'':<20}{'required':>12}{'free':>12}\n{table}\n"
            "What can be done:\n" + "\n".join(f"  - {option}" for option in options)
        )


@dataclass(frozen=True)
class _Demand:
    """What one place must have room for; prints as a row of the table."""

    place: str
    required: int
    free: int | None

    @property
    def is_too_much(self) -> bool:
        return self.free is not None and self.required > self.free

    def __str__(self) -> str:
        free = "unknown" if self.free is None else _gigabytes(self.free)
        mark = "   too little" if self.is_too_much else ""
        return f"  {self.place:<20}{_gigabytes(self.required):>12}{free:>12}{mark}"


def _smaller_form(
    config: TransformerConfig, device: torch.device, dtype: torch.dtype, pack: str | None
) -> str:
    full, half = (_gigabytes(model_bytes(config, d)) for d in (torch.float32, torch.bfloat16))
    if pack == "int8-dynamic":
        return f"no smaller form: {pack} takes a quarter of the {full} that float32 takes"
    if packing_obstacle("int8-dynamic", device, dtype) is None:
        quarter = _gigabytes(model_bytes(config, dtype, "int8-dynamic"))
        return (
            f'a smaller form: quantization="int8-dynamic" takes {quarter} and dtype="bfloat16" '
            f"takes {half} where float32 takes {full}"
        )
    if dtype.itemsize > 2:
        return f'a smaller dtype: dtype="bfloat16" takes {half} where float32 takes {full}'
    return f"no smaller dtype: {_name(dtype)} takes {half} where float32 takes {full}"


def _options(
    config: TransformerConfig, dtype: torch.dtype, passing: int, *, home: _Demand, disk: _Demand
) -> Iterator[str]:
    if disk.is_too_much:
        yield "a larger disk: set HF_HOME or cache_dir to a folder on it"
    if home.is_too_much:
        yield f"another device, or more {home.place}, if need be by ending other programs"
    for name, parameters in PUBLISHED_PARAMETERS.items():
        size = parameters * dtype.itemsize
        fits = home.free is None or size + passing <= home.free
        if fits and size < model_bytes(config, dtype):
            yield f"a smaller model: {name} takes {_gigabytes(size)} at {_name(dtype)}"
            return


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
