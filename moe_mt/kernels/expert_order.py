"""Claims in expert order: a stable counting sort without atomics.

A claim's row is the first row of its expert, plus the claims of that expert in earlier blocks, plus
those before it in its own block. The first two need every block's counts, so that more than one
block takes two launches. Dropped claims are not counted: what is no expert's is theirs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_mt.kernels._launch import launch
from moe_mt.kernels._tiles import element_offset

__all__ = ["expert_order"]

# Claims of a block: of the few of a decoding step, of most calls, at most.
SMALL_BLOCK, BLOCK, LARGEST_BLOCK = 128, 256, 1024
# Each program of the second launch reads the counts of all blocks.
MOST_BLOCKS = 256
# Integers of one step of a loop that a warp holds: 32 registers of each of its threads.
STEP = 1024

NOT_SPECIALIZED = ["num_claims", "top_k", "stride_ids_token", "stride_ids_choice"]


@triton.jit
def _load_experts(
    expert_ids_ptr, claims, num_claims, num_experts, top_k, stride_ids_token, stride_ids_choice
):
    """Return the expert of each claim; ``num_experts`` for dropped ones, which are not counted."""
    offsets = element_offset(claims // top_k, stride_ids_token)
    offsets += element_offset(claims % top_k, stride_ids_choice)
    return tl.load(expert_ids_ptr + offsets, mask=claims < num_claims, other=num_experts)


@triton.jit
def _count_block(
    expert_ids_ptr,
    first_claim,
    num_claims,
    num_experts,
    top_k,
    stride_ids_token,
    stride_ids_choice,
    E_PADDED: tl.constexpr,
    BLOCK_CLAIMS: tl.constexpr,
    STEP_CLAIMS: tl.constexpr,
):
    """Return (E_PADDED,) int32: claims of each expert in the block at ``first_claim``."""
    experts = tl.arange(0, E_PADDED)
    last_claim = tl.minimum(first_claim + BLOCK_CLAIMS, num_claims)
    counts = tl.zeros((STEP_CLAIMS, E_PADDED), tl.int32)
    for start in range(first_claim, last_claim, STEP_CLAIMS):
        claimed = _load_experts(
            expert_ids_ptr,
            start + tl.arange(0, STEP_CLAIMS),
            last_claim,
            num_experts,
            top_k,
            stride_ids_token,
            stride_ids_choice,
        )
        counts += (claimed[:, None] == experts[None, :]).to(tl.int32)
    # Padded experts hold the dropped claims, if there is room for them.
    return tl.where(experts < num_experts, tl.sum(counts, 0), 0)


@triton.jit
def _place_block(
    expert_ids_ptr,
    order_ptr,
    rows_ptr,
    first_claim,
    earlier,
    offsets,
    num_kept,
    num_claims,
    num_experts,
    top_k,
    stride_ids_token,
    stride_ids_choice,
    BLOCK_CLAIMS: tl.constexpr,
    STEP_CLAIMS: tl.constexpr,
):
    """Write the rows of the block's claims.

    Args:
        expert_ids_ptr: (T, K) int.
        order_ptr: (N,) int64, written at the rows of the block's claims.
        rows_ptr: (N,) int64, written at the block's claims.
        first_claim: Where the block begins.
        earlier: (E_PADDED,) int32, claims of each expert before the block.
        offsets: (E_PADDED,) int32, first row of each expert.
        num_kept: Claims that are not dropped, in all blocks.
        num_claims: ``N``.
        num_experts: ``E``.
        top_k: ``K``.
        stride_ids_token: Of the expert ids.
        stride_ids_choice: Of the expert ids.
        BLOCK_CLAIMS: Claims of a block.
        STEP_CLAIMS: Claims that all of the block's are compared with at once.
    """
    claims = first_claim + tl.arange(0, BLOCK_CLAIMS)
    last_claim = tl.minimum(first_claim + BLOCK_CLAIMS, num_claims)
    claimed = _load_experts(
        expert_ids_ptr,
        claims,
        last_claim,
        num_experts,
        top_k,
        stride_ids_token,
        stride_ids_choice,
    )
    ranks = tl.zeros((BLOCK_CLAIMS, STEP_CLAIMS), tl.int32)
    for start in range(first_claim, last_claim, STEP_CLAIMS):
        others = start + tl.arange(0, STEP_CLAIMS)
        others_claimed = _load_experts(
            expert_ids_ptr,
            others,
            last_claim,
            num_experts,
            top_k,
            stride_ids_token,
            stride_ids_choice,
        )
        same = claimed[:, None] == others_claimed[None, :]
        ranks += (same & (others[None, :] < claims[:, None])).to(tl.int32)
    dropped = claimed >= num_experts
    first_rows = tl.gather(earlier + offsets, tl.where(dropped, 0, claimed), 0)
    first_dropped_row = num_kept + first_claim - tl.sum(earlier, 0)
    found = tl.where(dropped, first_dropped_row, first_rows) + tl.sum(ranks, 1)
    inside = claims < last_claim
    tl.store(rows_ptr + claims, found.to(tl.int64), mask=inside)
    tl.store(order_ptr + found, claims.to(tl.int64), mask=inside)


@triton.jit
def _store_offsets(offsets_ptr, ends, num_experts, E_PADDED: tl.constexpr):
    experts = tl.arange(0, E_PADDED)
    tl.store(offsets_ptr, 0)
    tl.store(offsets_ptr + 1 + experts, ends.to(tl.int64), mask=experts < num_experts)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _order_kernel(
    expert_ids_ptr,
    order_ptr,
    rows_ptr,
    offsets_ptr,
    num_claims,
    num_experts,
    top_k,
    stride_ids_token,
    stride_ids_choice,
    E_PADDED: tl.constexpr,
    BLOCK_CLAIMS: tl.constexpr,
    COUNT_CLAIMS: tl.constexpr,
    RANK_CLAIMS: tl.constexpr,
):
    """Do everything, for claims that are one block."""
    counts = _count_block(
        expert_ids_ptr,
        0,
        num_claims,
        num_experts,
        top_k,
        stride_ids_token,
        stride_ids_choice,
        E_PADDED,
        BLOCK_CLAIMS,
        COUNT_CLAIMS,
    )
    ends = tl.cumsum(counts, 0)
    _place_block(
        expert_ids_ptr,
        order_ptr,
        rows_ptr,
        0,
        tl.zeros_like(counts),
        ends - counts,
        tl.sum(counts, 0),
        num_claims,
        num_experts,
        top_k,
        stride_ids_token,
        stride_ids_choice,
        BLOCK_CLAIMS,
        RANK_CLAIMS,
    )
    _store_offsets(offsets_ptr, ends, num_experts, E_PADDED)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _count_kernel(
    expert_ids_ptr,
    counts_ptr,
    num_claims,
    num_experts,
    top_k,
    stride_ids_token,
    stride_ids_choice,
    E_PADDED: tl.constexpr,
    BLOCK_CLAIMS: tl.constexpr,
    COUNT_CLAIMS: tl.constexpr,
):
    """counts[block, e] = claims of expert ``e`` in the block."""
    block = tl.program_id(0)
    counts = _count_block(
        expert_ids_ptr,
        block * BLOCK_CLAIMS,
        num_claims,
        num_experts,
        top_k,
        stride_ids_token,
        stride_ids_choice,
        E_PADDED,
        BLOCK_CLAIMS,
        COUNT_CLAIMS,
    )
    tl.store(counts_ptr + element_offset(block, E_PADDED) + tl.arange(0, E_PADDED), counts)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _place_kernel(
    expert_ids_ptr,
    counts_ptr,
    order_ptr,
    rows_ptr,
    offsets_ptr,
    num_claims,
    num_experts,
    top_k,
    stride_ids_token,
    stride_ids_choice,
    E_PADDED: tl.constexpr,
    BLOCK_CLAIMS: tl.constexpr,
    STEP_BLOCKS: tl.constexpr,
    RANK_CLAIMS: tl.constexpr,
):
    """Write the rows of one block's claims, from the counts of all blocks."""
    block = tl.program_id(0)
    num_blocks = tl.cdiv(num_claims, BLOCK_CLAIMS)
    before = tl.zeros((STEP_BLOCKS, E_PADDED), tl.int32)
    total = tl.zeros((STEP_BLOCKS, E_PADDED), tl.int32)
    for start in range(0, num_blocks, STEP_BLOCKS):
        blocks = start + tl.arange(0, STEP_BLOCKS)
        where = element_offset(blocks, E_PADDED)[:, None] + tl.arange(0, E_PADDED)[None, :]
        counts = tl.load(counts_ptr + where, mask=(blocks < num_blocks)[:, None], other=0)
        total += counts
        before += tl.where((blocks < block)[:, None], counts, 0)
    counts = tl.sum(total, 0)
    ends = tl.cumsum(counts, 0)
    _place_block(
        expert_ids_ptr,
        order_ptr,
        rows_ptr,
        block * BLOCK_CLAIMS,
        tl.sum(before, 0),
        ends - counts,
        tl.sum(counts, 0),
        num_claims,
        num_experts,
        top_k,
        stride_ids_token,
        stride_ids_choice,
        BLOCK_CLAIMS,
        RANK_CLAIMS,
    )
    if block == 0:
        _store_offsets(offsets_ptr, ends, num_experts, E_PADDED)


