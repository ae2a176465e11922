"""Generation with the shape of the 54B on a GPU, from random weights made there.

Beside the model of transformers 4.57 on the same weights, where it can be imported: 32 source
tokens, 32 new ones, token ids in, token ids out. And how many graphs a compiled step makes of 50
random lengths.
"""

import random
from collections.abc import Callable
from time import perf_counter

import pytest
import torch
from torch import Tensor

from benchmarks.floors import Ceilings, generation
from benchmarks.generation.experts_hit import counted
from benchmarks.generation.on_same_weights import transformers_model
from benchmarks.generation.random_model import random_model
from benchmarks.generation.shapes import (
    NEW_TOKENS,
    NLLB_MOE_54B,
    ON_GPU,
    REHEARSED,
    SOURCE_TOKENS,
    TOY_MOE,
    Decoding,
    draw_sources,
)
from benchmarks.graphs import Captured, time_peer
from moe_mt.generation import CompiledStep, DecodeStep, GenerationConfig, generate
from moe_mt.models import Seq2SeqTransformer

LENGTHS, TOY_LENGTHS = 50, 2
LONGEST = 200
TOY_TOKENS = 2


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "decoding" in metafunc.fixturenames:
        sizes = REHEARSED if metafunc.config.getoption("--rehearse") else ON_GPU
        metafunc.parametrize("decoding", sizes, ids=str)


@pytest.fixture(scope="module")
def model(device: torch.device, dtype: torch.dtype, rehearsal: bool) -> Seq2SeqTransformer:
    return random_model(TOY_MOE if rehearsal else NLLB_MOE_54B, device, dtype)


@pytest.fixture
def name(rehearsal: bool) -> str:
    return "toy-moe" if rehearsal else "nllb-moe-54b"


def test_generate_54b(
    benchmark,
    sign,
    clock,
    model: Seq2SeqTransformer,
    name: str,
    decoding: Decoding,
    device: torch.device,
    dtype: torch.dtype,
    ceilings: Ceilings,
    rehearsal: bool,
) -> None:
    new = TOY_TOKENS if rehearsal else NEW_TOKENS
    sources = torch.tensor(draw_sources(model.config, decoding.batch), device=device)
    step = CompiledStep(model, backend="eager" if rehearsal else "inductor")
    with counted(model) as hit:
        expected = run(model, sources, decoding.beam, new)
    assert [len(tokens) for tokens in expected] == [new] * decoding.batch
    run(model, sources, decoding.beam, new, step)  # compiles

    def prepare_peer() -> list[Callable[[], object]]:
        peer = transformers_model(model)
        options = {"num_beams": decoding.beam, "min_new_tokens": new, "max_new_tokens": new}
        ones = torch.ones_like(sources)
        return [lambda: peer.generate(sources, attention_mask=ones, do_sample=False, **options)]

    work = generation(
        model.config,
        sentences=decoding.batch,
        beams=decoding.beam,
        source_tokens=SOURCE_TOKENS,
        new_tokens=new,
        item_bytes=dtype.itemsize,
        distinct_encoding=hit["encoder"],
        distinct=hit["decoder"],
    )
    sign(name, batch=decoding.batch, beam=decoding.beam, source=SOURCE_TOKENS, new=new)
    ours = Captured(replay=lambda: run(model, sources, decoding.beam, new, step), calls=1)
    benchmark.extra_info["seconds"] = clock(ours)
    benchmark.extra_info["figures"] = {
        "tokens": decoding.batch * new,
        "bytes": work.bytes,
        "flops": work.flops,
        "floor_s": ceilings.floor_s(work),
        "copy_bytes_per_s": ceilings.bytes_per_s,
        "product_flops_per_s": ceilings.flops_per_s,
    }
    benchmark.extra_info["peers"] = {"transformers 4.57": time_peer(prepare_peer, device, clock)}
    benchmark.pedantic(ours.replay, rounds=1)


def test_graphs(
    benchmark, sign, model: Seq2SeqTransformer, name: str, device: torch.device, rehearsal: bool
) -> None:
    """Generate from 50 sources of random lengths to random lengths; count what was compiled."""
    step = CompiledStep(model, backend="eager" if rehearsal else "inductor")
    draw = random.Random(0)
    count, longest = (TOY_LENGTHS, 2 * TOY_TOKENS) if rehearsal else (LENGTHS, LONGEST)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    start = perf_counter()
    for _ in range(count):
        length, new = draw.randint(1, longest), draw.randint(1, longest)
        sources = torch.randint(4, model.config.vocab_size, (1, length), device=device)
        run(model, sources, 1, new, step)
    seconds = perf_counter() - start
    counters = torch._dynamo.utils.counters
    graphs = counters["stats"]["unique_graphs"]
    breaks = sum(counters["graph_break"].values())
    sign(name, sentences=count, longest=longest)
    benchmark.extra_info["seconds"] = {"median": seconds, "q1": seconds, "q3": seconds, "rounds": 1}
    benchmark.extra_info["figures"] = {"graphs": graphs, "buckets": step.graphs, "breaks": breaks}
    benchmark.pedantic(lambda: None, rounds=1)
    assert breaks == 0
    assert graphs <= 2 * step.graphs


def run(
    model: Seq2SeqTransformer,
    sources: Tensor,
    beams: int,
    new_tokens: int,
    step: DecodeStep | None = None,
) -> list[tuple[int, ...]]:
    """Return the best translation of every source, all of the same length."""
    found = generate(
        model,
        sources,
        torch.ones_like(sources, dtype=torch.bool),
        GenerationConfig(num_beams=beams, min_new_tokens=new_tokens),
        forced_tokens=[[]] * len(sources),
        max_new_tokens=[new_tokens] * len(sources),
        step=step,
    )
    return [hypotheses[0].tokens for hypotheses in found]
