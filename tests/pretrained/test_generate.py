"""The documented ``generate`` against transformers 4.57.1, on both ways of decoding."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe_mt.pretrained.generation.outputs import (
    BeamSampleEncoderDecoderOutput,
    BeamSearchEncoderDecoderOutput,
    GenerateBeamEncoderDecoderOutput,
    GenerateEncoderDecoderOutput,
    GreedySearchEncoderDecoderOutput,
    SampleEncoderDecoderOutput,
)
from moe_mt.pretrained.m2m100 import M2M100ForConditionalGeneration
from moe_mt.pretrained.nllb_moe import NllbMoeForConditionalGeneration
from tests.golden.generate_runs import (
    DENSE,
    LANGUAGE,
    SEARCHES,
    SOURCES,
    SPARSE,
    all_runs,
    keywords,
    shown_runs,
)

GOLDENS = Path(__file__).parents[1] / "golden"
MODELS = {DENSE: M2M100ForConditionalGeneration, SPARSE: NllbMoeForConditionalGeneration}


@cache
def load_model(name):
    return MODELS[name].from_pretrained(GOLDENS / "models" / name)


@cache
def golden(name):
    runs = json.loads((GOLDENS / "generate" / f"{name}.json").read_text())
    return {run["name"]: run for run in runs}


def run(name, options, **more):
    model = load_model(name)
    torch.manual_seed(options.get("seed", 0))
    return model.generate(**keywords(options, model.config) | more)


@pytest.mark.parametrize(
    ("name", "title", "options"),
    [
        pytest.param(name, *found, id=f"{name}, {found[0]}")
        for name in MODELS
        for found in all_runs(name)
    ],
)
def test_sequences_scores_and_beam_indices_are_the_published_ones(name, title, options):
    expected = golden(name)[title]
    found = run(name, options, return_dict_in_generate=True, output_scores=True)
    assert found.sequences.dtype == torch.int64
    assert found.sequences.tolist() == expected["sequences"]
    if "beam_indices" in expected:
        assert found.beam_indices.tolist() == expected["beam_indices"]
        scores = torch.tensor(expected["sequences_scores"])
        torch.testing.assert_close(found.sequences_scores, scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_both_ways_of_decoding_and_both_kinds_of_output_give_the_same_tokens(name, monkeypatch):
    model = load_model(name)
    steps = []
    # Not forward, whose replacement is a reason to decode slowly.
    decoder = model.get_decoder()
    decode_step, decode = model.decode_step, decoder.decode
    monkeypatch.setattr(model, "decode_step", lambda *a: steps.append(0) or decode_step(*a))
    monkeypatch.setattr(decoder, "decode", lambda *a, **k: steps.append(1) or decode(*a, **k))
    slow_arguments = ("decoder_head_mask", "cross_attn_head_mask", "decoder_attention_mask")
    for title, options in all_runs(name):
        expected = golden(name)[title]["sequences"]
        assert run(name, options).tolist() == expected, title
        is_slow = "use_cache" in options or any(key in options for key in slow_arguments)
        assert set(steps) == {int(is_slow)}, title
        steps.clear()
        found = run(name, options, return_dict_in_generate=True, output_hidden_states=True)
        assert found.sequences.tolist() == expected, title
        assert set(steps) == {1}, title
        steps.clear()


def nested(key, output):
    """Yield the tensors of nested tuples with the golden's names for them."""
    if isinstance(output, torch.Tensor):
        yield key, output
        return
    for index, item in enumerate(output):
        yield from nested(f"{key}.{index}", item)


