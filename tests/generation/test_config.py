import logging

import pytest

from moe_mt.errors import ConfigError
from moe_mt.generation import GenerationConfig

# What the published checkpoints carry.
NLLB_MOE = {
    "_from_model_config": True,
    "bos_token_id": 0,
    "decoder_start_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "max_new_tokens": 200,
    "num_beams": 4,
}
WMT21_CONFIG = {
    "model_type": "m2m_100",
    "d_model": 2048,
    "max_length": 200,
    "num_beams": 5,
    "early_stopping": True,
    "forced_bos_token_id": 128001,
    "length_penalty": None,
}


def test_defaults_are_greedy_search_without_a_limit():
    config = GenerationConfig()
    assert (config.num_beams, config.do_sample) == (1, False)
    assert config.new_token_limit is None
    assert config.new_token_minimum == 0


def test_generation_config_json_counts_alone():
    found = GenerationConfig.from_published(NLLB_MOE, WMT21_CONFIG)
    assert found == GenerationConfig(num_beams=4, max_new_tokens=200)


def test_without_it_the_fields_of_config_json_count():
    found = GenerationConfig.from_published(None, WMT21_CONFIG)
    # The forced token of this checkpoint is the language that tgt_lang says.
    expected = GenerationConfig(num_beams=5, early_stopping=True, max_length=200)
    assert found == expected
    assert found.new_token_limit == 199


def test_an_empty_generation_config_is_one_all_the_same():
    assert GenerationConfig.from_published({}, WMT21_CONFIG) == GenerationConfig()


def test_merged_leaves_what_is_none():
    base = GenerationConfig(num_beams=4, max_new_tokens=200)
    assert base.merged(num_beams=None, length_penalty=None) == base
    assert base.merged(num_beams=2) == GenerationConfig(num_beams=2, max_new_tokens=200)


def test_a_length_limit_replaces_the_checkpoints_other_one():
    # transformers ignores max_length here, because the checkpoint names max_new_tokens.
    base = GenerationConfig(max_new_tokens=200)
    assert base.merged(max_length=50).new_token_limit == 49
    assert GenerationConfig(max_length=200).merged(max_new_tokens=30).new_token_limit == 30


def test_max_new_tokens_wins_over_max_length():
    assert GenerationConfig(max_new_tokens=10, max_length=50).new_token_limit == 10


def test_minimum_is_the_stricter_of_its_two_spellings():
    assert GenerationConfig(min_length=6, min_new_tokens=3).new_token_minimum == 5
    assert GenerationConfig(min_length=2, min_new_tokens=3).new_token_minimum == 3


@pytest.mark.parametrize(
    ("option", "hint"), [("num_beam", "num_beams"), ("beam_size", "choose from"), ("maxlen", "")]
)
def test_unknown_options_are_named_with_a_suggestion(option, hint):
    with pytest.raises(ConfigError, match=f"{option}.*{hint}"):
        GenerationConfig().merged(**{option: 4})


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 0},
        {"num_beams": 2.0},
        {"num_beams": True},
        {"num_beams": "4"},
        {"num_beams": None},
        {"max_new_tokens": 0},
        {"min_new_tokens": -1},
        {"no_repeat_ngram_size": -1},
        {"length_penalty": float("nan")},
        {"length_penalty": "1"},
        {"temperature": 0.0},
        {"repetition_penalty": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"seed": -1},
        {"do_sample": 1},
        {"early_stopping": "sometimes"},
        {"early_stopping": None},
    ],
)
def test_values_out_of_range_are_named(options):
    (name,) = options
    with pytest.raises(ConfigError, match=name):
        GenerationConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2, "num_return_sequences": 3}, "num_beams=3"),
        ({"num_return_sequences": 2}, "do_sample=True"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "at least 5 and at most 4"),
    ],
)
def test_contradictions_say_what_to_do(options, message):
    with pytest.raises(ConfigError, match=message):
        GenerationConfig(**options)


def test_sampling_may_return_more_sequences_than_beams():
    assert GenerationConfig(do_sample=True, num_return_sequences=3).num_return_sequences == 3


def test_sampling_options_without_sampling_are_not_ignored_in_silence(caplog):
    with caplog.at_level(logging.WARNING):
        GenerationConfig().merged(temperature=0.5)
    assert "temperature has no effect without do_sample=True" in caplog.text
    caplog.clear()
    GenerationConfig().merged(temperature=0.5, do_sample=True)
    assert not caplog.text
