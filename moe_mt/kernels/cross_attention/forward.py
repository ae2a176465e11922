"""Attention of many queries, as in training: a program owns a block of them."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false
# Triton's own annotations take its ranges for no iterables and its constants for no numbers.

import triton
import triton.language as tl
from torch import Tensor

from moe_mt.kernels._launch import launch
from moe_mt.kernels._tiles import dot, load_tile, tile_offsets
from moe_mt.kernels.cross_attention.limits import (
    LOG2_E,
    Limits,
    kept,
    keys_of,
    lse_offset,
    place_of,
    programs_for,
    sentences_padded,
    tile_start,
    valid_keys,
)
from moe_mt.kernels.cross_attention.tiles import forward_tile

__all__ = ["NOT_SPECIALISED", "attend", "limits_arguments", "strides"]

NOT_SPECIALISED = ["sentences", "queries", "keys", "dropped_below"]
"""What changes from call to call; a kernel compiled for one value serves all."""


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


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    limits: Limits,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    dropped_below: int,
) -> None:
    """Write the output (B, H, L, d_head) and the log-sum-exp (B, H, L)."""
    lengths = limits.length(query), limits.length(key)
    tile = forward_tile(query, *lengths, dropout=dropped_below > 0)
    sentences, packed = limits.sentences(query), limits.packed()
    launch(
        _forward_kernel,
        (programs_for(sentences, query.shape[1], query.shape[2], tile.queries, packed=packed),),
        query_ptr=query,
        key_ptr=key,
        value_ptr=value,
        **limits_arguments(limits),
        out_ptr=out,
        lse_ptr=lse,
        sentences=sentences,
        heads=query.shape[1],
        queries=query.shape[2],
        keys=key.shape[2],
        scale=scale,
        dropped_below=dropped_below,
        **strides(query=query, key=key, value=value, out=out),
        D_HEAD=query.shape[3],
        D_PADDED=max(16, triton.next_power_of_2(query.shape[3])),
        SENTENCES_PADDED=sentences_padded(sentences, packed=packed),
        BLOCK_QUERIES=tile.queries,
        BLOCK_KEYS=tile.keys,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def limits_arguments(limits: Limits) -> dict[str, Tensor | None]:
    """Return what every kernel is given of the limits."""
    return {
        f"{name}_ptr": None if tensor is None else tensor.contiguous()
        for name, tensor in limits._asdict().items()
    }


def strides(**tensors: Tensor) -> dict[str, int]:
    """Return the strides of (B, H, L, d_head) tensors, as kernels name them.

    Packed sentences share one row of the batch: they are told apart by their first rows alone.
    """
    return {
        f"stride_{name}_{axis}": tensor.stride(dim) if dim > 0 or len(tensor) > 1 else 0
        for name, tensor in tensors.items()
        for dim, axis in enumerate(("sentence", "head", "row"))
    }
