"""``config.json``: read with care, refused with the reason."""

import json

import pytest

from moe_mt.checkpoints import read_config, read_json
from moe_mt.errors import CheckpointError, ConfigError
from tests.checkpoints.published import DENSE, MOE


def write(tmp_path, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "config.json").write_text(text)
    return tmp_path


def test_values_arrive(tmp_path):
    family, config = read_config(write(tmp_path, MOE))
    assert family.name == "nllb_moe"
    assert config.decoder_ffn_dim == 10
    assert config.moe is not None
    assert config.moe.num_experts == 3


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "not json", "\x00"])
def test_text_that_is_not_json(tmp_path, text):
    with pytest.raises(CheckpointError, match="should be JSON"):
        read_config(write(tmp_path, text))


def test_bytes_that_are_not_utf8(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(CheckpointError, match="should be JSON"):
        read_config(tmp_path)


def test_json_nested_beyond_reason(tmp_path):
    # The parser raises RecursionError, which is no ValueError.
    with pytest.raises(CheckpointError, match="should be JSON"):
        read_config(write(tmp_path, "[" * 200_000))


@pytest.mark.parametrize("content", [[], "model", 3, None])
def test_json_that_is_no_object(tmp_path, content):
    with pytest.raises(CheckpointError, match="should hold a JSON object"):
        read_json(write(tmp_path, json.dumps(content)) / "config.json")


def test_path_that_is_a_folder(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_config(tmp_path)


@pytest.mark.parametrize("model_type", ["bert", "", None, 3, ["m2m_100"]])
def test_unknown_model_type_lists_the_known_ones(tmp_path, model_type):
    with pytest.raises(CheckpointError, match=r"m2m_100, nllb-moe, nllb_moe"):
        read_config(write(tmp_path, DENSE | {"model_type": model_type}))


def test_no_model_type(tmp_path):
    with pytest.raises(CheckpointError, match="no model_type"):
        read_config(write(tmp_path, {"d_model": 8}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("d_model", "8"),
        ("d_model", 8.5),
        ("vocab_size", True),  # an int to Python
        ("vocab_size", [40]),
        ("scale_embedding", 1),
        ("dropout", "0.1"),
        ("dropout", True),
        ("activation_function", 3),
        ("num_experts", {}),
    ],
)
def test_value_of_the_wrong_type(tmp_path, name, value):
    with pytest.raises(ConfigError, match=f"{name} is "):
        read_config(write(tmp_path, MOE | {name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("d_model", 0),
        ("encoder_attention_heads", 3),  # does not divide d_model
        ("activation_function", "swish"),
        ("pad_token_id", 40),  # beyond the vocabulary
        ("num_experts", 1),
        ("router_dtype", "int8"),
    ],
)
def test_value_out_of_range_names_the_file(tmp_path, name, value):
    with pytest.raises(ConfigError, match=rf"config\.json: .*{value}"):
        read_config(write(tmp_path, MOE | {name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("encoder_layerdrop", 0),  # an int in every published NLLB file
        ("expert_capacity", None),  # fairseq's rule
        ("dropout", None),  # a null is the default
        ("task_specific_params", {"anything": 1}),  # not ours
    ],
)
def test_value_that_published_files_have(tmp_path, name, value):
    read_config(write(tmp_path, MOE | {name: value}))
