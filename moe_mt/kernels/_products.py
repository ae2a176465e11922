"""Every grouped product of an expert layer by itself, on inputs that are made up.

What the products compute does not matter here, only that it can be compared; so a few tensors stand
for all rows that have the same shape.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from moe_mt.kernels._configurations import Problem, problem_of
from moe_mt.kernels.expert_ffn.grouped import hidden_grad, hidden_rows
from moe_mt.kernels.expert_order import expert_order
from moe_mt.kernels.grouped_mm import (
    grouped_mm,
    grouped_mm_grad_input,
    grouped_mm_grad_weight,
)

__all__ = ["Inputs", "Layer", "Product", "products"]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer of experts; its weights are made when they are first asked for."""

    d_model: int
    ffn_dim: int
    num_experts: int
    top_k: int
    gated: bool
    dtype: torch.dtype
    device: torch.device

    @cached_property
    def up_proj(self) -> Tensor:
        """A weight (E, ffn_dim, d_model)."""
        return self.random(self.num_experts, self.ffn_dim, self.d_model).mul_(self.d_model**-0.5)

    @cached_property
    def gate_proj(self) -> Tensor | None:
        """Another such weight, if the layer is gated."""
        return self.up_proj.roll(1, 0) if self.gated else None

    @cached_property
    def down_proj(self) -> Tensor:
        """A weight (E, d_model, ffn_dim)."""
        return self.random(self.num_experts, self.d_model, self.ffn_dim).mul_(self.ffn_dim**-0.5)

    @cached_property
    def up_bias(self) -> Tensor | None:
        """A bias (E, ffn_dim), as layers without a gate have."""
        return None if self.gated else self.random(self.num_experts, self.ffn_dim)

    @cached_property
    def down_bias(self) -> Tensor | None:
        """A bias (E, d_model), likewise."""
        return None if self.gated else self.random(self.num_experts, self.d_model)

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return normally distributed numbers: zeros would be multiplied faster."""
        tensor = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        return tensor if tensor.is_meta else tensor.normal_()


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the products of a layer read for one number of tokens; made when first asked for."""

    layer: Layer
    tokens: int

    @cached_property
    def routing(self) -> tuple[Tensor, Tensor]:
        """Claims in expert order (N,) and offsets; experts are random, none twice for a token."""
        scores = self.layer.random(self.tokens, self.layer.num_experts, dtype=torch.float32)
        expert_ids = scores.topk(self.layer.top_k).indices.to(torch.int32)
        order, _, offsets = expert_order(expert_ids, self.layer.num_experts)
        return order, offsets

    @cached_property
    def gates(self) -> Tensor:
        """Gates (T, K)."""
        return self.layer.random(self.tokens, self.layer.top_k, dtype=torch.float32)

    @cached_property
    def x(self) -> Tensor:
        """Rows of tokens (T, d_model): inputs, or gradients of outputs."""
        return self.layer.random(self.tokens, self.layer.d_model)

    @cached_property
    def model_rows(self) -> Tensor:
        """Rows of claims (N, d_model)."""
        return self.layer.random(self.tokens * self.layer.top_k, self.layer.d_model)

    @cached_property
    def ffn_rows(self) -> tuple[Tensor, Tensor]:
        """Two times hidden rows of claims (N, ffn_dim)."""
        shape = self.tokens * self.layer.top_k, self.layer.ffn_dim
        return self.layer.random(*shape), self.layer.random(*shape)


class Product(NamedTuple):
    """A grouped product of a layer."""

    kind: str
    outer: str
    """Which width of the layer ``Problem.outer`` is."""

    inner: str
    backward: bool
    """Whether only training needs it."""

    launch: Callable[[Inputs], tuple[Tensor | None, ...]]

    def problem(self, inputs: Inputs) -> Problem:
        """Return what the launcher asks a tile for."""
        layer = inputs.layer
        claims = torch.empty(inputs.tokens * layer.top_k, 0, dtype=layer.dtype, device=layer.device)
        outer, inner = getattr(layer, self.outer), getattr(layer, self.inner)
        return problem_of(self.kind, claims, layer.num_experts, outer, inner)


def products(*, gated: bool) -> list[Product]:
    """Return the products of a layer, in the order in which it computes them."""
    up, down = ("ffn_dim", "d_model"), ("d_model", "ffn_dim")
    forward = [
        Product("gated" if gated else "forward", *up, False, _up),
        Product("forward", *down, False, _down),
    ]
    saved = [Product("gated_saved", *up, True, _up_saved)] if gated else []
    return [
        *forward,
        *saved,
        Product("hidden_grad_saved" if gated else "hidden_grad", *up, True, _hidden_grad),
        Product("grad_weight", *down, True, _grad_down),
        Product("grad_weight", *up, True, _grad_up),
        Product("grad_input_gated" if gated else "grad_input", *down, True, _grad_input),
    ]


Results = tuple[Tensor | None, ...]


def _up(inputs: Inputs, *, save: bool = False) -> Results:
    layer = inputs.layer
    order, offsets = inputs.routing
    return hidden_rows(
        inputs.x,
        order,
        offsets,
        layer.up_proj,
        layer.gate_proj,
        layer.up_bias,
        None,
        activation="silu" if layer.gated else "relu",
        save=save,
    )


def _up_saved(inputs: Inputs) -> Results:
    return _up(inputs, save=True)


def _down(inputs: Inputs) -> Results:
    layer, (_, offsets) = inputs.layer, inputs.routing
    return (grouped_mm(inputs.ffn_rows[0], layer.down_proj, offsets, layer.down_bias),)


def _hidden_grad(inputs: Inputs) -> Results:
    layer, (order, offsets) = inputs.layer, inputs.routing
    saved_up, saved_gate = inputs.ffn_rows if layer.gated else (None, None)
    # Without a gate hidden rows are read, with one they are written.
    hidden = torch.empty_like(inputs.ffn_rows[0]) if layer.gated else inputs.ffn_rows[0]
    grad_up, grad_gate, partials = hidden_grad(
        inputs.x,
        order,
        offsets,
        inputs.gates,
        layer.down_proj,
        hidden,
        saved_up,
        saved_gate,
        activation="silu" if layer.gated else "relu",
    )
    return grad_up, grad_gate, hidden if layer.gated else None, partials


def _grad_down(inputs: Inputs) -> Results:
    return grouped_mm_grad_weight(
        inputs.model_rows,
        inputs.ffn_rows[0],
        inputs.routing[1],
        weight_dtype=inputs.layer.dtype,
        bias=not inputs.layer.gated,
    )


def _grad_up(inputs: Inputs) -> Results:
    order, offsets = inputs.routing
    return grouped_mm_grad_weight(
        inputs.ffn_rows[0],
        inputs.x,
        offsets,
        order=order,
        top_k=inputs.layer.top_k,
        weight_dtype=inputs.layer.dtype,
        bias=not inputs.layer.gated,
    )


def _grad_input(inputs: Inputs) -> Results:
    layer, (first, second) = inputs.layer, inputs.ffn_rows
    pair = None if layer.gate_proj is None else (second, layer.gate_proj)
    return (grouped_mm_grad_input(first, layer.up_proj, inputs.routing[1], second=pair),)
