"""Rows of tokens in expert order: one gather."""

import triton
import triton.language as tl
from torch import Tensor

from moe_mt.kernels._launch import launch
from moe_mt.kernels._tiles import element_offset
from moe_mt.kernels.combine import tile_for

__all__ = ["permute"]


@triton.jit(do_not_specialize=["num_rows"])
def _permute_kernel(
    x_ptr,
    order_ptr,
    out_ptr,
    num_rows,
    d_model,
    stride_x_row,
    stride_x_column,
    TOP_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """out[r] = x[order[r] // TOP_K]."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (rows < num_rows)[:, None] & (columns < d_model)[None, :]
    tokens = tl.load(order_ptr + rows, mask=rows < num_rows, other=0) // TOP_K
    x_ptrs = x_ptr + (
        element_offset(tokens, stride_x_row)[:, None]
        + element_offset(columns, stride_x_column)[None, :]
    )
    out_ptrs = out_ptr + (element_offset(rows, d_model)[:, None] + columns[None, :])
    tl.store(out_ptrs, tl.load(x_ptrs, mask=mask), mask=mask)


def permute(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """Return ``x[order // top_k]`` (N, d_model).

    Args:
        x: (T, d_model), any strides.
        order: (N,) int64, the claim ``t * K + k`` at each row.
        top_k: ``K``.
    """
    num_rows, d_model = order.shape[0], x.shape[1]
    out = x.new_empty(num_rows, d_model)
    block_rows, block_columns = tile_for(d_model)
    launch(
        _permute_kernel,
        (triton.cdiv(num_rows, block_rows), triton.cdiv(d_model, block_columns)),
        x_ptr=x,
        order_ptr=order.contiguous(),
        out_ptr=out,
        num_rows=num_rows,
        d_model=d_model,
        stride_x_row=x.stride(0),
        stride_x_column=x.stride(1),
        TOP_K=top_k,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        num_warps=4,
    )
    return out
