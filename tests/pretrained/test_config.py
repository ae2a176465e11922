"""The documented configurations: spec 1.1 and 1.2, row 1 to 3 of its section 7.1."""

import copy
import json
import pickle

import pytest
import torch

from moe_mt import CheckpointError, ConfigError
from moe_mt.pretrained import M2M100Config, NllbMoeConfig, NllbMoeModel
from tests.pretrained.tiny_models import FAMILIES, build, class_of, config_of

# Written down from the specification, not read from the code.
DENSE_DEFAULTS = {
    "vocab_size": 128112,
    "max_position_embeddings": 1024,
    "encoder_layers": 12,
    "encoder_ffn_dim": 4096,
    "encoder_attention_heads": 16,
    "decoder_layers": 12,
    "decoder_ffn_dim": 4096,
    "decoder_attention_heads": 16,
    "encoder_layerdrop": 0.05,
    "decoder_layerdrop": 0.05,
    "use_cache": True,
    "is_encoder_decoder": True,
    "activation_function": "relu",
    "d_model": 1024,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "init_std": 0.02,
    "decoder_start_token_id": 2,
    "scale_embedding": True,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
    "num_hidden_layers": 12,
}
MOE_DEFAULTS = DENSE_DEFAULTS | {
    "router_bias": False,
    "router_dtype": "float32",
    "router_ignore_padding_tokens": False,
    "num_experts": 128,
    "expert_capacity": 64,
    "encoder_sparse_step": 4,
    "decoder_sparse_step": 4,
    "router_z_loss_coef": 0.001,
    "router_aux_loss_coef": 0.001,
    "second_expert_policy": "all",
    "normalize_router_prob_before_dropping": False,
    "batch_prioritized_routing": False,
    "moe_eval_capacity_token_fraction": 1.0,
    "moe_token_dropout": 0.2,
    "output_router_logits": False,
}


@pytest.mark.parametrize(
    ("config_class", "defaults"), [(M2M100Config, DENSE_DEFAULTS), (NllbMoeConfig, MOE_DEFAULTS)]
)
def test_every_field_has_its_published_default(config_class, defaults):
    config = config_class()
    assert {name: getattr(config, name) for name in defaults} == defaults
    assert {name: config.to_dict()[name] for name in defaults} == defaults


@pytest.mark.parametrize("family", FAMILIES)
def test_positional_arguments_stand_in_the_published_order(family):
    config = class_of(family, "Config")(60, 30, 3, 40, 2)
    assert (config.vocab_size, config.max_position_embeddings, config.encoder_layers) == (60, 30, 3)
    assert (config.encoder_ffn_dim, config.encoder_attention_heads) == (40, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_aliases_read_and_set_the_field_they_stand_for(family):
    config = class_of(family, "Config")(hidden_size=32, num_attention_heads=2)
    assert (config.d_model, config.encoder_attention_heads) == (32, 2)
    config.hidden_size = 8
    config.num_attention_heads = 4
    assert (config.d_model, config.hidden_size) == (8, 8)
    assert (config.encoder_attention_heads, config.num_attention_heads) == (4, 4)
    # An alias is no second field, which could come to differ.
    assert not {"hidden_size", "num_attention_heads"} & config.to_dict().keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_that_nobody_knows_are_kept(family, tmp_path):
    config = config_of(family, router_jitter_noise=0.01, nested={"a": [1, 2]}, max_length=200)
    config.added_later = "x"
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["nested"] == {"a": [1, 2]}
    found = type(config).from_pretrained(tmp_path)
    assert (found.router_jitter_noise, found.max_length, found.added_later) == (0.01, 200, "x")
    with pytest.raises(AttributeError, match="never_set"):
        found.never_set  # noqa: B018


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["dict", "json string", "json file", "folder", "copy", "pickle"])
def test_every_way_there_and_back_gives_the_same_configuration(family, way, tmp_path):
    config = config_of(
        family,
        torch_dtype="bfloat16",
        output_attentions=True,
        id2label={0: "a", 1: "b", 2: "c"},
        unknown=[1],
    )
    config_class = type(config)
    if way == "dict":
        found = config_class.from_dict(config.to_dict())
    elif way == "json string":
        found = config_class.from_dict(json.loads(config.to_json_string(use_diff=False)))
    elif way == "json file":
        config.to_json_file(tmp_path / "it.json")
        found = config_class.from_json_file(tmp_path / "it.json")
    elif way == "folder":
        config.save_pretrained(tmp_path / "made" / "here")
        found = config_class.from_pretrained(tmp_path / "made" / "here")
    else:
        found = copy.deepcopy(config) if way == "copy" else pickle.loads(pickle.dumps(config))
    assert found == config
    assert found.to_dict() == config.to_dict()
    assert (found.torch_dtype, found.id2label[2]) == (torch.bfloat16, "c")
    assert found != config_of(family)


