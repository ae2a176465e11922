"""Keys and values that decoding keeps between steps, in tensors that stay where they are."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["KVCache", "LayerCache"]

FIRST_CAPACITY = 32

_STORED = ("key", "value", "cross_key", "cross_value")


@dataclass(frozen=True)
class LayerCache:
    """One decoder layer's share: keys and values of its own positions, and of the memory."""

    key: Tensor
    """(B, H, beams, C, d_head). Room for ``C`` positions of every beam."""

    value: Tensor
    """(B, H, beams, C, d_head)."""

    cross_key: Tensor
    """(B, H, S, d_head). Keys of the memory, once per sentence."""

    cross_value: Tensor
    """(B, H, S, d_head)."""

    places: tuple[Tensor, Tensor] | None = None
    """Sentences (B, 1) and positions (B, new) that are written next."""

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B * beams, H, new, d_head); return all beams' (B, H, beams * C, d_head)."""
        for stored, new in ((self.key, key), (self.value, value)):
            self._write(stored, new)
        return self.key.flatten(2, 3), self.value.flatten(2, 3)

    def _write(self, stored: Tensor, new: Tensor) -> None:
        assert self.places is not None, "KVCache.open says where to write"
        sentences, positions = self.places
        rows = new.reshape(stored.shape[0], stored.shape[2], *new.shape[1:])
        stored[sentences, :, :, positions] = rows.permute(0, 3, 2, 1, 4)


class KVCache:
    """Everything decoding keeps: a layer cache per decoder layer, and who may see what in it.

    Beams are never copied. A beam writes its keys and values into a row of its own; which row
    holds its earlier positions says an ancestry table, and the beams of a sentence attend to all
    of their rows at once, under a mask that follows from it. Reordering beams moves that table,
    ``beams * C`` integers a sentence, and nothing else.

    Sentences can be at different positions, so that new ones may join (``regroup``). No shape
    depends on how far decoding has come, but for the room, which doubles.
    """

    def __init__(
        self,
        cross: Sequence[tuple[Tensor, Tensor]],
        memory_mask: Tensor | None,
        beams: int = 1,
        capacity: int = FIRST_CAPACITY,
    ) -> None:
        """Start empty.

        Args:
            cross: For each layer keys and values (B, H, S, d_head) of the memory.
            memory_mask: (B, S) bool, true where the memory may be attended to, or ``None``.
            beams: Rows per sentence; row ``b * beams + i`` belongs to sentence ``b``.
            capacity: Positions there is room for at first.
        """
        self.beams = beams
        self.memory_mask = memory_mask
        self.layers = [_empty_layer(key, value, beams, capacity) for key, value in cross]
        key = cross[0][0]
        sentences, device = key.shape[0], key.device
        self.positions = torch.zeros(sentences, dtype=torch.int64, device=device)
        """(B,) int64: where each sentence writes next."""
        self.sentence_ids = torch.arange(sentences, device=device)[:, None]
        self.beam_ids = torch.arange(beams, device=device)
        self.ancestry = _no_ancestry(sentences, beams, capacity, device)
        """(B, beams, C) int64: the beam whose row holds a position of a hypothesis."""
        self.idle: Tensor | None = None
        """(B,) bool, true for rows that stand in for sentences; ``None`` where there are none."""
        self.length = 0
        """Positions of the sentence that has come farthest."""

    @property
    def sentences(self) -> int:
        """How many there are, idle ones counted."""
        return self.layers[0].cross_key.shape[0]

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        return self.layers[0].key.shape[3]

    @property
    def memory_length(self) -> int:
        """Positions of the longest memory, padding counted."""
        return self.layers[0].cross_key.shape[2]

    def reserve(self, new: int) -> None:
        """Make room for ``new`` more positions."""
        needed = self.length + new
        if needed > self.capacity:
            self.regroup(capacity=max(needed, 2 * self.capacity))

    def open(self, new: int) -> list[LayerCache]:
        """Return the layers, ready to store ``new`` positions of every row."""
        places = self.positions[:, None]
        if new > 1:
            places = places + torch.arange(new, device=places.device)
        if self.ancestry is not None:
            self.ancestry[self.sentence_ids, :, places] = self.beam_ids
        return [replace(layer, places=(self.sentence_ids, places)) for layer in self.layers]

    def visible(self, new: int, dtype: torch.dtype) -> Tensor:
        """Return what ``new`` positions behind ``positions`` see, once ``open`` was called.

        Returns:
            (B, 1, beams * new, beams * C) in ``dtype``, to be added to scores: 0 where a row
            of the cache belongs to the hypothesis and does not lie ahead, else minus infinity.
        """
        columns = torch.arange(self.capacity, device=self.positions.device)
        last = self.positions[:, None]
        if new > 1:
            last = last + torch.arange(new, device=last.device)
        seen = (columns <= last[:, :, None])[:, None, :, None]  # (B, 1, new, 1, C)
        if self.ancestry is not None:
            own = self.ancestry[:, :, None] == self.beam_ids[:, None]  # (B, beams, beams, C)
            seen = seen & own[:, :, None]
        shape = (self.sentences, 1, self.beams * new, self.beams * self.capacity)
        hidden = ~seen.expand(-1, self.beams, -1, -1, -1).reshape(shape)
        return torch.zeros(shape, dtype=dtype, device=hidden.device).masked_fill_(
            hidden, -torch.inf
        )

    def advance(self, new: int) -> None:
        """Stand behind ``new`` positions that were stored."""
        self.positions += new
        self.length += new

    def reorder(self, parents: Tensor) -> None:
        """Continue row ``i`` from row ``parents[i]`` ((N * beams,) int64) of the same sentence.

        Where there are fewer than B sentences, the first ones are meant.
        """
        if self.ancestry is not None:
            parents = parents.view(-1, self.beams)
            count = parents.shape[0]
            local = parents - self.sentence_ids[:count] * self.beams
            # In place, as a captured graph reads it where it is.
            table = self.ancestry[:count]
            table.copy_(table.take_along_dim(local[:, :, None], 1))

    def empty_of(self, sentences: int) -> "KVCache":
        """Return an empty cache of the same sizes for so many sentences, its tensors to stay."""
        cross = [
            (
                layer.cross_key.new_zeros(sentences, *layer.cross_key.shape[1:]),
                layer.cross_value.new_zeros(sentences, *layer.cross_value.shape[1:]),
            )
            for layer in self.layers
        ]
        shape, device = (sentences, self.memory_length), self.positions.device
        mask = torch.ones(shape, dtype=torch.bool, device=device)
        found = KVCache(cross, mask, self.beams, self.capacity)
        found.idle = torch.zeros(sentences, dtype=torch.bool, device=device)
        return found

    def take(self, content: "KVCache") -> None:
        """Copy the sentences of a cache of the same sizes into the first places; rest idles."""
        count = content.sentences
        assert self.idle is not None, "only a cache from empty_of has room for others"
        pairs = [(self.positions, content.positions), (_mask(self), _mask(content))]
        if self.ancestry is not None and content.ancestry is not None:
            pairs.append((self.ancestry, content.ancestry))
        for layer, other in zip(self.layers, content.layers, strict=True):
            pairs += [(getattr(layer, n), getattr(other, n)) for n in _STORED]
        for mine, new in pairs:
            mine[:count].copy_(new)
        self.positions[count:] = 0
        self.idle[:count] = False
        self.idle[count:] = True
        self.length = content.length

    def rows(self, layer: LayerCache) -> tuple[Tensor, Tensor]:
        """Return copies (B * beams, H, length, d_head) of what each row of a layer has read.

        All sentences must have come equally far.
        """
        found: list[Tensor] = []
        for stored in (layer.key, layer.value):
            kept = stored[:, :, :, : self.length]
            if self.ancestry is not None:
                where = self.ancestry[:, None, :, : self.length, None]
                kept = kept.take_along_dim(where, 2)
            found.append(kept.transpose(1, 2).flatten(0, 1).clone())
        return found[0], found[1]

    def regroup(
        self,
        keep: Tensor | None = None,
        joining: "KVCache | None" = None,
        *,
        length: int | None = None,
        capacity: int | None = None,
        memory_length: int | None = None,
    ) -> None:
        """Let sentences leave and others join, in new tensors; layer by layer.

        Args:
            keep: (N,) int64. Sentences that stay, in their new order; ``None`` keeps all.
            joining: A cache of as many beams, whose sentences come behind them.
            length: How far the one has come that has come farthest among both; as far as before
                where ``None``.
            capacity: Positions there is room for from now on; as much as before where ``None``.
            memory_length: Positions of memory; more than needed is padding. The longest one's
                where ``None``.
        """
        parts = [self] if joining is None else [self, joining]
        kept = [keep] if joining is None else [keep, None]
        capacity = capacity or max(part.capacity for part in parts)
        widths = [part.memory_length for part in parts]
        memory_length = memory_length or max(widths)
        if any(part.memory_mask is not None for part in parts) or set(widths) != {memory_length}:
            self.memory_mask = _joined(
                [_padded(_mask(part), memory_length, 1) for part in parts], kept
            )
        self.positions = _joined([part.positions for part in parts], kept)
        if self.ancestry is not None:
            tables = [part.ancestry for part in parts if part.ancestry is not None]
            self.ancestry = _joined([_padded(table, capacity, 2) for table in tables], kept)
        self.length = max(part.length for part in parts) if length is None else length
        for index in range(len(self.layers)):
            layers = [part.layers[index] for part in parts]
            self.layers[index] = LayerCache(
                key=_joined([_padded(layer.key, capacity, 3) for layer in layers], kept),
                value=_joined([_padded(layer.value, capacity, 3) for layer in layers], kept),
                cross_key=_joined([_padded(a.cross_key, memory_length, 2) for a in layers], kept),
                cross_value=_joined(
                    [_padded(a.cross_value, memory_length, 2) for a in layers], kept
                ),
            )
        self.sentence_ids = torch.arange(self.sentences, device=self.positions.device)[:, None]


