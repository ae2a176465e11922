"""One decoder step for all rows of a batch: eager, compiled, or replayed as a CUDA graph."""

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_mt.errors import InputError
from moe_mt.models import KVCache, Seq2SeqTransformer, TargetVocabulary

__all__ = ["CompiledStep", "DecodeStep", "DecodingModel", "EagerStep"]

SHORTEST_BUCKET = 32
"""Least room for positions and memory of a compiled step; every longer one doubles it."""

MOST_GRAPHS = 256
"""More than translations have buckets: beyond it something changes that should not."""


class DecodingModel(Protocol):
    """A model that decodes with a cache."""

    def decode_step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Read new tokens (rows, new) and return the logits (rows, V) behind the last of them."""
        ...


class DecodeStep(Protocol):
    """Runs the decoder over the rows of a batch, and keeps the cache in the form that it needs."""

    def place(
        self,
        cache: KVCache,
        *,
        keep: Tensor | None = None,
        joining: KVCache | None = None,
        length: int,
        memory_length: int,
    ) -> KVCache:
        """Return the cache to go on with.

        Args:
            cache: What ``place`` returned before, or a new one.
            keep: (N,) int64. Sentences that stay; all where ``None``, of a new cache only.
            joining: The cache of sentences that come behind them.
            length: Positions of the sentence among both that has come farthest.
            memory_length: Positions of the longest memory among both.
        """
        ...

    def is_full(self, cache: KVCache) -> bool:
        """Whether the cache must be placed anew before the next step, to have room for it."""
        ...

    def run(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Return the logits behind tokens (rows, 1): (rows, V), or more rows, of no meaning."""
        ...

    def release(self) -> None:
        """Give back what is kept from batch to batch, because memory ran out."""
        ...


class EagerStep:
    """Every operation by itself, on exactly the rows that there are."""

    def __init__(self, model: DecodingModel) -> None:
        """Take the model."""
        self._model = model

    def place(
        self,
        cache: KVCache,
        *,
        keep: Tensor | None = None,
        joining: KVCache | None = None,
        length: int,
        memory_length: int,
    ) -> KVCache:
        """Regroup the cache in place; see ``DecodeStep.place``."""
        if keep is not None:
            cache.regroup(
                keep,
                joining,
                length=length,
                capacity=_bucket_length(length),
                memory_length=memory_length,
            )
        return cache

    def is_full(self, cache: KVCache) -> bool:
        """Never: the model lets the cache grow."""
        return False

    def run(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Return the logits (rows, V) behind tokens (rows, 1)."""
        return self._model.decode_step(tokens, cache)

    def release(self) -> None:
        """Do nothing: nothing is kept."""


class CompiledStep:
    """The whole step as one graph per bucket, which a GPU captures and replays.

    A bucket is a number of sentences, rounded up to a power of two, and a length, likewise: room
    for so many positions, and a memory of as many. Sentences that only fill a bucket claim no
    expert. The tensors of a bucket stay where they are, as a captured graph needs it.
    """

    def __init__(
        self,
        model: Seq2SeqTransformer | TargetVocabulary,
        *,
        pad_sentences: bool = True,
        backend: str | Callable[..., Any] = "inductor",
    ) -> None:
        """Prepare; nothing is compiled before a bucket is first used.

        Args:
            model: In evaluation mode, or its decoder over some tokens; its parameters must stay
                the tensors that they are.
            pad_sentences: Whether their number is rounded up. ``False`` where this would change
                the results of others; then every number has a bucket of its own.
            backend: As ``torch.compile`` takes it.
        """
        self._model = model
        self._pad_sentences = pad_sentences
        self._backend = backend
        self._decode = torch.compile(model.decode, fullgraph=True, dynamic=False, backend=backend)
        self._buckets: dict[tuple[int, int, int], _Bucket] = {}
        self._current: _Bucket | None = None
        # A table that grows later is another tensor, for which everything is compiled again.
        model.positions.reserve(2 * _power_of_two(model.config.max_positions))

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made of: its model is a copy too, its graphs are its own."""
        names = ("model", "pad_sentences", "backend")
        return {name: getattr(self, f"_{name}") for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start as new."""
        self.__init__(**state)

    def place(
        self,
        cache: KVCache,
        *,
        keep: Tensor | None = None,
        joining: KVCache | None = None,
        length: int,
        memory_length: int,
    ) -> KVCache:
        """Copy the cache into the tensors of its bucket; see ``DecodeStep.place``."""
        if keep is not None:
            self._bucket_of(cache)
        # The bucket that it may come from keeps its tensors.
        loose = copy.copy(cache)
        loose.layers = list(cache.layers)
        room = max(_bucket_length(length), _power_of_two(memory_length))
        loose.regroup(keep, joining, length=length, capacity=room, memory_length=room)
        self._model.positions.reserve(room)
        sentences = loose.sentences
        if self._pad_sentences:
            sentences = _power_of_two(sentences)
        key = (sentences, loose.beams, room)
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = _Bucket(self._decode, loose, sentences)
        bucket.take(loose)
        self._current = bucket
        return bucket.cache

    def is_full(self, cache: KVCache) -> bool:
        """Whether the bucket has no room for another step."""
        return cache.length >= cache.capacity

    def run(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Return the logits of all rows of the bucket behind tokens (rows, 1)."""
        return self._bucket_of(cache).run(tokens)

    def release(self) -> None:
        """Give the tensors and captured graphs of all buckets back; what is compiled stays."""
        self._buckets.clear()
        self._current = None

    def _bucket_of(self, cache: KVCache) -> "_Bucket":
        if self._current is None or cache is not self._current.cache:
            raise InputError(
                "a compiled step decodes one batch at a time, and another one was begun; end one "
                "before the other, use a step for each, or compile=False"
            )
        return self._current

    @property
    def graphs(self) -> int:
        """How many buckets have been compiled."""
        return len(self._buckets)


class _Bucket:
    """A cache of fixed size, and the graph that decodes with it."""

    def __init__(self, decode: Callable[..., Tensor], like: KVCache, sentences: int) -> None:
        self._decode = decode
        self.cache = like.empty_of(sentences)
        device = like.positions.device
        self._tokens = torch.zeros(sentences * like.beams, 1, dtype=torch.int64, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    def take(self, content: KVCache) -> None:
        # Another object over the same tensors: whoever has the last one is told so.
        self.cache = copy.copy(self.cache)
        self.cache.take(content)

    def run(self, tokens: Tensor) -> Tensor:
        self._tokens[: tokens.shape[0]].copy_(tokens)
        if self._graph is None and self._tokens.device.type == "cuda":
            self._capture()
        if self._graph is not None and self._logits is not None:
            self._graph.replay()
            logits = self._logits
        else:
            logits = self._run_compiled()
        self.cache.advance(1)
        return logits

    def _run_compiled(self) -> Tensor:
        # PyTorch gives up after eight graphs of one function; here each bucket has one.
        limits: Any = {"recompile_limit": MOST_GRAPHS, "accumulated_recompile_limit": MOST_GRAPHS}
        with torch._dynamo.config.patch(**limits):
            return self._decode(self._tokens, self.cache)

    def _capture(self) -> None:
        """Compile and capture. What is run for it writes where the step will write."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(2):  # the first compiles, the second has allocated what it needs
                self._run_compiled()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = self._run_compiled()
        self._graph = graph


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _bucket_length(length: int) -> int:
    """Return the room for one position more than ``length``."""
    return max(SHORTEST_BUCKET, _power_of_two(length + 1))
