"""``pipeline("translation")``: the output of transformers 4.57, and what it cut and lost."""

import itertools
import logging

import pytest
import torch

from moe_mt.errors import CheckpointError, ConfigError, InputError
from moe_mt.pretrained import AutoModelForSeq2SeqLM, AutoTokenizer
from moe_mt.translator import TranslationPipeline, pipeline
from tests.pretrained.tiny_models import build

FRENCH = {"src_lang": "eng_Latn", "tgt_lang": "fra_Latn"}


@pytest.fixture(scope="module")
def parts():
    """The tiny model and its tokenizer."""
    return AutoModelForSeq2SeqLM.from_pretrained("tiny"), AutoTokenizer.from_pretrained("tiny")


@pytest.fixture
def translate(parts):
    """A pipeline from English to French."""
    return pipeline("translation", *parts, **FRENCH)


def texts_of(results):
    return [result["translation_text"] for result in results]


def test_a_text_gives_a_list_of_one_dict_and_nothing_else(translate):
    assert translate("August 12, 1981") == [{"translation_text": "12 août 1981"}]


def test_a_list_gives_one_dict_a_text_in_order_whatever_the_batches(translate):
    texts = ["in 9 minutes", "August 12, 1981", "Namibia, Canada, Uganda, or Kenya", "in 2 weeks"]
    alone = [translate(text)[0] for text in texts]
    assert translate(texts) == alone
    assert translate(texts, batch_size=1) == translate(texts, batch_size=3) == alone
    assert translate([]) == []


def test_several_sequences_a_text_stand_in_a_list_of_their_own(translate):
    single = translate("August 12, 1981", num_return_sequences=2)
    several = translate(["August 12, 1981", "in 9 minutes"], num_return_sequences=2)
    assert single == several[0]
    assert [len(found) for found in several] == [2, 2]


def test_an_iterable_is_translated_as_it_comes(translate):
    taken = []

    def endless():
        for year in itertools.count(1900):
            taken.append(year)
            yield f"August 12, {year}"

    results = translate(endless(), batch_size=2)
    assert texts_of(next(results)) == ["12 août 1900"]
    assert len(taken) == 16  # eight batches of two, to sort by length
    assert texts_of(next(results)) == ["12 août 1901"]


def test_a_dataset_is_translated_item_by_item(translate):
    class Dataset(torch.utils.data.Dataset):
        """Without an iterator, as datasets are."""

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return ["in 9 minutes", "August 12, 1981"][index]

    assert [texts_of(found) for found in translate(Dataset())] == [
        ["dans 9 minutes"],
        ["12 août 1981"],
    ]


def test_languages_come_from_the_task_the_pipeline_or_the_call(parts):
    named = pipeline("translation_eng_Latn_to_fra_Latn", *parts)
    assert named._preprocess_params == FRENCH
    assert texts_of(named("August 12, 1981")) == ["12 août 1981"]
    assert texts_of(named("August 12, 1981", tgt_lang="deu_Latn")) == ["12. August 1981"]
    odd = pipeline("translation_cn_to_ar", *parts)
    assert odd._preprocess_params == {"src_lang": "cn", "tgt_lang": "ar"}


def test_a_missing_language_is_named_when_it_is_needed(parts):
    translate = pipeline("translation", *parts, src_lang="eng_Latn")
    with pytest.raises(InputError, match="tgt_lang is None"):
        translate("August 12, 1981")


def test_a_language_the_model_does_not_have_is_refused_with_a_suggestion(translate):
    with pytest.raises(ValueError, match="fra_Latn"):
        translate("August 12, 1981", tgt_lang="fra_Latin")


def test_a_model_is_opened_by_its_name():
    translate = pipeline("translation", model="tiny", torch_dtype="float64", **FRENCH)
    assert translate.model.dtype == torch.float64
    assert translate.device == torch.device("cpu")
    assert texts_of(translate("August 12, 1981")) == ["12 août 1981"]


