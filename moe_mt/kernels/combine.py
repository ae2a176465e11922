"""Expert rows back in token order, weighted by their gates; the gradients of both.

Each program owns rows of the result, so that sums have one order and nothing needs an atomic.
Rows whose gate is zero are never read: nobody may have written them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_mt.kernels._launch import launch
from moe_mt.kernels._tiles import element_offset

__all__ = ["combine", "combine_backward", "combine_grad", "tile_for"]

# Numbers of one tile: four warps hold four times 16 bytes of halves a thread.
TILE = 4096
MOST_ROWS, MOST_COLUMNS = 16, 1024


@triton.jit(do_not_specialize=["num_tokens"])
def _combine_kernel(
    expert_rows_ptr,
    rows_ptr,
    gates_ptr,
    residual_ptr,
    out_ptr,
    num_tokens,
    d_model,
    stride_expert_rows_row,
    stride_expert_rows_column,
    stride_residual_row,
    stride_residual_column,
    TOP_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """out[t] = residual[t] + sum over k of gates[t, k] * expert_rows[rows[t, k]].

    Without gates they are one, without a residual it is zero.
    """
    tokens = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = tokens < num_tokens
    out_mask = inside[:, None] & (columns < d_model)[None, :]
    column_offsets = element_offset(columns, stride_expert_rows_column)[None, :]
    claims = element_offset(tokens, TOP_K)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    # Unrolled, so that all rows of a token are on their way at once.
    for k in tl.static_range(TOP_K):  # pyright: ignore[reportGeneralTypeIssues]
        rows = tl.load(rows_ptr + claims + k, mask=inside, other=0)
        offsets = element_offset(rows, stride_expert_rows_row)[:, None] + column_offsets
        if gates_ptr is None:
            total += tl.load(expert_rows_ptr + offsets, mask=out_mask, other=0.0).to(tl.float32)
        else:
            gates = tl.load(gates_ptr + claims + k, mask=inside, other=0.0).to(tl.float32)[:, None]
            mask = out_mask & (gates != 0)
            found = tl.load(expert_rows_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            total += gates * found
    if residual_ptr is not None:
        offsets = element_offset(tokens, stride_residual_row)[:, None]
        offsets += element_offset(columns, stride_residual_column)[None, :]
        total += tl.load(residual_ptr + offsets, mask=out_mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + (element_offset(tokens, d_model)[:, None] + columns[None, :])
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=out_mask)


@triton.jit(do_not_specialize=["num_claims"])
def _claim_grad_kernel(
    grad_ptr,
    rows_ptr,
    gates_ptr,
    factors_ptr,
    factor_rows_ptr,
    partials_ptr,
    grad_rows_ptr,
    grad_gates_ptr,
    num_claims,
    num_partials,
    d_model,
    stride_grad_row,
    stride_grad_column,
    stride_factors_row,
    stride_factors_column,
    TOP_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
):
    """grad_rows[rows[c]] = gate * grad; grad_gates[c] = <grad, factor> + sum of partials[rows[c]].

    ``grad`` is that of the claim's token; factors and partials are each there or not. Where the
    gate is zero so is everything, and nothing of the claim is read.
    """
    claims = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = claims < num_claims
    rows = tl.load(rows_ptr + claims, mask=inside, other=0)
    gates = tl.load(gates_ptr + claims, mask=inside, other=0.0).to(tl.float32)
    alive = (gates != 0)[:, None]
    factor_base = factors_ptr
    if factors_ptr is not None:
        factor_rows = tl.load(factor_rows_ptr + claims, mask=inside, other=0)
        factor_base += element_offset(factor_rows, stride_factors_row)[:, None]
    grad_base = grad_ptr + element_offset(claims // TOP_K, stride_grad_row)[:, None]
    grad_rows_base = grad_rows_ptr + element_offset(rows, d_model)[:, None]
    products = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, d_model, BLOCK_COLUMNS):
        columns = (start + tl.arange(0, BLOCK_COLUMNS))[None, :]
        real = columns < d_model
        grad_ptrs = grad_base + element_offset(columns, stride_grad_column)
        grad = tl.load(grad_ptrs, mask=alive & real, other=0.0).to(tl.float32)
        grad_rows = (gates[:, None] * grad).to(grad_rows_ptr.dtype.element_ty)
        tl.store(grad_rows_base + columns, grad_rows, mask=inside[:, None] & real)
        if factors_ptr is not None:
            factor_ptrs = factor_base + element_offset(columns, stride_factors_column)
            factors = tl.load(factor_ptrs, mask=alive & real, other=0.0)
            products += grad * factors.to(tl.float32)
    grad_gates = tl.sum(products, 1)
    if partials_ptr is not None:
        partials_base = partials_ptr + element_offset(rows, num_partials)[:, None]
        partial_sums = tl.zeros((BLOCK_ROWS, BLOCK_PARTIALS), tl.float32)
        for start in range(0, num_partials, BLOCK_PARTIALS):
            columns = (start + tl.arange(0, BLOCK_PARTIALS))[None, :]
            mask = alive & (columns < num_partials)
            partial_sums += tl.load(partials_base + columns, mask=mask, other=0.0)
        grad_gates += tl.sum(partial_sums, 1)
    tl.store(grad_gates_ptr + claims, grad_gates.to(grad_gates_ptr.dtype.element_ty), mask=inside)


def combine(
    expert_rows: Tensor, rows: Tensor, gates: Tensor | None, residual: Tensor | None
) -> Tensor:
    """Return ``residual + sum_k gates * expert_rows[rows]`` (T, d_model), rounded once.

    Args:
        expert_rows: (N, d_model), any strides.
        rows: (T, K) int64, the row of each claim.
        gates: (T, K); rows where it is zero are not read. ``None`` is one everywhere.
        residual: (T, d_model), any strides, or ``None``.
    """
    (tokens, top_k), d_model = rows.shape, expert_rows.shape[1]
    dtype = expert_rows.dtype
    if residual is not None:
        dtype = torch.promote_types(dtype, residual.dtype)
    out = expert_rows.new_empty(tokens, d_model, dtype=dtype)
    block_rows, block_columns = tile_for(d_model)
    launch(
        _combine_kernel,
        (triton.cdiv(tokens, block_rows), triton.cdiv(d_model, block_columns)),
        expert_rows_ptr=expert_rows,
        rows_ptr=rows.contiguous(),
        gates_ptr=None if gates is None else gates.contiguous(),
        residual_ptr=residual,
        out_ptr=out,
        num_tokens=tokens,
        d_model=d_model,
        stride_expert_rows_row=expert_rows.stride(0),
        stride_expert_rows_column=expert_rows.stride(1),
        stride_residual_row=0 if residual is None else residual.stride(0),
        stride_residual_column=0 if residual is None else residual.stride(1),
        TOP_K=top_k,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        num_warps=4,
    )
    return out


def combine_backward(
    grad: Tensor, expert_rows: Tensor, rows: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the expert rows (N, d_model) and of the gates (T, K).

    Both are zero where the gate is: such rows are not read.

    Args:
        grad: (T, d_model), of what ``combine`` returned, any strides.
        expert_rows: (N, d_model), any strides.
        rows: (T, K) int64, no row twice.
        gates: (T, K).
    """
    # Rows that belong to no claim are written by none.
    make = expert_rows.new_empty if rows.numel() == expert_rows.shape[0] else expert_rows.new_zeros
    grad_rows = make(expert_rows.shape)
    grad_gates = gates.new_empty(gates.shape)
    _launch_claim_grad(grad, rows, gates, expert_rows, rows, None, grad_rows, grad_gates)
    return grad_rows, grad_gates