def test_what_is_written_is_json_with_the_model_type_and_no_common_defaults(tmp_path):
    build("moe", "Model").config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "nllb-moe"
    assert stored["num_experts"] == 4
    # Fields of every configuration at their defaults are left out, as are options of ours.
    assert not {"torchscript", "id2label", "ffn_output_dropout", "router_aux_loss"} & stored.keys()


def test_options_of_ours_are_written_where_they_say_something():
    config = config_of("moe", ffn_output_dropout="dropout", router_aux_loss="transformers-4")
    found = NllbMoeConfig.from_dict(json.loads(config.to_json_string()))
    assert (found.ffn_output_dropout, found.router_aux_loss) == ("dropout", "transformers-4")


def test_keywords_win_over_a_file_and_what_is_no_field_is_handed_back(tmp_path):
    config_of("dense", dropout=0.3).save_pretrained(tmp_path)
    found, unused = M2M100Config.from_pretrained(
        tmp_path, dropout=0.5, nonsense=1, return_unused_kwargs=True
    )
    assert (found.dropout, unused) == (0.5, {"nonsense": 1})
    assert M2M100Config.from_pretrained(tmp_path).dropout == 0.3


def test_a_subfolder_and_the_file_itself_can_be_given(tmp_path):
    config_of("dense", dropout=0.3).save_pretrained(tmp_path / "inner")
    assert M2M100Config.from_pretrained(tmp_path, subfolder="inner").dropout == 0.3
    assert M2M100Config.from_pretrained(tmp_path / "inner" / "config.json").dropout == 0.3


@pytest.mark.parametrize("model_type", ["nllb-moe", "bert"])
def test_a_file_of_another_family_is_refused(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ConfigError, match=model_type):
        M2M100Config.from_pretrained(tmp_path)


def test_both_published_spellings_of_the_experts_model_type_are_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nllb_moe", "d_model": 8}))
    config = NllbMoeConfig.from_pretrained(tmp_path)
    assert (config.d_model, config.model_type) == (8, "nllb-moe")


@pytest.mark.parametrize(
    ("content", "found"), [(None, "no config.json"), ("[1]", "list"), ("{", "JSON")]
)
def test_a_file_that_is_missing_or_damaged_is_an_oserror(tmp_path, content, found):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=found) as raised:
        M2M100Config.from_pretrained(tmp_path)
    assert isinstance(raised.value, OSError)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("router_dtype", "int8"),
        ("ffn_output_dropout", "none"),
        ("router_aux_loss", "mixtral"),
        ("torch_dtype", "float31"),
    ],
)
def test_a_value_that_means_nothing_is_a_valueerror_that_names_the_field(name, value):
    with pytest.raises(ConfigError, match=name) as raised:
        config_of("moe", **{name: value})
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"d_model": 15}, "heads"),
        ({"activation_function": "tanh"}, "activation_function"),
        ({"num_experts": 1}, "num_experts"),
        ({"second_expert_policy": "none"}, "second_expert_policy"),
    ],
)
def test_a_configuration_that_describes_no_model_is_refused_when_one_is_built(changes, named):
    # Not before: fields are set one after the other.
    config = config_of("moe", **changes)
    with pytest.raises(ConfigError, match=named):
        NllbMoeModel(config)


def test_labels_follow_their_number():
    config = config_of("dense", num_labels=3)
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    config.num_labels = 1
    assert (config.num_labels, config.label2id) == (1, {"LABEL_0": 0})


def test_use_return_dict_is_off_where_scripting_needs_tuples():
    assert config_of("dense").use_return_dict
    assert not config_of("dense", torchscript=True).use_return_dict
    assert not config_of("dense", return_dict=False).use_return_dict


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_keeps_the_configuration_it_was_built_from(family):
    config = config_of(family)
    assert class_of(family, "Model")(config).config is config


def test_the_default_mixture_of_experts_can_be_built_on_the_meta_device():
    # Row 3 of spec 7.1: 27.5 GB in float32.
    with torch.device("meta"):
        model = NllbMoeModel(NllbMoeConfig())
    assert model.device.type == "meta"
    # 12 + 12 layers of width 1024, in 6 of them 128 experts of width 4096.
    norm, attention = 2 * 1024, 4 * (1024 * 1024 + 1024)
    ffn = 2 * 1024 * 4096 + 4096 + 1024
    layers = 12 * (attention + 2 * norm) + 12 * (2 * attention + 3 * norm)
    feed_forward = 18 * ffn + 6 * (128 * ffn + 128 * 1024)
    assert model.num_parameters() == 128112 * 1024 + layers + feed_forward + 2 * norm
    assert round(model.num_parameters() / 1e9, 2) == 6.88
    assert len(model.encoder.layers[3].ffn.experts) == 128


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_of_generation_can_be_read_and_are_written_only_where_they_were_set(family):
    config = class_of(family, "Config")()
    assert (config.max_length, config.num_beams, config.forced_bos_token_id) == (20, 1, None)
    assert "max_length" not in config.to_dict()
    config.max_length = 50
    assert json.loads(config.to_json_string())["max_length"] == 50
