"""The gated mixture of expert FFNs: each token through the experts that it chose."""

# pyright: reportArgumentType=false, reportUnknownArgumentType=false
# An operator's arguments come as one flat list, whose types nothing here can tell apart.

from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from moe_mt.errors import ConfigError
from moe_mt.ops.backend import autocast, register_op, use_triton
from moe_mt.ops.combine import combine, combine_eager, dtype_of
from moe_mt.ops.expert_loop import mix_one_by_one
from moe_mt.ops.expert_order import expert_order, expert_order_eager
from moe_mt.ops.grouped_mm import grouped_mm
from moe_mt.ops.permute import permute

__all__ = ["ACTIVATIONS", "expert_ffn", "expert_ffn_eager"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "gelu_new": partial(functional.gelu, approximate="tanh"),
}

FUSED_ACTIVATIONS = ("relu", "gelu", "silu")
"""Those that kernels apply to a product before it is written."""

FEW_ROWS, FEW_ROWS_OF_A_WIDE_WEIGHT = 6, 3
"""So many rows are multiplied faster as ``(W x^T)^T``, by a weight with more rows than columns and
by one with fewer: measured on two cores with AVX-512."""


def expert_ffn(  # noqa: PLR0913
    x: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    *,
    gate_proj: Tensor | None = None,
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "relu",
    activation_dropout: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """Compute ``residual[t] + sum_k gates[t, k] * ffn(x[t])`` with the FFN of each chosen expert.

    The FFN is ``act(x W_up^T + b_up) W_down^T + b_down``, or, with ``gate_proj``,
    ``(act(x W_gate^T + b_gate) * (x W_up^T + b_up)) W_down^T + b_down``: SwiGLU where the
    activation is ``"silu"`` (Shazeer, arXiv:2002.05202). Products are summed in float32, the
    mixture over ``k`` in order in float32. Experts that no token chose are not read.

    Args:
        x: (T, d_model). One row per token.
        expert_ids: (T, K) int32 in [0, E]; ``E`` means dropped.
        gates: (T, K) float32; zero where a claim was dropped. A claim whose gate is zero adds
            nothing, and its gate's gradient is zero.
        up_proj: (E, ffn_dim, d_model), any strides with the last one 1: halves of a fused
            (E, 2 * ffn_dim, d_model) weight need no copy.
        down_proj: (E, d_model, ffn_dim).
        gate_proj: As ``up_proj``, or ``None`` for an FFN without a gate.
        up_bias: (E, ffn_dim) or ``None``.
        gate_bias: (E, ffn_dim) or ``None``; only with ``gate_proj``.
        down_bias: (E, d_model) or ``None``.
        activation: ``"relu"``, ``"gelu"``, ``"silu"``, or ``"gelu_new"``, its tanh form.
        activation_dropout: Dropout probability of hidden rows; 0 outside training.
        residual: (T, d_model), added last, of the dtype of ``x`` or a wider one; or ``None``.

    Returns:
        (T, d_model) in the dtype of ``x``, or what it and the residual's promote to; a token that
        reached no expert is its residual, or 0.

    Raises:
        ConfigError: If the activation is unknown, or shapes or dtypes do not fit together.
    """
    weights = {"up_proj": up_proj, "down_proj": down_proj, "gate_proj": gate_proj}
    biases = {"up_bias": up_bias, "gate_bias": gate_bias, "down_bias": down_bias}
    _check(x, expert_ids, gates, activation, weights, biases)
    if residual is not None and residual.shape != x.shape:
        raise ConfigError(f"the residual is {tuple(residual.shape)}; x is {tuple(x.shape)}")
    tensors = [*weights.values(), *biases.values()]
    needs_grad = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, gates, residual, *tensors)
    )
    if not use_triton(x):
        if needs_grad or activation_dropout > 0 or x.device.type not in ("cpu", "meta"):
            return expert_ffn_eager(
                x,
                expert_ids,
                gates,
                **cast(dict[str, Any], weights | biases),
                activation=activation,
                activation_dropout=activation_dropout,
                residual=residual,
            )
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):
            _check_dtypes(x, weights | biases)
        return _expert_ffn_one_by_one(x, expert_ids, gates, *tensors, activation, residual)
    x, *tensors = autocast(x, *tensors)
    _check_dtypes(x, dict(zip(weights | biases, tensors, strict=True)))
    if activation_dropout > 0 or activation not in FUSED_ACTIVATIONS:
        return _step_by_step(
            x, expert_ids, gates, tensors, activation, activation_dropout, residual
        )
    if needs_grad:
        return _expert_ffn_train(x, expert_ids, gates, *tensors, activation, residual)[0]
    return _expert_ffn(x, expert_ids, gates, *tensors, activation, residual)


