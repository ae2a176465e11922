"""The captured decoder step: the tokens of the eager one, few graphs, and no wait for the GPU.

The CPU runs the same steps compiled and not captured, in ``tests/generation/test_decode_step.py``.
"""

import random

import pytest
import torch

import moe_mt
from moe_mt.generation import BatchLimits, CompiledStep, GenerationConfig, Request, generate_each
from tests.gpu.execution import no_synchronisation

pytestmark = pytest.mark.gpu

EOS, LANGUAGE = 2, 4200
TEXTS = ["August 12, 1981", "Namibia, Canada, Uganda, or Kenya", "9 hours ago", "711.81 liters"]


@pytest.fixture(scope="module")
def eager():
    return moe_mt.from_pretrained("tiny", device="cuda", dtype="float32", compile=False)


@pytest.fixture(scope="module")
def compiled():
    return moe_mt.from_pretrained("tiny", device="cuda", dtype="float32", compile=True)


@pytest.mark.parametrize("num_beams", [1, 4])
def test_a_captured_step_gives_the_tokens_of_the_eager_one(eager, compiled, num_beams):
    for batch_size in (1, 3, 4):
        options = {"num_beams": num_beams, "batch_size": batch_size}
        expected = [r.tokens for r in eager.translate_iter(TEXTS, "en", "fr", **options)]
        for _ in range(2):  # captures, and replays
            found = [r.tokens for r in compiled.translate_iter(TEXTS, "en", "fr", **options)]
            assert found == expected


def test_fifty_random_lengths_make_one_graph_a_bucket(eager):
    model, draw = eager.model, random.Random(1)
    requests = [
        Request(
            source_tokens=[*(draw.randrange(4, 4000) for _ in range(draw.randrange(1, 60))), EOS],
            max_new_tokens=draw.randrange(3, 70),
        )
        for _ in range(50)
    ]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = CompiledStep(model)
    config, limits = GenerationConfig(), BatchLimits(sentences=8)
    found = dict(generate_each(model, requests, config, limits=limits, step=step))
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 2 * step.graphs
    assert step.graphs <= 12  # sentences: 8, 4, 2, 1; lengths: 32, 64, 128
    for number, hypotheses in dict(generate_each(model, requests, config, limits=limits)).items():
        assert found[number][0].tokens == hypotheses[0].tokens


@pytest.mark.parametrize("make_step", [CompiledStep, None], ids=["captured", "eager"])
def test_a_step_does_not_wait_for_the_gpu(eager, make_step):
    model = eager.model
    source = torch.randint(4, 4000, (4, 9), device="cuda")
    with torch.inference_mode():
        memory, _ = model.encode(source)
        cache = model.new_cache(memory, None, 2)
        tokens = torch.full((8, 1), EOS, device="cuda")
        parents = torch.arange(8, device="cuda").view(4, 2).flip(1).flatten()
        step = make_step(model) if make_step else None
        if step is not None:
            cache = step.place(cache, length=0, memory_length=9)
        decode = model.decode_step if step is None else step.run
        decode(tokens, cache)
        with no_synchronisation(tokens.device):
            for _ in range(3):
                logits = decode(tokens, cache)
                cache.reorder(parents)
                tokens = logits[:8].argmax(-1, keepdim=True)


@pytest.mark.parametrize("num_beams", [1, 4])
def test_batch_invariant_scores_are_the_same_to_the_last_bit(num_beams):
    translator = moe_mt.from_pretrained("tiny", device="cuda", batch_invariant=True)
    options = {"num_beams": num_beams}
    alone = [next(translator.translate_iter([t], "en", "fr", **options)).score for t in TEXTS]
    draw = random.Random(2)
    for _ in range(25):
        order = draw.sample(range(4), draw.randint(1, 4))
        group = [TEXTS[i] for i in order]
        found = translator.translate_iter(
            group, "en", "fr", batch_size=draw.randint(1, 4), **options
        )
        assert [result.score for result in found] == [alone[i] for i in order]
