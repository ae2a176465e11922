"""The gated mixture of expert FFNs, over packed weights, on a CPU and without gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_mt.errors import ConfigError
from moe_mt.ops.backend import register_op
from moe_mt.ops.combine import dtype_of
from moe_mt.ops.expert_ffn import ACTIVATIONS
from moe_mt.ops.expert_loop import mix_one_by_one
from moe_mt.ops.packed_linear import Opaque, PackedWeight

__all__ = ["PackedExpertWeights", "packed_expert_ffn"]


class PackedExpertWeights(Opaque):
    """The packed projections of a layer's experts."""

    def __init__(self, num_experts: int, d_model: int, ffn_dim: int, *, gated: bool) -> None:
        """Build experts without weights.

        Args:
            num_experts: ``E``.
            d_model: Width of a token.
            ffn_dim: Inner width.
            gated: Whether every expert has a ``gate_proj``.
        """
        super().__init__()
        self.num_experts = num_experts
        self.shapes: dict[str, tuple[int, ...]] = {
            "up_proj": (ffn_dim, d_model),
            "down_proj": (d_model, ffn_dim),
        }
        if gated:
            self.shapes["gate_proj"] = (ffn_dim, d_model)
        self._packed: dict[str, list[PackedWeight | None]] = {
            name: [None] * num_experts for name in self.shapes
        }

    def put(self, name: str, expert: int, packed: PackedWeight) -> None:
        """Give an expert its packed projection ``name``, a key of ``shapes``."""
        self._packed[name][expert] = packed

    def get(self, name: str, expert: int) -> PackedWeight:
        """Return what ``put`` took.

        Raises:
            ConfigError: If that never came.
        """
        packed = self._packed[name][expert]
        if packed is None:
            raise ConfigError(f"expert {expert} has no {name} yet; give it one before it is called")
        return packed


def packed_expert_ffn(
    x: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    weights: PackedExpertWeights,
    *,
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "relu",
    residual: Tensor | None = None,
) -> Tensor:
    """Compute ``expert_ffn`` with products of ``packed_linear``.

    The result of a token is bit-identical alone and in any batch, as theirs are. Experts that no
    token chose are not read.

    Args:
        x: (T, d_model) float32 on the CPU.
        expert_ids: (T, K) int32 in [0, E]; ``E`` means dropped.
        gates: (T, K) float32; a claim whose gate is zero adds nothing.
        weights: The projections of ``E`` experts.
        up_bias: (E, ffn_dim) float32 or ``None``.
        gate_bias: (E, ffn_dim) float32 or ``None``; only for gated experts.
        down_bias: (E, d_model) float32 or ``None``.
        activation: A name of ``ACTIVATIONS``.
        residual: (T, d_model) or ``None``, added last.

    Returns:
        (T, d_model) in the dtype of ``x``, or what it and the residual's promote to.

    Raises:
        ConfigError: If the activation is unknown, shapes, dtypes or devices do not fit together,
            or a projection that is needed was never packed.
        NotImplementedError: In a backward pass.
    """
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation {activation!r} is unknown; choose from {list(ACTIVATIONS)}")
    if x.dtype != torch.float32 or x.device.type not in ("cpu", "meta"):
        raise ConfigError(
            f"x is {x.dtype} on {x.device} and weights are packed for float32 on the CPU; move and "
            "cast a model before it is packed"
        )
    d_model = weights.shapes["down_proj"][0]
    if x.dim() != 2 or x.shape[1] != d_model:
        raise ConfigError(f"x is {tuple(x.shape)}; it must be (T, {d_model})")
    if expert_ids.shape != gates.shape or expert_ids.shape[0] != x.shape[0]:
        raise ConfigError(
            f"expert_ids are {tuple(expert_ids.shape)} and gates {tuple(gates.shape)}; "
            f"both must be ({x.shape[0]}, K)"
        )
    if residual is not None and residual.shape != x.shape:
        raise ConfigError(f"the residual is {tuple(residual.shape)}; x is {tuple(x.shape)}")
    biases = (up_bias, gate_bias, down_bias)
    return _packed_expert_ffn(x, expert_ids, gates, weights.handle, *biases, activation, residual)


def _launch(
    x: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    handle: int,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    weights = PackedExpertWeights.of(handle)
    act = ACTIVATIONS[activation]

    def product(
        name: str,
        index: int,
        rows: Tensor,
        biases: Tensor | None,
        act: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        bias = None if biases is None else biases[index]
        relu = act is ACTIVATIONS["relu"]
        out = weights.get(name, index).multiply(rows, bias, relu)
        if relu or act is None:
            return out
        # Row by row: the last elements of a tensor may be rounded otherwise than the others.
        return torch.stack([act(row) for row in out.unbind(0)])

    def expert(index: int, rows: Tensor) -> Tensor:
        if "gate_proj" in weights.shapes:
            hidden = product("gate_proj", index, rows, gate_bias, act)
            hidden = hidden * product("up_proj", index, rows, up_bias)
        else:
            hidden = product("up_proj", index, rows, up_bias, act)
        return product("down_proj", index, hidden, down_bias)

    return mix_one_by_one(x, expert_ids, gates, residual, weights.num_experts, expert)


def _fake(x: Tensor, *others: Any) -> Tensor:  # noqa: ANN401
    return x.new_empty(x.shape, dtype=dtype_of(x, others[-1]))


def _backward(ctx: Any, grad: Tensor) -> Any:  # noqa: ANN401
    raise NotImplementedError(
        "packed experts have no gradient; train with weights that are not packed"
    )


# The handle is a symbol to a compiler: layers of one form share one graph.
_packed_expert_ffn = register_op(
    "packed_expert_ffn(Tensor x, Tensor expert_ids, Tensor gates, SymInt handle, Tensor? up_bias, "
    "Tensor? gate_bias, Tensor? down_bias, str activation, Tensor? residual) -> Tensor",
    _launch,
    _fake,
    backward=_backward,
    devices=("CPU",),
)
