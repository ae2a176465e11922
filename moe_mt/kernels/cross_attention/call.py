"""What one call of attention is given, and how that reaches a kernel."""

from typing import Any, NamedTuple

import triton
from torch import Tensor

from moe_mt.kernels.cross_attention.limits import Limits
from moe_mt.kernels.cross_attention.tiles import Tile

__all__ = ["NOT_SPECIALISED", "Call", "padded_width", "strides"]

NOT_SPECIALISED = ["sentences", "queries", "keys", "dropped_below"]
"""What changes from call to call; a kernel compiled for one value serves all."""


class Call(NamedTuple):
    """The operands of attention, and what bounds it."""

    query: Tensor
    """(B, H, L, d_head)."""

    key: Tensor
    value: Tensor
    """(B, H, S, d_head)."""

    limits: Limits
    scale: float
    dropped_below: int

    def programs(self, rows_of: Tensor, block: int) -> int:
        """Return how many programs own a block of rows each; in a packed batch, at most."""
        sentences = self.limits.sentences(self.query)
        _, heads, length, _ = rows_of.shape
        if not self.limits.packed():
            return sentences * heads * triton.cdiv(length, block)
        return (length // block + sentences) * heads if sentences else 0

    def limits_arguments(self) -> dict[str, Tensor | None]:
        """Return the limits, as kernels name them."""
        return {
            f"{name}_ptr": None if tensor is None else tensor.contiguous()
            for name, tensor in self.limits._asdict().items()
        }

    def arguments(self, tile: Tile, **strided: Tensor) -> dict[str, Any]:
        """Return what the forward kernel and both of the backward pass are given alike.

        Args:
            tile: What a program works on.
            strided: More (B, H, length, d_head) tensors whose strides the kernel is told.
        """
        query, key, value = self.query, self.key, self.value
        sentences = self.limits.sentences(query)
        # The width in which a program looks for its sentence.
        padded = triton.next_power_of_2(max(sentences, 1)) if self.limits.packed() else 1
        return {
            "query_ptr": query,
            "key_ptr": key,
            "value_ptr": value,
            **self.limits_arguments(),
            "sentences": sentences,
            "heads": query.shape[1],
            "queries": query.shape[2],
            "keys": key.shape[2],
            "scale": self.scale,
            "dropped_below": self.dropped_below,
            **strides(query=query, key=key, value=value, **strided),
            "D_HEAD": query.shape[3],
            "D_PADDED": padded_width(query),
            "SENTENCES_PADDED": padded,
            "BLOCK_QUERIES": tile.queries,
            "BLOCK_KEYS": tile.keys,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }


def padded_width(query: Tensor) -> int:
    """Return d_head as a width that tiles can have."""
    return max(16, triton.next_power_of_2(query.shape[3]))


def strides(**tensors: Tensor) -> dict[str, int]:
    """Return the strides of (B, H, L, d_head) tensors, as kernels name them.

    Packed sentences share one row of the batch: they are told apart by their first rows alone.
    """
    return {
        f"stride_{name}_{axis}": tensor.stride(dim) if dim > 0 or len(tensor) > 1 else 0
        for name, tensor in tensors.items()
        for dim, axis in enumerate(("sentence", "head", "row"))
    }
