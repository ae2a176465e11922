"""The documented tokenizer of NLLB-200 and NLLB-MoE."""

import struct

import pytest

from moe_mt.pretrained.tokenization.nllb import FAIRSEQ_LANGUAGE_CODES, NllbTokenizer
from tests.pretrained.tokenizer_families import PIECE_COUNT, PIECES, nllb

FIRST = PIECE_COUNT + 1
ENG, FRA = (FIRST + FAIRSEQ_LANGUAGE_CODES.index(code) for code in ("eng_Latn", "fra_Latn"))


def field(number_and_type: int, content: bytes) -> bytes:
    return bytes([number_and_type, len(content)]) + content


@pytest.fixture(scope="module")
def published_size(tmp_path_factory):
    """Return a tokenizer with 256,000 pieces: those of the goldens and some that match nothing."""
    path = tmp_path_factory.mktemp("nllb") / "sentencepiece.bpe.model"
    # A model is a protobuf message, and further pieces may follow at its end.
    further = (
        field(0x0A, field(0x0A, f"\ue000{i}".encode()) + b"\x15" + struct.pack("<f", -1e4))
        for i in range(256_000 - PIECE_COUNT)
    )
    path.write_bytes(PIECES.read_bytes() + b"".join(further))
    return NllbTokenizer(str(path))


def test_published_ids(published_size):
    tokenizer = published_size
    expected = {
        "ace_Arab": 256001,
        "ace_Latn": 256002,
        "deu_Latn": 256042,
        "eng_Latn": 256047,
        "fra_Latn": 256057,
        "ron_Latn": 256145,
        "zul_Latn": 256202,
    }
    assert {code: tokenizer.get_lang_id(code) for code in expected} == expected
    assert {code: tokenizer.convert_tokens_to_ids(code) for code in expected} == expected
    assert tokenizer.convert_tokens_to_ids(["<mask>", "ar_AR"]) == [256203, 3]
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) == [0, 1, 2, 3]
    assert tokenizer.vocab_size == len(tokenizer) == 256_204


def test_a_new_language_follows_the_last_token(tmp_path, published_size):
    codes = ["myv_Cyrl", "myv_Latn"]
    tokenizer = NllbTokenizer(published_size.vocab_file, additional_special_tokens=codes)
    assert tokenizer.convert_tokens_to_ids(codes) == [256_204, 256_205]
    tokenizer.src_lang, tokenizer.tgt_lang = codes[1], codes[0]
    encoding = tokenizer("šumbrat!", text_target="šumbrat!")
    assert (encoding.input_ids[0], encoding.labels[0]) == (256_205, 256_204)
    tokenizer.save_pretrained(tmp_path)
    loaded = NllbTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded("šumbrat!").input_ids == encoding.input_ids


def test_the_languages_keep_their_ids_whatever_special_tokens_are_listed():
    # transformers drops those that are not listed, so that eng_Latn becomes <unk>.
    for listed in ([], ["<extra>"], ["fra_Latn"]):
        tokenizer = nllb(additional_special_tokens=listed)
        assert tokenizer.get_lang_id("eng_Latn") == ENG
        assert {ENG, FRA} <= set(tokenizer.all_special_ids)


def test_names_of_fairseq():
    tokenizer = nllb()
    assert tokenizer.fairseq_offset == 1
    assert tokenizer.fairseq_tokens_to_ids["fra_Latn"] == FRA
    assert tokenizer.fairseq_tokens_to_ids["<mask>"] == FIRST + 202
    assert tokenizer.fairseq_ids_to_tokens[0] == "<s>"
    assert len(tokenizer.fairseq_tokens_to_ids) == 4 + 202 + 1
    assert tokenizer.lang_code_to_id["fra_Latn"] == FRA
    assert tokenizer.id_to_lang_code[FRA] == "fra_Latn"
    assert len(tokenizer.lang_code_to_id) == 202
    # The one language that fairseq spells otherwise, wherever a language is named.
    assert tokenizer.get_lang_id("sat_Olck") == tokenizer.get_lang_id("sat_Beng")
    assert tokenizer.convert_tokens_to_ids("sat_Olck") == tokenizer.get_lang_id("sat_Beng")


def test_both_formats():
    tokenizer = nllb(tgt_lang="fra_Latn")
    text = tokenizer.encode("river", add_special_tokens=False)
    encoding = tokenizer("river", text_target="river")
    assert encoding.input_ids == [ENG, *text, 2]
    assert encoding.labels == [FRA, *text, 2]
    # The attribute may be set later, and counts from the next call on.
    tokenizer.legacy_behaviour = True
    encoding = tokenizer("river", text_target="river")
    assert encoding.input_ids == [*text, 2, ENG]
    assert encoding.labels == [*text, 2, FRA]
    assert tokenizer.cur_lang_code == ENG


def test_token_type_ids_are_zeros_as_many_as_there_are_tokens():
    tokenizer = nllb()
    assert tokenizer.create_token_type_ids_from_sequences([5, 6], [7]) == [0] * 5
    encoding = tokenizer("the old mill", "river", return_token_type_ids=True)
    assert len(encoding.token_type_ids) == len(encoding.input_ids)
    assert not any(encoding.token_type_ids)


def test_subword_sampling_cuts_a_text_in_several_ways(tmp_path):
    sampling = {"enable_sampling": True, "alpha": 0.5, "nbest_size": -1}
    tokenizer = nllb(sp_model_kwargs=sampling)
    tokenizer.save_pretrained(tmp_path)
    for sampler in (tokenizer, NllbTokenizer.from_pretrained(tmp_path)):
        assert sampler.sp_model_kwargs == sampling
        drawn = {tuple(sampler("the old mill by the river").input_ids) for _ in range(20)}
        assert len(drawn) > 1


def test_save_vocabulary_needs_a_folder(tmp_path):
    assert nllb().save_vocabulary(str(tmp_path)) == (str(tmp_path / "sentencepiece.bpe.model"),)
    with pytest.raises(OSError, match="no folder"):
        nllb().save_vocabulary(str(tmp_path / "missing"))
