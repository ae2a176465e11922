"""The compiled step: few graphs, no breaks, and the tokens of the eager one."""

import copy
import json
import random
from functools import cache
from pathlib import Path

import pytest
import torch

from moe_mt.checkpoints import load
from moe_mt.errors import InputError
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


def requests_of(lengths, limits):
    return [
        Request(source_tokens=[*(5 + i % 50 for i in range(length - 1)), EOS], max_new_tokens=limit)
        for length, limit in zip(lengths, limits, strict=True)
    ]


def tokens_of(model, requests, sentences, **more):
    found = generate_each(
        model, requests, GenerationConfig(), limits=BatchLimits(sentences=sentences), **more
    )
    return {number: hypotheses[0].tokens for number, hypotheses in found}


def test_a_bucket_that_was_run_to_its_end_is_as_good_as_new():
    model, step = load_model("dense_3_1"), CompiledStep(load_model("dense_3_1"), backend="eager")
    # Ended at the last position, then fewer sentences in the same bucket, then as many again.
    for lengths, limits in (([9] * 4, [31] * 4), ([7] * 3, [31] * 3), ([5] * 4, [60] * 4)):
        requests = requests_of(lengths, limits)
        assert tokens_of(model, requests, 4, step=step) == tokens_of(model, requests, 4)


def test_sentences_that_fill_a_bucket_claim_no_expert(monkeypatch):
    model = load_model("moe_4_experts_bias")
    step = CompiledStep(model, backend="eager")
    (sparse,) = [m for m in model.decoder.modules() if type(m).__name__ == "MoELayer"][:1]
    seen, choose = [], sparse.router.choose

    def spy(logits, padding=None, noise=None):
        routing = choose(logits, padding, noise)
        seen.append(routing.expert_ids)
        return routing

    monkeypatch.setattr(sparse.router, "choose", spy)
    monkeypatch.setattr(step, "_decode", model.decode)  # a spy cannot stand in a graph
    tokens_of(model, requests_of([4, 4, 4], [3, 3, 3]), 3, step=step)
    assert len(seen) == 3
    for expert_ids in seen:
        assert (expert_ids[3:] == sparse.router.num_experts).all()
        assert (expert_ids[:3] < sparse.router.num_experts).all()


def test_positions_beyond_the_models_own_table_are_there():
    model = load_model("dense_2_2")
    requests = requests_of([90, 3], [20, 130])
    step = CompiledStep(model, backend="eager")
    found = tokens_of(model, requests, 2, step=step)
    assert found == tokens_of(model, requests, 2)


def test_a_copy_decodes_with_the_copied_model():
    model = load_model("dense_2_2")
    other, step = copy.deepcopy((model, CompiledStep(model, backend="eager")))
    with torch.no_grad():
        other.decoder.norm.weight.neg_()
    requests = requests_of([4, 6], [9, 9])
    found = tokens_of(other, requests, 2, step=step)
    assert found == tokens_of(other, requests, 2)
    assert found != tokens_of(model, requests, 2)


def test_what_changes_for_a_compiler_is_compiled_anew_in_every_bucket():
    model, step = load_model("dense_2_2"), CompiledStep(load_model("dense_2_2"), backend="eager")
    # Twelve buckets: more than PyTorch compiles of one function by itself.
    sizes = [(sentences, limit) for sentences in (1, 2, 4, 8) for limit in (20, 40, 80)]
    requests = {size: requests_of([4] * size[0], [size[1]] * size[0]) for size in sizes}
    model.positions.reserve(128)
    threads = torch.get_num_threads()
    try:
        for changed in (threads, threads + 1):
            torch.set_num_threads(changed)
            for size in sizes:
                tokens_of(model, requests[size], size[0], step=step)
    finally:
        torch.set_num_threads(threads)
    assert step.graphs == 12


@pytest.mark.parametrize("first_sentences", [2, 4], ids=["the same bucket", "another"])
def test_two_batches_at_once_are_refused_and_not_mixed(first_sentences):
    model, step = load_model("dense_2_2"), CompiledStep(load_model("dense_2_2"), backend="eager")
    count = first_sentences
    outer = generate_each(
        model,
        requests_of([4] * count, [3] + [20] * (count - 1)),
        GenerationConfig(min_new_tokens=3),
        limits=BatchLimits(sentences=count),
        step=step,
    )
    next(outer)
    requests = requests_of([5, 6], [9, 9])
    assert tokens_of(model, requests, 2, step=step) == tokens_of(model, requests, 2)
    with pytest.raises(InputError, match="one batch at a time"):
        list(outer)
