"""Generation of whole batches on a processor, beside CTranslate2 and transformers.

Every system runs in a process of its own on the same random weights: 32 source tokens, exactly 32
new ones. Timed: token ids in, token ids out, so encoding counts. Left out: loading, which has a
figure of its own, tokenising, and the first call at every batch and beam. ``-k "418m and 1x4"``
measures one of them, ``-k "not transformers"`` leaves a system out.
"""

import importlib.metadata
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks.floors import Work, generation, measure_reading
from benchmarks.generation.checkpoints import random_checkpoint
from benchmarks.generation.experts_hit import experts_hit
from benchmarks.generation.process import Worker
from benchmarks.generation.shapes import (
    MODELS,
    NEW_TOKENS,
    SOURCE_TOKENS,
    SYSTEMS,
    TOY_DENSE,
    TOY_MOE,
    Decoding,
    GeneratedModel,
    System,
    draw_sources,
)
from benchmarks.generation.turns import Found, Measured, measure_in_turns, speedup
from benchmarks.graphs import PeerUnavailable
from benchmarks.signature import instruction_set
from benchmarks.timing import spread
from moe_mt.models import TransformerConfig

ITEM_BYTES = {"float32": 4, "int8-dynamic": 1}

CHECKED_SENTENCES = 4


class Case(NamedTuple):
    """One system at one batch and beam of a model."""

    model: GeneratedModel
    decoding: Decoding
    system: System

    def __str__(self) -> str:
        return f"{self.model.name}-{self.decoding}-{self.system.name}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    cases = [
        Case(model, decoding, SYSTEMS[name])
        for model in MODELS.values()
        for decoding in model.decodings
        for name in model.systems
    ]
    ours = metafunc.function is test_generate
    metafunc.parametrize("case", [one for one in cases if one.system.is_ours == ours], ids=str)


@pytest.fixture(scope="session")
def threads() -> int:
    return torch.get_num_threads()


@pytest.fixture(scope="session")
def read_bytes_per_s() -> float:
    return measure_reading()


@pytest.fixture(scope="session")
def agreement(threads: int) -> None:
    """Fail unless all systems in float32 generate the same tokens, greedily, on small models."""
    check_agreement(TOY_DENSE, "toy-dense", [s for s in SYSTEMS if s.endswith("float32")], threads)
    check_agreement(TOY_MOE, "toy-moe", ["ours-float32", "transformers-float32"], threads)


@pytest.fixture(scope="session")
def measured(
    request: pytest.FixtureRequest, agreement: None, threads: int
) -> Callable[[GeneratedModel], Found]:
    """Return what measures a model once: all its systems that were selected, in turns."""
    chosen = list(selected_cases(request.session.items))
    known: dict[str, Found] = {}
    capture = request.config.pluginmanager.getplugin("capturemanager")
    assert capture is not None

    def tell(line: str) -> None:
        with capture.global_and_fixture_disabled():
            sys.stdout.write(f"\n{line}")
            sys.stdout.flush()

    def measure(model: GeneratedModel) -> Found:
        if model.name not in known:
            cases = [case for case in chosen if case.model is model]
            wanted = {
                decoding: [case.system for case in cases if case.decoding == decoding]
                for decoding in dict.fromkeys(case.decoding for case in cases)
            }
            folder = random_checkpoint(model.config, model.name)
            start = partial(start_worker, folder=folder, threads=threads)
            known[model.name] = measure_in_turns(model, wanted, start, tell=tell)
        return known[model.name]

    return measure


