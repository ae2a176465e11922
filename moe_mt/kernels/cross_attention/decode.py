"""Attention of few queries, as in decoding: the beams of a sentence, one program a head.

All that takes time is to read the keys and values once. Keys are the left operand, whose rows fill
the matrix unit, and the few queries the right one.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false
# Triton's own annotations take its ranges for no iterables and its constants for no numbers.

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_mt.kernels._launch import accelerator_of, launch
from moe_mt.kernels._tiles import dot, element_offset, load_tile, tile_offsets
from moe_mt.kernels.cross_attention.call import NOT_SPECIALISED, Call, padded_width, strides
from moe_mt.kernels.cross_attention.limits import (
    LOG2_E,
    keys_of,
    tile_start,
    valid_keys,
)
from moe_mt.kernels.cross_attention.tiles import decode_tile

__all__ = ["DECODE_QUERIES", "attend_decode"]

DECODE_QUERIES = 16
"""Most queries of a sentence that take this path."""


@triton.jit(do_not_specialize=NOT_SPECIALISED, do_not_specialize_on_alignment=NOT_SPECIALISED)
def _decode_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    key_lengths_ptr,
    key_mask_ptr,
    out_ptr,
    lse_ptr,
    maxima_ptr,
    heads,
    queries,
    keys,
    scale,
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
    SPLITS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Attend to all keys of one sentence and head, or to one of ``SPLITS`` parts of them.

    A part is written as it is, not yet divided by its sum: ``out`` is (SPLITS, B * H, L, d_head)
    float32 then, ``lse`` holds sums and ``maxima`` maxima, both (SPLITS, B * H, L).
    """
    EVEN_HEAD: tl.constexpr = D_HEAD == D_PADDED
    split = tl.program_id(0) % SPLITS
    row = tl.program_id(0) // SPLITS
    sentence = row // heads
    head = row % heads
    first, count = keys_of(sentence, key_lengths_ptr, key_mask_ptr, None, keys)
    # Parts are cut from all keys, not from the valid ones: where they lie is known before these.
    part = tl.cdiv(tl.cdiv(keys, SPLITS), BLOCK_KEYS) * BLOCK_KEYS
    begin = split * part
    end = tl.minimum(begin + part, count)
    inner = tl.arange(0, D_PADDED)
    few = tl.arange(0, BLOCK_QUERIES)
    inner_inside = inner < D_HEAD
    few_inside = few < queries
    query_start = tile_start(
        query_ptr, sentence, head, first, stride_query_sentence, stride_query_head, stride_query_row
    )
    query = tl.load(
        query_start + (inner[:, None] + few[None, :] * stride_query_row),
        mask=inner_inside[:, None] & few_inside[None, :],
        other=0.0,
    )
    key_ptrs = tile_start(
        key_ptr, sentence, head, begin, stride_key_sentence, stride_key_head, stride_key_row
    ) + tile_offsets(stride_key_row, BLOCK_KEYS, D_PADDED)
    value_ptrs = tile_start(
        value_ptr, sentence, head, begin, stride_value_sentence, stride_value_head, stride_value_row
    ) + tile_offsets(stride_value_row, BLOCK_KEYS, D_PADDED)
    scale_log2 = scale * LOG2_E

    maximum = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_QUERIES,), tl.float32)
    out = tl.zeros((D_PADDED, BLOCK_QUERIES), tl.float32)
    for start in tl.range(begin, end, BLOCK_KEYS):
        valid = valid_keys(sentence, start, count, key_mask_ptr, keys, BLOCK_KEYS)
        key = load_tile(key_ptrs, valid[:, None], inner_inside[None, :], False, EVEN_HEAD)
        value = load_tile(value_ptrs, valid[:, None], inner_inside[None, :], False, EVEN_HEAD)
        scores = dot(key, query, tl.zeros((BLOCK_KEYS, BLOCK_QUERIES), tl.float32))
        scores = tl.where(valid[:, None], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 0))
        # As long as no key is valid, exp2(-inf - 0) = 0 and not exp2(-inf + inf).
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum * scale_log2)
        weights = tl.math.exp2(scores * scale_log2 - shift[None, :])
        correction = tl.math.exp2(maximum * scale_log2 - shift)
        total = total * correction + tl.sum(weights, 0)
        out = dot(tl.trans(value), weights.to(value.dtype), out * correction[None, :])
        maximum = new_maximum
        key_ptrs += BLOCK_KEYS * stride_key_row
        value_ptrs += BLOCK_KEYS * stride_value_row

    inside = inner_inside[:, None] & few_inside[None, :]
    if SPLITS > 1:
        part_row = element_offset(split * (tl.num_programs(0) // SPLITS) + row, queries) + few
        tl.store(maxima_ptr + part_row, maximum * scale_log2, mask=few_inside)
        tl.store(lse_ptr + part_row, total, mask=few_inside)
        tl.store(out_ptr + (part_row * D_HEAD)[None, :] + inner[:, None], out, mask=inside)
    else:
        out_start = tile_start(
            out_ptr, sentence, head, first, stride_out_sentence, stride_out_head, stride_out_row
        )
        _store_result(
            out_start + (inner[:, None] + few[None, :] * stride_out_row),
            lse_ptr + (element_offset(row, queries) + few),
            out,
            maximum * scale_log2,
            total,
            inside,
            few_inside,
        )


@triton.jit
def _store_result(out_ptrs, lse_ptrs, out, maximum_log2, total, inside, few_inside):
    """Divide the weighted sum (D_PADDED, BLOCK_QUERIES) by the sum, and write both results."""
    # Without a valid key: 0 / 1, and a log-sum-exp of -inf + log(1).
    total = tl.where(total == 0, 1.0, total)
    tl.store(out_ptrs, (out / total[None, :]).to(out_ptrs.dtype.element_ty), mask=inside)
    tl.store(lse_ptrs, maximum_log2 / LOG2_E + tl.log(total), mask=few_inside)


@triton.jit(do_not_specialize=["queries"], do_not_specialize_on_alignment=["queries"])
def _merge_kernel(
    parts_ptr,
    totals_ptr,
    maxima_ptr,
    out_ptr,
    lse_ptr,
    heads,
    queries,
    stride_out_sentence,
    stride_out_head,
    stride_out_row,
    D_HEAD: tl.constexpr,
    D_PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
):
    """Merge the parts of one sentence and head, in their order."""
    row = tl.program_id(0)
    inner = tl.arange(0, D_PADDED)
    few = tl.arange(0, BLOCK_QUERIES)
    few_inside = few < queries
    inside = (inner < D_HEAD)[:, None] & few_inside[None, :]
    maximum = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_QUERIES,), tl.float32)
    out = tl.zeros((D_PADDED, BLOCK_QUERIES), tl.float32)
    for split in tl.range(0, SPLITS):
        part_row = element_offset(split * tl.num_programs(0) + row, queries) + few
        part_maximum = tl.load(maxima_ptr + part_row, mask=few_inside, other=float("-inf"))
        part_total = tl.load(totals_ptr + part_row, mask=few_inside, other=0.0)
        part = tl.load(
            parts_ptr + (part_row * D_HEAD)[None, :] + inner[:, None], mask=inside, other=0.0
        )
        new_maximum = tl.maximum(maximum, part_maximum)
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        correction = tl.math.exp2(maximum - shift)
        part_correction = tl.math.exp2(part_maximum - shift)
        total = total * correction + part_total * part_correction
        out = out * correction[None, :] + part * part_correction[None, :]
        maximum = new_maximum
    first = tl.zeros((), tl.int64)
    out_start = tile_start(
        out_ptr,
        row // heads,
        row % heads,
        first,
        stride_out_sentence,
        stride_out_head,
        stride_out_row,
    )
    _store_result(
        out_start + (inner[:, None] + few[None, :] * stride_out_row),
        lse_ptr + (element_offset(row, queries) + few),
        out,
        maximum,
        total,
        inside,
        few_inside,
    )


