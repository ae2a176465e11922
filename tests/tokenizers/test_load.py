"""From a folder to the right tokenizer, or to an error that says what to do."""

import pytest

from moe_mt.errors import CheckpointError
from moe_mt.tokenizers import (
    M2M100Tokenizer,
    NllbTokenizer,
    Small100Tokenizer,
    load_tokenizer,
    read_word_ids,
)

SENTENCEPIECE = "sentencepiece.bpe.model"
VOCABULARY = "vocab.json"
WMT21_TOKENS = [f"__{code}__" for code in ("en", "ha", "is", "ja", "cs", "ru", "zh", "de")]
WORDS = 542  # entries of the goldens' vocab.json


@pytest.mark.parametrize(
    "contents",
    [
        {"tokenizer_config": {"tokenizer_class": "NllbTokenizer"}, "config": {}},
        {"tokenizer_config": {"tokenizer_class": "NllbTokenizerFast"}},
        # A dense NLLB: the model's type alone would say M2M100.
        {
            "tokenizer_config": {"tokenizer_class": "NllbTokenizer"},
            "config": {"model_type": "m2m_100"},
        },
        {"config": {"model_type": "nllb-moe"}},
        {"config": {"model_type": "nllb_moe"}},  # the first revision's spelling
        {
            # A distilled NLLB of SMaLL-100's shape.
            "tokenizer_config": {"tokenizer_class": "NllbTokenizer"},
            "config": {"d_model": 1024, "encoder_layers": 12, "decoder_layers": 3},
        },
        {
            "tokenizer_config": {"tokenizer_class": "TokenizersBackend"},
            "config": {"model_type": "nllb-moe"},
        },
    ],
)
def test_nllb(checkpoint, contents):
    tokenizer = load_tokenizer(checkpoint(SENTENCEPIECE, **contents))
    assert type(tokenizer) is NllbTokenizer
    assert tokenizer.legacy_behaviour is False


def test_nllb_legacy_behaviour_is_the_folder_s(checkpoint):
    settings = {"tokenizer_class": "NllbTokenizer", "legacy_behaviour": True}
    tokenizer = load_tokenizer(checkpoint(SENTENCEPIECE, tokenizer_config=settings))
    assert isinstance(tokenizer, NllbTokenizer)
    assert tokenizer.legacy_behaviour is True


@pytest.mark.parametrize(
    "contents",
    [
        {"config": {"model_type": "m2m_100"}},  # as first published: no tokenizer_class
        {"tokenizer_config": {"tokenizer_class": "M2M100Tokenizer", "language_codes": "m2m100"}},
        {"config": {"model_type": "m2m_100", "vocab_size": WORDS + 108}},
        # Three decoder layers alone do not make it SMaLL-100.
        {"config": {"model_type": "m2m_100", "d_model": 512, "decoder_layers": 3}},
    ],
)
def test_m2m100(checkpoint, contents):
    tokenizer = load_tokenizer(checkpoint(SENTENCEPIECE, VOCABULARY, **contents))
    assert type(tokenizer) is M2M100Tokenizer
    assert len(tokenizer.languages) == 100


@pytest.mark.parametrize(
    "contents",
    [
        {"tokenizer_config": {"language_codes": "wmt21"}},
        {"tokenizer_config": {"additional_special_tokens": WMT21_TOKENS}},
        {"special_tokens_map": {"additional_special_tokens": WMT21_TOKENS}},
        {
            "special_tokens_map": {
                "additional_special_tokens": [{"content": t, "special": True} for t in WMT21_TOKENS]
            }
        },
        {"config": {"model_type": "m2m_100", "vocab_size": WORDS + 8}},
    ],
)
def test_wmt21(checkpoint, contents):
    contents = {"config": {"model_type": "m2m_100"}, **contents}
    tokenizer = load_tokenizer(checkpoint(SENTENCEPIECE, VOCABULARY, **contents))
    assert type(tokenizer) is M2M100Tokenizer
    assert len(tokenizer.languages) == 8


def test_wmt21_by_the_published_size_of_its_vocabulary(checkpoint):
    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, 128_001)}
    folder = checkpoint(SENTENCEPIECE, vocab=words, config={"model_type": "m2m_100"})
    assert load_tokenizer(folder).language_id("en") == 128_001


@pytest.mark.parametrize(
    "contents",
    [
        {"tokenizer_config": {"tokenizer_class": "SMALL100Tokenizer"}},
        # Its own repository says M2M100Tokenizer; it ships this code, and has this shape.
        {"tokenizer_config": {"tokenizer_class": "M2M100Tokenizer"}, "code": True},
        {
            "tokenizer_config": {"tokenizer_class": "M2M100Tokenizer"},
            "config": {"d_model": 1024, "encoder_layers": 12, "decoder_layers": 3},
        },
    ],
)
def test_small100(checkpoint, contents):
    contents = dict(contents)
    has_code = contents.pop("code", False)
    folder = checkpoint(SENTENCEPIECE, VOCABULARY, **contents)
    if has_code:
        (folder / "tokenization_small100.py").touch()
    assert type(load_tokenizer(folder)) is Small100Tokenizer


