"""The numbering and format of M2M100, WMT21 and SMaLL-100."""

import pytest

from moe_mt.errors import CheckpointError, UnsupportedLanguageError
from moe_mt.tokenizers import M2M100Tokenizer


def published_vocabulary(size):
    """Return a vocab.json of a published size, whose pieces do not matter here."""
    return {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, size)}


def test_ids_of_the_published_m2m100(pieces):
    tokenizer = M2M100Tokenizer(pieces, published_vocabulary(128_004))
    ids = [tokenizer.language_id(code) for code in tokenizer.languages]
    assert ids == list(range(128_004, 128_104))  # all 100, without a gap
    stated = {"af": 128_004, "ar": 128_006, "en": 128_022, "fr": 128_028}
    stated |= {"mr": 128_063, "ro": 128_076, "zu": 128_103}
    assert {code: tokenizer.language_id(code) for code in stated} == stated
    assert tokenizer.token(128_022) == "__en__"
    assert tokenizer.vocab_size == 128_104
    # The model's eight made-up rows.
    assert {tokenizer.token(token_id) for token_id in range(128_104, 128_112)} == {"<unk>"}


def test_ids_of_the_published_wmt21(pieces):
    tokenizer = M2M100Tokenizer(pieces, published_vocabulary(128_001), "wmt21")
    codes = ("en", "ha", "is", "ja", "cs", "ru", "zh", "de")
    assert tokenizer.languages == codes
    assert [tokenizer.language_id(code) for code in codes] == list(range(128_001, 128_009))
    assert tokenizer.vocab_size == 128_009


def test_format_of_source_target_and_forced_tokens(tokenizers):
    tokenizer = tokenizers["m2m100"]
    english, french = tokenizer.language_id("en"), tokenizer.language_id("fr")
    text = tokenizer.encode_text("How was your day?")
    assert tokenizer.encode_source("How was your day?", "en", "fr") == [english, *text, 2]
    assert tokenizer.encode_target("How was your day?", "fr") == [french, *text, 2]
    assert tokenizer.forced_tokens("fr") == [french]


def test_small100_tells_the_encoder_the_target_language(tokenizers):
    tokenizer, m2m100 = tokenizers["small100"], tokenizers["m2m100"]
    text = m2m100.encode_text("How was your day?")
    french = m2m100.language_id("fr")
    assert tokenizer.encode_source("How was your day?", "en", "fr") == [french, *text, 2]
    assert tokenizer.encode_target("How was your day?", "fr") == [*text, 2]
    assert tokenizer.forced_tokens("fr") == []
    assert tokenizer.language_id("fr") == french


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("encode_source", ("text", "klingon", "fr")),  # a source the model is not told
        ("encode_source", ("text", "en", "klingon")),
        ("encode_target", ("text", "klingon")),
        ("forced_tokens", ("klingon",)),
    ],
)
def test_small100_refuses_a_wrong_language_where_it_needs_none(tokenizers, call, arguments):
    with pytest.raises(UnsupportedLanguageError, match="klingon"):
        getattr(tokenizers["small100"], call)(*arguments)


def test_pieces_are_looked_up_as_strings(tokenizers, pieces, word_ids):
    # The vocabulary is in another order than the model's pieces, and lacks some of them.
    tokenizer = tokenizers["m2m100"]
    numbers = [(pieces.piece_id(piece), word_ids[piece]) for piece in pieces.encode("How was")]
    assert any(theirs + 1 != ours for theirs, ours in numbers)
    assert tokenizer.encode_text("How was") == [ours for _, ours in numbers]
    missing = [p for i in range(3, len(pieces)) if (p := pieces.piece(i)) not in word_ids]
    assert len(missing) == 20
    assert {tokenizer.token_id(piece) for piece in missing} == {tokenizer.unk_id}


def test_pieces_and_ids_are_each_other_s_inverse(tokenizers):
    for family in ("m2m100", "wmt21", "small100"):
        tokenizer = tokenizers[family]
        for token_id in range(tokenizer.vocab_size):
            assert tokenizer.token_id(tokenizer.token(token_id)) == token_id


def test_a_vocabulary_without_begin_token_gets_an_id_for_it_at_the_end(pieces):
    # The vocabulary of transformers' own tests of this tokenizer.
    words = ["</s>", "<unk>", "▁This", "▁is", "▁a", "▁t", "est", "\u0120", "<pad>"]
    tokenizer = M2M100Tokenizer(pieces, {word: i for i, word in enumerate(words)})
    assert (tokenizer.eos_id, tokenizer.unk_id, tokenizer.pad_id) == (0, 1, 8)
    assert tokenizer.bos_id == 9 + 100
    assert tokenizer.vocab_size == 9 + 100 + 1
    assert tokenizer.token(tokenizer.bos_id) == "<s>"


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ({"</s>": 0, "<pad>": 1, "<unk>": 3}, "0 to 2"),  # a gap
        ({"</s>": 0, "<pad>": 1, "<unk>": 1}, "0 to 2"),  # two tokens with one id
        ({"</s>": -1, "<pad>": 0, "<unk>": 1}, "0 to 2"),
        ({"<s>": 0, "<pad>": 1}, "</s> <unk>"),
        ({}, "</s> <pad> <unk>"),
    ],
)
def test_an_unusable_vocabulary_is_refused(pieces, vocabulary, message):
    with pytest.raises(CheckpointError, match=message):
        M2M100Tokenizer(pieces, vocabulary)


def test_an_unknown_list_of_languages_is_refused(pieces, word_ids):
    # "nllb" is a list, but not one whose tokens this vocabulary has.
    for name in ("flores", "nllb"):
        with pytest.raises(CheckpointError, match=name):
            M2M100Tokenizer(pieces, word_ids, name)
