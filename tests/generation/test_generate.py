"""Generation against transformers 4.57.1, and what must hold beyond it."""

import json
import random
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from moe_mt.checkpoints import load
from moe_mt.errors import InputError
from moe_mt.generation import GenerationConfig, generate
from moe_mt.generation.beam import BeamSearch, take_best_several
from moe_mt.generation.rules import ForcedTokens
from moe_mt.generation.search import CachedDecoder, search
from moe_mt.generation.stopping import Stopping
from moe_mt.models import Seq2SeqTransformer

GOLDENS = Path(__file__).parents[1] / "golden" / "models"
MODELS = sorted(path.parent.name for path in GOLDENS.glob("*/generation.json"))
FREE_OF_DROPPING = "moe_4_experts_bias"
PAD, EOS, LANGUAGE = 1, 2, 7


@cache
def load_model(name: str, dtype: torch.dtype = torch.float32) -> Seq2SeqTransformer:
    return load(GOLDENS / name, device="cpu", dtype=dtype)


@cache
def golden(name):
    return json.loads((GOLDENS / name / "generation.json").read_text())


RUNS = [run["name"] for run in golden("dense_2_2")["runs"]]


def run(model, sources, config, *, forced, limits, **more):
    width = max(map(len, sources))
    tokens = torch.tensor([row + [PAD] * (width - len(row)) for row in sources])
    return generate(
        model, tokens, tokens != PAD, config, forced_tokens=forced, max_new_tokens=limits, **more
    )


def test_every_model_has_every_run():
    assert len(MODELS) == 11
    assert all([run["name"] for run in golden(name)["runs"]] == RUNS for name in MODELS)


@pytest.mark.parametrize("run_name", RUNS)
@pytest.mark.parametrize("model_name", MODELS)
def test_tokens_and_scores_are_the_published_ones(model_name, run_name):
    sources = golden(model_name)["sources"]
    expected = next(run for run in golden(model_name)["runs"] if run["name"] == run_name)
    known = ("name", "forced", "limit", "tokens", "scores")
    options = {key: value for key, value in expected.items() if key not in known}
    forced = [] if expected["forced"] is None else [expected["forced"]]
    found = run(
        load_model(model_name),
        sources,
        GenerationConfig(**options),
        forced=[forced] * len(sources),
        limits=[expected["limit"]] * len(sources),
    )
    assert [[list(h.tokens) for h in hypotheses] for hypotheses in found] == expected["tokens"]
    for hypotheses in found:
        for hypothesis in hypotheses:
            ended = hypothesis.tokens[-1] == EOS
            assert hypothesis.finish_reason == ("stop" if ended else "length")
    if expected["scores"] is not None:
        scores = torch.tensor([[h.score for h in hypotheses] for hypotheses in found])
        torch.testing.assert_close(scores, torch.tensor(expected["scores"]), rtol=1e-5, atol=1e-5)


# Strategies that must not know what else is in the batch.
STRATEGIES = {
    "greedy": GenerationConfig(),
    "beam": GenerationConfig(num_beams=3, num_return_sequences=2, no_repeat_ngram_size=3),
    "beam, early stopping": GenerationConfig(num_beams=4, early_stopping=True),
    "beam, never": GenerationConfig(num_beams=3, early_stopping="never", length_penalty=0.5),
    "sampling": GenerationConfig(do_sample=True, num_return_sequences=2, seed=5, top_p=0.9),
    "beam sampling": GenerationConfig(do_sample=True, num_beams=3, seed=5, temperature=0.7),
}


