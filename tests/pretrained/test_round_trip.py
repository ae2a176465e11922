"""What one package saves the other reads: the documented classes and transformers 4.57.1."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import moe_mt

pytestmark = pytest.mark.peers

SIZES = {
    "vocab_size": 60,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 20,
    "max_position_embeddings": 20,
    # Large enough that logits differ from token to token.
    "init_std": 0.3,
}
FAMILIES = {
    "dense": ("M2M100", SIZES),
    "moe": (
        "NllbMoe",
        SIZES
        | {
            "num_experts": 3,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 1,
            "router_bias": True,
        },
    ),
}
# Relative to the norm of the logits.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
# transformers cannot build the causal mask of a mixture of experts in float64.
CASES = [
    pytest.param("dense", torch.float32, id="dense float32"),
    pytest.param("dense", torch.float64, id="dense float64"),
    pytest.param("moe", torch.float32, id="moe float32"),
]
SHARDS = [pytest.param({}, id="one file"), pytest.param({"max_shard_size": "8KB"}, id="shards")]


@pytest.fixture
def theirs():
    transformers = pytest.importorskip("transformers")
    assert transformers.__version__.startswith("4.57")
    transformers.logging.set_verbosity_error()
    return transformers


def class_of(package, family, kind="ForConditionalGeneration"):
    return getattr(package, FAMILIES[family][0] + kind)


def build(package, family, kind="ForConditionalGeneration", dtype=torch.float32, **changes):
    torch.manual_seed(5)
    config = class_of(package, family, "Config")(**FAMILIES[family][1] | changes)
    return class_of(package, family, kind)(config).to(dtype).eval()


def outputs(model):
    source = torch.tensor([[5, 6, 7, 8, 2], [9, 3, 2, 1, 1]])
    with torch.no_grad():
        return model(
            input_ids=source,
            attention_mask=(source != 1).long(),
            decoder_input_ids=torch.tensor([[2, 10, 11], [2, 12, 13]]),
        )[0]


def assert_same_outputs(found, expected):
    dtype = next(expected.parameters()).dtype
    assert {parameter.dtype for parameter in found.parameters()} == {dtype}
    difference = outputs(found) - outputs(expected)
    assert difference.norm() <= TOLERANCE[dtype] * outputs(expected).norm()


def saved(folder):
    """Return every tensor of a folder's safetensors files by its key."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors |= {key: opened.get_tensor(key) for key in opened.keys()}
    return tensors


def read(package, family, folder, kind="ForConditionalGeneration", dtype=torch.float32):
    model, report = class_of(package, family, kind).from_pretrained(
        folder, torch_dtype=dtype, output_loading_info=True
    )
    return model, report


