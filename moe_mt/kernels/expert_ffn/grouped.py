"""The expert FFN for many tokens: hidden rows and their gradients, in expert order.

Rows of ``x`` and of the output's gradient are gathered while they are loaded, so that neither is
ever copied into expert order.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# To a type checker, Triton's ranges cannot be walked over and its constants are not constants.

import triton
import triton.language as tl
from torch import Tensor

from moe_mt.kernels._configurations import choose_tile, programs_for
from moe_mt.kernels._launch import launch
from moe_mt.kernels._tiles import (
    activate,
    activation_grad,
    dot,
    element_offset,
    load_tile,
    row_blocks_of,
    tile_of,
    tile_offsets,
)
from moe_mt.kernels.grouped_mm import multiply

__all__ = ["hidden_grad", "hidden_rows"]


@triton.jit
def _multiply_two(
    first,
    second,
    x_ptr,
    rows,
    stride_x_row,
    first_weight_ptr,
    second_weight_ptr,
    columns,
    stride_first_w_out,
    stride_second_w_out,
    inner,
    outer,
    BLOCK_INNER: tl.constexpr,
    EVEN_INNER: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    SWAP: tl.constexpr,
):
    """Add ``x[rows] @ weight[columns].T`` of two weights, reading ``x`` once."""
    k = tl.arange(0, BLOCK_INNER)
    x_ptrs = x_ptr + (element_offset(rows, stride_x_row)[:, None] + k[None, :])
    first_ptrs = first_weight_ptr + (
        element_offset(columns, stride_first_w_out)[:, None] + k[None, :]
    )
    second_ptrs = second_weight_ptr + (
        element_offset(columns, stride_second_w_out)[:, None] + k[None, :]
    )
    real_columns = (columns < outer)[:, None]
    for start in tl.range(0, inner, BLOCK_INNER):
        inside = k[None, :] < inner - start
        x = load_tile(x_ptrs, inside, inside, True, EVEN_INNER)
        first_weight = load_tile(first_ptrs, real_columns, inside, EVEN_COLUMNS, EVEN_INNER)
        second_weight = load_tile(second_ptrs, real_columns, inside, EVEN_COLUMNS, EVEN_INNER)
        if SWAP:
            first = dot(first_weight, tl.trans(x), first)
            second = dot(second_weight, tl.trans(x), second)
        else:
            first = dot(x, tl.trans(first_weight), first)
            second = dot(x, tl.trans(second_weight), second)
        x_ptrs += BLOCK_INNER
        first_ptrs += BLOCK_INNER
        second_ptrs += BLOCK_INNER
    return first, second


@triton.jit
def _hidden_rows_kernel(
    x_ptr,
    order_ptr,
    offsets_ptr,
    up_ptr,
    gate_ptr,
    up_bias_ptr,
    gate_bias_ptr,
    hidden_ptr,
    saved_up_ptr,
    saved_gate_ptr,
    top_k,
    num_experts,
    d_model,
    ffn_dim,
    stride_x_row,
    stride_up_expert,
    stride_up_out,
    stride_gate_expert,
    stride_gate_out,
    stride_up_bias_expert,
    stride_gate_bias_expert,
    ACTIVATION: tl.constexpr,
    E_PADDED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    EVEN_INNER: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    SWAP: tl.constexpr,
):
    """hidden[r] = act(x W_up^T + b_up), or act(x W_gate^T + b_gate) * (x W_up^T + b_up).

    What enters the activation is stored too where a pointer for it is given.
    """
    num_columns = tl.cdiv(ffn_dim, BLOCK_COLUMNS)
    tiles = row_blocks_of(offsets_ptr, num_experts, E_PADDED, BLOCK_ROWS)
    for tile in tl.range(tl.program_id(0), tl.sum(tiles, 0) * num_columns, tl.num_programs(0)):
        expert, row_block, column_block, first_row, last_row = tile_of(
            tile, tiles, num_columns, offsets_ptr, E_PADDED, BLOCK_ROWS
        )
        rows = first_row + row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        columns = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        tokens = tl.load(order_ptr + tl.minimum(rows, last_row - 1)) // top_k
        real_columns = columns < ffn_dim
        if SWAP:
            up = tl.zeros((BLOCK_COLUMNS, BLOCK_ROWS), tl.float32)
        else:
            up = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        up_base = up_ptr + element_offset(expert, stride_up_expert)
        if gate_ptr is None:
            up = multiply(
                up,
                x_ptr,
                tokens,
                stride_x_row,
                up_base,
                columns,
                stride_up_out,
                d_model,
                ffn_dim,
                BLOCK_INNER,
                EVEN_INNER,
                EVEN_COLUMNS,
                False,
                SWAP,
            )
            gate = up
        else:
            gate = tl.zeros_like(up)
            up, gate = _multiply_two(
                up,
                gate,
                x_ptr,
                tokens,
                stride_x_row,
                up_base,
                gate_ptr + element_offset(expert, stride_gate_expert),
                columns,
                stride_up_out,
                stride_gate_out,
                d_model,
                ffn_dim,
                BLOCK_INNER,
                EVEN_INNER,
                EVEN_COLUMNS,
                SWAP,
            )
        if SWAP:
            up = tl.trans(up)
            gate = tl.trans(gate)
        if up_bias_ptr is not None:
            bias_ptrs = up_bias_ptr + element_offset(expert, stride_up_bias_expert) + columns
            up += tl.load(bias_ptrs, mask=real_columns, other=0.0).to(tl.float32)[None, :]
        if gate_bias_ptr is not None:
            bias_ptrs = gate_bias_ptr + element_offset(expert, stride_gate_bias_expert) + columns
            gate += tl.load(bias_ptrs, mask=real_columns, other=0.0).to(tl.float32)[None, :]
        first = element_offset(first_row + row_block * BLOCK_ROWS, ffn_dim)
        first += column_block * BLOCK_COLUMNS
        where = tile_offsets(ffn_dim, BLOCK_ROWS, BLOCK_COLUMNS)
        inside = (rows < last_row)[:, None] & real_columns[None, :]
        if saved_up_ptr is not None:
            tl.store(
                saved_up_ptr + first + where, up.to(saved_up_ptr.dtype.element_ty), mask=inside
            )
        if gate_ptr is None:
            hidden = activate(up, ACTIVATION)
        else:
            if saved_gate_ptr is not None:
                tl.store(
                    saved_gate_ptr + first + where,
                    gate.to(saved_gate_ptr.dtype.element_ty),
                    mask=inside,
                )
            hidden = activate(gate, ACTIVATION) * up
        tl.store(hidden_ptr + first + where, hidden.to(hidden_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _hidden_grad_kernel(
    grad_ptr,
    order_ptr,
    offsets_ptr,
    gates_ptr,
    down_ptr,
    saved_up_ptr,
    saved_gate_ptr,
    hidden_ptr,
    grad_up_ptr,
    grad_gate_ptr,
    partials_ptr,
    top_k,
    num_experts,
    d_model,
    ffn_dim,
    stride_grad_row,
    stride_down_expert,
    stride_down_out,
    ACTIVATION: tl.constexpr,
    E_PADDED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    EVEN_INNER: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    SWAP: tl.constexpr,
):
    """From the gradient of the mixture (T, d_model) to those of what entered the activation.

    With ``a[r] = grad[token of r] @ W_down``: ``partials[r, block] = <a[r], hidden[r]>`` over the
    block's columns, which sums to the gate's gradient without any expert's output, and
    ``grad_up[r] = gate * a[r] * d hidden / d up``, likewise ``grad_gate``. Where hidden rows were
    not kept they are computed again and written for the weight's gradient.
    """
    num_columns = tl.cdiv(ffn_dim, BLOCK_COLUMNS)
    tiles = row_blocks_of(offsets_ptr, num_experts, E_PADDED, BLOCK_ROWS)
    for tile in tl.range(tl.program_id(0), tl.sum(tiles, 0) * num_columns, tl.num_programs(0)):
        expert, row_block, column_block, first_row, last_row = tile_of(
            tile, tiles, num_columns, offsets_ptr, E_PADDED, BLOCK_ROWS
        )
        rows = first_row + row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        columns = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        claims = tl.load(order_ptr + tl.minimum(rows, last_row - 1))
        if SWAP:
            grad = tl.zeros((BLOCK_COLUMNS, BLOCK_ROWS), tl.float32)
        else:
            grad = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        grad = multiply(
            grad,
            grad_ptr,
            claims // top_k,
            stride_grad_row,
            down_ptr + element_offset(expert, stride_down_expert),
            columns,
            stride_down_out,
            d_model,
            ffn_dim,
            BLOCK_INNER,
            EVEN_INNER,
            EVEN_COLUMNS,
            True,
            SWAP,
        )
        if SWAP:
            grad = tl.trans(grad)
        route_gate = tl.load(gates_ptr + claims).to(tl.float32)[:, None]
        first = element_offset(first_row + row_block * BLOCK_ROWS, ffn_dim)
        first += column_block * BLOCK_COLUMNS
        where = tile_offsets(ffn_dim, BLOCK_ROWS, BLOCK_COLUMNS)
        inside = (rows < last_row)[:, None] & (columns < ffn_dim)[None, :]
        if saved_up_ptr is None:
            # ReLU: the hidden row is its own derivative's mask, rounded as the forward rounded it.
            hidden = tl.load(hidden_ptr + first + where, mask=inside, other=0.0).to(tl.float32)
            grad_up = route_gate * grad * activation_grad(hidden, "relu")
        elif saved_gate_ptr is None:
            up = tl.load(saved_up_ptr + first + where, mask=inside, other=0.0).to(tl.float32)
            hidden = activate(up, ACTIVATION)
            grad_up = route_gate * grad * activation_grad(up, ACTIVATION)
            tl.store(
                hidden_ptr + first + where, hidden.to(hidden_ptr.dtype.element_ty), mask=inside
            )
        else:
            up = tl.load(saved_up_ptr + first + where, mask=inside, other=0.0).to(tl.float32)
            gate = tl.load(saved_gate_ptr + first + where, mask=inside, other=0.0).to(tl.float32)
            activated = activate(gate, ACTIVATION)
            hidden = activated * up
            grad_up = route_gate * grad * activated
            grad_gate = route_gate * grad * up * activation_grad(gate, ACTIVATION)
            tl.store(
                hidden_ptr + first + where, hidden.to(hidden_ptr.dtype.element_ty), mask=inside
            )
            tl.store(
                grad_gate_ptr + first + where,
                grad_gate.to(grad_gate_ptr.dtype.element_ty),
                mask=inside,
            )
        tl.store(grad_up_ptr + first + where, grad_up.to(grad_up_ptr.dtype.element_ty), mask=inside)
        partial = tl.sum(tl.where(inside, grad * hidden, 0.0), 1)
        tl.store(
            partials_ptr + element_offset(rows, num_columns) + column_block,
            partial,
            mask=rows < last_row,
        )


def hidden_rows(
    x: Tensor,
    order: Tensor,
    offsets: Tensor,
    up_proj: Tensor,
    gate_proj: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    *,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return hidden rows (N, ffn_dim) and, with ``save``, what entered the activation.

    ReLU without a gate saves nothing: its hidden rows say all that the backward pass asks.

    Args:
        x: (T, d_model), innermost stride 1.
        order: (N,) int64, from ``expert_order``.
        offsets: (E + 1,) int64.
        up_proj: (E, ffn_dim, d_model), innermost stride 1.
        gate_proj: (E, ffn_dim, d_model), innermost stride 1, or ``None``.
        up_bias: (E, ffn_dim) or ``None``.
        gate_bias: (E, ffn_dim) or ``None``.
        activation: A name of ``_tiles.activate``.
        save: Whether a backward pass follows.
    """
    num_experts, ffn_dim, d_model = up_proj.shape
    hidden = x.new_empty(order.shape[0], ffn_dim)
    keep_up = save and not (activation == "relu" and gate_proj is None)
    saved_up = _empty_if(hidden, keep_up)
    saved_gate = _empty_if(hidden, save and gate_proj is not None)
    kind = "forward" if gate_proj is None else "gated_saved" if save else "gated"
    tile = choose_tile(kind, hidden, num_experts, ffn_dim, d_model)
    launch(
        _hidden_rows_kernel,
        (programs_for(tile, hidden, num_experts, ffn_dim, weights=1 if gate_proj is None else 2),),
        x_ptr=x,
        order_ptr=order,
        offsets_ptr=offsets,
        up_ptr=up_proj,
        gate_ptr=gate_proj,
        up_bias_ptr=up_bias,
        gate_bias_ptr=gate_bias,
        hidden_ptr=hidden,
        saved_up_ptr=saved_up,
        saved_gate_ptr=saved_gate,
        top_k=order.shape[0] // max(x.shape[0], 1),
        num_experts=num_experts,
        d_model=d_model,
        ffn_dim=ffn_dim,
        stride_x_row=x.stride(0),
        stride_up_expert=up_proj.stride(0),
        stride_up_out=up_proj.stride(1),
        stride_gate_expert=0 if gate_proj is None else gate_proj.stride(0),
        stride_gate_out=0 if gate_proj is None else gate_proj.stride(1),
        stride_up_bias_expert=0 if up_bias is None else up_bias.stride(0),
        stride_gate_bias_expert=0 if gate_bias is None else gate_bias.stride(0),
        ACTIVATION=activation,
        E_PADDED=triton.next_power_of_2(num_experts),
        BLOCK_ROWS=tile.rows,
        BLOCK_COLUMNS=tile.columns,
        BLOCK_INNER=tile.inner,
        EVEN_INNER=d_model % tile.inner == 0,
        EVEN_COLUMNS=ffn_dim % tile.columns == 0,
        SWAP=tile.swap,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return hidden, saved_up, saved_gate


def hidden_grad(
    grad: Tensor,
    order: Tensor,
    offsets: Tensor,
    gates: Tensor,
    down_proj: Tensor,
    hidden: Tensor,
    saved_up: Tensor | None,
    saved_gate: Tensor | None,
    *,
    activation: str,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the gradients of up rows and of gate rows (N, ffn_dim), and partials (N, blocks).

    ``hidden`` is read where nothing was saved (ReLU), and written where something was.

    Args:
        grad: (T, d_model), of the mixture, innermost stride 1.
        order: (N,) int64.
        offsets: (E + 1,) int64.
        gates: (T, K) float32, contiguous.
        down_proj: (E, d_model, ffn_dim), innermost stride 1.
        hidden: (N, ffn_dim), contiguous.
        saved_up: (N, ffn_dim) or ``None``.
        saved_gate: (N, ffn_dim) or ``None``.
        activation: A name of ``_tiles.activate``.
    """
    num_experts, d_model, ffn_dim = down_proj.shape
    grad_up = hidden.new_empty(hidden.shape)
    grad_gate = _empty_if(hidden, saved_gate is not None)
    kind = "hidden_grad" if saved_up is None else "hidden_grad_saved"
    tile = choose_tile(kind, hidden, num_experts, ffn_dim, d_model)
    partials = gates.new_empty(hidden.shape[0], triton.cdiv(ffn_dim, tile.columns))
    launch(
        _hidden_grad_kernel,
        (programs_for(tile, hidden, num_experts, ffn_dim),),
        grad_ptr=grad,
        order_ptr=order,
        offsets_ptr=offsets,
        gates_ptr=gates,
        down_ptr=down_proj,
        saved_up_ptr=saved_up,
        saved_gate_ptr=saved_gate,
        hidden_ptr=hidden,
        grad_up_ptr=grad_up,
        grad_gate_ptr=grad_gate,
        partials_ptr=partials,
        top_k=gates.shape[1],
        num_experts=num_experts,
        d_model=d_model,
        ffn_dim=ffn_dim,
        stride_grad_row=grad.stride(0),
        stride_down_expert=down_proj.stride(0),
        stride_down_out=down_proj.stride(1),
        ACTIVATION=activation,
        E_PADDED=triton.next_power_of_2(num_experts),
        BLOCK_ROWS=tile.rows,
        BLOCK_COLUMNS=tile.columns,
        BLOCK_INNER=tile.inner,
        EVEN_INNER=d_model % tile.inner == 0,
        EVEN_COLUMNS=ffn_dim % tile.columns == 0,
        SWAP=tile.swap,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return grad_up, grad_gate, partials


def _empty_if(rows: Tensor, wanted: bool) -> Tensor | None:
    return rows.new_empty(rows.shape) if wanted else None
