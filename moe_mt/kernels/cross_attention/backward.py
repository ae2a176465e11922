"""Gradients of attention: one kernel for queries, one for keys and values, no atomics.

Weights are computed anew from the saved log-sum-exp (Dao, arXiv:2307.08691, section 3.1.2).
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false
# Triton's own annotations take its ranges for no iterables and its constants for no numbers.

import torch
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
    rows_of,
    tile_start,
    valid_keys,
)
from moe_mt.kernels.cross_attention.tiles import grad_key_value_tile, grad_query_tile

__all__ = ["grad_key_value", "grad_query"]


@triton.jit(do_not_specialize=NOT_SPECIALISED, do_not_specialize_on_alignment=NOT_SPECIALISED)
def _grad_query_kernel(
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
    grad_ptr,
    grad_lse_ptr,
    delta_ptr,
    grad_query_ptr,
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
    stride_grad_sentence,
    stride_grad_head,
    stride_grad_row,
    D_HEAD: tl.constexpr,
    D_PADDED: tl.constexpr,
    SENTENCES_PADDED: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Write the gradient of a block of queries, and delta, which the other kernel reads.

    Delta is what the softmax subtracts from the gradient of every weight of a query:
    ``sum(grad * out)``, less the gradient of the log-sum-exp.
    """
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
    row_in_sentence = first_row + tl.arange(0, BLOCK_QUERIES)
    rows_inside = row_in_sentence < rows
    columns_inside = (tl.arange(0, D_PADDED) < D_HEAD)[None, :]
    inside = rows_inside[:, None]
    row = first_query + first_row
    query_ptrs = tile_start(
        query_ptr, sentence, head, row, stride_query_sentence, stride_query_head, stride_query_row
    ) + tile_offsets(stride_query_row, BLOCK_QUERIES, D_PADDED)
    out_ptrs = tile_start(
        out_ptr, sentence, head, row, stride_out_sentence, stride_out_head, stride_out_row
    ) + tile_offsets(stride_out_row, BLOCK_QUERIES, D_PADDED)
    grad_ptrs = tile_start(
        grad_ptr, sentence, head, row, stride_grad_sentence, stride_grad_head, stride_grad_row
    ) + tile_offsets(stride_grad_row, BLOCK_QUERIES, D_PADDED)
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
    numbers = lse_offset(sentence, head, first_query, heads, queries, PACKED) + row_in_sentence

    out = load_tile(out_ptrs, inside, columns_inside, False, EVEN_HEAD)
    grad = load_tile(grad_ptrs, inside, columns_inside, False, EVEN_HEAD)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + numbers, mask=rows_inside, other=0.0)
    tl.store(delta_ptr + numbers, delta, mask=rows_inside)
    query = load_tile(query_ptrs, inside, columns_inside, False, EVEN_HEAD)
    lse = tl.load(lse_ptr + numbers, mask=rows_inside, other=0.0) * LOG2_E
    seed = tl.load(seed_ptr) if DROPOUT else 0

    grad_query = tl.zeros((BLOCK_QUERIES, D_PADDED), tl.float32)
    for start in tl.range(0, count, BLOCK_KEYS):
        valid = valid_keys(sentence, start, count, key_mask_ptr, keys, BLOCK_KEYS)
        key = load_tile(key_ptrs, valid[:, None], columns_inside, False, EVEN_HEAD)
        value = load_tile(value_ptrs, valid[:, None], columns_inside, False, EVEN_HEAD)
        none = tl.zeros((BLOCK_QUERIES, BLOCK_KEYS), tl.float32)
        scores = dot(query, tl.trans(key), none)
        # Without a valid key there is no weight, and no finite log-sum-exp.
        weights = tl.where(
            valid[None, :], tl.math.exp2(scores * (scale * LOG2_E) - lse[:, None]), 0.0
        )
        grad_weights = dot(grad, tl.trans(value), none)
        if DROPOUT:
            keep = kept(
                seed, sentence, head, first_row, start, dropped_below, BLOCK_QUERIES, BLOCK_KEYS
            )
            rescale = 1 / (1 - dropped_below / 16777216.0)
            grad_weights = tl.where(keep, grad_weights * rescale, 0.0)
        grad_scores = weights * (grad_weights - delta[:, None])
        grad_query = dot(grad_scores.to(key.dtype), key, grad_query)
        key_ptrs += BLOCK_KEYS * stride_key_row
        value_ptrs += BLOCK_KEYS * stride_value_row

    # Gradients lie like the output.
    grad_query_ptrs = tile_start(
        grad_query_ptr, sentence, head, row, stride_out_sentence, stride_out_head, stride_out_row
    ) + tile_offsets(stride_out_row, BLOCK_QUERIES, D_PADDED)
    tl.store(
        grad_query_ptrs,
        (grad_query * scale).to(grad_query_ptr.dtype.element_ty),
        mask=inside & columns_inside,
    )