def test_token_ids_instead_of_text(translate, parts):
    (found,) = translate("August 12, 1981", return_tensors=True)
    ids = found["translation_token_ids"]
    assert list(found) == ["translation_token_ids"]
    assert parts[1].decode(ids, skip_special_tokens=True) == "12 août 1981"


def test_generation_options_reach_generate(parts):
    greedy = pipeline("translation", *parts, num_beams=1, **FRENCH)
    seen = []

    def watch(ids, scores):
        seen.append(len(ids))
        return scores

    greedy("August 12, 1981", logits_processor=[watch])
    assert set(seen) == {1}
    seen.clear()
    greedy("August 12, 1981", logits_processor=[watch], num_beams=3)
    assert set(seen) == {3}


def test_the_defaults_of_pipelines_fill_in_where_the_model_says_nothing(parts):
    tokenizer = parts[1]
    model = build("moe")
    assert (model.generation_config.num_beams, model.generation_config.max_new_tokens) == (1, None)
    silent = TranslationPipeline(model, tokenizer).generation_config
    assert (silent.num_beams, silent.max_new_tokens) == (4, 256)
    model.generation_config.num_beams = 2
    model.generation_config.max_length = 30
    speaking = TranslationPipeline(model, tokenizer).generation_config
    assert (speaking.num_beams, speaking.max_new_tokens, speaking.max_length) == (2, None, 30)


def test_what_says_how_to_open_a_model_reaches_it():
    opened = pipeline("translation", "tiny", model_kwargs={"torch_dtype": torch.float16}, **FRENCH)
    assert opened.model.dtype == torch.float16
    config = AutoModelForSeq2SeqLM.from_pretrained("tiny").config
    config.output_attentions = True
    opened = pipeline("translation", "tiny", config=config, device_map="cpu", **FRENCH)
    assert opened.model.config.output_attentions


def test_a_device_is_a_number_or_a_name(parts):
    assert pipeline("translation", *parts, device=-1).device == torch.device("cpu")
    moved = pipeline("translation", *parts_of_tiny(), device="meta")
    assert moved.device == torch.device("meta")


def parts_of_tiny():
    """Fresh ones, to be spoiled."""
    return AutoModelForSeq2SeqLM.from_pretrained("tiny"), AutoTokenizer.from_pretrained("tiny")


def test_languages_may_be_named_and_parts_are_joined_as_their_scripts_want(parts):
    translate = pipeline("translation", *parts, max_input_tokens=12)
    text = "9小时前。9小时前。"
    results = [
        translate(text, src_lang=source, tgt_lang="eng_Latn")[0]["translation_text"]
        for source in ("zho_Hans", "Chinese (Simplified)")
    ]
    assert results[0] == results[1]
    # Chinese has no space between sentences, and English wants one.
    assert results[0].count("9 hours ago") == 2
    assert "ago9" not in results[0].replace(".", "")


def test_text_is_cleaned_up_only_on_request(parts):
    class Plain:
        """Decodes as it is told to."""

        def __getattr__(self, name):
            return getattr(parts[1], name)

        def batch_decode(self, ids, clean_up_tokenization_spaces, **options):
            return [str(clean_up_tokenization_spaces)] * len(ids)

    translate = TranslationPipeline(parts[0], Plain(), **FRENCH)
    assert texts_of(translate("in 9 minutes")) == ["False"]
    assert texts_of(translate("in 9 minutes", clean_up_tokenization_spaces=True)) == ["True"]


def test_other_ways_to_end_are_not_taken_for_the_limit(parts, translate):
    eos = parts[0].config.eos_token_id
    assert "warnings" not in translate("in 9 minutes", eos_token_id=[eos, 7])[0]
    stopped = translate("August 12, 1981", stopping_criteria=[lambda ids, _: ids.shape[1] >= 5])
    assert "warnings" not in stopped[0]


