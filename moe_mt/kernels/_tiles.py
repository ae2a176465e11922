"""Device functions that several kernels share: products, addresses, activations, tile order."""

import os

import triton
import triton.language as tl

__all__ = [
    "activate",
    "activation_grad",
    "dot",
    "element_offset",
    "load_tile",
    "row_blocks_of",
    "tile_of",
    "tile_offsets",
]

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, accumulator):
    """Return ``accumulator + a @ b``, summed in float32; float32 operands are not rounded."""
    if INTERPRETED:
        # The interpreter multiplies bfloat16 as if its bits were integers.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def element_offset(index, stride):
    """Return ``index * stride`` in 64 bits: one weight of the 54B has 2^31 elements."""
    return index.to(tl.int64) * stride


@triton.jit
def load_tile(
    ptrs, rows_inside, columns_inside, EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr
):
    """Load a tile, with zeros where an axis that need not be even is past its end.

    A mask, not an index that is held inside: along the axis whose elements are neighbours that
    would end wide loads. No mask where none is needed, for the same reason on other widths.
    """
    if EVEN_ROWS and EVEN_COLUMNS:
        return tl.load(ptrs)
    elif EVEN_ROWS:
        return tl.load(ptrs, mask=columns_inside, other=0.0)
    elif EVEN_COLUMNS:
        return tl.load(ptrs, mask=rows_inside, other=0.0)
    else:
        return tl.load(ptrs, mask=rows_inside & columns_inside, other=0.0)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Apply an activation in float32."""
    if ACTIVATION == "relu":
        # Not maximum, which may drop a NaN.
        return tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    else:
        tl.static_assert(ACTIVATION == "gelu")
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def activation_grad(x, ACTIVATION: tl.constexpr):
    """Return the derivative of an activation where its input is ``x``, in float32."""
    if ACTIVATION == "relu":
        # Not above zero, which a NaN is not either.
        return tl.where(x <= 0, 0.0, 1.0)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(x)
        return s * (1 + x * (1 - s))
    else:
        tl.static_assert(ACTIVATION == "gelu")
        cdf = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        return cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def row_blocks_of(offsets_ptr, num_experts, E_PADDED: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Return (E_PADDED,) int32: how many blocks the rows of each expert fill."""
    experts = tl.arange(0, E_PADDED)
    real = experts < num_experts
    first = tl.load(offsets_ptr + experts, mask=real, other=0)
    last = tl.load(offsets_ptr + experts + 1, mask=real, other=0)
    return ((last - first + BLOCK_ROWS - 1) // BLOCK_ROWS).to(tl.int32)


@triton.jit
def tile_of(
    tile, tiles, num_columns, offsets_ptr, E_PADDED: tl.constexpr, BLOCK_ROWS: tl.constexpr
):
    """Return which expert, row block and column block tile ``tile`` is, and the expert's rows.

    Experts follow each other; within one, the row blocks of a column block do, so that a weight
    tile that is read once serves them all from the cache.

    Args:
        tile: Index of the tile, below ``sum(tiles) * num_columns``.
        tiles: (E_PADDED,) int32, row blocks of each expert.
        num_columns: Column blocks of every expert.
        offsets_ptr: (E + 1,) int64, rows of each expert.
        E_PADDED: Experts, rounded up to a power of two.
        BLOCK_ROWS: Rows of a tile.
    """
    ends = tl.cumsum(tiles, 0) * num_columns
    expert = tl.sum((ends <= tile).to(tl.int32), 0)
    before = tl.sum(tl.where(tl.arange(0, E_PADDED) < expert, tiles, 0), 0) * num_columns
    first_row = tl.load(offsets_ptr + expert)
    last_row = tl.load(offsets_ptr + expert + 1)
    row_blocks = ((last_row - first_row + BLOCK_ROWS - 1) // BLOCK_ROWS).to(tl.int32)
    column_block = (tile - before) // row_blocks
    row_block = (tile - before) % row_blocks
    return expert, row_block, column_block, first_row, last_row


@triton.jit
def tile_offsets(stride_row, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Return the offsets of a tile's elements from its first, in 32 bits.

    Enough inside a tile, whose rows are few, and half the registers of 64 bits; the offset of the
    first element itself is 64 bits wide.
    """
    rows = tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_COLUMNS)
    return rows[:, None] * stride_row + columns[None, :]
