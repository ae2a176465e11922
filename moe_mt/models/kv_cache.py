"""Keys and values that decoding keeps between steps."""

import torch
from torch import Tensor

__all__ = ["KVCache", "LayerCache"]


class LayerCache:
    """One decoder layer's share: its own keys and values so far, and those of the memory."""

    def __init__(self, cross_key: Tensor, cross_value: Tensor, beams: int, capacity: int) -> None:
        """Allocate room for ``capacity`` steps of ``B * beams`` rows.

        Args:
            cross_key: (B, H, S, d_head). Keys of the memory, once per sentence.
            cross_value: (B, H, S, d_head).
            beams: Rows per sentence.
            capacity: Steps there is room for at first; grows by doubling.
        """
        self.cross_key = cross_key
        self.cross_value = cross_value
        sentences, heads, _, d_head = cross_key.shape
        self._key = cross_key.new_empty(sentences * beams, heads, capacity, d_head)
        self._value = torch.empty_like(self._key)

    def append(self, key: Tensor, value: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Store (rows, H, new, d_head) behind ``length`` earlier steps and return all of them."""
        stop = length + key.shape[2]
        if stop > self._key.shape[2]:
            self._key, self._value = _grow(self._key, stop), _grow(self._value, stop)
        self._key[:, :, length:stop] = key
        self._value[:, :, length:stop] = value
        return self._key[:, :, :stop], self._value[:, :, :stop]

    def reorder(self, parents: Tensor, length: int) -> None:
        """Let row ``i`` continue what row ``parents[i]`` holds; the memory stays as it is."""
        self._key[:, :, :length] = self._key[parents, :, :length]
        self._value[:, :, :length] = self._value[parents, :, :length]


class KVCache:
    """Everything decoding keeps: a layer cache per decoder layer and the steps stored so far."""

    def __init__(self, layers: list[LayerCache], memory_mask: Tensor | None, beams: int) -> None:
        """Start empty.

        Args:
            layers: One cache per decoder layer.
            memory_mask: (B, S) bool, true where the memory may be attended to, or ``None``.
            beams: Rows per sentence; row ``b * beams + i`` belongs to sentence ``b``.
        """
        self.layers = layers
        self.memory_mask = memory_mask
        self.beams = beams
        self.length = 0

    def reorder(self, parents: Tensor) -> None:
        """Continue row ``i`` from row ``parents[i]`` ((B * beams,) int64) of the same sentence."""
        for layer in self.layers:
            layer.reorder(parents, self.length)


def _grow(stored: Tensor, needed: int) -> Tensor:
    rows, heads, capacity, d_head = stored.shape
    grown = stored.new_empty(rows, heads, max(needed, 2 * capacity), d_head)
    grown[:, :, :capacity] = stored
    return grown
