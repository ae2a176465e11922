"""The one place where an operation's implementation is chosen, and where kernels become ops.

Kernels run for tensors on a GPU, and on a CPU where Triton interprets them (``TRITON_INTERPRET=1``
before the process starts); the eager definition runs everywhere else. ``MOE_MT_BACKEND`` sets
``eager``, ``triton`` or ``auto`` for a process, ``use_backend`` for a block. A kernel that fails,
fails: nothing falls back.
"""

# pyright: reportUnknownMemberType=false
# torch.library is not fully typed.

import importlib.util
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moe_mt.errors import BackendUnavailableError, ConfigError

__all__ = [
    "KERNEL_DTYPES",
    "autocast",
    "backend_for",
    "register_op",
    "use_backend",
    "use_triton",
]

BACKENDS = ("auto", "eager", "triton")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_LIBRARY = torch.library.Library("moe_mt", "DEF")


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ConfigError(f"{source} {name!r} is unknown; choose from {BACKENDS}")
    return name


# Not checked yet: importing the package should not fail for the environment's sake.
_requested = os.environ.get("MOE_MT_BACKEND", "auto")


@contextmanager
def use_backend(name: str) -> Generator[None]:
    """Choose the implementation of every operation inside the block.

    Args:
        name: ``"eager"``, ``"triton"`` or ``"auto"`` (kernels wherever they can run).

    Raises:
        ConfigError: If the name is unknown.
    """
    global _requested
    before, _requested = _requested, _checked(name, "backend")
    try:
        yield
    finally:
        _requested = before


def use_triton(x: Tensor) -> bool:
    """Return whether the kernel, not the definition, runs for inputs like ``x``.

    Raises:
        BackendUnavailableError: If kernels were asked for and cannot run on ``x``.
        ConfigError: If ``MOE_MT_BACKEND`` names no backend.
    """
    _checked(_requested, "MOE_MT_BACKEND")
    # Meta tensors have shapes only, and the shapes of both implementations are the same.
    reachable = _HAS_TRITON and (x.is_cuda or x.is_meta or _INTERPRETED)
    runnable = reachable and x.dtype in KERNEL_DTYPES
    if _requested == "triton" and not runnable:
        raise BackendUnavailableError(
            f"backend 'triton' was asked for, but {_obstacle(x)}; use backend 'auto' or 'eager'"
        )
    return runnable and _requested != "eager"


def autocast(*tensors: Any) -> Any:  # noqa: ANN401
    """Return tensors (or ``None``) in autocast's dtype where autocast is on.

    PyTorch's own products do this by themselves; an operator of ours must be told.
    """
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def backend_for(device: torch.device) -> str:
    """Return in words what computes float32, float16 and bfloat16 tensors on a device."""
    try:
        triton = use_triton(torch.empty(0, device=device))
    except BackendUnavailableError as error:
        return f"none: {error}"
    if not triton:
        return "eager PyTorch"
    return "Triton kernels" if device.type == "cuda" else "Triton kernels, interpreted"


def _obstacle(x: Tensor) -> str:
    """Return why kernels cannot run on ``x``."""
    if not _HAS_TRITON:
        return "the package triton is not installed"
    if x.dtype not in KERNEL_DTYPES:
        return f"kernels compute float32, float16 and bfloat16, not {x.dtype}"
    return f"the tensors are on {x.device} and Triton's interpreter (TRITON_INTERPRET=1) is off"


def register_op(
    schema: str,
    launch: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    devices: tuple[str, ...] = ("CPU", "CUDA"),
) -> Callable[..., Any]:
    """Make a launcher an operator that ``torch.compile``, export and autograd take whole.

    Args:
        schema: Name and signature, as ``torch.library.Library.define`` takes them.
        launch: Computes the outputs on real tensors.
        fake: Returns empty outputs; depends on input sizes only, never on values.
        backward: ``(ctx, *output_grads) -> one gradient for each input``; an operator without one
            raises when it is asked for a gradient, as the backward operators are by a second one.
        setup_context: ``(ctx, inputs, output) -> None``, saves what ``backward`` needs.
        devices: Where ``launch`` computes, as PyTorch's dispatcher names them.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    for device in devices:
        _LIBRARY.impl(name, launch, device)
    qualified = f"moe_mt::{name}"
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    torch.library.register_autograd(
        qualified, backward or _refuse(name), setup_context=setup_context, lib=_LIBRARY
    )
    return getattr(torch.ops.moe_mt, name).default


def _refuse(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:  # noqa: ANN401
        raise NotImplementedError(
            f"moe_mt::{name} has no gradient (kernels are differentiable once); "
            "use backend 'eager' for a second one"
        )

    return backward