def combine_grad(
    grad: Tensor,
    rows: Tensor,
    gates: Tensor,
    expert_ids: Tensor,
    down_bias: Tensor | None,
    partials: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the same two gradients where no expert rows were kept, the gates' in float32.

    A gate's gradient is the product of ``grad`` with the expert row ``W_down h + b_down``: the sum
    of the row's partials, which are the first term's, plus the product with the bias. Both are
    zero where the gate is; such a claim's partials are not read, nor its expert id used.

    Args:
        grad: (T, d_model), of the mixture, any strides.
        rows: (T, K) int64, a permutation of all rows.
        gates: (T, K), zero where a claim was dropped.
        expert_ids: (T, K) int32.
        down_bias: (E, d_model), any strides, or ``None``.
        partials: (N, P) float32, contiguous.
    """
    grad_rows = grad.new_empty(rows.numel(), grad.shape[1])
    grad_gates = grad.new_empty(rows.shape, dtype=torch.float32)
    _launch_claim_grad(grad, rows, gates, down_bias, expert_ids, partials, grad_rows, grad_gates)
    return grad_rows, grad_gates


def _launch_claim_grad(
    grad: Tensor,
    rows: Tensor,
    gates: Tensor,
    factors: Tensor | None,
    factor_rows: Tensor,
    partials: Tensor | None,
    grad_rows: Tensor,
    grad_gates: Tensor,
) -> None:
    block_rows, block_columns = tile_for(grad.shape[1])
    # Two tiles are held at once, gradient and factors, and wide elements take twice the registers.
    block_rows = max(block_rows // grad.element_size(), 1)
    num_partials = 0 if partials is None else partials.shape[1]
    launch(
        _claim_grad_kernel,
        (triton.cdiv(rows.numel(), block_rows),),
        grad_ptr=grad,
        rows_ptr=rows.contiguous(),
        gates_ptr=gates.contiguous(),
        factors_ptr=factors,
        factor_rows_ptr=factor_rows.contiguous(),
        partials_ptr=partials,
        grad_rows_ptr=grad_rows,
        grad_gates_ptr=grad_gates,
        num_claims=rows.numel(),
        num_partials=num_partials,
        d_model=grad.shape[1],
        stride_grad_row=grad.stride(0),
        stride_grad_column=grad.stride(1),
        stride_factors_row=0 if factors is None else factors.stride(0),
        stride_factors_column=0 if factors is None else factors.stride(1),
        TOP_K=rows.shape[1],
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        BLOCK_PARTIALS=min(triton.next_power_of_2(max(num_partials, 1)), 128),
        num_warps=4,
    )


def tile_for(d_model: int) -> tuple[int, int]:
    """Return how many rows and columns one program moves."""
    columns = min(triton.next_power_of_2(d_model), MOST_COLUMNS)
    return min(TILE // columns, MOST_ROWS), columns
