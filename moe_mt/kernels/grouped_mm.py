"""Each expert's rows times its weight; the gradients of rows and weights.

Rows stand in expert order; ``offsets`` says whose they are. Programs walk over tiles in an order
in which an expert's weights are read from memory once (``_tiles.tile_of``); their number is known
on the host, the number of tiles only on the device.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# To a type checker, Triton's ranges cannot be walked over and its constants are not constants.

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_mt.kernels._configurations import Tile, choose_tile, programs_for
from moe_mt.kernels._launch import inner_contiguous, launch
from moe_mt.kernels._tiles import (
    dot,
    element_offset,
    load_tile,
    row_blocks_of,
    tile_of,
    tile_offsets,
)

__all__ = ["grouped_mm", "grouped_mm_grad_input", "grouped_mm_grad_weight", "multiply"]


@triton.jit
def multiply(
    accumulator,
    x_ptr,
    rows,
    stride_x_row,
    weight_ptr,
    columns,
    stride_weight,
    inner,
    outer,
    BLOCK_INNER: tl.constexpr,
    EVEN_INNER: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SWAP: tl.constexpr,
):
    """Return ``accumulator + x[rows] @ weight[columns].T``, transposed where ``SWAP``.

    Where ``TRANSPOSED``, the weight is ``(inner, outer)`` and its columns are taken. Tiles are
    loaded as they lie in memory. Swapped, weights are the left operand: matrix units work on 64
    left rows at once, which few tokens would leave empty.
    """
    k = tl.arange(0, BLOCK_INNER)
    x_ptrs = x_ptr + (element_offset(rows, stride_x_row)[:, None] + k[None, :])
    real_columns = columns < outer
    if TRANSPOSED:
        weight_ptrs = weight_ptr + (element_offset(k, stride_weight)[:, None] + columns[None, :])
        weight_step = BLOCK_INNER * stride_weight
    else:
        weight_ptrs = weight_ptr + (element_offset(columns, stride_weight)[:, None] + k[None, :])
        weight_step = BLOCK_INNER
    for start in tl.range(0, inner, BLOCK_INNER):
        inside = k < inner - start
        x = load_tile(x_ptrs, inside[None, :], inside[None, :], True, EVEN_INNER)
        if TRANSPOSED:
            weight = load_tile(
                weight_ptrs, inside[:, None], real_columns[None, :], EVEN_INNER, EVEN_COLUMNS
            )
            if SWAP:
                accumulator = dot(tl.trans(weight), tl.trans(x), accumulator)
            else:
                accumulator = dot(x, weight, accumulator)
        else:
            weight = load_tile(
                weight_ptrs, real_columns[:, None], inside[None, :], EVEN_COLUMNS, EVEN_INNER
            )
            if SWAP:
                accumulator = dot(weight, tl.trans(x), accumulator)
            else:
                accumulator = dot(x, tl.trans(weight), accumulator)
        x_ptrs += BLOCK_INNER
        weight_ptrs += weight_step
    return accumulator


@triton.jit
def _grouped_mm_kernel(
    x_ptr,
    weight_ptr,
    second_x_ptr,
    second_weight_ptr,
    bias_ptr,
    offsets_ptr,
    out_ptr,
    num_experts,
    inner,
    outer,
    stride_x_row,
    stride_second_x_row,
    stride_weight_expert,
    stride_weight,
    stride_second_weight_expert,
    stride_second_weight,
    stride_bias_expert,
    E_PADDED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    EVEN_INNER: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SWAP: tl.constexpr,
):
    """out[r] = x[r] @ weight[e].T (+ second_x[r] @ second_weight[e].T) (+ bias[e]).

    Where ``TRANSPOSED``, the weights themselves and not their transposes.
    """
    num_columns = tl.cdiv(outer, BLOCK_COLUMNS)
    tiles = row_blocks_of(offsets_ptr, num_experts, E_PADDED, BLOCK_ROWS)
    for tile in tl.range(tl.program_id(0), tl.sum(tiles, 0) * num_columns, tl.num_programs(0)):
        expert, row_block, column_block, first_row, last_row = tile_of(
            tile, tiles, num_columns, offsets_ptr, E_PADDED, BLOCK_ROWS
        )
        rows = first_row + row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        columns = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        # Rows beyond the last read the last one again: nothing of them is stored.
        safe_rows = tl.minimum(rows, last_row - 1)
        if SWAP:
            accumulator = tl.zeros((BLOCK_COLUMNS, BLOCK_ROWS), tl.float32)
        else:
            accumulator = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        accumulator = multiply(
            accumulator,
            x_ptr,
            safe_rows,
            stride_x_row,
            weight_ptr + element_offset(expert, stride_weight_expert),
            columns,
            stride_weight,
            inner,
            outer,
            BLOCK_INNER,
            EVEN_INNER,
            EVEN_COLUMNS,
            TRANSPOSED,
            SWAP,
        )
        if second_x_ptr is not None:
            accumulator = multiply(
                accumulator,
                second_x_ptr,
                safe_rows,
                stride_second_x_row,
                second_weight_ptr + element_offset(expert, stride_second_weight_expert),
                columns,
                stride_second_weight,
                inner,
                outer,
                BLOCK_INNER,
                EVEN_INNER,
                EVEN_COLUMNS,
                TRANSPOSED,
                SWAP,
            )
        if SWAP:
            accumulator = tl.trans(accumulator)
        if bias_ptr is not None:
            bias_ptrs = bias_ptr + element_offset(expert, stride_bias_expert) + columns
            bias = tl.load(bias_ptrs, mask=columns < outer, other=0.0)
            accumulator += bias.to(tl.float32)[None, :]
        first = element_offset(first_row + row_block * BLOCK_ROWS, outer)
        first += column_block * BLOCK_COLUMNS
        out_ptrs = out_ptr + first + tile_offsets(outer, BLOCK_ROWS, BLOCK_COLUMNS)
        inside = (rows < last_row)[:, None] & (columns < outer)[None, :]
        tl.store(out_ptrs, accumulator.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _grad_weight_kernel(
    grad_ptr,
    x_ptr,
    order_ptr,
    offsets_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    top_k,
    inner,
    outer,
    stride_grad_row,
    stride_x_row,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    EVEN_OUT: tl.constexpr,
    EVEN_IN: tl.constexpr,
):
    """grad_weight[e] = grad[rows of e].T @ x[rows of e]; grad_bias[e] = sum of grad[rows of e].

    Where ``order`` is given, row ``r`` of the second operand is ``x[order[r] // top_k]``.
    """
    in_blocks = tl.cdiv(inner, BLOCK_IN)
    out_blocks = tl.cdiv(outer, BLOCK_OUT)
    program = tl.program_id(0)
    expert = program // (in_blocks * out_blocks)
    out_block = (program // in_blocks) % out_blocks
    in_block = program % in_blocks
    first_row = tl.load(offsets_ptr + expert)
    last_row = tl.load(offsets_ptr + expert + 1)
    out_columns = out_block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    in_columns = in_block * BLOCK_IN + tl.arange(0, BLOCK_IN)
    out_inside = (out_columns < outer)[None, :]
    in_inside = (in_columns < inner)[None, :]
    accumulator = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    for start in tl.range(first_row, last_row, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        inside = (rows < last_row)[:, None]
        sources = rows
        if order_ptr is not None:
            sources = tl.load(order_ptr + rows, mask=rows < last_row, other=0) // top_k
        grad_ptrs = grad_ptr + (
            element_offset(rows, stride_grad_row)[:, None] + out_columns[None, :]
        )
        x_ptrs = x_ptr + (element_offset(sources, stride_x_row)[:, None] + in_columns[None, :])
        # Both masked: what lies beyond an expert's rows may be a NaN.
        grad = load_tile(grad_ptrs, inside, out_inside, False, EVEN_OUT)
        x = load_tile(x_ptrs, inside, in_inside, False, EVEN_IN)
        accumulator = dot(tl.trans(grad), x, accumulator)
    # Not times a stride: grad_weight is ours, and stacked without gaps.
    row_offsets = (expert.to(tl.int64) * outer + out_columns) * inner
    tl.store(
        grad_weight_ptr + (row_offsets[:, None] + in_columns[None, :]),
        accumulator.to(grad_weight_ptr.dtype.element_ty),
        mask=(out_columns < outer)[:, None] & (in_columns < inner)[None, :],
    )
    if grad_bias_ptr is not None:
        if in_block == 0:
            # A loop of its own: in the one above, a sum would stand in the way of the product.
            total = tl.zeros((BLOCK_OUT,), tl.float32)
            for start in tl.range(first_row, last_row, BLOCK_ROWS):
                rows = start + tl.arange(0, BLOCK_ROWS)
                inside = (rows < last_row)[:, None]
                offsets = element_offset(rows, stride_grad_row)[:, None] + out_columns[None, :]
                grad = load_tile(grad_ptr + offsets, inside, out_inside, False, EVEN_OUT)
                total += tl.sum(grad.to(tl.float32), 0)
            tl.store(
                grad_bias_ptr + expert.to(tl.int64) * outer + out_columns,
                total.to(grad_bias_ptr.dtype.element_ty),
                mask=out_columns < outer,
            )


def grouped_mm(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, *, out: Tensor | None = None
) -> Tensor:
    """Return ``x[r] @ weight[e].T + bias[e]`` (N, out); rows past the last offset as in ``out``.

    Args:
        x: (N, in), rows in expert order, any strides, as of all inputs.
        weight: (E, out, in).
        offsets: (E + 1,) int64.
        bias: (E, out) or ``None``.
        out: (N, out) to write to; where ``None``, uninitialised memory.
    """
    out = x.new_empty(x.shape[0], weight.shape[1]) if out is None else out
    tile = choose_tile("forward", x, *weight.shape)
    _launch_grouped_mm(x, weight, offsets, bias, out, tile, transposed=False)
    return out


def grouped_mm_grad_input(
    grad: Tensor,
    weight: Tensor,
    offsets: Tensor,
    *,
    second: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return ``grad[r] @ weight[e]`` (N, in), plus the same of a second pair.

    Args:
        grad: (N, out), any strides, as of all inputs.
        weight: (E, out, in).
        offsets: (E + 1,) int64.
        second: Another grad and weight of the same shapes, or ``None``.
        out: (N, in) to write to; where ``None``, uninitialised memory.
    """
    num_experts, outer, inner = weight.shape
    out = grad.new_empty(grad.shape[0], inner) if out is None else out
    kind = "grad_input" if second is None else "grad_input_gated"
    tile = choose_tile(kind, grad, num_experts, inner, outer)
    _launch_grouped_mm(grad, weight, offsets, None, out, tile, transposed=True, second=second)
    return out


def _launch_grouped_mm(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tile: Tile,
    *,
    transposed: bool,
    second: tuple[Tensor, Tensor] | None = None,
) -> None:
    num_experts, inner, outer = weight.shape[0], x.shape[1], out.shape[1]
    x, weight = inner_contiguous(x), inner_contiguous(weight)
    bias = None if bias is None else inner_contiguous(bias)
    second_x, second_weight = map(inner_contiguous, second) if second else (None, None)
    launch(
        _grouped_mm_kernel,
        (programs_for(tile, x, num_experts, outer),),
        x_ptr=x,
        weight_ptr=weight,
        second_x_ptr=second_x,
        second_weight_ptr=second_weight,
        bias_ptr=bias,
        offsets_ptr=offsets,
        out_ptr=out,
        num_experts=num_experts,
        inner=inner,
        outer=outer,
        stride_x_row=x.stride(0),
        stride_second_x_row=0 if second_x is None else second_x.stride(0),
        stride_weight_expert=weight.stride(0),
        stride_weight=weight.stride(1),
        stride_second_weight_expert=0 if second_weight is None else second_weight.stride(0),
        stride_second_weight=0 if second_weight is None else second_weight.stride(1),
        stride_bias_expert=0 if bias is None else bias.stride(0),
        E_PADDED=triton.next_power_of_2(num_experts),
        BLOCK_ROWS=tile.rows,
        BLOCK_COLUMNS=tile.columns,
        BLOCK_INNER=tile.inner,
        EVEN_INNER=inner % tile.inner == 0,
        EVEN_COLUMNS=outer % tile.columns == 0,
        TRANSPOSED=transposed,
        SWAP=tile.swap,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def grouped_mm_grad_weight(
    grad: Tensor,
    x: Tensor,
    offsets: Tensor,
    *,
    order: Tensor | None = None,
    top_k: int = 1,
    weight_dtype: torch.dtype,
    bias: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of the weight (E, out, in) and, where wanted, of the bias (E, out).

    Args:
        grad: (N, out), gradient of each row, any strides.
        x: (N, in), or (T, in) with ``order``, any strides.
        offsets: (E + 1,) int64.
        order: (N,) int64: row ``r`` was computed from ``x[order[r] // top_k]``; or ``None``.
        top_k: Claims per row of ``x``.
        weight_dtype: Of both gradients.
        bias: Whether the bias's gradient is wanted.
    """
    num_experts, outer, inner = offsets.shape[0] - 1, grad.shape[1], x.shape[1]
    grad, x = inner_contiguous(grad), inner_contiguous(x)
    grad_weight = grad.new_empty(num_experts, outer, inner, dtype=weight_dtype)
    grad_bias = grad.new_empty(num_experts, outer, dtype=weight_dtype) if bias else None
    tile = choose_tile("grad_weight", grad, num_experts, outer, inner)
    blocks = triton.cdiv(outer, tile.rows) * triton.cdiv(inner, tile.columns)
    launch(
        _grad_weight_kernel,
        (num_experts * blocks,),
        grad_ptr=grad,
        x_ptr=x,
        order_ptr=order,
        offsets_ptr=offsets,
        grad_weight_ptr=grad_weight,
        grad_bias_ptr=grad_bias,
        top_k=top_k,
        inner=inner,
        outer=outer,
        stride_grad_row=grad.stride(0),
        stride_x_row=x.stride(0),
        BLOCK_OUT=tile.rows,
        BLOCK_IN=tile.columns,
        BLOCK_ROWS=tile.inner,
        EVEN_OUT=outer % tile.rows == 0,
        EVEN_IN=inner % tile.columns == 0,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return grad_weight, grad_bias
