import copy
import json

import pytest

from moe_mt.errors import CheckpointError, ConfigError
from moe_mt.pretrained.config import M2M100Config
from moe_mt.pretrained.generation.config import PublishedGenerationConfig

# What the checkpoints ship; the last is one that was made of config.json.
SHIPPED = {
    "m2m100_418M": {"max_length": 200, "num_beams": 5, "early_stopping": True},
    "nllb-moe-54b": {"max_new_tokens": 200, "num_beams": 4},
    "nllb-200": {"max_length": 200, "_from_model_config": True},
}
TOKENS = {"bos_token_id": 0, "decoder_start_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}


def test_documented_defaults():
    config = PublishedGenerationConfig()
    assert (config.max_length, config.max_new_tokens, config.min_length) == (20, None, 0)
    assert (config.do_sample, config.num_beams, config.early_stopping) == (False, 1, False)
    assert (config.temperature, config.top_k, config.top_p, config.typical_p) == (1.0, 50, 1.0, 1.0)
    assert (config.repetition_penalty, config.length_penalty) == (1.0, 1.0)
    assert (config.no_repeat_ngram_size, config.num_return_sequences) == (0, 1)
    assert (config.use_cache, config.renormalize_logits) == (True, False)
    assert (config.output_scores, config.return_dict_in_generate) == (False, False)
    assert (config.forced_bos_token_id, config.eos_token_id) == (None, None)
    # Documented fields of what is not offered are there, at the value that means off.
    assert (config.num_beam_groups, config.diversity_penalty) == (1, 0.0)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_come_back_as_they_were(name, tmp_path):
    shipped = SHIPPED[name] | TOKENS | {"transformers_version": "4.27.0.dev0", "ours": [1]}
    (tmp_path / "generation_config.json").write_text(json.dumps(shipped))
    config = PublishedGenerationConfig.from_pretrained(tmp_path)
    assert {key: getattr(config, key) for key in shipped} == shipped
    config.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text()) == shipped
    assert PublishedGenerationConfig.from_pretrained(tmp_path / "again") == config


def test_other_file_names_folders_and_overrides(tmp_path):
    PublishedGenerationConfig(num_beams=3).save_pretrained(tmp_path / "in", "mine.json")
    read = PublishedGenerationConfig.from_pretrained
    config = read(tmp_path, "mine.json", subfolder="in", num_return_sequences=2)
    assert (config.num_beams, config.num_return_sequences) == (3, 2)
    config, unused = read(
        tmp_path / "in", "mine.json", top_k=1, foo=False, return_unused_kwargs=True
    )
    assert (config.top_k, unused) == (1, {"foo": False})


def test_from_dict_keeps_unknown_fields_and_returns_unknown_keywords():
    config, unused = PublishedGenerationConfig.from_dict(
        {"foo": "bar", "num_beams": 2}, num_beams=3, other=1, return_unused_kwargs=True
    )
    assert (config.foo, config.num_beams, unused) == ("bar", 3, {"other": 1})
    assert PublishedGenerationConfig.from_dict(config.to_dict()) == config


def test_update_sets_fields_and_returns_the_rest():
    config = PublishedGenerationConfig(mine=1)
    given = {"max_new_tokens": 7, "mine": 2, "foo": "bar", "validate": 3}
    assert config.update(**given) == {"foo": "bar", "validate": 3}
    assert (config.max_new_tokens, config.mine) == (7, 2)
    assert given["foo"] == "bar"


def test_none_switches_off_or_sets_what_cannot_be_off_to_its_default():
    config = PublishedGenerationConfig(num_beams=None, do_sample=None, top_k=None)
    assert (config.num_beams, config.do_sample, config.top_k) == (1, False, None)
    config.length_penalty = None
    assert config.length_penalty == 1.0


def test_only_what_differs_from_the_defaults_is_written():
    config = PublishedGenerationConfig(num_beams=4, bad_words_ids=[[1, 2]], foo=None)
    expected = {"num_beams": 4, "bad_words_ids": [[1, 2]], "foo": None}
    assert config.to_diff_dict() == expected
    assert json.loads(config.to_json_string()) == expected
    assert json.loads(config.to_json_string(use_diff=False))["max_length"] == 20
    assert "num_beams" in repr(config)


def test_biases_of_sequences_survive_json(tmp_path):
    PublishedGenerationConfig(sequence_bias={(4, 5): -0.5}).save_pretrained(tmp_path)
    read = PublishedGenerationConfig.from_pretrained(tmp_path)
    assert read.sequence_bias == [[[4, 5], -0.5]]


def test_a_models_configuration_gives_its_generation_fields_alone():
    model_config = M2M100Config(num_beams=5, max_length=200, output_scores=True, foo="bar")
    config = PublishedGenerationConfig.from_model_config(model_config)
    assert (config.num_beams, config.max_length, config.eos_token_id) == (5, 200, 2)
    assert config.return_dict_in_generate
    assert not hasattr(config, "foo")
    assert not hasattr(config, "vocab_size")


def test_equality_looks_at_what_says_how_to_generate():
    config = PublishedGenerationConfig(num_beams=2)
    assert config == PublishedGenerationConfig(num_beams=2, transformers_version="4.30")
    assert config != PublishedGenerationConfig(num_beams=3)
    assert config != {"num_beams": 2}
    assert copy.deepcopy(config) == config


def test_bad_values_are_named_when_set_together_and_when_saved(tmp_path):
    with pytest.raises(ConfigError, match=r"no_repeat_ngram_size is 1\.5"):
        PublishedGenerationConfig(no_repeat_ngram_size=1.5)
    config = PublishedGenerationConfig()
    with pytest.raises(ValueError, match="exponential_decay_length_penalty is"):
        config.update(exponential_decay_length_penalty=5)
    config = PublishedGenerationConfig()
    config.num_return_sequences = 2
    with pytest.raises(ConfigError, match="greedy search finds one"):
        config.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_missing_files_and_files_for_folders_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="generation_config"):
        PublishedGenerationConfig.from_pretrained(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        PublishedGenerationConfig().save_pretrained(tmp_path / "file")