def expert_ffn_eager(  # noqa: PLR0913
    x: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    *,
    gate_proj: Tensor | None = None,
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "relu",
    activation_dropout: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """Define ``expert_ffn``: expert by expert, on the rows that chose it.

    Rows are gathered expert by expert, so that neither a copy of all rows (but where their gradient
    is asked for) nor one of any weight is made.
    """
    order, rows, offsets = expert_order_eager(expert_ids, up_proj.shape[0])
    bounds = list(pairwise(cast(list[int], offsets.tolist())))  # pyright: ignore
    tokens = order // max(expert_ids.shape[1], 1)
    weights = zip(
        *map(_by_expert(up_proj.shape[0]), (up_proj, down_proj, gate_proj)),
        *map(_by_expert(up_proj.shape[0]), (up_bias, gate_bias, down_bias)),
        strict=True,
    )
    # A function of its own, whose single pieces are gone when outputs are combined.
    expert_rows = _expert_rows(x, tokens, bounds, weights, activation, activation_dropout)
    return combine_eager(expert_rows, rows, gates, residual)


def _expert_rows(
    x: Tensor,
    tokens: Tensor,
    bounds: list[tuple[int, int]],
    weights: Iterable[tuple[Any, ...]],
    activation: str,
    activation_dropout: float,
) -> Tensor:
    """Return the experts' outputs (N, d_model) in expert order; zero where dropped."""
    pieces = [
        _ffn(inputs, tensors, activation, activation_dropout)
        for inputs, tensors in zip(_rows_by_expert(x, tokens, bounds), weights, strict=True)
        if inputs.shape[0] > 0
    ]
    pieces.append(x.new_zeros(tokens.numel() - bounds[-1][1], x.shape[1]))
    return torch.cat(pieces)


def _ffn(
    x: Tensor, tensors: Iterable[Any], activation: str, activation_dropout: float = 0.0
) -> Tensor:
    """Return (M, d_model): the FFN of one expert, whose six tensors come in the usual order."""
    up_proj, down_proj, gate_proj, up_bias, gate_bias, down_bias = tensors
    act = ACTIVATIONS[activation]
    hidden = functional.linear(x, up_proj, up_bias)
    if gate_proj is None:
        hidden = act(hidden)
    else:
        hidden = act(functional.linear(x, gate_proj, gate_bias)) * hidden
    if activation_dropout > 0:
        hidden = functional.dropout(hidden, activation_dropout)
    return functional.linear(hidden, down_proj, down_bias)


def _ffn_without_gradients(x: Tensor, tensors: Iterable[Any], activation: str) -> Tensor:
    """Compute ``_ffn``, fast for few rows, and with two hidden tensors at most in memory."""
    up_proj, down_proj, gate_proj, up_bias, gate_bias, down_bias = tensors
    act = ACTIVATIONS[activation]
    if gate_proj is None:
        hidden = act(_linear(x, up_proj, up_bias))
    else:
        hidden = act(_linear(x, gate_proj, gate_bias)).mul_(_linear(x, up_proj, up_bias))
    return _linear(hidden, down_proj, down_bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x W^T + b`` (M, out), its factors in the order that a CPU is faster at.

    As the second factor of few rows, a weight is hardly shared among threads, and is read more
    slowly than memory gives it.
    """
    is_tall = weight.shape[0] >= weight.shape[1]
    few = FEW_ROWS if is_tall else FEW_ROWS_OF_A_WIDE_WEIGHT
    is_float32 = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if not is_float32 or not 1 < x.shape[0] <= few:
        return functional.linear(x, weight, bias)
    # Contiguous: its columns are read one by one.
    out = (weight @ x.contiguous().t()).t()
    return out if bias is None else out.add_(bias)


def _by_expert(num_experts: int) -> Callable[[Tensor | None], Any]:
    # unbind, not indexing: its gradient is one stack, not a full-size sum for every expert.
    return lambda weight: [None] * num_experts if weight is None else weight.unbind(0)


def _rows_by_expert(x: Tensor, tokens: Tensor, bounds: list[tuple[int, int]]) -> Iterable[Tensor]:
    """Return the rows of ``x`` that each expert reads."""
    if torch.is_grad_enabled() and x.requires_grad:
        # All at once: the gradient of each gather is as large as x, whatever it gathers.
        return torch.split(x[tokens[: bounds[-1][1]]], [stop - start for start, stop in bounds])
    return (x[tokens[start:stop]] if start < stop else x[:0] for start, stop in bounds)


def _check(
    x: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    activation: str,
    weights: dict[str, Tensor | None],
    biases: dict[str, Tensor | None],
) -> None:
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation {activation!r} is unknown; choose from {list(ACTIVATIONS)}")
    up_proj = cast(Tensor, weights["up_proj"])
    num_experts, ffn_dim, d_model = up_proj.shape
    expected = {
        "up_proj": (num_experts, ffn_dim, d_model),
        "down_proj": (num_experts, d_model, ffn_dim),
        "gate_proj": (num_experts, ffn_dim, d_model),
        "up_bias": (num_experts, ffn_dim),
        "gate_bias": (num_experts, ffn_dim),
        "down_bias": (num_experts, d_model),
    }
    for name, tensor in (weights | biases).items():
        if tensor is not None and tensor.shape != expected[name]:
            raise ConfigError(
                f"{name} is {tuple(tensor.shape)}; beside up_proj {tuple(up_proj.shape)} it must "
                f"be {expected[name]}"
            )
    if x.dim() != 2 or x.shape[1] != d_model:
        raise ConfigError(f"x is {tuple(x.shape)}; it must be (T, {d_model})")
    if expert_ids.shape != gates.shape or expert_ids.shape[0] != x.shape[0]:
        raise ConfigError(
            f"expert_ids are {tuple(expert_ids.shape)} and gates {tuple(gates.shape)}; "
            f"both must be ({x.shape[0]}, K)"
        )
    if weights["gate_proj"] is None and biases["gate_bias"] is not None:
        raise ConfigError("gate_bias was given without gate_proj; give both or neither")


def _check_dtypes(x: Tensor, weights: dict[str, Tensor | None]) -> None:
    for name, weight in weights.items():
        if weight is not None and weight.dtype != x.dtype:
            raise ConfigError(
                f"x is {x.dtype} and {name} {weight.dtype}; they must be of one dtype (autocast "
                "makes them so)"
            )


def _step_by_step(
    x: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    tensors: list[Tensor | None],
    activation: str,
    activation_dropout: float,
    residual: Tensor | None,
) -> Tensor:
    """Compute step by step: PyTorch drops hidden units between the two grouped products."""
    up_proj, down_proj, gate_proj, up_bias, gate_bias, down_bias = tensors
    assert up_proj is not None
    assert down_proj is not None
    act = ACTIVATIONS[activation]
    order, rows, offsets = expert_order(expert_ids, up_proj.shape[0])
    inputs = permute(x, order, rows)
    hidden = grouped_mm(inputs, up_proj, offsets, bias=up_bias)
    if gate_proj is None:
        hidden = act(hidden)
    else:
        hidden = act(grouped_mm(inputs, gate_proj, offsets, bias=gate_bias)) * hidden
    hidden = functional.dropout(hidden, activation_dropout)
    return combine(grouped_mm(hidden, down_proj, offsets, bias=down_bias), rows, gates, residual)


_INPUTS = (
    "Tensor x, Tensor expert_ids, Tensor gates, Tensor up_proj, Tensor down_proj, "
    "Tensor? gate_proj, Tensor? up_bias, Tensor? gate_bias, Tensor? down_bias, str activation"
)


def _launch(
    x: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    *tensors: Any,  # noqa: ANN401
) -> Tensor:
    from moe_mt.kernels import expert_ffn as kernels

    *weights, activation, residual = tensors
    return kernels.expert_ffn(
        x.contiguous(),
        expert_ids.contiguous(),
        gates.float().contiguous(),
        kernels.weights_of(weights),
        activation=activation,
        residual=residual,
    )


def _fake(x: Tensor, *others: Any) -> Tensor:  # noqa: ANN401
    return _output_like(x, others[-1])


def _output_like(x: Tensor, residual: Tensor | None) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype_of(x, residual))


def _one_by_one(
    x: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    *tensors: Any,  # noqa: ANN401
) -> Tensor:
    *weights, activation, residual = tensors

    def expert(index: int, rows: Tensor) -> Tensor:
        # Under autocast, inputs may come in its dtype, and a compiler has left it when this runs.
        own = [None if weight is None else weight[index].to(rows.dtype) for weight in weights]
        return _ffn_without_gradients(rows, own, activation)

    return mix_one_by_one(x, expert_ids, gates, residual, weights[0].shape[0], expert)


def _launch_train(
    x: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    *tensors: Any,  # noqa: ANN401
) -> tuple[Tensor, ...]:
    from moe_mt.kernels import expert_ffn as kernels

    *weights, activation, residual = tensors
    out, saved = kernels.expert_ffn_forward(
        x.contiguous(),
        expert_ids.contiguous(),
        gates.float().contiguous(),
        kernels.weights_of(weights),
        activation=activation,
        residual=residual,
    )
    return (out, *(x.new_empty(0) if tensor is None else tensor for tensor in saved))


def _fake_train(
    x: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    *tensors: Any,  # noqa: ANN401
) -> tuple[Tensor, ...]:
    up_proj, _, gate_proj, *_, activation, residual = tensors
    num_experts, ffn_dim = up_proj.shape[:2]
    rows = expert_ids.numel()
    hidden_is_kept = activation == "relu" and gate_proj is None
    kept = [hidden_is_kept, not hidden_is_kept, gate_proj is not None]
    return (
        _output_like(x, residual),
        x.new_empty(rows, dtype=torch.int64),
        x.new_empty(expert_ids.shape, dtype=torch.int64),
        x.new_empty(num_experts + 1, dtype=torch.int64),
        *(x.new_empty(rows, ffn_dim) if keep else x.new_empty(0) for keep in kept),
    )


def _setup_context(
    ctx: Any,  # noqa: ANN401
    inputs: tuple[Any, ...],
    output: tuple[Tensor, ...],
) -> None:
    *tensors, activation, residual = inputs
    ctx.activation = activation
    ctx.has_residual = residual is not None
    ctx.save_for_backward(*tensors, *output[1:])
    # The saved outputs have no gradient; zeros for them would be as large as they are.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    if grad is None:
        return (None,) * 11
    x, expert_ids, gates, *tensors = ctx.saved_tensors
    need_x, _, _, *need = ctx.needs_input_grad[:9]
    need_up, need_down, need_gate, need_up_bias, need_gate_bias, need_down_bias = need
    needed = [need_x, need_up or need_up_bias, need_gate or need_gate_bias]
    needed.append(need_down or need_down_bias)
    found = _expert_ffn_backward(grad, x, expert_ids, gates, *tensors, ctx.activation, needed)
    grad_x, grad_gates, *weights = found
    weights = [g if n else None for g, n in zip(weights, need, strict=True)]
    residual = grad if ctx.has_residual else None
    return grad_x if need_x else None, None, grad_gates, *weights, None, residual


def _launch_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    from moe_mt.kernels import expert_ffn as kernels

    x, expert_ids, gates, *tensors, activation, needed = arguments
    order, rows, offsets, *hidden = tensors[6:]
    # An output cannot be None: what was not kept came as a vector without elements.
    kept = [None if tensor.dim() == 1 else tensor for tensor in hidden]
    grad_x, grad_gates, grad_weights = kernels.expert_ffn_backward(
        grad.to(x.dtype).contiguous(),
        x.contiguous(),
        expert_ids.contiguous(),
        gates.float().contiguous(),
        kernels.weights_of(tensors[:6]),
        kernels.Saved(order, rows, offsets, *kept),
        kernels.Needed(*needed),
        activation=activation,
    )
    grads = (grad_x, grad_gates.to(gates.dtype), *grad_weights)
    return tuple(x.new_empty(0) if tensor is None else tensor for tensor in grads)


def _fake_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    x, _, gates, *tensors, _, needed = arguments
    need_x, need_up, need_gate, need_down = needed
    wanted = (need_up, need_down, need_gate, need_up, need_gate, need_down)
    shapes = [
        tensor.shape if tensor is not None and want else 0
        for tensor, want in zip(tensors[:6], wanted, strict=True)
    ]
    return (
        x.new_empty(x.shape if need_x else 0),
        gates.new_empty(gates.shape),
        *map(x.new_empty, shapes),
    )


_expert_ffn = register_op(f"expert_ffn({_INPUTS}, Tensor? residual) -> Tensor", _launch, _fake)
_expert_ffn_one_by_one = register_op(
    f"expert_ffn_one_by_one({_INPUTS}, Tensor? residual) -> Tensor",
    _one_by_one,
    _fake,
    devices=("CPU",),
)
_expert_ffn_backward = register_op(
    f"expert_ffn_backward(Tensor grad, {_INPUTS.removesuffix(', str activation')}, Tensor order, "
    "Tensor rows, Tensor offsets, Tensor hidden, Tensor saved_up, Tensor saved_gate, "
    f"str activation, bool[] needed) -> ({', '.join(['Tensor'] * 8)})",
    _launch_backward,
    _fake_backward,
)
_expert_ffn_train = register_op(
    f"expert_ffn_train({_INPUTS}, Tensor? residual) -> ({', '.join(['Tensor'] * 7)})",
    _launch_train,
    _fake_train,
    backward=_backward,
    setup_context=_setup_context,
)
