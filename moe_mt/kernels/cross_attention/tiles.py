"""How large the tiles of attention are: the largest that fit the registers.

What fits was found by compiling for Ampere, Hopper and MI300 (``benchmarks/ahead_of_time``, which
names what spills nevertheless: some float32 kernels). Which of the tiles that fit is fastest, no
GPU has said yet.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_mt.kernels._launch import accelerator_of

__all__ = [
    "FEW_KEYS",
    "Tile",
    "decode_tile",
    "forward_tile",
    "grad_key_value_tile",
    "grad_query_tile",
]

FEW_KEYS = 256
"""Up to how many keys several programs on a multiprocessor are worth more than large tiles."""


class Tile(NamedTuple):
    """What a program works on at a time, and with what."""

    queries: int
    keys: int
    warps: int
    stages: int


INTERPRETED = Tile(queries=16, keys=16, warps=4, stages=2)


def forward_tile(query: Tensor, queries: int, keys: int, *, dropout: bool) -> Tile:
    """Return the tile of the forward pass of ``query`` (B, H, L, d_head).

    Args:
        query: Only its width, dtype and device count.
        queries: How many a sentence has; in a packed batch, their mean.
        keys: As ``queries``.
        dropout: Whether there is any: random bits take registers, too.
    """
    arch = accelerator_of(query).arch
    if arch == "interpreter":
        return INTERPRETED
    wide = query.shape[3] > 128
    if query.dtype == torch.float32:
        # Products without the matrix unit hold their operands in registers.
        return Tile(16, 16 if wide or dropout else 32, 4 if _is_amd(arch) else 8, 1)
    if wide:
        return Tile(64, 32, 4 if _is_amd(arch) else 8, 1)
    block_keys = 32 if _multiplies_by_warp(arch) else 64
    if queries <= 64 or keys <= FEW_KEYS or dropout:
        return Tile(64, block_keys, 4, 2)
    if _is_amd(arch):
        return Tile(128, block_keys, 4, 1)
    return Tile(128, block_keys, 8, 2 if _multiplies_by_warp(arch) else 3)


def decode_tile(query: Tensor) -> Tile:
    """Return the tile of the decode path, for up to 16 queries (B, H, L, d_head)."""
    arch = accelerator_of(query).arch
    if arch == "interpreter":
        return INTERPRETED
    if _is_amd(arch):
        row_bytes = query.shape[3] * query.element_size()
        return Tile(16, 32 if row_bytes > 512 else 64, 4, 1 if row_bytes > 256 else 2)
    return Tile(16, 32, 8, 1) if query.dtype == torch.float32 else Tile(16, 64, 4, 2)


def grad_query_tile(query: Tensor, *, dropout: bool) -> Tile:
    """Return the tile of the gradient of ``query`` (B, H, L, d_head); as ``forward_tile``."""
    arch = accelerator_of(query).arch
    if arch == "interpreter":
        return INTERPRETED
    if query.dtype == torch.float32:
        return Tile(16, 16, 4 if _is_amd(arch) else 8, 1)
    if query.shape[3] > 128:
        return Tile(32, 32, 4 if _is_amd(arch) else 8, 1)
    return Tile(64, 32 if dropout or _multiplies_by_warp(arch) else 64, 4, 2)


def grad_key_value_tile(query: Tensor, keys: int) -> Tile:
    """Return the tile of the gradients of keys and values; as ``forward_tile``."""
    arch = accelerator_of(query).arch
    if arch == "interpreter":
        return INTERPRETED
    wide = query.shape[3] > 128
    if query.dtype == torch.float32:
        block = 16 if wide else 32
        return Tile(block, block, 4 if _is_amd(arch) else 8, 1)
    if _is_amd(arch):
        return Tile(16, 32, 4, 1) if wide else Tile(32, 64 if keys <= 64 else 128, 4, 1)
    if wide:
        return Tile(32, 32, 8, 1)
    return Tile(32, 64 if keys <= 64 or _multiplies_by_warp(arch) else 128, 8, 2)


def _is_amd(arch: str) -> bool:
    return arch.startswith("gfx")


def _multiplies_by_warp(arch: str) -> bool:
    """Whether matrix units serve single warps: Ampere, Ada and the smaller Blackwell.

    Nearly all of them have 100 KB of shared memory.
    """
    return arch.startswith(("sm_8", "sm_12"))