def attend_decode(call: Call, out: Tensor, lse: Tensor) -> None:
    """Write the output (B, H, L, d_head) and the log-sum-exp (B, H, L), L <= 16, no dropout."""
    query, key, value = call.query, call.key, call.value
    sentences, heads, queries, d_head = query.shape
    keys = key.shape[2]
    tile = decode_tile(query)
    splits = _splits(query, keys, tile.keys)
    shape = {
        "D_HEAD": d_head,
        "D_PADDED": padded_width(query),
        "SPLITS": splits,
        "BLOCK_QUERIES": tile.queries,
    }
    limits = call.limits_arguments()
    parts, totals, maxima = out, lse, None
    if splits > 1:
        parts = query.new_empty(splits, *query.shape, dtype=torch.float32)
        totals, maxima = lse.new_empty(2, splits, *lse.shape)
    launch(
        _decode_kernel,
        (sentences * heads * splits,),
        query_ptr=query,
        key_ptr=key,
        value_ptr=value,
        key_lengths_ptr=limits["key_lengths_ptr"],
        key_mask_ptr=limits["key_mask_ptr"],
        out_ptr=parts,
        lse_ptr=totals,
        maxima_ptr=maxima,
        heads=heads,
        queries=queries,
        keys=keys,
        scale=call.scale,
        **strides(query=query, key=key, value=value, out=out),
        **shape,
        BLOCK_KEYS=tile.keys,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if splits > 1:
        launch(
            _merge_kernel,
            (sentences * heads,),
            parts_ptr=parts,
            totals_ptr=totals,
            maxima_ptr=maxima,
            out_ptr=out,
            lse_ptr=lse,
            heads=heads,
            queries=queries,
            **strides(out=out),
            **shape,
            num_warps=4,
        )


def _splits(query: Tensor, keys: int, block_keys: int) -> int:
    """Return into how many parts keys are cut: 1 where there are programs enough.

    A power of two, of which few are compiled, and parts of two tiles at least.
    """
    programs = max(query.shape[0] * query.shape[1], 1)
    wanted = triton.cdiv(2 * accelerator_of(query).multiprocessors, programs)
    return min(triton.next_power_of_2(wanted), _power_of_2_below(keys // (2 * block_keys)), 16)


def _power_of_2_below(number: int) -> int:
    """Return the largest power of two that is not above a number, or 1."""
    return 1 << max(number.bit_length() - 1, 0)
