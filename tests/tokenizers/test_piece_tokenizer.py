"""Properties of every tokenizer, whatever the text."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_mt.errors import InputError
from moe_mt.tokenizers import M2M100Tokenizer, NllbTokenizer, SentencePieceModel, Tokenizer

FAMILIES = ("nllb", "nllb_legacy", "m2m100", "wmt21", "small100")
SPECIAL_LOOKING = ("</s>", "<s>", "<mask>", "<pad>", "<unk>", "eng_Latn", "__en__", "＜/s＞")

any_text = st.lists(st.one_of(st.text(max_size=12), st.sampled_from(SPECIAL_LOOKING))).map("".join)
any_ids = st.lists(st.integers(min_value=-3, max_value=1000))


def languages_of(tokenizer: Tokenizer) -> tuple[str, str]:
    return tokenizer.languages[0], tokenizer.languages[-1]


@pytest.mark.parametrize("family", FAMILIES)
@given(text=any_text)
@settings(deadline=None)
def test_text_never_becomes_a_special_token(tokenizers, family, text):
    tokenizer = tokenizers[family]
    source, target = languages_of(tokenizer)
    ids = tokenizer.encode_text(text)
    reserved = set(tokenizer.special_tokens.values()) - {tokenizer.unk_id}
    assert not reserved & set(ids)
    # So the sentence has exactly the special tokens that the tokenizer itself put there.
    sentence = tokenizer.encode_source(text, source, target)
    assert len(sentence) == len(ids) + 2
    assert sentence.count(tokenizer.eos_id) == 1
    assert isinstance(tokenizer.decode(sentence, skip_special_tokens=False), str)


@pytest.mark.parametrize("family", FAMILIES)
@given(text=any_text)
@settings(deadline=None)
def test_reading_special_tokens_in_text_gives_ids_of_the_vocabulary(tokenizers, family, text):
    tokenizer = tokenizers[family]
    ids = tokenizer.encode_text(text, special_tokens_in_text=True)
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in ids)


@pytest.mark.parametrize("family", FAMILIES)
@given(ids=any_ids)
@settings(deadline=None)
def test_any_ids_can_be_decoded(tokenizers, family, ids):
    tokenizer = tokenizers[family]
    for skip in (True, False):
        assert isinstance(tokenizer.decode(ids, skip_special_tokens=skip), str)


@pytest.mark.parametrize("family", FAMILIES)
def test_known_text_comes_back(tokenizers, family):
    tokenizer = tokenizers[family]
    source, target = languages_of(tokenizer)
    # Every character of it is in the small model and, as a piece, in the vocabulary.
    text = "the old mill by the river"
    ids = tokenizer.encode_source(text, source, target)
    assert tokenizer.unk_id not in ids
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", ["\ud800", "fine until \udfff here"])
def test_a_lone_surrogate_is_refused_with_its_place(tokenizers, family, text):
    # os.fsdecode and surrogateescape make these from bytes that are not UTF-8.
    for special_tokens_in_text in (False, True):
        with pytest.raises(InputError, match=r"lone surrogate U\+D"):
            tokenizers[family].encode_text(text, special_tokens_in_text=special_tokens_in_text)


def test_a_run_of_unknown_characters_that_spells_a_special_token_stays_text(word_ids):
    # Sentencepiece returns such a run as it stands: with "<", "/", "s" and ">" all unknown to the
    # model, the piece is "</s>" itself.
    class KnowsNothing(SentencePieceModel):
        def __init__(self):
            pass

        reserved_ids = (0, 1, 2)

        def __len__(self):
            return 10

        def encode(self, text):
            return [text]

        def piece_id(self, piece):
            # As sentencepiece numbers its control pieces.
            return {"<s>": 1, "</s>": 2}.get(piece, 0)

    for tokenizer in (NllbTokenizer(KnowsNothing()), M2M100Tokenizer(KnowsNothing(), word_ids)):
        for text in tokenizer.special_tokens:
            assert tokenizer.encode_text(text) == [tokenizer.unk_id]
        # transformers looks the same pieces up among its special tokens.
        assert tokenizer.encode_text("</s>", special_tokens_in_text=True) == [tokenizer.eos_id]


def test_a_very_long_text_is_encoded_whole(tokenizers):
    text = "the old mill by the river " * 4000
    ids = tokenizers["nllb"].encode_text(text)
    assert tokenizers["nllb"].decode(ids) == text.strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokenizer_can_be_sent_to_another_process(tokenizers, family):
    tokenizer = tokenizers[family]
    copy = pickle.loads(pickle.dumps(tokenizer))
    source, target = languages_of(tokenizer)
    for text in ("How was your day?", "</s> नदी"):
        assert copy.encode_source(text, source, target) == tokenizer.encode_source(
            text, source, target
        )


def test_one_tokenizer_serves_many_threads_and_languages(tokenizers):
    tokenizer = tokenizers["nllb"]
    jobs = [(f"mill number {i}", tokenizer.languages[i % 202]) for i in range(400)]
    alone = [tokenizer.encode_source(text, language, "fra_Latn") for text, language in jobs]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda job: tokenizer.encode_source(*job, "fra_Latn"), jobs))
    assert together == alone
