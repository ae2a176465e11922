"""One line opens a model: by name, by folder, or with an error that says what to do."""

import json
import logging
from pathlib import Path

import pytest
import torch

import moe_mt
from moe_mt.checkpoints import fit
from moe_mt.errors import CheckpointError, ConfigError, PlacementError
from tests.checkpoints.published import NLLB_MOE_54B, tensor_shapes
from tests.translators import TINY, random_checkpoint, tiny


def write_54b(folder: Path) -> Path:
    """Write what is known of NLLB-MoE-54B without its weights: configuration and index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(NLLB_MOE_54B))
    weight_map = {
        key: f"pytorch_model-{number % 23 + 1:05d}-of-00023.bin"
        for number, key in enumerate(tensor_shapes(NLLB_MOE_54B))
    }
    index = {"metadata": {"total_size": 217_829_171_200}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def test_tiny_is_a_mixture_of_experts_and_says_what_it_is(caplog):
    with caplog.at_level(logging.WARNING):
        translator = moe_mt.from_pretrained("tiny", device="cpu")
    assert "not a general translator" in caplog.text
    moe = translator.model.config.moe
    assert moe is not None
    assert moe.num_experts >= 8
    assert translator.model.embedding.weight.dtype == torch.float32
    assert not translator.model.training
    assert len(translator.languages) >= 10
    assert translator.tokenizer.languages[0] == "ace_Arab"
    assert translator.folder == TINY


def test_the_same_from_a_folder_by_str_and_path():
    text = "July 8, 2047"
    expected = tiny().translate(text, "eng_Latn", "rus_Cyrl")
    for name in (TINY, str(TINY)):
        translator = moe_mt.from_pretrained(name, device="cpu")
        assert translator.translate(text, "eng_Latn", "rus_Cyrl") == expected


def test_tiny_is_the_package_s_even_beside_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()
    assert moe_mt.from_pretrained("tiny", device="cpu").folder == TINY


def test_dtype_and_progress(tmp_path):
    calls = []
    translator = moe_mt.from_pretrained(
        random_checkpoint(tmp_path),
        device="cpu",
        dtype="bfloat16",
        on_progress=lambda done, total: calls.append((done, total)),
    )
    assert translator.model.embedding.weight.dtype == torch.bfloat16
    assert calls[-1][0] == calls[-1][1] > 0
    assert isinstance(translator.translate("May 2", "en", "fr", max_new_tokens=4), str)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", Path("nowhere"), ""])
def test_no_such_folder(name):
    with pytest.raises(CheckpointError):
        moe_mt.from_pretrained(name)


def test_a_hub_model_that_was_never_fetched_and_may_not_be(tmp_path):
    with pytest.raises(CheckpointError, match="facebook/nllb-200-distilled-600M"):
        moe_mt.from_pretrained(
            "facebook/nllb-200-distilled-600M", cache_dir=tmp_path, local_files_only=True
        )


def test_a_missing_tokenizer_is_found_before_weights_are_read(tmp_path):
    folder = random_checkpoint(tmp_path)
    (folder / "sentencepiece.bpe.model").unlink()
    calls = []
    with pytest.raises(CheckpointError, match=r"sentencepiece\.bpe\.model"):
        moe_mt.from_pretrained(folder, on_progress=lambda *call: calls.append(call))
    assert calls == []


def test_what_cannot_fit_is_refused_before_anything_else_is_read(tmp_path, monkeypatch):
    # Neither weights nor tokenizer are there: to look for them would raise a CheckpointError.
    monkeypatch.setattr(fit, "free_host_bytes", lambda: 64_000_000_000)
    folder = write_54b(tmp_path / "nllb-moe-54b")
    with pytest.raises(PlacementError) as caught:
        moe_mt.from_pretrained(folder, device="cpu")
    message = str(caught.value)
    # 54.5 billion parameters in float32, the packed head and what passes through, beside what is
    # there.
    assert "nllb-moe-54b does not fit: float32 was asked for on cpu" in message
    assert "222.7 GB" in message
    assert "64.0 GB" in message
    assert 'dtype="bfloat16" takes 109.0 GB' in message


def test_options_are_checked_before_the_model_is_looked_for():
    with pytest.raises(ConfigError, match="dtype"):
        moe_mt.from_pretrained("./nowhere", dtype="int3")
    with pytest.raises(ConfigError, match="device"):
        moe_mt.from_pretrained("./nowhere", device="abacus")
