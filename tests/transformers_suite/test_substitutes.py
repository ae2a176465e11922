"""What tests of transformers check that cannot run here; ``verdicts.txt`` names these instead."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import moe_mt

SIZES = {
    "vocab_size": 60,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    "init_std": 0.3,
    "num_experts": 3,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 1,
}
FAMILIES = ["M2M100", "NllbMoe"]


def class_of(family, kind="ForConditionalGeneration"):
    return getattr(moe_mt, family + kind)


def build(family, kind="ForConditionalGeneration", **changes):
    torch.manual_seed(4)
    config = class_of(family, "Config")(**SIZES | changes)
    return class_of(family, kind)(config).eval()


def outputs(model):
    source = torch.tensor([[5, 6, 7, 2], [9, 3, 2, 1]])
    with torch.no_grad():
        return model(source, (source != 1).long(), torch.tensor([[2, 10], [2, 12]]))[0]


def assert_same_weights(found, expected):
    assert set(found) == set(expected)
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


# test_load_save_without_tied_weights
@pytest.mark.parametrize("family", FAMILIES)
def test_an_untied_head_is_saved_and_loaded(tmp_path, family):
    model = build(family, tie_word_embeddings=False)
    assert not torch.equal(model.lm_head.weight, model.model.shared.weight)
    model.save_pretrained(tmp_path)
    again, report = class_of(family).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert_same_weights(again.state_dict(), model.state_dict())
    assert torch.equal(outputs(again), outputs(model))


# test_correct_missing_keys
@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_of_its_own_that_is_not_in_the_files_is_missing(tmp_path, family, caplog):
    build(family, "Model", tie_word_embeddings=False).save_pretrained(tmp_path)
    model, report = class_of(family).from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == ["lm_head.weight"]
    assert "lm_head.weight" in caplog.text
    assert 0.2 < model.lm_head.weight.std() < 0.4


# test_tie_model_weights
@pytest.mark.parametrize("family", FAMILIES)
def test_resized_models_stay_tied(family):
    model = build(family)
    names = [name for name, _ in model.named_parameters()]
    model.resize_token_embeddings(70)
    assert [name for name, _ in model.named_parameters()] == names
    tied = ("model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head")
    for name in tied:
        assert model.get_submodule(name).weight is model.model.shared.weight


# test_can_init_all_missing_weights
@pytest.mark.parametrize("kind", ["ForConditionalGeneration", "Model"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_are_missing_are_drawn_as_those_of_a_new_model(family, kind, caplog):
    config = class_of(family, "Config")(**SIZES)
    model, report = class_of(family, kind).from_pretrained(
        None, config=config, state_dict={}, output_loading_info=True
    )
    parameters = dict(model.named_parameters())
    assert set(parameters) <= set(report["missing_keys"])
    for name, parameter in parameters.items():
        assert parameter.device.type == "cpu", name
        if "norm" in name:
            assert (parameter == float(name.endswith("weight"))).all(), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert 0.2 < parameter.std() < 0.4, name
    pad = config.pad_token_id
    assert not model.get_input_embeddings().weight[pad].any()


# test_load_with_mismatched_shapes, test_mismatched_shapes_have_properly_initialized_weights,
# test_matched_shapes_have_loaded_weights_when_some_mismatched_shapes_exist
def test_a_tensor_of_another_shape_is_refused_or_drawn_anew(tmp_path, caplog):
    model = build("M2M100")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    wrong = "model.encoder.layers.0.fc1.weight"
    stored[wrong] = torch.zeros(13, 16)
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(OSError, match=r"fc1\.weight"):
        class_of("M2M100").from_pretrained(tmp_path)
    again, report = class_of("M2M100").from_pretrained(
        tmp_path, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert [entry[0] for entry in report["mismatched_keys"]] == [wrong]
    assert wrong in caplog.text
    found, expected = again.state_dict(), model.state_dict()
    assert 0.2 < found.pop(wrong).std() < 0.4
    del expected[wrong]
    assert_same_weights(found, expected)


# test_save_load_low_cpu_mem_usage and its two variants
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loading_with_little_memory_gives_the_same_model(tmp_path, family, safe):
    model = build(family)
    if safe:
        model.save_pretrained(tmp_path)
    else:
        model.config.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    again, report = class_of(family).from_pretrained(
        tmp_path, low_cpu_mem_usage=True, output_loading_info=True
    )
    assert not any(report.values())
    assert_same_weights(again.state_dict(), model.state_dict())


# test_can_load_with_device_context_manager and test_can_load_with_global_device_set need a GPU
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_goes_to_the_device_that_is_asked_for(tmp_path, family):
    build(family).save_pretrained(tmp_path)
    model = class_of(family).from_pretrained(tmp_path, device_map="cpu")
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert model.device == torch.device("cpu")


# test_prepare_inputs_for_generation_encoder_decoder_llm
@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_of_the_next_step_are_prepared_as_documented(family):
    model = build(family)
    ids = torch.tensor([[2, 10, 11], [2, 12, 13]])
    first = model.prepare_inputs_for_generation(ids, use_cache=True, encoder_outputs="any")
    assert torch.equal(first["decoder_input_ids"], ids)
    assert first["input_ids"] is None
    assert first["use_cache"] is True
    assert first["encoder_outputs"] == "any"
    past = ((torch.zeros(2, 4, 2, 4),) * 4,) * 2
    mask = torch.ones(2, 5)
    second = model.prepare_inputs_for_generation(ids, past_key_values=past, attention_mask=mask)
    assert torch.equal(second["decoder_input_ids"], ids[:, 2:])
    assert second["past_key_values"] is past
    assert second["attention_mask"] is mask


# test_torch_encode_plus_sent_to_model, test_np_encode_plus_sent_to_model
def test_what_a_tokenizer_returns_goes_into_a_model():
    tokenizer = moe_mt.AutoTokenizer.from_pretrained("tiny", src_lang="eng_Latn")
    model = moe_mt.AutoModelForSeq2SeqLM.from_pretrained("tiny")
    texts = ["Hello.", "This is a longer text."]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    start = torch.full((2, 1), model.config.decoder_start_token_id)
    with torch.no_grad():
        found = model(**encoded, decoder_input_ids=start).logits
        arrays = tokenizer(texts, padding=True, return_tensors="np")
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        assert torch.equal(model(**tensors, decoder_input_ids=start).logits, found)
    assert found.shape == (2, 1, model.config.vocab_size)
