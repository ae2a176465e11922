"""Which queries and keys are whose, which keys count, and which weights dropout keeps."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false
# Triton's own annotations take its ranges for no iterables and its constants for no numbers.

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from moe_mt.kernels._tiles import element_offset, row_blocks_of

__all__ = [
    "Limits",
    "kept",
    "keys_of",
    "lse_offset",
    "place_of",
    "rows_of",
    "tile_start",
    "valid_keys",
]

LOG2_E = tl.constexpr(1.4426950408889634)


class Limits(NamedTuple):
    """What bounds attention; shapes as ``moe_mt.ops.cross_attention`` takes them."""

    key_lengths: Tensor | None
    key_mask: Tensor | None
    query_offsets: Tensor | None
    key_offsets: Tensor | None
    seed: Tensor | None
    """(1,) int64, or ``None`` without dropout."""

    def sentences(self, query: Tensor) -> int:
        """Return how many sentences there are."""
        packed = self.query_offsets
        return query.shape[0] if packed is None else packed.numel() - 1

    def length(self, tensor: Tensor) -> int:
        """Return how many rows of (B, H, L, d_head) a sentence has; in a packed batch, the mean."""
        rows = tensor.shape[2]
        return rows // max(self.sentences(tensor), 1) if self.packed() else rows

    def packed(self) -> bool:
        """Return whether sentences stand behind each other in one row."""
        return self.query_offsets is not None


@triton.jit
def place_of(
    program,
    offsets_ptr,
    length,
    sentences,
    heads,
    SENTENCES_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return a program's sentence, head and block, and its sentence's first row and rows.

    Blocks of one sentence and head follow each other, so that what they share stays in the cache.
    In a packed batch there are more programs than blocks: the last ones get a sentence of no row.
    """
    if offsets_ptr is None:
        blocks = tl.cdiv(length, BLOCK)
        block = program % blocks
        head = program // blocks % heads
        sentence = program // blocks // heads
        first = tl.zeros((), tl.int64)
        rows = length
    else:
        tiles = row_blocks_of(offsets_ptr, sentences, SENTENCES_PADDED, BLOCK)
        ends = tl.cumsum(tiles, 0) * heads
        numbers = tl.arange(0, SENTENCES_PADDED)
        found = tl.sum(((ends <= program) & (numbers < sentences)).to(tl.int32), 0)
        sentence = tl.minimum(found, sentences - 1)
        before = tl.sum(tl.where(numbers < sentence, tiles, 0), 0) * heads
        first, rows = rows_of(sentence, offsets_ptr, length)
        blocks = tl.maximum(tl.cdiv(rows, BLOCK), 1)
        block = (program - before) % blocks
        head = (program - before) // blocks % heads
        rows = tl.where(found < sentences, rows, 0)
    return sentence, head, block, first, rows


@triton.jit
def rows_of(sentence, offsets_ptr, length):
    """Return the first row of a sentence and how many it has."""
    if offsets_ptr is None:
        first = tl.zeros((), tl.int64)
        rows = length
    else:
        first = tl.load(offsets_ptr + sentence).to(tl.int64)
        rows = (tl.load(offsets_ptr + sentence + 1) - first).to(tl.int32)
    return first, rows


@triton.jit
def keys_of(sentence, key_lengths_ptr, key_mask_ptr, key_offsets_ptr, keys):
    """Return a sentence's first key, and how many there are up to the last valid one."""
    first, count = rows_of(sentence, key_offsets_ptr, keys)
    if key_lengths_ptr is not None:
        count = tl.minimum(tl.load(key_lengths_ptr + sentence), keys).to(tl.int32)
    if key_mask_ptr is not None:
        BLOCK: tl.constexpr = 1024
        last = tl.zeros((BLOCK,), tl.int32)
        places = tl.arange(0, BLOCK)
        mask_ptrs = key_mask_ptr + element_offset(sentence, keys) + places
        for start in tl.range(0, keys, BLOCK):
            valid = tl.load(mask_ptrs + start, mask=start + places < keys, other=0)
            last = tl.where(valid != 0, start + places + 1, last)
        count = tl.max(last, 0)
    return first, count


@triton.jit
def valid_keys(sentence, start, count, key_mask_ptr, keys, BLOCK_KEYS: tl.constexpr):
    """Return (BLOCK_KEYS,) bool: which keys from ``start`` on are valid."""
    places = start + tl.arange(0, BLOCK_KEYS)
    valid = places < count
    if key_mask_ptr is not None:
        mask_ptrs = key_mask_ptr + element_offset(sentence, keys) + places
        valid = tl.load(mask_ptrs, mask=valid, other=0) != 0
    return valid


@triton.jit
def tile_start(ptr, sentence, head, row, stride_sentence, stride_head, stride_row):
    """Return the pointer to a row of a sentence and head."""
    return ptr + (
        element_offset(sentence, stride_sentence)
        + element_offset(head, stride_head)
        + element_offset(row, stride_row)
    )


@triton.jit
def lse_offset(sentence, head, first, heads, length, PACKED: tl.constexpr):
    """Return where a sentence's and head's first number stands in a (B, H, L) of numbers."""
    if PACKED:
        return element_offset(head, length) + first
    else:
        return element_offset(sentence * heads + head, length)


@triton.jit
def kept(
    seed,
    sentence,
    head,
    first_query,
    first_key,
    dropped_below,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Return (BLOCK_QUERIES, BLOCK_KEYS) bool: what dropout keeps.

    The definition is ``moe_mt.ops.dropout.keep_mask``: four keys share a counter, a word each.
    ``first_key`` is a multiple of 4.
    """
    zeros = tl.zeros((BLOCK_QUERIES, BLOCK_KEYS // 4), tl.int32)
    groups = zeros + (first_key // 4 + tl.arange(0, BLOCK_KEYS // 4))[None, :]
    queries = zeros + (first_query + tl.arange(0, BLOCK_QUERIES))[:, None]
    w0, w1, w2, w3 = tl.philox(seed, groups, queries, zeros + head, zeros + sentence, 7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK_QUERIES, BLOCK_KEYS)
    return (words >> 8).to(tl.int32) >= dropped_below
