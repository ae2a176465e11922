"""``AutoConfig``, ``AutoModel`` and ``AutoModelForSeq2SeqLM``: from a checkpoint to its class."""

import json

import pytest
import torch

from moe_mt import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    M2M100Model,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    NllbMoeModel,
)
from moe_mt.errors import CheckpointError, ConfigError

SMALL = {
    "vocab_size": 20,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8,
}
FAMILIES = {
    "dense": (M2M100Config, M2M100Model, M2M100ForConditionalGeneration),
    "experts": (NllbMoeConfig, NllbMoeModel, NllbMoeForConditionalGeneration),
}
each_family = pytest.mark.parametrize("family", FAMILIES)


def small_config(family, **fields):
    return FAMILIES[family][0](**SMALL, **fields)


@each_family
def test_the_class_is_that_of_the_family(family, tmp_path):
    config_class, model_class, with_head = FAMILIES[family]
    model = with_head(small_config(family))
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is config_class
    for auto, expected in ((AutoModel, model_class), (AutoModelForSeq2SeqLM, with_head)):
        assert type(auto.from_pretrained(tmp_path)) is expected
        assert type(auto.from_config(small_config(family))) is expected
    loaded, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == info["unexpected_keys"] == []
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_both_spellings_of_the_experts_model_type_open(tmp_path):
    NllbMoeModel(small_config("experts")).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"model_type": "nllb_moe"}))
    assert type(AutoModel.from_pretrained(tmp_path)) is NllbMoeModel


def test_keywords_reach_the_configuration_and_the_model(tmp_path):
    M2M100Model(small_config("dense")).save_pretrained(tmp_path / "within")
    model = AutoModel.from_pretrained(
        tmp_path, subfolder="within", torch_dtype="float64", dropout=0.25
    )
    assert model.dtype == torch.float64
    assert model.config.dropout == 0.25
    given = small_config("dense", use_cache=False)
    found = AutoModel.from_pretrained(tmp_path / "within", config=given).config
    assert found.use_cache is False
    assert given.torch_dtype is None  # a copy was used


def test_another_kind_of_model_is_named_with_those_that_run_here(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    for auto in (AutoConfig, AutoModel, AutoModelForSeq2SeqLM):
        with pytest.raises(CheckpointError, match=r"'t5'.*m2m_100.*nllb-moe"):
            auto.from_pretrained(tmp_path)


def test_what_is_no_configuration_is_refused():
    with pytest.raises(ConfigError, match=r"dict.*M2M100Config"):
        AutoModel.from_config({})


@pytest.mark.parametrize("auto", [AutoConfig, AutoModel, AutoModelForSeq2SeqLM])
def test_they_are_not_made_themselves(auto):
    with pytest.raises(ConfigError, match="from_pretrained"):
        auto()


def test_the_name_tiny_opens_the_model_of_this_package():
    assert type(AutoConfig.from_pretrained("tiny")) is NllbMoeConfig
    assert type(AutoModelForSeq2SeqLM.from_pretrained("tiny")) is NllbMoeForConditionalGeneration
