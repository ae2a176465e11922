"""NLLB's numbering and format."""

import pytest

from moe_mt.errors import CheckpointError, UnsupportedLanguageError
from moe_mt.tokenizers import NllbIdLayout, NllbTokenizer


def test_ids_of_the_published_models():
    layout = NllbIdLayout(256_000)
    ids = layout.language_ids
    assert list(ids.values()) == list(range(256_001, 256_203))  # all 202, without a gap
    stated = {"ace_Arab": 256_001, "ace_Latn": 256_002, "deu_Latn": 256_042, "eng_Latn": 256_047}
    stated |= {"fra_Latn": 256_057, "ron_Latn": 256_145, "zul_Latn": 256_202, "sat_Beng": 256_150}
    assert {code: ids[code] for code in stated} == stated
    assert layout.special_ids == {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 256_203}
    assert layout.vocab_size == 256_204
    assert layout.model_rows == 256_206
    # The first and the last piece, and what lies beside them.
    assert [layout.id_of_piece(i) for i in (0, 1, 2, 3, 255_999)] == [None, None, None, 4, 256_000]
    assert [layout.piece_of_id(i) for i in (3, 4, 256_000, 256_001)] == [None, 3, 255_999, None]


def test_format_of_source_target_and_forced_tokens(tokenizers):
    tokenizer = tokenizers["nllb"]
    english, french = tokenizer.language_id("eng_Latn"), tokenizer.language_id("fra_Latn")
    text = tokenizer.encode_text("How was your day?")
    assert tokenizer.encode_source("How was your day?", "eng_Latn", "fra_Latn") == [
        english,
        *text,
        2,
    ]
    assert tokenizer.encode_target("How was your day?", "fra_Latn") == [french, *text, 2]
    assert tokenizer.forced_tokens("fra_Latn") == [french]


def test_legacy_format_has_the_language_last(tokenizers):
    tokenizer = tokenizers["nllb_legacy"]
    english, french = tokenizer.language_id("eng_Latn"), tokenizer.language_id("fra_Latn")
    assert tokenizer.encode_source("a", "eng_Latn", "fra_Latn")[-2:] == [2, english]
    assert tokenizer.encode_target("a", "fra_Latn")[-2:] == [2, french]
    assert tokenizer.forced_tokens("fra_Latn") == [french]


def test_languages_may_be_named_as_people_name_them(tokenizers):
    tokenizer = tokenizers["nllb"]
    assert tokenizer.encode_source("a", "en", "fr") == tokenizer.encode_source(
        "a", "eng_Latn", "fra_Latn"
    )
    assert tokenizer.language_id("sat_Olck") == tokenizer.language_id("sat_Beng")
    assert tokenizer.language_name("fr") == "French"


@pytest.mark.parametrize("call", ["encode_source", "encode_target", "forced_tokens"])
def test_a_language_the_model_lacks_is_never_an_unknown_token(tokenizers, call):
    arguments = {
        "encode_source": ("text", "klingon", "fra_Latn"),
        "encode_target": ("text", "klingon"),
        "forced_tokens": ("klingon",),
    }
    with pytest.raises(UnsupportedLanguageError, match="klingon"):
        getattr(tokenizers["nllb"], call)(*arguments[call])


def test_pieces_and_ids_are_each_other_s_inverse(tokenizers):
    tokenizer = tokenizers["nllb"]
    for token_id in range(tokenizer.vocab_size):
        assert tokenizer.token_id(tokenizer.token(token_id)) == token_id
    assert tokenizer.token_id("no such piece") == tokenizer.unk_id


@pytest.mark.parametrize("token_id", [-1, -5, 764, 765, 256_205, 10**12])
def test_ids_that_mean_nothing_are_unknown(tokenizers, token_id):
    tokenizer = tokenizers["nllb"]
    assert tokenizer.token(token_id) == "<unk>"
    assert tokenizer.decode([token_id]) == ""
    assert tokenizer.decode([token_id], skip_special_tokens=False) == "<unk>"


def test_a_sentencepiece_model_with_other_reserved_ids_is_refused(pieces):
    class OtherOrder:
        reserved_ids = (3, 0, 2)  # as a model trained with unk_id=3 has them

        def __len__(self):
            return len(pieces)

    with pytest.raises(CheckpointError, match=r"\(3, 0, 2\)"):
        NllbTokenizer(OtherOrder())  # pyright: ignore[reportArgumentType]
