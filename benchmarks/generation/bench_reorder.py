"""Beams that change places: two ways to attend over one decoder layer's own cache.

Gather: the cache of every row is moved to where its beam went, then each row attends to its own.
Ancestry mask: nothing is moved, and all beams of a sentence attend to the caches of all, under a
mask of the positions that belong to each. Left out of both: projections, and the mask itself, which
is made once for all layers.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.agreement import TOLERANCE, check_close
from benchmarks.generation.columns import MASK
from benchmarks.generation.shapes import Decoding
from benchmarks.graphs import capture, time_peer

DECODINGS = (Decoding(1, 4), Decoding(8, 4), Decoding(32, 4))
LENGTHS = (64, 256)
HEADS, D_HEAD = 16, 64
SETS = 4
"""Of data that take turns, so that caches are not found in the processor's."""


class Problem(NamedTuple):
    """One layer's cache, and where each beam comes from."""

    query: Tensor
    """(B, H, beams, d_head)."""

    key: Tensor
    """(B, H, beams, L, d_head): the beams of a sentence and head behind each other."""

    value: Tensor
    key_rows: Tensor
    """(B * beams, H, L, d_head): the same, row by row."""

    value_rows: Tensor
    moved: tuple[Tensor, Tensor]
    """Where both are moved to: allocating room anew at every step would be half the time."""

    parents: Tensor
    """(B, beams) int64: the beam that each continues."""

    mask: Tensor
    """(B, 1, beams, beams * L) bool: the positions of its parent."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    small = metafunc.config.getoption("--rehearse")
    sizes = [(d, n) for d in DECODINGS for n in LENGTHS]
    sizes = sizes[:1] if small else sizes
    metafunc.parametrize(("decoding", "length"), sizes, ids=[f"{d}-L{n}" for d, n in sizes])


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Let one thread compute: where another process runs, waiting for a second one is all noise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_reorder(
    benchmark, sign, clock, decoding: Decoding, length: int, device, dtype: torch.dtype
) -> None:
    problems = [draw(decoding, length, device, dtype, seed) for seed in range(SETS)]

    def prepare(attend: Callable[[Problem], Tensor]) -> list[Callable[[], Tensor]]:
        check_close(attend(problems[0]), gather(problems[0]), TOLERANCE[dtype], "the two ways")
        return [lambda one=one: attend(one) for one in problems]

    sign(f"{HEADS}-heads-of-{D_HEAD}", batch=decoding.batch, beam=decoding.beam, length=length)
    benchmark.extra_info["seconds"] = clock(capture(prepare(gather), device))
    benchmark.extra_info["peers"] = {MASK: time_peer(lambda: prepare(masked), device, clock)}
    benchmark.pedantic(lambda: gather(problems[0]), rounds=1)


def gather(one: Problem) -> Tensor:
    """Move the caches of both kinds, then let every row attend to its own."""
    batch, _, beams, *_ = one.key.shape
    rows = (one.parents + beams * torch.arange(batch, device=one.parents.device)[:, None]).flatten()
    key = torch.index_select(one.key_rows, 0, rows, out=one.moved[0])
    value = torch.index_select(one.value_rows, 0, rows, out=one.moved[1])
    query = one.query.transpose(1, 2).flatten(0, 1)[:, :, None]
    context = scaled_dot_product_attention(query, key, value)
    return context.view(batch, beams, HEADS, D_HEAD).transpose(1, 2)


def masked(one: Problem) -> Tensor:
    """Let all beams of a sentence attend to what is theirs in the caches of all."""
    key, value = (cache.flatten(2, 3) for cache in (one.key, one.value))
    return scaled_dot_product_attention(one.query, key, value, attn_mask=one.mask)


def draw(
    decoding: Decoding, length: int, device: torch.device, dtype: torch.dtype, seed: int
) -> Problem:
    """Return random caches and parents; the caches lie as each way would keep them."""
    generator = torch.Generator(device).manual_seed(seed)
    batch, beams = decoding.batch, decoding.beam
    size = (batch, HEADS, beams, length, D_HEAD)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    key, value = random(*size), random(*size)
    parents = torch.randint(beams, (batch, beams), generator=generator, device=device)
    key_rows, value_rows = (
        cache.transpose(1, 2).flatten(0, 1).contiguous() for cache in (key, value)
    )
    own = parents[:, :, None] == torch.arange(beams, device=device)
    return Problem(
        query=random(batch, HEADS, beams, D_HEAD),
        key=key,
        value=value,
        key_rows=key_rows,
        value_rows=value_rows,
        moved=(torch.empty_like(key_rows), torch.empty_like(value_rows)),
        parents=parents,
        mask=own[:, None, :, :, None].expand(-1, 1, -1, -1, length).flatten(3),
    )
