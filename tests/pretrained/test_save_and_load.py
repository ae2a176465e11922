"""``save_pretrained`` and ``from_pretrained`` without any other library; see test_round_trip.py."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_mt import CheckpointError, ConfigError
from moe_mt.checkpoints import load, save
from moe_mt.models import TIED_KEYS, Seq2SeqTransformer
from moe_mt.pretrained import M2M100ForConditionalGeneration, NllbMoeForConditionalGeneration
from tests.pretrained.tiny_models import (
    BATCH,
    FAMILIES,
    MASK,
    SOURCE,
    TARGET,
    build,
    class_of,
    config_of,
    logits,
)

NOTHING = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}


def read(family, folder, kind="ForConditionalGeneration", **more):
    """Return a loaded model and the report."""
    return class_of(family, kind).from_pretrained(folder, output_loading_info=True, **more)


def files_of(folder):
    return {path.name for path in folder.iterdir()}


def stored(folder):
    # Copies: tensors of older safetensors are views of the file, which a second save overwrites.
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor.clone() for name, tensor in tensors.items()}


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


FORMATS = {
    "one file": ({}, {"model.safetensors"}),
    "pickle": ({"safe_serialization": False}, {"pytorch_model.bin"}),
    "shards": ({"max_shard_size": "16KB"}, {"model.safetensors.index.json"}),
    "pickled shards": (
        {"max_shard_size": 16_000, "safe_serialization": False},
        {"pytorch_model.bin.index.json"},
    ),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_comes_back_from_every_kind_of_file(family, form, tmp_path, caplog):
    options, expected_files = FORMATS[form]
    model = build(family)
    model.save_pretrained(tmp_path / "made", **options)
    assert expected_files <= files_of(tmp_path / "made")
    found, info = read(family, tmp_path / "made")
    assert info == NOTHING
    assert not warnings_of(caplog)
    assert not found.training
    assert torch.equal(logits(found), logits(model))
    assert found.config.to_dict() == model.config.to_dict() | {
        "_name_or_path": str(tmp_path / "made")
    }


def test_shards_keep_to_their_size_and_the_index_names_every_tensor_once(tmp_path):
    model = build("moe")
    model.save_pretrained(tmp_path, max_shard_size="6KiB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = {name: load_file(tmp_path / name) for name in set(index["weight_map"].values())}
    assert len(shards) > 3
    for tensors in shards.values():
        assert sum(t.numel() * 4 for t in tensors.values()) <= 6 * 1024 or len(tensors) == 1
    keys = [key for tensors in shards.values() for key in tensors]
    assert sorted(keys) == sorted(index["weight_map"])
    assert set(keys) == model.state_dict().keys() - {
        "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
        "lm_head.weight",
    }


@pytest.mark.parametrize("key", [f"model.{key}" for key in TIED_KEYS[:3]] + ["lm_head.weight"])
@pytest.mark.parametrize("kind", ["ForConditionalGeneration", "Model"])
def test_any_one_of_the_tied_names_stands_for_all(key, kind, tmp_path):
    model = build("dense")
    model.save_pretrained(tmp_path)
    tensors = stored(tmp_path)
    tensors[key] = tensors.pop("model.shared.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    found, info = read("dense", tmp_path, kind)
    assert info == NOTHING
    assert torch.equal(found.get_input_embeddings().weight, model.model.shared.weight)
    if kind != "Model":
        assert torch.equal(logits(found), logits(model))
        assert found.lm_head.weight is found.model.shared.weight


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_of_its_own_is_written_and_read(family, tmp_path):
    model = build(family, tie_word_embeddings=False)
    assert model.lm_head.weight is not model.model.shared.weight
    model.save_pretrained(tmp_path)
    assert {"lm_head.weight", "model.shared.weight"} <= stored(tmp_path).keys()
    found, info = read(family, tmp_path)
    assert info == NOTHING
    assert torch.equal(logits(found), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_base_models_encoders_and_decoders_are_read_out_of_a_whole_model(family, tied, tmp_path):
    model = build(family, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    base, info = read(family, tmp_path, "Model")
    assert info["missing_keys"] == []
    assert info["unexpected_keys"] == ([] if tied else ["lm_head.weight"])
    encoder, info = read(family, tmp_path, "Encoder")
    assert info["missing_keys"] == []
    assert all("decoder" in key or key == "lm_head.weight" for key in info["unexpected_keys"])
    decoder, info = read(family, tmp_path, "Decoder")
    assert info["missing_keys"] == []
    with torch.no_grad():
        expected = model.model(**BATCH)
        assert torch.equal(base(**BATCH).last_hidden_state, expected.last_hidden_state)
        memory = encoder(SOURCE, MASK).last_hidden_state
        assert torch.equal(memory, expected.encoder_last_hidden_state)
        found = decoder(TARGET, encoder_hidden_states=memory, encoder_attention_mask=MASK)
        assert torch.equal(found.last_hidden_state, expected.last_hidden_state)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_a_head_is_read_from_a_base_model(family, tmp_path):
    base = build(family, "Model")
    base.save_pretrained(tmp_path)
    # As the published 54B: no prefix.
    assert "shared.weight" in stored(tmp_path)
    assert not any(key.startswith("model.") for key in stored(tmp_path))
    found, info = read(family, tmp_path)
    assert info == NOTHING
    with torch.no_grad():
        expected = base(**BATCH).last_hidden_state @ base.shared.weight.T
    torch.testing.assert_close(logits(found), expected)


@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
@pytest.mark.parametrize("family", FAMILIES)
def test_encoders_and_decoders_are_saved_alone(family, kind, tmp_path):
    part = build(family, kind)
    part.save_pretrained(tmp_path)
    assert set(stored(tmp_path)) == set(part.state_dict())
    assert "embed_tokens.weight" in stored(tmp_path)
    found, info = read(family, tmp_path, kind)
    assert info == NOTHING
    with torch.no_grad():
        assert torch.equal(found(SOURCE, MASK)[0], part(SOURCE, MASK)[0])


def test_a_part_of_a_model_is_saved_as_one_alone(tmp_path):
    model = build("moe")
    model.get_encoder().save_pretrained(tmp_path)
    found, info = read("moe", tmp_path, "Encoder")
    assert info == NOTHING
    with torch.no_grad():
        assert torch.equal(found(SOURCE, MASK)[0], model.get_encoder()(SOURCE, MASK)[0])


def test_what_is_missing_and_what_has_no_place_is_said_and_logged(tmp_path, caplog):
    model = build("moe")
    model.save_pretrained(tmp_path)
    tensors = stored(tmp_path)
    gone = "model.decoder.layers.0.ffn.experts.expert_3.fc1.bias"
    del tensors[gone]
    del tensors["model.encoder.layer_norm.weight"]
    tensors["model.decoder.layers.9.fc1.bias"] = torch.zeros(3)
    # Tables and marks of old files hold nothing and are not worth a word.
    tensors["model.encoder.embed_positions.weights"] = torch.zeros(22, 16)
    tensors["final_logits_bias"] = torch.zeros(1, 60)
    save_file(tensors, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        found, info = read("moe", tmp_path)
    assert sorted(info["missing_keys"]) == [gone, "model.encoder.layer_norm.weight"]
    assert info["unexpected_keys"] == ["model.decoder.layers.9.fc1.bias"]
    missing, unexpected = warnings_of(caplog)
    assert gone in missing
    assert "train" in missing
    assert "model.decoder.layers.9.fc1.bias" in unexpected
    assert not found.get_parameter(gone).any()
    assert (found.model.encoder.layer_norm.weight == 1).all()
    kept = "model.decoder.layers.0.ffn.experts.expert_2.fc1.weight"
    assert torch.equal(found.get_parameter(kept), tensors[kept])


def test_an_embedding_of_another_shape_is_refused_or_named_once(tmp_path, caplog):
    build("dense").save_pretrained(tmp_path)
    tensors = stored(tmp_path)
    # Under a name that is not the first of the four.
    tensors["lm_head.weight"] = torch.zeros(61, 16)
    del tensors["model.shared.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*\(61, 16\).*\(60, 16\)"):
        read("dense", tmp_path)
    with caplog.at_level(logging.WARNING):
        found, info = read("dense", tmp_path, ignore_mismatched_sizes=True)
    assert info["mismatched_keys"] == [("lm_head.weight", (61, 16), (60, 16))]
    assert info["missing_keys"] == []
    assert "lm_head.weight" in caplog.text
    assert 0.2 < found.lm_head.weight.std() < 0.4


@pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("wanted", [torch.float16, "float16", "torch.float16"])
def test_a_dtype_is_taken_by_either_name_as_dtype_or_string(name, wanted, tmp_path):
    build("moe").save_pretrained(tmp_path)
    model, _ = read("moe", tmp_path, **{name: wanted})
    assert model.dtype == model.config.torch_dtype == torch.float16
    dtypes = {n: p.dtype for n, p in model.named_parameters()}
    routers = {n for n, dtype in dtypes.items() if dtype != torch.float16}
    # Rounding them would change which experts are chosen.
    assert routers == {n for n in dtypes if "router" in n}
    assert {dtypes[n] for n in routers} == {torch.float32}
    classifier = "model.decoder.layers.0.ffn.router.classifier.weight"
    assert torch.equal(model.get_parameter(classifier), build("moe").get_parameter(classifier))
    assert logits(model).dtype == torch.float16


def test_float32_is_the_dtype_unless_another_is_asked_for(tmp_path):
    build("dense").half().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float16"
    assert stored(tmp_path)["model.shared.weight"].dtype == torch.float16
    assert read("dense", tmp_path)[0].dtype == torch.float32
    assert read("dense", tmp_path, torch_dtype="auto")[0].dtype == torch.float16


@pytest.mark.parametrize("value", ["float31", torch.int8])
def test_a_dtype_that_weights_cannot_have_is_refused(value, tmp_path):
    build("dense").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="torch_dtype"):
        read("dense", tmp_path, torch_dtype=value)


def test_weights_can_be_given_instead_of_files(tmp_path, caplog):
    model = build("dense")
    state_dict = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found, info = read("dense", None, config=model.config, state_dict=state_dict)
    assert info == NOTHING
    assert torch.equal(logits(found), logits(model))
    # The folder is then asked for its configuration alone.
    model.config.save_pretrained(tmp_path)
    found, info = read("dense", tmp_path, state_dict=state_dict)
    assert info == NOTHING
    assert torch.equal(logits(found), logits(model))
    with pytest.raises(ConfigError, match="state_dict"):
        M2M100ForConditionalGeneration.from_pretrained(None)


def test_a_state_dict_can_be_written_instead_of_the_model_s_own(tmp_path):
    model = build("dense")
    halved = {name: tensor * 0.5 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=halved)
    weight = "model.encoder.layers.0.fc1.weight"
    assert torch.equal(stored(tmp_path)[weight], model.get_parameter(weight) * 0.5)


def test_a_configuration_that_is_given_wins_and_stays_as_it_is(tmp_path):
    build("dense").save_pretrained(tmp_path / "model")
    config = config_of("dense", dropout=0.7)
    before = config.to_dict()
    found, _ = read("dense", tmp_path / "model", config=config, torch_dtype="float64")
    assert found.config.dropout == 0.7
    assert found.dtype == torch.float64
    assert config.to_dict() == before
    config.save_pretrained(tmp_path / "config")
    found, _ = read("dense", tmp_path / "model", config=tmp_path / "config")
    assert found.config.dropout == 0.7
    found, _ = read("dense", tmp_path / "model", dropout=0.6)
    assert found.config.dropout == 0.6


def test_a_subfolder_is_read(tmp_path):
    model = build("dense")
    model.save_pretrained(tmp_path / "inner")
    found, info = read("dense", tmp_path, subfolder="inner")
    assert info == NOTHING
    assert torch.equal(logits(found), logits(model))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("earlier", FORMATS)
def test_weights_of_an_earlier_save_are_not_read(earlier, form, tmp_path):
    old, model = build("dense"), build("dense")
    with torch.no_grad():
        model.model.shared.weight.mul_(2)
    (tmp_path / "notes.txt").write_text("mine")
    old.save_pretrained(tmp_path, **FORMATS[earlier][0])
    model.save_pretrained(tmp_path, **FORMATS[form][0])
    assert torch.equal(logits(read("dense", tmp_path)[0]), logits(model))
    # Pickles stay beside safetensors, which every reader prefers; nothing else does.
    left = {name for name in files_of(tmp_path) if name.endswith(".safetensors")}
    if "pickle" in form:
        assert not left
    assert "notes.txt" in files_of(tmp_path)


def test_only_the_main_process_writes(tmp_path):
    build("dense").save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


def test_only_a_model_that_generates_writes_how(tmp_path):
    build("dense").save_pretrained(tmp_path / "head")
    build("dense", "Model").save_pretrained(tmp_path / "base")
    build("dense", "Encoder").save_pretrained(tmp_path / "encoder")
    assert "generation_config.json" in files_of(tmp_path / "head")
    assert "generation_config.json" not in files_of(tmp_path / "base")
    assert "generation_config.json" not in files_of(tmp_path / "encoder")
    assert class_of("dense").can_generate()
    assert not class_of("dense", "Model").can_generate()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"push_to_hub": True}, "push_to_hub"),
        ({"nonsense": None}, "nonsense"),
        ({"max_shard_size": "big"}, "max_shard_size"),
    ],
)
def test_saving_refuses_what_it_cannot_do(arguments, named, tmp_path):
    with pytest.raises(ConfigError, match=named):
        build("dense").save_pretrained(tmp_path, **arguments)
    assert not files_of(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"nonsense": 1}, "nonsense"), ({"device_map": {"lm_head": "cpu"}}, "device_map")],
)
def test_loading_refuses_what_it_cannot_do(arguments, named, tmp_path):
    build("dense").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=named):
        read("dense", tmp_path, **arguments)


def test_arguments_that_choose_among_ways_of_loading_are_accepted(tmp_path):
    model = build("dense")
    model.save_pretrained(tmp_path, push_to_hub=False)
    found, info = read(
        "dense",
        tmp_path,
        low_cpu_mem_usage=True,
        use_safetensors=True,
        attn_implementation="eager",
        trust_remote_code=False,
        device_map="cpu",
        local_files_only=True,
    )
    assert info == NOTHING
    assert torch.equal(logits(found), logits(model))


def test_files_of_another_family_are_refused_by_name(tmp_path):
    build("dense").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"m2m_100.*nllb-moe"):
        NllbMoeForConditionalGeneration.from_pretrained(tmp_path)


def test_a_folder_that_is_not_there_is_an_oserror(tmp_path):
    with pytest.raises(OSError, match="not_there"):
        M2M100ForConditionalGeneration.from_pretrained(tmp_path / "not_there")
    config_of("dense").save_pretrained(tmp_path)
    with pytest.raises(OSError, match="no weights"):
        M2M100ForConditionalGeneration.from_pretrained(tmp_path)


# The other way to load: the translator's.


def core_logits(core):
    with torch.no_grad():
        return core(SOURCE, TARGET, MASK.bool()).logits


@pytest.mark.parametrize("kind", ["ForConditionalGeneration", "Model"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_translator_reads_what_is_saved_here(family, kind, tmp_path):
    model = build(family, kind)
    model.save_pretrained(tmp_path, max_shard_size="16KB")
    core = load(tmp_path, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        outputs = model(**BATCH)
        expected = outputs[0] if kind != "Model" else outputs[0] @ model.shared.weight.T
    torch.testing.assert_close(core_logits(core), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_translator_saves_is_read_here(family, tmp_path):
    core = Seq2SeqTransformer(config_of(family).for_model()).eval()
    save(core, tmp_path)
    found, info = read(family, tmp_path)
    assert info == NOTHING
    torch.testing.assert_close(logits(found), core_logits(core), rtol=1e-5, atol=1e-5)


def test_the_translator_does_not_take_a_head_of_its_own_for_the_embedding(tmp_path):
    build("dense", tie_word_embeddings=False).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differ"):
        load(tmp_path, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_sides_with_embeddings_of_their_own_keep_them_where_nothing_is_tied(family, tmp_path):
    model = build(family, tie_word_embeddings=False)
    own = torch.nn.Embedding.from_pretrained(torch.randn(60, 16), freeze=False, padding_idx=1)
    model.model.encoder.embed_tokens = own
    model.save_pretrained(tmp_path)
    loaded = class_of(family).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(loaded.get_encoder().embed_tokens.weight, own.weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_of_a_tied_weight_that_differ_are_refused(family, tmp_path):
    model = build(family)
    model.model.encoder.embed_tokens = torch.nn.Embedding(60, 16, padding_idx=1)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"embed_tokens.*tie_word_embeddings=False"):
        class_of(family).from_pretrained(tmp_path)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = build("dense")
    with torch.no_grad():
        model.model.encoder.layers[0].fc1.bias[3] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"fc1.bias holds nan"):
        class_of("dense").from_pretrained(tmp_path)


def test_settings_of_generation_that_are_not_allowed_are_found_before_anything_is_written(tmp_path):
    model = build("dense")
    model.generation_config.num_beams = 0
    with pytest.raises(ConfigError, match="num_beams"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_head_that_is_apart_for_scripting_has_the_values_of_the_embedding(tmp_path):
    model = build("dense")
    model.save_pretrained(tmp_path)
    scripted, info = class_of("dense").from_pretrained(
        tmp_path, torchscript=True, output_loading_info=True
    )
    assert info["missing_keys"] == []
    assert scripted.lm_head.weight is not scripted.model.shared.weight
    assert torch.equal(scripted.lm_head.weight, scripted.model.shared.weight)


def test_arguments_that_ask_for_nothing_are_accepted_and_others_refused(tmp_path):
    model = build("dense")
    model.save_pretrained(tmp_path, save_function=torch.save, push_to_hub=False)
    nothing = {"quantization_config": None, "load_in_8bit": False, "use_auth_token": None}
    loaded = class_of("dense").from_pretrained(tmp_path, device_map={"": "cpu"}, **nothing)
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(ConfigError, match="load_in_8bit"):
        class_of("dense").from_pretrained(tmp_path, load_in_8bit=True)
