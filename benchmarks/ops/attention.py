"""Cross-attention by other means, each in its best form, and the data that all of them take.

What a caller could keep from step to step (replicated or packed keys, masks) is prepared once and
not timed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.graphs import PeerUnavailable
from benchmarks.ops.conftest import PROBLEMS_ON_CPU, PROBLEMS_ON_GPU
from benchmarks.shapes import AttentionShape
from moe_mt.ops.cross_attention import cross_attention, cross_attention_eager

__all__ = [
    "Problem",
    "Way",
    "chosen_kernel",
    "definition_in_float64",
    "draw_key_lengths",
    "draw_problems",
    "flex",
    "ours",
    "packed",
    "peers_of",
    "sdpa_replicated",
    "sdpa_reshaped",
    "sdpa_restricted",
    "sets_of",
    "varlen",
]

CACHE_BYTES = 2**27
"""More than the cache of a GPU holds; small calls need more than six sets to fill it."""

ALIGNMENT = 8
"""Numbers in which the memory-efficient kernel reads a mask; other rows it would copy."""

FUSED_KERNELS = {
    "mem-efficient masked": SDPBackend.EFFICIENT_ATTENTION,
    "flash unmasked": SDPBackend.FLASH_ATTENTION,
    "cuDNN unmasked": SDPBackend.CUDNN_ATTENTION,
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One set of data."""

    query: Tensor
    """(B, H, L, d_head), lying as (B, L, H, d_head), as a projection leaves it."""

    key: Tensor
    value: Tensor
    """(B, H, S, d_head), lying as (B, S, H, d_head)."""

    grad: Tensor
    """Of the output; as ``query``."""

    key_lengths: Tensor | None
    """(B,) int32, the same of all sets; ``None`` where nothing is padding."""

    def valid(self) -> Tensor:
        """Return (B, S) bool, true where a key is valid."""
        sentences, _, keys, _ = self.key.shape
        if self.key_lengths is None:
            return self.key.new_ones(sentences, keys, dtype=torch.bool)
        return torch.arange(keys, device=self.key.device) < self.key_lengths[:, None]

    def mask(self) -> Tensor:
        """Return (B, 1, 1, S) of 0 and minus infinity, which PyTorch adds without converting it."""
        sentences, _, keys, _ = self.key.shape
        wide = self.query.new_zeros(sentences, 1, 1, -(-keys // ALIGNMENT) * ALIGNMENT)
        return wide[..., :keys].masked_fill_(~self.valid()[:, None, None], -torch.inf)


class Way(NamedTuple):
    """A way to compute attention, and how it wants its tensors to lie."""

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    """From queries, keys and values to the output, which lies as the queries."""

    lay_queries: Callable[[Tensor], Tensor] = lambda tensor: tensor
    lay_keys: Callable[[Tensor], Tensor] = lambda tensor: tensor
    mask: Tensor | None = None
    """What ``attend`` adds to the scores, where it is PyTorch's attention."""

    def inputs(self, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of a problem as this way wants them."""
        return (
            self.lay_queries(problem.query),
            self.lay_keys(problem.key),
            self.lay_keys(problem.value),
        )


def draw_key_lengths(sentences: int, keys: int, padding: float) -> Tensor:
    """Return (B,) int32 in random order, spread evenly around ``1 - padding`` of the keys."""
    places = (torch.arange(sentences) + 0.5) / sentences
    lengths = (keys * (1 - 2 * padding * places)).round().int()
    return lengths[torch.randperm(sentences, generator=torch.Generator().manual_seed(0))]


def draw_problems(
    shape: AttentionShape, padding: float, device: torch.device, dtype: torch.dtype
) -> list[Problem]:
    """Return random sets of data, as many as a cache does not hold."""
    generator = torch.Generator(device).manual_seed(shape.sentences * shape.keys)
    lengths = None
    if padding:
        lengths = draw_key_lengths(shape.sentences, shape.keys, padding).to(device)

    def random(length: int) -> Tensor:
        size = shape.sentences, length, shape.heads, shape.d_head
        return torch.randn(size, generator=generator, device=device).to(dtype).transpose(1, 2)

    def draw() -> Problem:
        return Problem(
            query=random(shape.queries),
            key=random(shape.keys),
            value=random(shape.keys),
            grad=random(shape.queries),
            key_lengths=lengths,
        )

    first = draw()
    count = sets_of(first.key.nbytes + first.value.nbytes, device)
    return [first, *(draw() for _ in range(count - 1))]


def sets_of(nbytes: int, device: torch.device) -> int:
    """Return how many sets of data there are, if one has ``nbytes`` of keys and values."""
    if device.type != "cuda":
        return PROBLEMS_ON_CPU
    return max(PROBLEMS_ON_GPU, -(-CACHE_BYTES // nbytes))


def ours(problem: Problem) -> Way:
    """Return this package's operation."""
    return Way(partial(cross_attention, key_lengths=problem.key_lengths))


def definition_in_float64(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> Tensor:
    """Return what every way must compute."""
    wide = query.double(), key.double(), value.double()
    return cross_attention_eager(*wide, key_lengths=problem.key_lengths)


def sdpa_reshaped(problem: Problem) -> Way:
    """Return PyTorch's attention, where the beams of a sentence are queries of one memory."""
    mask = None if problem.key_lengths is None else problem.mask()
    return Way(partial(functional.scaled_dot_product_attention, attn_mask=mask), mask=mask)


def sdpa_replicated(problem: Problem) -> Way:
    """Return PyTorch's attention on keys and values of which every beam has its own.

    So do the models of Hugging Face, to which beams are sentences.
    """
    beams = problem.query.shape[2]
    mask = None if problem.key_lengths is None else problem.mask().repeat_interleave(beams, 0)
    return Way(
        partial(functional.scaled_dot_product_attention, attn_mask=mask),
        lay_queries=lambda tensor: tensor.transpose(1, 2).flatten(0, 1).unsqueeze(2),
        lay_keys=lambda tensor: tensor.repeat_interleave(beams, 0),
        mask=mask,
    )


def sdpa_restricted(problem: Problem, backend: SDPBackend) -> Way:
    """Return PyTorch's attention by one of its kernels; the memory-efficient one takes a mask."""
    mask = problem.mask() if backend == SDPBackend.EFFICIENT_ATTENTION else None

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(query, key, value, mask)

    return Way(attend, mask=mask)


def chosen_kernel(way: Way, problem: Problem) -> str:
    """Return which of its kernels PyTorch's attention takes, in a word."""
    inputs = way.inputs(problem)
    if torch.is_grad_enabled():
        inputs = tuple(tensor.detach().requires_grad_() for tensor in inputs)
    number = torch._fused_sdp_choice(*inputs, attn_mask=way.mask)
    return SDPBackend(number).name.removesuffix("_ATTENTION").lower()


def varlen(problem: Problem) -> Way:
    """Return PyTorch's attention of sentences that stand behind each other without padding."""
    if problem.query.device.type != "cuda":
        raise PeerUnavailable("it runs on a GPU only")
    from torch.nn.attention.varlen import varlen_attn

    return packed(problem, varlen_attn)


def packed(problem: Problem, varlen_attn: Callable[..., Any]) -> Way:
    """Return an attention of packed sentences, given what ``varlen_attn`` is given."""
    valid = problem.valid()
    sentences, _, queries, _ = problem.query.shape
    query_offsets = queries * torch.arange(sentences + 1, device=valid.device, dtype=torch.int32)
    key_offsets = torch.zeros_like(query_offsets)
    key_offsets[1:] = valid.sum(1).cumsum(0)
    longest = int(valid.sum(1).max())

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return varlen_attn(query, key, value, query_offsets, key_offsets, queries, longest)

    return Way(
        attend,
        lay_queries=lambda tensor: tensor.transpose(1, 2).flatten(0, 1),
        lay_keys=lambda tensor: tensor.transpose(1, 2)[valid],
    )


def flex(problem: Problem, compiler: str) -> Way:
    """Return FlexAttention, compiled for this shape, with a block mask."""
    if problem.query.device.type == "cpu" and torch.is_grad_enabled():
        raise PeerUnavailable("it has no backward pass on a CPU")
    from torch._functorch import config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention, noop_mask

    torch._dynamo.reset()  # else it stops compiling after eight shapes
    config.donated_buffer = False  # else a backward pass runs but once
    lengths = problem.key_lengths
    sentences, _, queries, _ = problem.query.shape
    # Without a mask it would make an empty one in every call.
    allowed = noop_mask if lengths is None else lambda b, _head, _query, key: key < lengths[b]
    mask = create_block_mask(
        allowed,
        B=None if lengths is None else sentences,
        H=None,
        Q_LEN=queries,
        KV_LEN=problem.key.shape[2],
        device=problem.query.device,
    )
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True, backend=compiler)
    return Way(lambda query, key, value: compiled(query, key, value, block_mask=mask))


def peers_of(
    problem: Problem, shape: AttentionShape, *, rehearsal: bool
) -> dict[str, Callable[[], Way]]:
    """Return the peers by name; PyTorch's attention also by the kernel that it takes by itself."""
    free = {"SDPA reshaped": sdpa_reshaped, "SDPA replicated": sdpa_replicated}
    if shape.beams == 1:
        free = {"SDPA": sdpa_reshaped}
    found: dict[str, Callable[[], Way]] = {}
    for name, build in free.items():
        kernel = chosen_kernel(build(problem), problem)
        found[f"{name} ({kernel})"] = partial(build, problem)
    if problem.query.device.type == "cuda" or rehearsal:  # on a CPU there is but one
        for name, backend in FUSED_KERNELS.items():
            if backend == SDPBackend.EFFICIENT_ATTENTION or problem.key_lengths is None:
                found[f"SDPA {name}"] = partial(sdpa_restricted, problem, backend)
    found["varlen_attn"] = partial(varlen, problem)
    found["FlexAttention"] = partial(flex, problem, "eager" if rehearsal else "inductor")
    return found