@triton.jit(do_not_specialize=NOT_SPECIALISED, do_not_specialize_on_alignment=NOT_SPECIALISED)
def _grad_key_value_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    key_lengths_ptr,
    key_mask_ptr,
    query_offsets_ptr,
    key_offsets_ptr,
    seed_ptr,
    lse_ptr,
    grad_ptr,
    delta_ptr,
    grad_key_ptr,
    grad_value_ptr,
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
    stride_grad_sentence,
    stride_grad_head,
    stride_grad_row,
    stride_grad_key_sentence,
    stride_grad_key_head,
    stride_grad_key_row,
    D_HEAD: tl.constexpr,
    D_PADDED: tl.constexpr,
    SENTENCES_PADDED: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Write the gradients of a block of keys and values: sums over all queries of the sentence."""
    EVEN_HEAD: tl.constexpr = D_HEAD == D_PADDED
    DROPOUT: tl.constexpr = seed_ptr is not None
    PACKED: tl.constexpr = query_offsets_ptr is not None
    sentence, head, block, first_key, own_keys = place_of(
        tl.program_id(0), key_offsets_ptr, keys, sentences, heads, SENTENCES_PADDED, BLOCK_KEYS
    )
    _, count = keys_of(sentence, key_lengths_ptr, key_mask_ptr, key_offsets_ptr, keys)
    first_query, rows = rows_of(sentence, query_offsets_ptr, queries)
    start_key = block * BLOCK_KEYS
    # Padding gets zeros, for which nothing is read, and a program too many has no key.
    rows = tl.where(start_key < tl.minimum(count, own_keys), rows, 0)
    valid = valid_keys(sentence, start_key, count, key_mask_ptr, keys, BLOCK_KEYS)[:, None]
    columns_inside = (tl.arange(0, D_PADDED) < D_HEAD)[None, :]
    key_ptrs = tile_start(
        key_ptr,
        sentence,
        head,
        first_key + start_key,
        stride_key_sentence,
        stride_key_head,
        stride_key_row,
    ) + tile_offsets(stride_key_row, BLOCK_KEYS, D_PADDED)
    value_ptrs = tile_start(
        value_ptr,
        sentence,
        head,
        first_key + start_key,
        stride_value_sentence,
        stride_value_head,
        stride_value_row,
    ) + tile_offsets(stride_value_row, BLOCK_KEYS, D_PADDED)
    query_ptrs = tile_start(
        query_ptr,
        sentence,
        head,
        first_query,
        stride_query_sentence,
        stride_query_head,
        stride_query_row,
    ) + tile_offsets(stride_query_row, BLOCK_QUERIES, D_PADDED)
    grad_ptrs = tile_start(
        grad_ptr,
        sentence,
        head,
        first_query,
        stride_grad_sentence,
        stride_grad_head,
        stride_grad_row,
    ) + tile_offsets(stride_grad_row, BLOCK_QUERIES, D_PADDED)
    numbers = lse_offset(sentence, head, first_query, heads, queries, PACKED)
    key = load_tile(key_ptrs, valid, columns_inside, False, EVEN_HEAD)
    value = load_tile(value_ptrs, valid, columns_inside, False, EVEN_HEAD)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    rescale = 1 / (1 - dropped_below / 16777216.0)

    grad_key = tl.zeros((BLOCK_KEYS, D_PADDED), tl.float32)
    grad_value = tl.zeros((BLOCK_KEYS, D_PADDED), tl.float32)
    for start in tl.range(0, rows, BLOCK_QUERIES):
        row_in_sentence = start + tl.arange(0, BLOCK_QUERIES)
        rows_inside = row_in_sentence < rows
        query = load_tile(query_ptrs, rows_inside[:, None], columns_inside, False, EVEN_HEAD)
        grad = load_tile(grad_ptrs, rows_inside[:, None], columns_inside, False, EVEN_HEAD)
        # Rows past the last have weight exp2(-inf) = 0. Invalid keys are dropped when all is done.
        lse = tl.load(lse_ptr + numbers + row_in_sentence, mask=rows_inside, other=float("inf"))
        delta = tl.load(delta_ptr + numbers + row_in_sentence, mask=rows_inside, other=0.0)
        none = tl.zeros((BLOCK_KEYS, BLOCK_QUERIES), tl.float32)
        scores = dot(key, tl.trans(query), none)
        weights = tl.math.exp2(scores * (scale * LOG2_E) - (lse * LOG2_E)[None, :])
        grad_weights = dot(value, tl.trans(grad), none)
        used = weights
        if DROPOUT:
            keep = tl.trans(
                kept(
                    seed,
                    sentence,
                    head,
                    start,
                    start_key,
                    dropped_below,
                    BLOCK_QUERIES,
                    BLOCK_KEYS,
                )
            )
            used = tl.where(keep, weights * rescale, 0.0)
            grad_weights = tl.where(keep, grad_weights * rescale, 0.0)
        grad_value = dot(used.to(grad.dtype), grad, grad_value)
        grad_scores = weights * (grad_weights - delta[None, :])
        grad_key = dot(grad_scores.to(query.dtype), query, grad_key)
        query_ptrs += BLOCK_QUERIES * stride_query_row
        grad_ptrs += BLOCK_QUERIES * stride_grad_row

    own = (start_key + tl.arange(0, BLOCK_KEYS) < own_keys)[:, None] & columns_inside
    to_grad = tile_start(
        tl.zeros((), tl.int64),
        sentence,
        head,
        first_key + start_key,
        stride_grad_key_sentence,
        stride_grad_key_head,
        stride_grad_key_row,
    ) + tile_offsets(stride_grad_key_row, BLOCK_KEYS, D_PADDED)
    grad_key = tl.where(valid, grad_key * scale, 0.0)
    grad_value = tl.where(valid, grad_value, 0.0)
    tl.store(grad_key_ptr + to_grad, grad_key.to(grad_key_ptr.dtype.element_ty), mask=own)
    tl.store(grad_value_ptr + to_grad, grad_value.to(grad_value_ptr.dtype.element_ty), mask=own)


def grad_query(
    call: Call,
    grad: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    found: Tensor,
) -> Tensor:
    """Write the gradient of the queries into ``found`` and return delta (B, H, L)."""
    delta = torch.empty_like(lse)
    tile = grad_query_tile(call.query, dropout=call.dropped_below > 0)
    launch(
        _grad_query_kernel,
        (call.programs(call.query, tile.queries),),
        out_ptr=out,
        lse_ptr=lse,
        grad_ptr=grad,
        grad_lse_ptr=grad_lse,
        delta_ptr=delta,
        grad_query_ptr=found,
        **call.arguments(tile, out=out, grad=grad),
    )
    return delta


def grad_key_value(
    call: Call,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    found_key: Tensor,
    found_value: Tensor,
) -> None:
    """Write the gradients of keys and values into ``found_key`` and ``found_value``."""
    tile = grad_key_value_tile(call.query, call.limits.length(call.key))
    launch(
        _grad_key_value_kernel,
        (call.programs(call.key, tile.keys),),
        lse_ptr=lse,
        grad_ptr=grad,
        delta_ptr=delta,
        grad_key_ptr=found_key,
        grad_value_ptr=found_value,
        **call.arguments(tile, grad=grad, grad_key=found_key),
    )
