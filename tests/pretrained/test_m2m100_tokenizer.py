"""The documented tokenizers of M2M100, WMT21 and SMaLL-100."""

import json

import pytest

from moe_mt.errors import CheckpointError, InputError
from moe_mt.pretrained.tokenization.m2m100 import FAIRSEQ_LANGUAGE_CODES, M2M100Tokenizer
from tests.pretrained.tokenizer_families import PIECES, WORD_COUNT, WORDS, m2m100, small100

EN, FR, DE = (
    WORD_COUNT + FAIRSEQ_LANGUAGE_CODES["m2m100"].index(code) for code in "en fr de".split()
)


def of_published_size(folder, words, **settings):
    """Return a tokenizer with as many pieces as a published one; only four of them matter."""
    names = ["<s>", "<pad>", "</s>", "<unk>", *(f"word{i}" for i in range(words - 4))]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    return M2M100Tokenizer(str(folder / "vocab.json"), str(PIECES), **settings)


def test_published_ids(tmp_path):
    tokenizer = of_published_size(tmp_path, 128_004)
    expected = {"af": 128004, "ar": 128006, "en": 128022, "fr": 128028, "mr": 128063, "zu": 128103}
    assert {code: tokenizer.get_lang_id(code) for code in expected} == expected
    assert tokenizer.vocab_size == 128_004
    assert len(tokenizer) == 128_104
    # The rows of the made-up words have no token.
    assert tokenizer.convert_ids_to_tokens([128_104, 128_111, 144_012]) == ["<unk>"] * 3
    assert tokenizer.decode([128_028, 144_012, 2], skip_special_tokens=True) == ""


def test_published_ids_of_wmt21(tmp_path):
    tokenizer = of_published_size(tmp_path, 128_001, language_codes="wmt21", num_madeup_words=0)
    codes = ["en", "ha", "is", "ja", "cs", "ru", "zh", "de"]
    assert [tokenizer.get_lang_id(code) for code in codes] == list(range(128_001, 128_009))
    assert len(tokenizer) == 128_009


def test_dictionaries_of_languages_agree_with_each_other():
    tokenizer = m2m100()
    assert tokenizer.lang_code_to_token["fr"] == tokenizer.get_lang_token("fr") == "__fr__"
    assert tokenizer.lang_code_to_id["fr"] == tokenizer.get_lang_id("fr") == FR
    assert tokenizer.lang_token_to_id["__fr__"] == FR
    assert tokenizer.id_to_lang_token[FR] == "__fr__"
    assert tokenizer.id_to_lang_code[FR] == "fr"
    assert len(tokenizer.lang_code_to_id) == 100
    assert tokenizer.cur_lang_id == EN


def test_a_bare_tokenizer_has_its_languages_as_special_tokens():
    # transformers forgets them unless its files or the caller list them.
    tokenizer = m2m100()
    assert tokenizer.tokenize("__fr__ mill")[0] == "__fr__"
    assert tokenizer.decode([FR, 2], skip_special_tokens=True) == ""
    assert set(tokenizer.lang_token_to_id) <= set(tokenizer.additional_special_tokens)


def test_a_vocabulary_without_bos_gets_it_after_the_languages(tmp_path):
    words = ["</s>", "<unk>", "▁This", "▁is", "▁a", "▁t", "est", "\u0120", "<pad>"]
    (tmp_path / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    tokenizer = M2M100Tokenizer(str(tmp_path / "vocab.json"), str(PIECES))
    vocabulary = list(tokenizer.get_vocab())
    assert vocabulary[:2] == ["</s>", "<unk>"]
    assert vocabulary[-1] == "<s>"
    assert len(vocabulary) == len(tokenizer) == 110


def test_an_unknown_list_of_languages_is_refused():
    with pytest.raises(InputError, match=r"language_codes.*'wmt21'"):
        m2m100(language_codes="wmt22")


def test_save_vocabulary_writes_both_files_and_needs_a_folder(tmp_path):
    tokenizer = m2m100()
    paths = tokenizer.save_vocabulary(str(tmp_path), filename_prefix="small")
    assert [path.split("/")[-1] for path in paths] == [
        "small-vocab.json",
        "small-sentencepiece.bpe.model",
    ]
    assert json.loads((tmp_path / "small-vocab.json").read_text()) == json.loads(WORDS.read_text())
    assert (tmp_path / "small-sentencepiece.bpe.model").read_bytes() == PIECES.read_bytes()
    with pytest.raises(OSError, match="no folder"):
        tokenizer.save_vocabulary(str(tmp_path / "missing"))
    with pytest.raises(CheckpointError, match=r"cannot read|Cannot read|none in"):
        M2M100Tokenizer(str(tmp_path / "missing.json"), str(PIECES))


def test_small100_tells_the_encoder_the_target_and_the_decoder_nothing():
    tokenizer = small100(tgt_lang="fr")
    text = tokenizer.encode("river", add_special_tokens=False)
    encoding = tokenizer("river", text_target="river")
    assert encoding.input_ids == [FR, *text, 2]
    assert encoding.labels == [*text, 2]
    assert tokenizer(text_target="river").input_ids == [*text, 2]
    tokenizer.tgt_lang = "de"
    assert tokenizer.prefix_tokens == [DE]
    assert tokenizer("river").input_ids == [DE, *text, 2]
    # The source language is read by nobody, but a wrong one is an error all the same.
    tokenizer.src_lang = "ja"
    assert tokenizer("river").input_ids == [DE, *text, 2]
    with pytest.raises(KeyError, match="xx"):
        tokenizer.src_lang = "xx"


def test_small100_translates_into_english_until_told_otherwise_and_forces_no_token():
    tokenizer = small100()
    assert tokenizer("river").input_ids[0] == EN
    inputs = tokenizer._build_translation_inputs("river", src_lang="en", tgt_lang="fr")
    assert inputs.input_ids[0] == FR
    assert "forced_bos_token_id" not in inputs
    assert tokenizer("river", tgt_lang="de").input_ids[0] == DE
    assert tokenizer.tgt_lang == "fr"
    assert tokenizer.create_token_type_ids_from_sequences([5]) == [0, 0, 0]