def assert_nothing_was_wrong(report):
    assert {key for key, value in report.items() if value} == set()


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_transformers_reads_what_we_save(theirs, tmp_path, family, dtype, shards):
    ours = build(moe_mt, family, dtype=dtype)
    ours.save_pretrained(tmp_path, **shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(shards)
    model, report = read(theirs, family, tmp_path, dtype=dtype)
    assert_nothing_was_wrong(report)
    assert_same_outputs(model, ours)


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_we_read_what_transformers_saves(theirs, tmp_path, family, dtype, shards):
    expected = build(theirs, family, dtype=dtype)
    expected.save_pretrained(tmp_path, **shards)
    model, report = read(moe_mt, family, tmp_path, dtype=dtype)
    assert_nothing_was_wrong(report)
    assert_same_outputs(model, expected)


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_we_read_the_pickles_that_transformers_saves(theirs, tmp_path, family, shards):
    expected = build(theirs, family)
    expected.save_pretrained(tmp_path, safe_serialization=False, **shards)
    assert not list(tmp_path.glob("*.safetensors"))
    model, report = read(moe_mt, family, tmp_path)
    assert_nothing_was_wrong(report)
    assert_same_outputs(model, expected)


@pytest.mark.parametrize("kind", ["ForConditionalGeneration", "Model"])
@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_save_the_same_keys(theirs, tmp_path, family, shards, kind):
    ours = build(moe_mt, family, kind)
    ours.save_pretrained(tmp_path / "ours", **shards)
    class_of(theirs, family, kind).from_pretrained(tmp_path / "ours").save_pretrained(
        tmp_path / "theirs", **shards
    )
    found, expected = saved(tmp_path / "ours"), saved(tmp_path / "theirs")
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    if shards:
        index = "model.safetensors.index.json"
        ours_map, theirs_map = (
            json.loads((tmp_path / side / index).read_text())["weight_map"]
            for side in ("ours", "theirs")
        )
        assert set(ours_map) == set(theirs_map) == set(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_state_dicts_and_parameters_have_the_same_names_and_shapes(theirs, family):
    ours, expected = build(moe_mt, family), build(theirs, family)

    # In one order too: optimizers know parameters by their numbers.
    def shapes(pairs):
        return [(name, tuple(tensor.shape)) for name, tensor in pairs]

    assert shapes(ours.state_dict().items()) == shapes(expected.state_dict().items())
    assert shapes(ours.named_parameters()) == shapes(expected.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_state_dicts_load_into_one_another(theirs, family):
    ours, expected = build(moe_mt, family), build(theirs, family)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(0.5)
    expected.load_state_dict(ours.state_dict())
    assert_same_outputs(expected, ours)
    fresh = build(moe_mt, family)
    fresh.load_state_dict(expected.state_dict())
    assert_same_outputs(fresh, expected)


# A base model's keys have no prefix, as those of the published 54B.
@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_model_is_read_as_one_with_a_head(theirs, tmp_path, family):
    base = build(theirs, family, "Model")
    base.save_pretrained(tmp_path)
    assert not any(key.startswith("model.") for key in saved(tmp_path))
    model, report = read(moe_mt, family, tmp_path)
    expected, expected_report = read(theirs, family, tmp_path)
    assert_nothing_was_wrong(report)
    assert_nothing_was_wrong(expected_report)
    assert_same_outputs(model, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_a_head_is_read_as_a_base_model(theirs, tmp_path, family):
    build(theirs, family).save_pretrained(tmp_path)
    model, report = read(moe_mt, family, tmp_path, "Model")
    expected, expected_report = read(theirs, family, tmp_path, "Model")
    assert report["missing_keys"] == expected_report["missing_keys"] == []
    assert sorted(report["unexpected_keys"]) == sorted(expected_report["unexpected_keys"])
    assert_same_outputs(model, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_our_base_model_is_read_by_transformers(theirs, tmp_path, family):
    ours = build(moe_mt, family, "Model")
    ours.save_pretrained(tmp_path)
    model, report = read(theirs, family, tmp_path, "Model")
    assert_nothing_was_wrong(report)
    assert_same_outputs(model, ours)
    with_head, report = read(theirs, family, tmp_path)
    assert_nothing_was_wrong(report)
    assert_same_outputs(with_head.model, ours)


def test_keys_that_are_missing_unexpected_or_of_another_shape_are_named_alike(theirs, tmp_path):
    build(theirs, "dense").save_pretrained(tmp_path)
    tensors = saved(tmp_path)
    del tensors["model.encoder.layers.1.fc1.bias"]
    tensors["model.encoder.layers.7.fc1.bias"] = torch.zeros(12)
    tensors["model.decoder.layers.0.fc1.bias"] = torch.zeros(21)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})

    def report_of(package):
        _, report = class_of(package, "dense").from_pretrained(
            tmp_path, output_loading_info=True, ignore_mismatched_sizes=True
        )
        return report

    found, expected = report_of(moe_mt), report_of(theirs)
    for key in ("missing_keys", "unexpected_keys"):
        assert sorted(found[key]) == sorted(expected[key]), key
    # 4.36 names the shapes too, 4.57 no longer does.
    name = "model.decoder.layers.0.fc1.bias"
    assert expected["mismatched_keys"] == [name]
    assert [tuple(entry) for entry in found["mismatched_keys"]] == [(name, (21,), (20,))]


# transformers 4.57.1 does not read back what it saves itself: both sides get new embeddings.
@pytest.mark.parametrize("family", FAMILIES)
def test_we_read_an_untied_head_whoever_saved_it(theirs, tmp_path, family):
    expected = build(theirs, family, tie_word_embeddings=False)
    expected.save_pretrained(tmp_path / "theirs")
    ours, report = read(moe_mt, family, tmp_path / "theirs")
    assert_nothing_was_wrong(report)
    assert_same_outputs(ours, expected)
    ours.save_pretrained(tmp_path / "ours")
    assert set(saved(tmp_path / "ours")) == set(saved(tmp_path / "theirs"))
    again, report = read(moe_mt, family, tmp_path / "ours")
    assert_nothing_was_wrong(report)
    assert_same_outputs(again, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_configurations_mean_the_same_on_both_sides(theirs, tmp_path, family):
    changes = FAMILIES[family][1] | {"dropout": 0.3, "something_new": [1, 2]}
    ours = class_of(moe_mt, family, "Config")(**changes)
    ours.save_pretrained(tmp_path / "ours")
    expected = class_of(theirs, family, "Config")(**changes)
    expected.save_pretrained(tmp_path / "theirs")
    model_fields = set(json.loads((tmp_path / "theirs" / "config.json").read_text()))
    model_fields -= {"transformers_version"}
    for reader in (moe_mt, theirs):
        config_class = class_of(reader, family, "Config")
        first, second = (
            config_class.from_pretrained(tmp_path / side) for side in ("ours", "theirs")
        )
        for field in sorted(model_fields):
            assert getattr(first, field) == getattr(second, field), field
