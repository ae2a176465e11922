"""Linear layers over packed weights: PyTorch's fast CPU products behind one operator.

A weight is packed once, into the layout that the product reads; what comes out is opaque and never
changes. Two kinds: ``"float32"`` (oneDNN), and ``"int8-dynamic"`` (FBGEMM: int8 weights with one
scale a row, inputs quantised as they come, also with one scale a row). The result of a row of the
input is bit-identical alone and in any batch. Inference only, float32 in and out.
"""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
# Some of the operators have no public name.

import platform
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from itertools import count
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from moe_mt.errors import ConfigError
from moe_mt.ops.backend import register_op

__all__ = [
    "PACKED_KINDS",
    "Opaque",
    "PackedWeight",
    "pack_weight",
    "packed_linear",
    "packing_obstacle",
    "quantize_rows",
]

CHUNK_ELEMENTS = 1 << 20
"""Weights that are quantised at a time, so that no second float32 copy of them is made."""

LONGEST_LONE_ROW = 1024
"""Of longer rows, oneDNN sums a lone one in another order than several (AVX-512; measured)."""


_OpaqueT = TypeVar("_OpaqueT", bound="Opaque")


class Opaque:
    """What an operator cannot take as a tensor, and finds by its handle.

    Copies of a module share it, as it does not change. It lives as long as somebody holds it.
    """

    def __init__(self) -> None:
        """Take a handle."""
        self.handle = next(_HANDLES)
        _ALIVE[self.handle] = self

    @classmethod
    def of(cls: type[_OpaqueT], handle: int) -> _OpaqueT:
        """Return the one with that handle."""
        found = _ALIVE[handle]
        assert isinstance(found, cls), "an operator was given the handle of something else"
        return found

    def __deepcopy__(self: _OpaqueT, memo: object) -> _OpaqueT:
        """Return itself."""
        return self

    def __reduce__(self) -> Any:  # noqa: ANN401
        """Refuse to be written to a file."""
        raise ConfigError("packed weights cannot be pickled; save the model before it is packed")


_HANDLES = count(1)
_ALIVE: WeakValueDictionary[int, Opaque] = WeakValueDictionary()