def test_the_model_type_may_be_given(checkpoint):
    folder = checkpoint(SENTENCEPIECE)
    assert isinstance(load_tokenizer(folder, "nllb-moe"), NllbTokenizer)


@pytest.mark.parametrize(
    "contents",
    [
        {},  # neither file
        {"config": {"model_type": "marian"}},
        {"tokenizer_config": {"tokenizer_class": "MarianTokenizer"}},
        {"config": {"model_type": None}, "tokenizer_config": {"tokenizer_class": ["odd"]}},
    ],
)
def test_a_tokenizer_of_no_known_family_is_refused(checkpoint, contents):
    with pytest.raises(CheckpointError, match=r"Cannot tell which tokenizer .* nllb-moe"):
        load_tokenizer(checkpoint(SENTENCEPIECE, **contents))


@pytest.mark.parametrize(
    ("present", "model_type", "missing", "hint"),
    [
        ((), "nllb-moe", SENTENCEPIECE, "Fetch it"),
        ((VOCABULARY,), "m2m_100", SENTENCEPIECE, "Fetch it"),
        # An NLLB folder that lost its tokenizer_config.json looks like M2M100.
        ((SENTENCEPIECE,), "m2m_100", VOCABULARY, "NllbTokenizer"),
    ],
)
def test_a_missing_file_is_named_with_its_folder(checkpoint, present, model_type, missing, hint):
    folder = checkpoint(*present)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(folder, model_type)
    for part in (missing, str(folder), hint):
        assert part in str(caught.value)


def test_tokenizer_json_does_not_replace_the_sentencepiece_model(checkpoint):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is there but"):
        load_tokenizer(checkpoint(tokenizer={}), "nllb-moe")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage, and more of it",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:14bb8dfb35c0ffdea7bc01e56cea38b9e",
        b"<!DOCTYPE html><html><body>Not Found</body></html>",
        bytes(4096),
        None,  # the real file, cut in half
    ],
)
def test_a_file_that_is_no_sentencepiece_model_is_refused(checkpoint, golden_folder, content):
    if content is None:
        whole = (golden_folder / SENTENCEPIECE).read_bytes()
        content = whole[: len(whole) // 2]
    folder = checkpoint()
    (folder / SENTENCEPIECE).write_bytes(content)
    with pytest.raises(CheckpointError, match="is no sentencepiece model"):
        load_tokenizer(folder, "nllb-moe")


@pytest.mark.parametrize("name", ["vocab", "config", "tokenizer_config", "added_tokens"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"</s>": 2, "<pad',  # cut short
        b"\xff\xfe{}",  # not UTF-8
        b"[1, 2]",
        b"[" * 100_000,  # deeper than the parser goes
    ],
    ids=["empty", "cut", "encoding", "list", "deep"],
)
def test_a_file_that_is_no_json_object_is_refused(checkpoint, name, content):
    folder = checkpoint(SENTENCEPIECE, VOCABULARY, **{name: content})
    with pytest.raises(CheckpointError, match=name):
        load_tokenizer(folder, "m2m_100")


@pytest.mark.parametrize("word_id", ["2", 2.0, None, True, [2]])
def test_a_vocabulary_with_an_id_that_is_no_whole_number_is_refused(checkpoint, word_id):
    folder = checkpoint(vocab={"</s>": word_id})
    with pytest.raises(CheckpointError, match="whole number"):
        read_word_ids(folder / VOCABULARY)


def test_an_unknown_list_of_languages_is_refused(checkpoint):
    folder = checkpoint(SENTENCEPIECE, VOCABULARY, tokenizer_config={"language_codes": "flores"})
    with pytest.raises(CheckpointError, match="flores"):
        load_tokenizer(folder, "m2m_100")


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(checkpoint):
    # 560 pieces and one, 202 languages and the mask: one row fewer is another model's.
    for rows, fits in ((764, True), (763, False)):
        folder = checkpoint(SENTENCEPIECE, config={"model_type": "nllb-moe", "vocab_size": rows})
        if fits:
            load_tokenizer(folder)
        else:
            with pytest.raises(CheckpointError, match=r"764 embedding rows .* 763"):
                load_tokenizer(folder)


@pytest.mark.parametrize("shift", [0, 1])
def test_languages_that_a_converter_moved_are_refused(checkpoint, shift):
    # transformers puts <mask> before the languages when it has only the sentencepiece model.
    decoder = {str(561 + 46 + shift): {"content": "eng_Latn", "special": True}}
    in_settings = {"tokenizer_config": {"added_tokens_decoder": decoder}}
    in_a_file = {"tokenizer_config": {}, "added_tokens": {"eng_Latn": 561 + 46 + shift}}
    for contents in (in_settings, in_a_file):
        folder = checkpoint(SENTENCEPIECE, **contents)
        if shift:
            with pytest.raises(CheckpointError, match="eng_Latn the id 608"):
                load_tokenizer(folder, "nllb-moe")
        else:
            assert load_tokenizer(folder, "nllb-moe").language_id("eng_Latn") == 607