def varied_sentences(count):
    """Sources, forced tokens (none, a language, a language and a prefix) and limits."""
    generator = random.Random(8)
    sources = [
        [*(generator.randrange(4, 64) for _ in range(generator.randrange(1, 9))), EOS]
        for _ in range(count)
    ]
    forced = [[generator.randrange(4, 64) for _ in range(i % 4)] for i in range(count)]
    limits = [generator.randrange(3, 14) for _ in range(count)]
    return sources, forced, limits


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_sentence_gives_the_same_in_any_batch(strategy):
    # In float64, so that what is tested is the search and not the rounding of a near-tie.
    model, config = load_model(FREE_OF_DROPPING, torch.float64), STRATEGIES[strategy]
    sources, forced, limits = varied_sentences(12)

    def results(rows):
        found = run(
            model,
            [sources[row] for row in rows],
            config,
            forced=[forced[row] for row in rows],
            limits=[limits[row] for row in rows],
        )
        return [[h.tokens for h in hypotheses] for hypotheses in found]

    alone = [results([row])[0] for row in range(12)]
    assert len({hypotheses[0] for hypotheses in alone}) > 8
    generator = random.Random(9)
    for _ in range(8):
        rows = generator.sample(range(12), generator.randrange(2, 13))
        assert results(rows) == [alone[row] for row in rows]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_forced_tokens_and_limits_are_obeyed_row_by_row(strategy):
    sources, forced, limits = varied_sentences(12)
    found = run(
        load_model(FREE_OF_DROPPING), sources, STRATEGIES[strategy], forced=forced, limits=limits
    )
    for hypotheses, prefix, limit in zip(found, forced, limits, strict=True):
        assert len(hypotheses) == STRATEGIES[strategy].num_return_sequences
        for hypothesis in hypotheses:
            start = min(len(prefix), limit)
            assert list(hypothesis.tokens[:start]) == prefix[:start]
            assert len(hypothesis.tokens) <= limit
            if hypothesis.finish_reason == "length":
                assert len(hypothesis.tokens) == limit
            assert EOS not in hypothesis.tokens[:-1]


@pytest.mark.parametrize("num_beams", [1, 4])
def test_nothing_but_forced_tokens_is_one_hypothesis(num_beams):
    config = GenerationConfig(num_beams=num_beams, num_return_sequences=max(1, num_beams - 1))
    for limit in (1, 2, 3):
        found = run(
            load_model("dense_2_2"), [[9, 8, EOS]], config, forced=[[7, 8, 9]], limits=[limit]
        )
        assert [(h.tokens, h.score, h.finish_reason) for h in found[0]] == [
            ((7, 8, 9)[:limit], 0.0, "length")
        ]


def test_greedy_score_is_the_mean_log_probability_without_forced_tokens():
    model, source = load_model("dense_2_2"), torch.tensor([[9, 8, 30, EOS]])
    for penalty in (1.0, 0.0, 2.0):
        config = GenerationConfig(length_penalty=penalty)
        hypothesis = generate(
            model, source, None, config, forced_tokens=[[LANGUAGE]], max_new_tokens=[12]
        )[0][0]
        tokens = torch.tensor([hypothesis.tokens])
        with torch.no_grad():
            target = torch.cat([torch.tensor([[EOS]]), tokens[:, :-1]], dim=1)
            log_probs = model(source, target).logits.log_softmax(-1)
        gains = log_probs.gather(2, tokens[:, :, None]).flatten()[1:]
        expected = gains.sum().item() / len(hypothesis.tokens) ** penalty
        assert hypothesis.score == pytest.approx(expected, rel=1e-5)


def test_one_beam_that_stops_early_is_greedy_search():
    # The strategies are written apart; here they must meet.
    model, (sources, forced, limits) = load_model(FREE_OF_DROPPING), varied_sentences(12)
    greedy = run(model, sources, GenerationConfig(), forced=forced, limits=limits)
    for source, prefix, limit, expected in zip(sources, forced, limits, greedy, strict=True):
        device = torch.device("cpu")
        beams = BeamSearch(
            torch.full((1, 1, 1), EOS),
            ForcedTokens([prefix], device),
            Stopping([limit], [EOS], device),
            partial(take_best_several, 2),
            length_penalty=1.0,
            early_stopping=True,
        )
        with torch.no_grad():
            cache = model.new_cache(model.encode(torch.tensor([source]))[0], None)
            search(CachedDecoder(model, cache), beams, torch.tensor([[EOS]]))
        ((found, score),) = beams.results(1)[0]
        assert tuple(found) == expected[0].tokens
        assert score == pytest.approx(expected[0].score, abs=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        GenerationConfig(),
        GenerationConfig(num_beams=4, num_return_sequences=4, early_stopping=True),
    ],
    ids=["greedy", "beam, early stopping"],
)
def test_decoding_stops_with_the_last_sentence(config, monkeypatch):
    # Sentences of which every hypothesis ends long before the limit: the last one to end is the
    # last one that was needed.
    model, sources = load_model("dense_3_1"), golden("dense_3_1")["sources"]
    sources = [*sources[:3], sources[4]]
    steps, decode_step = [], model.decode_step
    monkeypatch.setattr(model, "decode_step", lambda *args: steps.append(1) or decode_step(*args))
    found = run(model, sources, config, forced=[[LANGUAGE]] * 4, limits=[60] * 4)
    assert all(h.finish_reason == "stop" for hypotheses in found for h in hypotheses)
    assert len(steps) == max(len(h.tokens) for hypotheses in found for h in hypotheses)


