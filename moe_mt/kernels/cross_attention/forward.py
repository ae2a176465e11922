"""Attention of many queries, as in training: a program owns a block of them."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false
# Triton's own annotations take its ranges for no iterables and its constants for no numbers.

import triton
import triton.language as tl
from torch import Tensor

from moe_mt.kernels._launch import launch
from moe_mt.kernels._tiles import dot, load_tile, tile_offsets
from moe_mt.kernels.cross_attention.call import NOT_SPECIALISED, Call
from moe_mt.kernels.cross_attention.limits import (
    LOG2_E,
    kept,
    keys_of,
    lse_offset,
    place_of,
    tile_start,
    valid_keys,
)
from moe_mt.kernels.cross_attention.tiles import forward_tile

__all__ = ["attend"]


@triton.jit(do_not_specialize=NOT_SPECIALISED, do_not_specialize_on_alignment=NOT_SPECIALISED)
def _forward_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    key_lengths_ptr,
    key_mask_ptr,
    query_offsets_ptr,
    key_offsets_ptr,
    seed_ptr,
    out_ptr,
    lse_ptr,
    sentences,
    heads,
    queries,
    keys,
    scale,
    dropped_below,
    stride_query_sentence,
    stride_query_head,
    stride_query_row,
    stride_key_sentence,
    stride_key_head,
    stride_key_row,
    stride_value_sentence,
    stride_value_head,
    stride_value_row,
    stride_out_sentence,
    stride_out_head,
    stride_out_row,
    D_HEAD: tl.constexpr,
    D_PADDED: tl.constexpr,
    SENTENCES_PADDED: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Write the output and the log-sum-exp of a block of queries of one sentence and head."""
    EVEN_HEAD: tl.constexpr = D_HEAD == D_PADDED
    DROPOUT: tl.constexpr = seed_ptr is not None
    PACKED: tl.constexpr = query_offsets_ptr is not None
    sentence, head, block, first_query, rows = place_of(
        tl.program_id(0),
        query_offsets_ptr,
        queries,
        sentences,
        heads,
        SENTENCES_PADDED,
        BLOCK_QUERIES,
    )
    first_key, count = keys_of(sentence, key_lengths_ptr, key_mask_ptr, key_offsets_ptr, keys)
    if PACKED:  # a program too many has no row, and nothing to read
        count = tl.where(rows > 0, count, 0)
    first_row = block * BLOCK_QUERIES
    columns_inside = (tl.arange(0, D_PADDED) < D_HEAD)[None, :]
    rows_inside = first_row + tl.arange(0, BLOCK_QUERIES) < rows
    query_ptrs = tile_start(
        query_ptr,
        sentence,
        head,
        first_query + first_row,
        stride_query_sentence,
        stride_query_head,
        stride_query_row,
    ) + tile_offsets(stride_query_row, BLOCK_QUERIES, D_PADDED)
    key_ptrs = tile_start(
        key_ptr, sentence, head, first_key, stride_key_sentence, stride_key_head, stride_key_row
    ) + tile_offsets(stride_key_row, BLOCK_KEYS, D_PADDED)
    value_ptrs = tile_start(
        value_ptr,
        sentence,
        head,
        first_key,
        stride_value_sentence,
        stride_value_head,
        stride_value_row,
    ) + tile_offsets(stride_value_row, BLOCK_KEYS, D_PADDED)
    query = load_tile(query_ptrs, rows_inside[:, None], columns_inside, False, EVEN_HEAD)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    scale_log2 = scale * LOG2_E

    maximum = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_QUERIES,), tl.float32)
    out = tl.zeros((BLOCK_QUERIES, D_PADDED), tl.float32)
    # One loop that masks every block: whole blocks and the last one in two loops could not load
    # ahead for each other.
    for start in tl.range(0, count, BLOCK_KEYS):
        valid = valid_keys(sentence, start, count, key_mask_ptr, keys, BLOCK_KEYS)
        key = load_tile(key_ptrs, valid[:, None], columns_inside, False, EVEN_HEAD)
        value = load_tile(value_ptrs, valid[:, None], columns_inside, False, EVEN_HEAD)
        scores = dot(query, tl.trans(key), tl.zeros((BLOCK_QUERIES, BLOCK_KEYS), tl.float32))
        scores = tl.where(valid[None, :], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        # As long as no key is valid, exp2(-inf - 0) = 0 and not exp2(-inf + inf).
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum * scale_log2)
        weights = tl.math.exp2(scores * scale_log2 - shift[:, None])
        correction = tl.math.exp2(maximum * scale_log2 - shift)
        total = total * correction + tl.sum(weights, 1)
        if DROPOUT:
            keep = kept(
                seed, sentence, head, first_row, start, dropped_below, BLOCK_QUERIES, BLOCK_KEYS
            )
            weights = tl.where(keep, weights, 0.0)
        out = dot(weights.to(value.dtype), value, out * correction[:, None])
        maximum = new_maximum
        key_ptrs += BLOCK_KEYS * stride_key_row
        value_ptrs += BLOCK_KEYS * stride_value_row

    # Without a valid key: 0 / 1, and a log-sum-exp of -inf + log(1).
    total = tl.where(total == 0, 1.0, total)
    lse = maximum * scale + tl.log(total)
    if DROPOUT:
        total *= 1 - dropped_below / 16777216.0
    out_ptrs = tile_start(
        out_ptr,
        sentence,
        head,
        first_query + first_row,
        stride_out_sentence,
        stride_out_head,
        stride_out_row,
    ) + tile_offsets(stride_out_row, BLOCK_QUERIES, D_PADDED)
    tl.store(
        out_ptrs,
        (out / total[:, None]).to(out_ptr.dtype.element_ty),
        mask=rows_inside[:, None] & columns_inside,
    )
    lse_ptrs = lse_ptr + lse_offset(sentence, head, first_query, heads, queries, PACKED)
    tl.store(lse_ptrs + first_row + tl.arange(0, BLOCK_QUERIES), lse, mask=rows_inside)


def attend(call: Call, out: Tensor, lse: Tensor) -> None:
    """Write the output (B, H, L, d_head) and the log-sum-exp (B, H, L)."""
    lengths = call.limits.length(call.query), call.limits.length(call.key)
    tile = forward_tile(call.query, *lengths, dropout=call.dropped_below > 0)
    launch(
        _forward_kernel,
        (call.programs(call.query, tile.queries),),
        out_ptr=out,
        lse_ptr=lse,
        **call.arguments(tile, out=out),
    )
