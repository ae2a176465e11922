"""One decoder step of this package's model, beside the floor of its weights.

Sixteen steps run behind each other, from the middle of a translation; the time is divided by their
number. On the CPU, packed weights of the shape of M2M100-418M, eager and compiled; on a GPU the
54B with random weights in bfloat16, where a compiled step is a CUDA graph. Left out: the memory
(32 source tokens, projected once), and choosing the next token.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.agreement import check_close
from benchmarks.floors import Ceilings, decoder_step, measure_reading
from benchmarks.generation.checkpoints import random_checkpoint
from benchmarks.generation.experts_hit import counted
from benchmarks.generation.random_model import random_model
from benchmarks.generation.shapes import (
    MODELS,
    NLLB_MOE_54B,
    ON_GPU,
    REHEARSED,
    SOURCE_TOKENS,
    TOY_MOE,
    Decoding,
    draw_sources,
)
from benchmarks.graphs import Captured
from moe_mt.checkpoints import load
from moe_mt.generation import CompiledStep, DecodeStep, EagerStep
from moe_mt.models import Seq2SeqTransformer

STEPS, TOY_STEPS = 16, 2
TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-1, "int8-dynamic": 1e-1}
"""Compiled steps round elsewhere, and what reaches a half precision or a quantizer differently may
be rounded to its neighbour there."""

ITEM_BYTES = {"float32": 4, "int8-dynamic": 1, "bfloat16": 2}
MODES: dict[str, Callable[[Seq2SeqTransformer], DecodeStep]] = {
    "eager": EagerStep,
    "compiled": CompiledStep,
}
ON_CPU = MODELS["m2m100-418m"]


class Case(NamedTuple):
    """A step at one batch and beam."""

    model: str
    dtype: str
    decoding: Decoding
    mode: str

    def __str__(self) -> str:
        return f"{self.model}-{self.dtype}-{self.decoding}-{self.mode}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.config.getoption("--rehearse"):
        kinds, decodings = [("toy-moe", "float32")], REHEARSED
    elif metafunc.config.getoption("--device") == "cuda":
        kinds, decodings = [("nllb-moe-54b", "bfloat16")], ON_GPU
    else:
        kinds = [(ON_CPU.name, dtype) for dtype in ("float32", "int8-dynamic")]
        decodings = ON_CPU.decodings
    cases = [Case(*kind, size, mode) for kind in kinds for size in decodings for mode in MODES]
    metafunc.parametrize("case", cases, ids=str)


@pytest.fixture(scope="module")
def build(device: torch.device) -> Iterator[Callable[[Case], Seq2SeqTransformer]]:
    """Return what builds the model of a case; one is held at a time."""
    held: dict[tuple[str, str], Seq2SeqTransformer] = {}

    def model_of(case: Case) -> Seq2SeqTransformer:
        key = (case.model, case.dtype)
        if key not in held:
            held.clear()
            held[key] = build_model(case, device)
        return held[key]

    yield model_of
    held.clear()


@pytest.fixture(scope="session")
def bytes_per_s(ceilings: Ceilings | None) -> float:
    return ceilings.bytes_per_s if ceilings else measure_reading()


def test_step(
    benchmark, sign, clock, build, bytes_per_s: float, rehearsal: bool, case: Case
) -> None:
    model = build(case)
    count = TOY_STEPS if rehearsal else STEPS
    with counted(model) as hit:
        expected = run_steps(model, EagerStep(model), case.decoding, count)()
    run = run_steps(model, MODES[case.mode](model), case.decoding, count)
    got = run()
    check_close(got, expected, TOLERANCES[case.dtype], "a step and the eager one")
    rows = case.decoding.batch * case.decoding.beam
    work = decoder_step(model.config, rows, hit.get("decoder", 0), ITEM_BYTES[case.dtype])
    sign(
        case.model,
        dtype=case.dtype,
        batch=case.decoding.batch,
        beam=case.decoding.beam,
        source=SOURCE_TOKENS,
        mode=case.mode,
    )
    benchmark.extra_info["seconds"] = clock(Captured(replay=run, calls=count))
    benchmark.extra_info["figures"] = {
        "bytes": work.bytes,
        "flops": work.flops,
        "floor_s": work.bytes / bytes_per_s,
        "distinct_experts": hit.get("decoder", 0),
    }
    benchmark.pedantic(run, rounds=1)


def run_steps(
    model: Seq2SeqTransformer, step: DecodeStep, decoding: Decoding, count: int = STEPS
) -> Callable[[], Tensor]:
    """Return what runs ``count`` steps, always from position ``count``; it gives the last logits.

    Logits of earlier steps lie where a captured graph writes those of the next.
    """
    device = model.embedding.weight.device
    sources = torch.tensor(draw_sources(model.config, decoding.batch), device=device)
    memory, _ = model.encode(sources)
    mask = torch.ones_like(sources, dtype=torch.bool)
    cache = model.new_cache(memory, mask, decoding.beam, 2 * count)
    cache = step.place(cache, length=0, memory_length=SOURCE_TOKENS)
    rows = decoding.batch * decoding.beam
    generator = torch.Generator().manual_seed(rows)
    tokens = torch.randint(4, model.config.vocab_size, (2 * count, rows, 1), generator=generator)
    tokens = tokens.to(device)
    for position in range(count):
        step.run(tokens[position], cache)

    def run() -> Tensor:
        for position in range(count, 2 * count):
            logits = step.run(tokens[position], cache)
        cache.advance(-count)
        return logits[:rows]

    return run


def build_model(case: Case, device: torch.device) -> Seq2SeqTransformer:
    if case.model == ON_CPU.name:
        folder = random_checkpoint(ON_CPU.config, ON_CPU.name)
        return load(folder, device=device, dtype=torch.float32, pack=case.dtype)
    config = TOY_MOE if case.model == "toy-moe" else NLLB_MOE_54B
    return random_model(config, device, getattr(torch, case.dtype))
