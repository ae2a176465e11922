"""The compiled step: few graphs, no breaks, and the tokens of the eager one."""

import json
import random
from functools import cache
from pathlib import Path

import pytest
import torch

from moe_mt.checkpoints import load
from moe_mt.generation import (
    BatchLimits,
    CompiledStep,
    GenerationConfig,
    Request,
    generate,
    generate_each,
)

GOLDENS = Path(__file__).parents[1] / "golden" / "models"
FAMILIES = ["dense_2_2", "moe_4_experts_bias"]
PAD, EOS, LANGUAGE = 1, 2, 7


@cache
def load_model(name):
    return load(GOLDENS / name, device="cpu", dtype=torch.float32)


class CountingBackend:
    """Runs graphs as they were traced, and counts them."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph.forward


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch._dynamo.reset()


def fifty_requests():
    draw = random.Random(1)
    return [
        Request(
            source_tokens=[*(draw.randrange(4, 64) for _ in range(draw.randrange(1, 60))), EOS],
            forced_tokens=[LANGUAGE],
            max_new_tokens=draw.randrange(3, 70),
        )
        for _ in range(50)
    ]


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_fifty_random_lengths_make_one_graph_a_bucket_and_no_breaks(name, num_beams):
    model, requests, backend = load_model(name), fifty_requests(), CountingBackend()
    config, limits = GenerationConfig(num_beams=num_beams), BatchLimits(sentences=8)
    # These small models know few positions, and a table that grows is compiled for once more.
    model.positions.reserve(128)
    step = CompiledStep(model, backend=backend)
    torch._dynamo.utils.counters.clear()
    compiled = dict(generate_each(model, requests, config, limits=limits, step=step))
    assert len(backend.graphs) == step.graphs
    # Sentences: 8, 4, 2, 1; lengths: 32, 64, 128.
    assert 4 <= step.graphs <= 12
    assert not torch._dynamo.utils.counters["graph_break"]
    # A second translation compiles nothing.
    again = dict(generate_each(model, requests, config, limits=limits, step=step))
    assert len(backend.graphs) == step.graphs
    eager = dict(generate_each(model, requests, config, limits=limits))
    for number, hypotheses in eager.items():
        tokens = [h.tokens for h in hypotheses]
        assert tokens == [h.tokens for h in compiled[number]] == [h.tokens for h in again[number]]


@pytest.mark.parametrize("name", ["dense_2_2", "moe_4_experts_bias", "moe_priority_capacity"])
def test_every_golden_comes_out_of_the_compiled_step(name):
    golden = json.loads((GOLDENS / name / "generation.json").read_text())
    model, sources = load_model(name), golden["sources"]
    pads = "capacity" not in name
    step = CompiledStep(model, pad_sentences=pads, backend=CountingBackend())
    width = max(map(len, sources))
    tokens = torch.tensor([row + [PAD] * (width - len(row)) for row in sources])
    for run in golden["runs"]:
        known = ("name", "forced", "limit", "tokens", "scores")
        found = generate(
            model,
            tokens,
            tokens != PAD,
            GenerationConfig(**{key: run[key] for key in run if key not in known}),
            forced_tokens=[[] if run["forced"] is None else [run["forced"]]] * len(sources),
            max_new_tokens=[run["limit"]] * len(sources),
            step=step,
        )
        assert [[list(h.tokens) for h in hypotheses] for hypotheses in found] == run["tokens"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_code_that_inductor_writes_gives_the_same_tokens(name):
    model, requests = load_model(name), fifty_requests()[:3]
    config, limits = GenerationConfig(num_beams=2), BatchLimits(sentences=4)
    # One bucket: nobody's leaving makes a smaller one within so few steps.
    requests = [
        Request(source_tokens=r.source_tokens, forced_tokens=[LANGUAGE], max_new_tokens=8)
        for r in requests
    ]
    step = CompiledStep(model)
    compiled = dict(generate_each(model, requests, config, limits=limits, step=step))
    eager = dict(generate_each(model, requests, config, limits=limits))
    for number, hypotheses in eager.items():
        assert [h.tokens for h in hypotheses] == [h.tokens for h in compiled[number]]
        assert [h.score for h in hypotheses] == pytest.approx(
            [h.score for h in compiled[number]], abs=1e-5
        )


def test_a_bucket_that_ran_out_of_memory_is_given_back(monkeypatch):
    model, requests = load_model("dense_2_2"), fifty_requests()[:8]
    config, limits = GenerationConfig(), BatchLimits(sentences=8)
    step = CompiledStep(model, backend=CountingBackend())
    run = CompiledStep.run

    def with_memory_for_four(self, tokens, cache):
        if cache.sentences > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, tokens, cache)

    monkeypatch.setattr(CompiledStep, "run", with_memory_for_four)
    found = dict(generate_each(model, requests, config, limits=limits, step=step))
    assert all(sentences <= 4 for sentences, _, _ in step._buckets)
    for number, hypotheses in dict(generate_each(model, requests, config, limits=limits)).items():
        assert found[number][0].tokens == hypotheses[0].tokens