@pytest.mark.parametrize(
    ("name", "title", "options"),
    [
        pytest.param(name, *found, id=f"{name}, {found[0]}")
        for name in MODELS
        for found in shown_runs(name)
    ],
)
def test_everything_that_can_be_returned_is_what_the_published_class_returns(name, title, options):
    expected = load_file(GOLDENS / "generate" / f"{name}.safetensors")
    expected = {
        k.removeprefix(f"{title}/"): v for k, v in expected.items() if k.startswith(f"{title}/")
    }
    found = run(
        name,
        options,
        max_new_tokens=5,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_attentions=True,
        output_hidden_states=True,
    )
    tensors = dict(pair for key, value in found.items() for pair in nested(key, value))
    assert tensors.keys() == expected.keys()
    for key, value in expected.items():
        value = value.long() if key == "beam_indices" else value
        torch.testing.assert_close(tensors[key], value, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beam 3"])
def test_the_cache_is_the_same_on_both_ways(name, options):
    fast = run(name, options, return_dict_in_generate=True)
    slow = run(name, options, return_dict_in_generate=True, output_hidden_states=True)
    assert len(fast.past_key_values) == load_model(name).config.decoder_layers
    for layer, expected in zip(fast.past_key_values, slow.past_key_values, strict=True):
        for state, value in zip(layer, expected, strict=True):
            torch.testing.assert_close(state, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"decoder_attention_mask": True}], ids=str
)
def test_generation_goes_on_from_a_returned_cache(name, options):
    # Without an end mark, so that no sentence ends before the others.
    model, options = load_model(name), {"eos_token_id": None} | options
    masked = options.pop("decoder_attention_mask", False)
    whole = run(name, options, max_new_tokens=6, num_beams=1, return_dict_in_generate=True)
    first = run(name, options, max_new_tokens=4, num_beams=1, return_dict_in_generate=True)
    given = {"decoder_input_ids": first.sequences, "past_key_values": first.past_key_values}
    if masked:
        given["decoder_attention_mask"] = torch.ones_like(first.sequences)
    rest = model.generate(
        **keywords(options, model.config) | given | {"max_new_tokens": 2, "num_beams": 1},
        return_dict_in_generate=True,
    )
    assert rest.sequences.tolist() == whole.sequences.tolist()
    for layer, expected in zip(rest.past_key_values, whole.past_key_values, strict=True):
        for state, value in zip(layer, expected, strict=True):
            torch.testing.assert_close(state, value, rtol=1e-5, atol=1e-5)
    # The cache of a sentence is that of each of its beams.
    again = model.generate(**keywords(options, model.config) | given | {"max_new_tokens": 2})
    fresh = model.generate(
        **keywords(options, model.config)
        | {"decoder_input_ids": first.sequences, "max_new_tokens": 2}
    )
    assert again.tolist() == fresh.tolist()


def test_output_classes_and_their_fields():
    assert GreedySearchEncoderDecoderOutput is SampleEncoderDecoderOutput
    assert GreedySearchEncoderDecoderOutput is GenerateEncoderDecoderOutput
    assert BeamSearchEncoderDecoderOutput is BeamSampleEncoderDecoderOutput
    assert BeamSearchEncoderDecoderOutput is GenerateBeamEncoderDecoderOutput
    greedy = run(DENSE, {}, return_dict_in_generate=True)
    assert isinstance(greedy, GenerateEncoderDecoderOutput)
    assert list(greedy) == ["sequences", "past_key_values"]
    beams = run(DENSE, {"num_beams": 2}, return_dict_in_generate=True, use_cache=False)
    assert isinstance(beams, GenerateBeamEncoderDecoderOutput)
    assert list(beams) == ["sequences", "beam_indices"]
    assert torch.equal(beams[0], beams["sequences"])


def test_logits_come_before_the_rules_and_scores_after():
    found = run(
        DENSE,
        {"forced_bos_token_id": LANGUAGE},
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        # A rule that writes on what it is given.
        logits_processor=[lambda _, scores: scores.mul_(2)],
    )
    for step, (scores, logits) in enumerate(zip(found.scores, found.logits, strict=True)):
        assert logits.isfinite().all()
        if step == 0:
            assert (scores > -torch.inf).sum(1).tolist() == [1, 1, 1]
        else:
            assert torch.equal(scores, 2 * logits)


def test_transition_scores_add_up():
    model = load_model(DENSE)
    found = run(
        DENSE,
        {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.7},
        return_dict_in_generate=True,
        output_scores=True,
    )
    scores = model.compute_transition_scores(found.sequences, found.scores, found.beam_indices)
    lengths = (found.beam_indices >= 0).sum(1)
    torch.testing.assert_close(scores.sum(1) / lengths**0.7, found.sequences_scores)
    greedy = run(DENSE, {}, return_dict_in_generate=True, output_scores=True)
    log_probs = model.compute_transition_scores(
        greedy.sequences, greedy.scores, normalize_logits=True
    )
    for row, tokens in enumerate(greedy.sequences[:, 1:].tolist()):
        for step, token in enumerate(tokens):
            expected = greedy.scores[step][row].log_softmax(-1)[token]
            assert log_probs[row, step] == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize(("title", "options"), SEARCHES, ids=[title for title, _ in SEARCHES])
def test_batching_does_not_change_sequences(title, options):
    # In float64, so that a near-tie does not decide.
    model = MODELS[DENSE].from_pretrained(GOLDENS / "models" / DENSE).double()
    count = options.get("num_return_sequences", 1)
    together = model.generate(**keywords(options, model.config)).tolist()
    for index, source in enumerate(SOURCES):
        given = keywords(options, model.config) | {"attention_mask": None}
        alone = model.generate(**given | {"input_ids": torch.tensor([source])}).tolist()
        rows = together[index * count : (index + 1) * count]
        assert [without_padding(row) for row in rows] == [without_padding(row) for row in alone]


def without_padding(row):
    while row[-1] == 1:
        row = row[:-1]
    return row