def expert_order(
    expert_ids: Tensor, num_experts: int, *, block: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``order`` (N,), ``rows`` (T, K) and ``offsets`` (E + 1,), all int64.

    Claims are taken in the row-major order of ``expert_ids``, whatever its strides: transposed
    ids let all first choices stand before any second one.

    Args:
        expert_ids: (T, K) int32, values in [0, E]; ``E`` means dropped. Any strides.
        num_experts: ``E``.
        block: Claims of a block, a power of two, or ``None`` to choose by their number.
    """
    num_claims = expert_ids.numel()
    order = expert_ids.new_empty(num_claims, dtype=torch.int64)
    rows = expert_ids.new_empty(expert_ids.shape, dtype=torch.int64)
    offsets = expert_ids.new_empty(num_experts + 1, dtype=torch.int64)
    block = _block_for(num_claims) if block is None else block
    # Without claims, one program still writes the offsets.
    num_blocks = max(triton.cdiv(num_claims, block), 1)
    e_padded = max(triton.next_power_of_2(num_experts), 16)
    num_warps = 4 if block <= SMALL_BLOCK else 8
    shared: dict[str, Any] = {
        "expert_ids_ptr": expert_ids,
        "num_claims": num_claims,
        "num_experts": num_experts,
        "top_k": max(expert_ids.shape[1], 1),
        "stride_ids_token": expert_ids.stride(0),
        "stride_ids_choice": expert_ids.stride(1),
        "E_PADDED": e_padded,
        "BLOCK_CLAIMS": block,
        "num_warps": num_warps,
    }
    counting = {"COUNT_CLAIMS": _step(num_warps, e_padded, block)}
    placing = {
        "order_ptr": order,
        "rows_ptr": rows,
        "offsets_ptr": offsets,
        "RANK_CLAIMS": _step(num_warps, block, block),
    }
    if num_blocks == 1:
        launch(_order_kernel, (1,), **shared, **counting, **placing)
        return order, rows, offsets
    counts = expert_ids.new_empty(num_blocks, e_padded, dtype=torch.int32)
    launch(_count_kernel, (num_blocks,), counts_ptr=counts, **shared, **counting)
    step_blocks = _step(num_warps, e_padded, MOST_BLOCKS)
    launch(
        _place_kernel,
        (num_blocks,),
        counts_ptr=counts,
        STEP_BLOCKS=step_blocks,
        **shared,
        **placing,
    )
    return order, rows, offsets


def _block_for(num_claims: int) -> int:
    """Return how many claims a block has.

    Comparing all pairs of a block costs its square, reading all blocks' counts that of their
    number.
    """
    if num_claims <= SMALL_BLOCK:
        return SMALL_BLOCK
    block = BLOCK
    while block < LARGEST_BLOCK and num_claims > block * MOST_BLOCKS:
        block *= 2
    return block


def _step(num_warps: int, width: int, most: int) -> int:
    """Return how many rows of ``width`` integers one step of a loop takes."""
    return min(max(STEP * num_warps // width, 1), most)