def _empty_layer(key: Tensor, value: Tensor, beams: int, capacity: int) -> LayerCache:
    sentences, heads, _, d_head = key.shape
    # Zeros, since what is masked is still multiplied: by 0.
    own = key.new_zeros(sentences, heads, beams, capacity, d_head)
    return LayerCache(own, torch.zeros_like(own), key, value)


def _no_ancestry(sentences: int, beams: int, capacity: int, device: torch.device) -> Tensor | None:
    if beams == 1:
        return None
    return torch.zeros(sentences, beams, capacity, dtype=torch.int64, device=device)


def _mask(cache: KVCache) -> Tensor:
    if cache.memory_mask is not None:
        return cache.memory_mask
    shape = (cache.sentences, cache.memory_length)
    return torch.ones(shape, dtype=torch.bool, device=cache.positions.device)


def _padded(tensor: Tensor, size: int, dim: int) -> Tensor:
    """Return a tensor cut or filled with zeros to ``size`` along ``dim``."""
    missing = size - tensor.shape[dim]
    if missing <= 0:
        return tensor.narrow(dim, 0, size)
    return functional.pad(tensor, (0, 0) * (tensor.dim() - 1 - dim) + (0, missing))


def _joined(tensors: list[Tensor], kept: list[Tensor | None]) -> Tensor:
    chosen = [
        tensor if keep is None else tensor[keep] for tensor, keep in zip(tensors, kept, strict=True)
    ]
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen)
