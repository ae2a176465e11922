"""The one place where kernels are launched, or only noted for ahead-of-time compilation."""

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

__all__ = [
    "Accelerator",
    "Launch",
    "accelerator_of",
    "inner_contiguous",
    "launch",
    "record_launches",
]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """What a launcher must know of the device it launches on."""

    arch: str
    """``"sm_90"``, ``"gfx942"`` and so on; ``"interpreter"`` on a CPU."""

    multiprocessors: int
    """How many programs run beside each other, one each."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A launch that was noted instead of run."""

    kernel: triton.JITFunction[Any]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


_recorded: list[Launch] | None = None
_recorded_for: Accelerator | None = None


def launch(
    kernel: Any,  # noqa: ANN401
    grid: Sequence[int],
    *,
    num_warps: int = 4,
    num_stages: int = 2,
    **arguments: Any,  # noqa: ANN401
) -> None:
    """Run ``grid`` programs of a kernel on the device of its tensors."""
    if _recorded is not None:
        _recorded.append(
            Launch(kernel=kernel, arguments=arguments, num_warps=num_warps, num_stages=num_stages)
        )
        return
    if 0 in grid:
        return
    with _on_device_of(arguments):
        # Said because Triton is about to change its default: a product and a sum may round once.
        kernel[tuple(grid)](
            **arguments, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True
        )


def _on_device_of(arguments: dict[str, Any]) -> Any:  # noqa: ANN401
    """Triton launches on the current device, which need not be that of the tensors."""
    device = next(value for value in arguments.values() if isinstance(value, Tensor)).device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def inner_contiguous(tensor: Tensor) -> Tensor:
    """Return the tensor itself where its last stride is 1, which kernels rely on, or a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def accelerator_of(tensor: Tensor) -> Accelerator:
    """Return the device that a launch on ``tensor`` runs on, or is recorded for."""
    if _recorded_for is not None:
        return _recorded_for
    return _accelerator(tensor.device)


@cache
def _accelerator(device: torch.device) -> Accelerator:
    if device.type != "cuda":
        # Few, so that the persistent loops of the kernels do loop at the sizes of tests.
        return Accelerator(arch="interpreter", multiprocessors=3)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    return Accelerator(arch=arch, multiprocessors=properties.multi_processor_count)


@contextmanager
def record_launches(accelerator: Accelerator) -> Generator[list[Launch]]:
    """Note every launch instead of running it, as if the tensors were on ``accelerator``.

    With tensors on the meta device, launchers then run without memory and without a GPU, and show
    which kernels they would run with which arguments.
    """
    global _recorded, _recorded_for
    if _recorded is not None:
        raise RuntimeError("launches are being recorded already; end that recording first")
    _recorded, _recorded_for = [], accelerator
    try:
        yield _recorded
    finally:
        _recorded = _recorded_for = None