SAMPLING = GenerationConfig(do_sample=True, seed=1, top_k=0)


def sample(config, **more):
    sources, forced, _ = varied_sentences(6)
    found = run(
        load_model(FREE_OF_DROPPING), sources, config, forced=forced, limits=[12] * 6, **more
    )
    return [[h.tokens for h in hypotheses] for hypotheses in found]


def test_a_seed_repeats_and_another_does_not():
    assert sample(SAMPLING) == sample(SAMPLING)
    assert sample(SAMPLING) != sample(SAMPLING.merged(seed=2))


def test_without_a_seed_the_global_generator_decides():
    config = GenerationConfig(do_sample=True)
    torch.manual_seed(4)
    first, second = sample(config), sample(config)
    torch.manual_seed(4)
    assert sample(config) == first
    assert first != second
    assert sample(SAMPLING, generator=torch.Generator().manual_seed(4)) == sample(
        SAMPLING.merged(seed=9), generator=torch.Generator().manual_seed(4)
    )


def test_samples_of_a_sentence_differ():
    for hypotheses in sample(SAMPLING.merged(num_return_sequences=4)):
        assert len(hypotheses) == 4
        assert len(set(hypotheses)) > 1


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-4}])
def test_sampling_without_a_choice_is_greedy_search(options):
    assert sample(SAMPLING.merged(**options)) == sample(GenerationConfig())


def test_beam_sampling_varies_with_the_seed():
    config = SAMPLING.merged(num_beams=3, num_return_sequences=3)
    found = sample(config)
    assert found == sample(config)
    assert found != sample(config.merged(seed=2))
    assert all(len(set(hypotheses)) == 3 for hypotheses in found)


def test_sampling_follows_the_models_distribution():
    # The first token of 4,000 samples against its probabilities, six standard deviations apart.
    model, source = load_model("dense_2_2"), torch.tensor([[9, 8, 30, EOS]])
    config = GenerationConfig(do_sample=True, top_k=0, num_return_sequences=4000)
    generator = torch.Generator().manual_seed(0)
    found = generate(
        model, source, None, config, forced_tokens=[[]], max_new_tokens=[1], generator=generator
    )[0]
    counts = torch.bincount(torch.tensor([h.tokens[0] for h in found]), minlength=64)
    with torch.no_grad():
        expected = 4000 * model(source, torch.tensor([[EOS]])).logits[0, 0].softmax(-1)
    assert ((counts - expected).abs() <= 6 * expected.sqrt() + 1).all()


def test_loops_are_called_so():
    model = load(GOLDENS / "dense_2_2", device="cpu", dtype=torch.float32)
    with torch.no_grad():
        # A final norm that always points at one token makes the model say it for ever.
        model.decoder.norm.weight.zero_()
        model.decoder.norm.bias.copy_(model.embedding.weight[33])
    for config in (GenerationConfig(), GenerationConfig(num_beams=3)):
        ordinary, looping = run(
            model, [[9, 8, EOS], [*[12] * 30, EOS]], config, forced=[[7], [7]], limits=[30, 30]
        )
        assert ordinary[0].finish_reason == "repetition"
        assert looping[0].finish_reason == "length"


def test_no_sentences_give_no_results():
    empty = torch.zeros(0, 3, dtype=torch.int64)
    assert (
        generate(
            load_model("dense_2_2"),
            empty,
            None,
            GenerationConfig(),
            forced_tokens=[],
            max_new_tokens=[],
        )
        == []
    )


@pytest.mark.parametrize(
    ("forced", "limits", "message"),
    [
        ([[7]], [5, 5], "2 sources, 1 rows of forced tokens"),
        ([[7], [7]], [5], "1 limits"),
        ([[7], [7]], [5, 0], "limit of 0"),
    ],
)
def test_arguments_that_disagree_are_named(forced, limits, message):
    with pytest.raises(InputError, match=message):
        run(
            load_model("dense_2_2"), [[9, EOS], [8, EOS]], GenerationConfig(),
            forced=forced, limits=limits,
        )  # fmt: skip


def test_gradients_are_off_and_the_model_can_train_afterwards():
    model = load(GOLDENS / "dense_2_2", device="cpu", dtype=torch.float32)
    # Longer than the position table, which grows while nothing records gradients.
    run(model, [[*[9] * 50, EOS]], GenerationConfig(), forced=[[7]], limits=[3])
    logits = model(torch.full((1, 50), 9), torch.tensor([[EOS, 7]])).logits
    logits.sum().backward()
    assert model.embedding.weight.grad is not None