def test_generate(
    benchmark, sign, measured, read_bytes_per_s: float, threads: int, case: Case
) -> None:
    found = benchmark.pedantic(partial(measured, case.model), rounds=1)
    mine = found[case.decoding, case.system.name]
    check_lengths(mine, case)
    rivals = {
        name: found[case.decoding, name]
        for name in case.model.systems
        if case.system.name in SYSTEMS[name].rival_to and (case.decoding, name) in found
    }
    sign(
        case.model.name,
        peer="+".join(f"{name}-{installed(name)}" for name in ("transformers", "ctranslate2")),
        dtype=case.system.dtype,
        batch=case.decoding.batch,
        beam=case.decoding.beam,
        source=SOURCE_TOKENS,
        new=NEW_TOKENS,
        isa=instruction_set(),
    )
    work = work_of(case)
    benchmark.extra_info["seconds"] = spread(mine.seconds)
    benchmark.extra_info["figures"] = {
        "tokens": case.decoding.batch * NEW_TOKENS,
        "bytes": work.bytes,
        "flops": work.flops,
        "floor_s": work.bytes / read_bytes_per_s,
        "read_bytes_per_s": read_bytes_per_s,
        **mine.figures(),
    }
    benchmark.extra_info["peers"] = {
        f"{SYSTEMS[name].program} {SYSTEMS[name].dtype}": beside(mine, theirs)
        for name, theirs in rivals.items()
    }


def test_peer(measured, case: Case) -> None:
    mine = measured(case.model)[case.decoding, case.system.name]
    if mine.note:
        pytest.skip(mine.note)
    check_lengths(mine, case)


def beside(mine: Measured, theirs: Measured) -> dict:
    """Return what stands in our row of a peer."""
    if theirs.note:
        return {"note": theirs.note}
    pairs = zip(mine.tokens, theirs.tokens, strict=True)
    same = sum(ours == other for ours, other in pairs) / len(mine.tokens)
    return {
        "seconds": spread(theirs.seconds),
        "speedup": spread(speedup(mine, theirs)),
        "same_translations": same,
        **theirs.figures(),
    }


def work_of(case: Case) -> Work:
    """Return what must be moved and computed for one batch."""
    config, decoding = case.model.config, case.decoding
    hit = {}
    if config.moe is not None:
        folder = random_checkpoint(config, case.model.name)
        hit = experts_hit(folder, case.model.decodings)[str(decoding)]
    return generation(
        config,
        sentences=decoding.batch,
        beams=decoding.beam,
        source_tokens=SOURCE_TOKENS,
        new_tokens=NEW_TOKENS,
        item_bytes=ITEM_BYTES[case.system.dtype],
        distinct_encoding=hit.get("encoder", 0),
        distinct=hit.get("decoder", 0),
    )


def check_lengths(found: Measured, case: Case) -> None:
    assert not found.note, found.note
    lengths = [len(tokens) for tokens in found.tokens]
    assert lengths == [NEW_TOKENS] * case.decoding.batch, f"{case} generated {lengths} tokens"


def check_agreement(config: TransformerConfig, name: str, systems: list[str], threads: int) -> None:
    """Compare the greedy translations of systems on a small model."""
    folder = random_checkpoint(config, name)
    sources = draw_sources(config, CHECKED_SENTENCES)
    found = {}
    for system in systems:
        try:
            with start_worker(SYSTEMS[system], folder=folder, threads=threads) as worker:
                found[system] = worker.generate(sources, 1, NEW_TOKENS).tokens
        except PeerUnavailable:
            assert not SYSTEMS[system].is_ours
    expected = found.pop("ours-float32")
    for system, tokens in found.items():
        assert tokens == expected, f"{system} and this package generate other tokens on {name}"


def start_worker(system: System, *, folder: Path, threads: int) -> Worker:
    """Start one system, its model converted where it needs another form."""
    if system.program == "ctranslate2":
        installed(system.program, required=True)
        from benchmarks.generation.ctranslate2_model import convert

        folder = convert(folder, quantization=None if system.dtype == "float32" else system.dtype)
    return Worker(system.program, system.dtype, folder, threads)


def installed(package: str, *, required: bool = False) -> str:
    """Return a peer's version; ``none`` where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        if required:
            raise PeerUnavailable(f"{package} is not installed here; make bench has it") from error
        return "none"


def selected_cases(items: Iterable[pytest.Item]) -> Iterator[Case]:
    """Yield the cases of the tests that will run."""
    for item in items:
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        if isinstance(case, Case):
            yield case