def test_an_output_object_of_generate_is_read_too(translate):
    plain = translate("August 12, 1981")
    assert translate("August 12, 1981", return_dict_in_generate=True) == plain


def test_a_long_text_is_split_and_flagged_and_nothing_of_it_is_lost(translate, caplog):
    years = range(1950, 1990)
    text = "\n".join(f"August 12, {year}" for year in years)
    translate.max_input_tokens = 100
    with caplog.at_level(logging.WARNING):
        (found,) = translate(text)
    assert found["translation_text"] == "\n".join(f"12 août {year}" for year in years)
    assert found["warnings"] == [
        "split: the text has more than 100 tokens and was translated in 40 parts"
    ]
    assert "was translated in 40 parts" in caplog.text


def test_a_text_of_as_many_tokens_as_fit_is_translated_as_one(translate, parts):
    text = "August 12, 1981"
    translate.max_input_tokens = len(parts[1](text)["input_ids"])
    assert "warnings" not in translate(text)[0]
    translate.max_input_tokens -= 1
    assert "split" in translate(text)[0]["warnings"][0]


def test_truncation_cuts_as_it_is_asked_to(translate, parts):
    parts[1].model_max_length, before = 6, parts[1].model_max_length
    try:
        (found,) = translate("August 12, 1981", truncation=True)
    finally:
        parts[1].model_max_length = before
    assert "warnings" not in found
    assert "1981" not in found["translation_text"]


@pytest.mark.parametrize("limit", [{"max_length": 6}, {"max_new_tokens": 5}])
def test_an_output_that_reached_its_limit_is_flagged(translate, limit):
    (found,) = translate("August 12, 1981", **limit)
    assert found["warnings"] == [
        "length: the output reached its limit before it ended; raise max_new_tokens"
    ]
    ids = translate("August 12, 1981", return_tensors=True, **limit)[0]["translation_token_ids"]
    assert len(ids) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "summarization", "model": "tiny"}, "summarization"),
        ({"task": "translation"}, "no model"),
        ({"task": "translation_cn_to_ar"}, "no model"),
    ],
)
def test_what_cannot_be_done_is_said(arguments, message):
    with pytest.raises(ConfigError, match=message):
        pipeline(**arguments)


def test_a_model_that_is_nowhere_is_an_os_error(tmp_path):
    with pytest.raises(CheckpointError):
        pipeline("translation", model=str(tmp_path / "nothing"))


def test_a_model_without_a_head_is_refused(parts):
    with pytest.raises(ConfigError, match="cannot generate"):
        TranslationPipeline(parts[0].model, parts[1])


@pytest.mark.parametrize("inputs", [b"bytes", 7, ["text", 7], [["text"]], {"text": "text"}])
def test_inputs_that_are_no_texts_are_refused(translate, inputs):
    with pytest.raises(InputError, match="text"):
        translate(inputs)


@pytest.mark.peers
@pytest.mark.filterwarnings("default")
def test_the_output_is_that_of_the_pipeline_of_transformers(tmp_path, parts):
    import transformers

    model, tokenizer = parts
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.pipeline(
        "translation",
        model=transformers.NllbMoeForConditionalGeneration.from_pretrained(tmp_path),
        tokenizer=transformers.NllbTokenizer.from_pretrained(tmp_path),
        **FRENCH,
    )
    ours = pipeline("translation", *parts, **FRENCH)
    for inputs in ("August 12, 1981", ["in 9 minutes", "August 12, 1981"], []):
        assert ours(inputs) == theirs(inputs)
    two = {"num_return_sequences": 2}
    assert ours("August 12, 1981", **two) == theirs("August 12, 1981", **two)
    named = transformers.pipeline("translation_cn_to_ar", theirs.model, tokenizer=theirs.tokenizer)
    assert pipeline("translation_cn_to_ar", *parts)._preprocess_params == named._preprocess_params