class PackedWeight(Opaque):
    """A weight (out_features, in_features), packed."""

    kind: str

    def __init__(self, weight: Tensor) -> None:
        """Take the weight's shape; subclasses pack its values."""
        super().__init__()
        self.out_features, self.in_features = weight.shape

    def multiply(self, x: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        """Compute ``packed_linear``, unchecked and not as an operator."""
        raise NotImplementedError


class _PackedFloat32(PackedWeight):
    """The layout of oneDNN's products; float32 all through."""

    kind = "float32"
    operators = ("mkldnn._reorder_linear_weight", "mkldnn._linear_pointwise")

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self._linear = torch.ops.mkldnn._linear_pointwise.default

    def multiply(self, x: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        after = "relu" if relu else "none"
        rows = x.numel() // self.in_features
        computed = _rows_computed(rows)
        if rows == 1 and self.in_features > LONGEST_LONE_ROW:
            computed = 2
        if computed == rows:
            return self._linear(x, self._packed, bias, after, [], "")
        padded = x.new_zeros(computed, self.in_features)
        padded[:rows] = x.reshape(rows, self.in_features)
        out = self._linear(padded, self._packed, bias, after, [], "")
        return out[:rows].view(*x.shape[:-1], self.out_features)


def _rows_computed(rows: int) -> int:
    """Round up to one of eight numbers between a power of two and the next.

    oneDNN writes code for every number of rows that it meets, which takes milliseconds and a
    megabyte, and keeps a thousand of them.
    """
    step = 1 << max(0, (rows - 1).bit_length() - 4)
    return -(-rows // step) * step


class _PackedInt8(PackedWeight):
    """int8 rows in FBGEMM's layout, each with its scale.

    FBGEMM quantises inputs with one scale that the caller names. Rows are divided by their largest
    magnitude first, so one scale fits all of them and none depends on another.
    """

    kind = "int8-dynamic"
    operators = (
        "aten._make_per_channel_quantized_tensor",
        "quantized.linear_prepack",
        "quantized.linear_with_input_q_dq_qweight_dq_output_fp32",
    )

    def __init__(self, weight: Tensor, steps: int | None = None) -> None:
        super().__init__(weight)
        with _fbgemm():
            self._packed = torch.ops.quantized.linear_prepack(_quantized_tensor(weight), None)
        self._linear = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
        self._steps = _exact_steps() if steps is None else steps

    def multiply(self, x: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        # A row of zeros is divided by something, too.
        magnitude = x.abs().amax(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
        steps = self._steps
        out = self._linear(x / magnitude, 1 / steps, steps + 1, self._packed)
        # Apart: a fused multiplication and addition may round otherwise where a row ends.
        out.mul_(magnitude)
        if bias is not None:
            out.add_(bias)
        return out.relu_() if relu else out


_CLASSES = {packed.kind: packed for packed in (_PackedFloat32, _PackedInt8)}
PACKED_KINDS = tuple(_CLASSES)
"""How weights can be packed."""


def packing_obstacle(
    kind: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> str | None:
    """Return why weights cannot be packed, in words, or ``None`` if they can.

    The operators that compute the products are no stable part of PyTorch, and no part of every
    build of it.

    Args:
        kind: One of ``PACKED_KINDS``.
        device: Where the weights are.
        dtype: What they are.

    Raises:
        ConfigError: If there is no such kind.
    """
    packed = _class(kind)
    if device.type != "cpu":
        return f"packed weights are for the CPU, and the device is {str(device)!r}"
    if dtype != torch.float32:
        return f"packed weights are made from float32, and the dtype is {dtype}"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"packed weights are for x86-64 processors, and this is {platform.machine()!r}"
    if kind == _PackedInt8.kind and "fbgemm" not in torch.backends.quantized.supported_engines:
        return "this build of PyTorch has no FBGEMM"
    if kind == _PackedFloat32.kind and not torch.backends.mkldnn.is_available():
        return "this build of PyTorch has no oneDNN"
    lacking = [name for name in packed.operators if not _has_operator(name)]
    return f"this build of PyTorch lacks the operator {lacking[0]}" if lacking else None


def pack_weight(weight: Tensor, kind: str) -> PackedWeight:
    """Pack a weight; the original is not changed, not kept, and no longer needed.

    Args:
        weight: (out_features, in_features) float32 on the CPU.
        kind: One of ``PACKED_KINDS``.

    Raises:
        ConfigError: If there is no such kind, or it cannot be made here.
    """
    obstacle = packing_obstacle(kind, weight.device, weight.dtype)
    if obstacle is not None:
        raise ConfigError(f"packing as {kind!r} was asked for, but {obstacle}")
    if weight.dim() != 2:
        raise ConfigError(f"the weight is {tuple(weight.shape)}; it must be (out, in)")
    return _class(kind)(weight.detach())


def packed_linear(
    x: Tensor, packed: PackedWeight, bias: Tensor | None = None, *, relu: bool = False
) -> Tensor:
    """Compute ``x @ weight.T + bias`` for a packed weight, and its positive part with ``relu``.

    Args:
        x: (..., in_features) float32 on the CPU.
        packed: From ``pack_weight``.
        bias: (out_features,) float32 or ``None``.
        relu: Whether negative results become zero.

    Returns:
        (..., out_features) float32. With int8, elements differ from those of the float32 product;
        ``tests/ops/test_packed_linear.py`` derives a bound. A row that holds a value that is not
        finite gives a row without finite values, but for zeros of ``relu``.

    Raises:
        ConfigError: If ``x`` is of another dtype, width or device.
        NotImplementedError: In a backward pass.
    """
    if x.dtype != torch.float32 or x.device.type not in ("cpu", "meta"):
        raise ConfigError(
            f"x is {x.dtype} on {x.device} and the weight is packed for float32 on the CPU; move "
            "and cast a model before it is packed"
        )
    if x.shape[-1] != packed.in_features:
        raise ConfigError(f"x is {tuple(x.shape)}; it must be (..., {packed.in_features})")
    return _packed_linear(x, packed.handle, packed.out_features, bias, relu)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the int8 rows (out, in) nearest to a weight's, in [-127, 127], and their scales.

    Args:
        weight: (out, in) float32.

    Returns:
        Rows, and scales (out,) float32: the largest magnitude of each row over 127. Rows times
        scales are off by at most half a scale.
    """
    rows = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], device=weight.device)
    chunk = max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], chunk):
        part = slice(start, start + chunk)
        largest = weight[part].abs().amax(1).clamp_min_(torch.finfo(torch.float32).tiny)
        scale[part] = largest / 127
        rows[part] = (weight[part] / scale[part, None]).round_().clamp_(-127, 127)
    return rows, scale


def _class(kind: str) -> Any:  # noqa: ANN401
    if kind not in _CLASSES:
        raise ConfigError(f"kind {kind!r} is unknown; choose from {', '.join(_CLASSES)}")
    return _CLASSES[kind]


def _has_operator(name: str) -> bool:
    namespace, _, operator = name.partition(".")
    return hasattr(getattr(torch.ops, namespace), operator)


def _quantized_tensor(weight: Tensor) -> Tensor:
    """Return a weight as the kind of tensor that FBGEMM packs."""
    rows, scale = quantize_rows(weight)
    zero_points = torch.zeros(len(rows), dtype=torch.int64)
    with warnings.catch_warnings():
        # PyTorch says once a process that it means to remove such tensors.
        warnings.simplefilter("ignore")
        return torch._make_per_channel_quantized_tensor(rows, scale.double(), zero_points, 0)


@contextmanager
def _fbgemm() -> Generator[None]:
    """Have weights packed by FBGEMM, whatever engine the process has chosen."""
    engines = torch.backends.quantized
    before, engines.engine = engines.engine, "fbgemm"
    try:
        yield
    finally:
        engines.engine = before


@cache
def _exact_steps() -> int:
    """Return the steps on either side of zero that an input is quantised to on this processor.

    Without VNNI, FBGEMM adds pairs of products in 16 bits, which saturate: with 8-bit inputs, up
    to 2 * 255 * 127. With 7-bit inputs, 2 * 127 * 127, no sum does. What is lost to saturation was
    measured to be more than what the eighth bit gains.
    """
    probe = _PackedInt8(torch.ones(32, 64), steps=127)
    sums = probe.multiply(torch.ones(1, 64), None, False)
    return 127 if bool((sums - 64).abs().max() < 0.5) else 63


def _launch(x: Tensor, handle: int, out_features: int, bias: Tensor | None, relu: bool) -> Tensor:
    return PackedWeight.of(handle).multiply(x, bias, relu)


def _fake(x: Tensor, handle: int, out_features: int, bias: Tensor | None, relu: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _backward(ctx: Any, grad: Tensor) -> Any:  # noqa: ANN401
    raise NotImplementedError(
        "packed weights have no gradient; train a model whose weights are not packed"
    )


_packed_linear: Callable[..., Tensor] = register_op(
    "packed_linear(Tensor x, int handle, int out_features, Tensor? bias, bool relu) -> Tensor",
    _launch,
    _fake,
    backward=_backward,
    devices=("CPU",),
)
