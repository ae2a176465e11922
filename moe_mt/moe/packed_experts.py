"""The weights of a layer's experts, packed for a CPU's products: inference only.

Built empty and filled expert by expert, as tensors arrive, so that no weight is held twice::

    experts = PackedExperts(128, 1024, 4096, kind="int8-dynamic")
    for index, (fc1, fc2) in enumerate(checkpoint):
        experts.set(index, up_proj=fc1.weight, up_bias=fc1.bias)
        experts.set(index, down_proj=fc2.weight, down_bias=fc2.bias)

``PackedExperts.empty_like(experts, kind)`` takes the form from ``Experts``, also from some on the
meta device; ``PackedExperts.pack(experts, kind)`` takes weights that are in memory.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_mt.errors import ConfigError, PlacementError
from moe_mt.moe.experts import Experts
from moe_mt.ops import PackedExpertWeights, pack_weight, packed_expert_ffn

__all__ = ["PackedExperts"]


class PackedExperts(nn.Module):
    """What ``Experts`` computes in evaluation, on the CPU, in float32 or with int8 products.

    A token's result is bit-identical alone and in any batch. Biases are stacked parameters, named
    and shaped as those of ``Experts``; projections are packed and no parameters, so that a
    ``state_dict`` cannot be had.
    """

    up_bias: nn.Parameter | None
    gate_bias: nn.Parameter | None
    down_bias: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        d_model: int,
        ffn_dim: int,
        *,
        kind: str,
        activation: str = "relu",
        gated: bool = False,
        bias: bool = True,
    ) -> None:
        """Build experts without projections, in evaluation mode; ``set`` gives them.

        Args:
            num_experts: ``E``.
            d_model: Width of a token.
            ffn_dim: Inner width.
            kind: How weights are packed: ``"float32"`` or ``"int8-dynamic"``.
            activation: A name of ``ops.ACTIVATIONS``.
            gated: Whether a second product gates the first: SwiGLU with ``"silu"``.
            bias: Whether the products have biases.
        """
        super().__init__()
        self.num_experts = num_experts
        self.kind = kind
        self.activation = activation
        self.weights = PackedExpertWeights(num_experts, d_model, ffn_dim, gated=gated)
        sizes = {
            "up_bias": ffn_dim if bias else None,
            "gate_bias": ffn_dim if bias and gated else None,
            "down_bias": d_model if bias else None,
        }
        for name, size in sizes.items():
            self.register_parameter(
                name, None if size is None else _frozen(torch.empty(num_experts, size))
            )
        self.eval()

    @classmethod
    def empty_like(cls, experts: Experts, kind: str) -> "PackedExperts":
        """Build experts without projections, of the form that ``experts`` have.

        Biases are uninitialised, on the device of those of ``experts``: also on the meta device.

        Args:
            experts: On any device; not changed.
            kind: ``"float32"`` or ``"int8-dynamic"``.
        """
        num_experts, ffn_dim, d_model = experts.up_proj.shape
        with experts.up_proj.device:
            return cls(
                num_experts,
                d_model,
                ffn_dim,
                kind=kind,
                activation=experts.activation,
                gated=experts.gate_proj is not None,
                bias=experts.up_bias is not None,
            )

    @classmethod
    def pack(cls, experts: Experts, kind: str) -> "PackedExperts":
        """Pack experts and free them: one stacked projection at most is in memory twice.

        Args:
            experts: On the CPU. Its projections are on the meta device afterwards; its biases
                become those of the result.
            kind: ``"float32"`` or ``"int8-dynamic"``.
        """
        packed = cls.empty_like(experts, kind)
        for name in packed.weights.shapes:
            packed._take(experts, name)
        for name, bias in packed.named_parameters():
            bias.data = getattr(experts, name).detach().float()
        return packed

    def _take(self, experts: Experts, name: str) -> None:
        stacked = getattr(experts, name)
        for index, weight in enumerate(stacked.detach().unbind(0)):
            self.set(index, **{name: weight})
        setattr(experts, name, _frozen(torch.empty_like(stacked, device="meta")))

    @torch.no_grad()
    def set(self, expert: int, **tensors: Tensor) -> None:
        """Pack projections of one expert, and copy its biases.

        Args:
            expert: In [0, E).
            tensors: Any of ``up_proj`` (ffn_dim, d_model), ``down_proj`` (d_model, ffn_dim),
                ``gate_proj`` (ffn_dim, d_model), ``up_bias`` (ffn_dim,), ``gate_bias`` (ffn_dim,)
                and ``down_bias`` (d_model,), float, on the CPU. None is kept. Biases on the meta
                device are allocated.

        Raises:
            ConfigError: If these experts have no such tensor, or it is of another shape.
        """
        for name, tensor in tensors.items():
            self._check(name, tensor)
            if name in self.weights.shapes:
                packed = pack_weight(tensor.to(torch.float32), self.kind)
                self.weights.put(name, expert, packed)
                continue
            stacked = self._parameters[name]
            assert stacked is not None
            if stacked.is_meta:
                stacked = _frozen(torch.empty(stacked.shape, device="cpu"))
                setattr(self, name, stacked)
            stacked[expert] = tensor

    def _check(self, name: str, tensor: Tensor) -> None:
        biases = {name: (bias.shape[1],) for name, bias in self.named_parameters()}
        shapes = self.weights.shapes | biases
        if name not in shapes:
            raise ConfigError(f"these experts have no {name}; they have {', '.join(shapes)}")
        if tensor.shape != shapes[name]:
            raise ConfigError(
                f"{name} of one expert is {tuple(tensor.shape)}; it must be {shapes[name]}"
            )

    def forward(
        self, x: Tensor, expert_ids: Tensor, gates: Tensor, residual: Tensor | None = None
    ) -> Tensor:
        """Return (T, d_model): ``residual`` plus the gated outputs of each token's experts.

        Args:
            x: (T, d_model) float32.
            expert_ids: (T, K) int32; ``E`` means dropped.
            gates: (T, K) float32; zero where dropped.
            residual: (T, d_model) or ``None``.

        Raises:
            ConfigError: In training mode.
        """
        if self.training:
            raise ConfigError(
                "packed experts compute inference only; call eval(), or train a model whose "
                "weights are not packed"
            )
        return packed_expert_ffn(
            x,
            expert_ids,
            gates,
            self.weights,
            up_bias=self.up_bias,
            gate_bias=self.gate_bias,
            down_bias=self.down_bias,
            activation=self.activation,
            residual=residual,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedExperts":
        """Refuse a device or a dtype that packed weights cannot go to."""
        moved = fn(torch.empty(0, device="cpu"))
        if moved.device.type != "cpu" or moved.dtype != torch.float32:
            raise PlacementError(
                f"packed experts were asked to become {moved.dtype} on {moved.device}; they stay "
                "float32 on the CPU: move and cast a model before it is packed"
            )
        return super()._apply(fn, recurse)  # pyright: ignore[reportUnknownMemberType]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:  # noqa: ANN401
        raise ConfigError("packed experts have no state_dict; save the model before it is packed")

    def extra_repr(self) -> str:
        """Return what ``print`` shows of these experts."""
        ffn_dim, d_model = self.weights.shapes["up_proj"]
        return f"{self.num_experts}, {d_model}, {ffn_dim}, kind={self.kind!r}"


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
