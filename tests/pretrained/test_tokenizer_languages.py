"""The source and the target language of a documented tokenizer, and the mode it is in."""

import copy
import pickle

import pytest
import torch

from moe_mt.errors import UnsupportedLanguageError
from tests.pretrained.tokenizer_families import m2m100, nllb


@pytest.fixture(params=["nllb", "m2m100"])
def case(request):
    """Return a tokenizer, three of its languages and one that it does not have."""
    if request.param == "nllb":
        return nllb(tgt_lang="fra_Latn"), ("eng_Latn", "fra_Latn", "deu_Latn"), "eng_Latin"
    return m2m100(tgt_lang="fr"), ("en", "fr", "de"), "klingon"


def test_setting_the_source_takes_effect_at_once(case):
    tokenizer, (_, _, other), _ = case
    tokenizer.src_lang = other
    assert tokenizer.prefix_tokens == [tokenizer.get_lang_id(other)]
    assert tokenizer.suffix_tokens == [tokenizer.eos_token_id]
    assert tokenizer.encode("river")[0] == tokenizer.get_lang_id(other)


def test_modes_frame_texts_with_either_language(case):
    tokenizer, (source, target, _), _ = case
    tokenizer._switch_to_target_mode()
    assert tokenizer.prefix_tokens == [tokenizer.get_lang_id(target)]
    tokenizer._switch_to_input_mode()
    assert tokenizer.prefix_tokens == [tokenizer.get_lang_id(source)]
    tokenizer.set_tgt_lang_special_tokens(target)
    assert tokenizer.prefix_tokens == [tokenizer.get_lang_id(target)]
    tokenizer.set_src_lang_special_tokens(source)
    assert tokenizer.prefix_tokens == [tokenizer.get_lang_id(source)]


def test_every_call_within_as_target_tokenizer_is_of_target_text(case):
    tokenizer, (source, target, _), _ = case
    with tokenizer.as_target_tokenizer():
        # The second call is where transformers has gone back to source text.
        for _ in range(2):
            assert tokenizer("river").input_ids[0] == tokenizer.get_lang_id(target)
    assert tokenizer("river").input_ids[0] == tokenizer.get_lang_id(source)


def test_an_error_leaves_the_tokenizer_in_input_mode(case):
    tokenizer, (source, _, _), _ = case
    with pytest.raises(ValueError, match="NoneType"):
        tokenizer(text_target=["river", None])
    with pytest.raises(RuntimeError), tokenizer.as_target_tokenizer():
        raise RuntimeError
    assert tokenizer.prefix_tokens == [tokenizer.get_lang_id(source)]


def test_an_unknown_language_is_a_key_error_that_suggests_others(case):
    tokenizer, (source, _, _), unknown = case
    for attempt in (
        lambda: setattr(tokenizer, "src_lang", unknown),
        lambda: setattr(tokenizer, "tgt_lang", unknown),
        lambda: tokenizer.get_lang_id(unknown),
        lambda: tokenizer.get_lang_token(unknown),
        lambda: tokenizer("river", src_lang=unknown),
        lambda: type(tokenizer)(**files(tokenizer), src_lang=unknown),
    ):
        with pytest.raises(KeyError, match=rf"^\w+: Language '{unknown}' is not among") as caught:
            attempt()
        assert isinstance(caught.value, UnsupportedLanguageError)
        assert isinstance(caught.value, ValueError)
    # Nothing was overwritten on the way.
    assert tokenizer.src_lang == source
    assert tokenizer.prefix_tokens == [tokenizer.get_lang_id(source)]


def test_a_misspelt_language_is_answered_with_the_one_that_may_be_meant():
    with pytest.raises(KeyError, match=r"did you mean .*'eng_Latn' \(English\)"):
        nllb(src_lang="eng_Latin")


def test_a_target_that_is_not_set_is_an_error_where_it_is_needed():
    tokenizer = m2m100()
    assert tokenizer.tgt_lang is None
    with pytest.raises(KeyError, match=r"tgt_lang is None.*from_pretrained"):
        tokenizer(text_target="river")
    for languages in ({"src_lang": "en"}, {"tgt_lang": "fr"}):
        with pytest.raises(ValueError, match="_lang is None"):
            tokenizer._build_translation_inputs("river", **languages)


def test_languages_may_be_named_as_everywhere_else_and_read_back_as_codes():
    tokenizer = nllb(src_lang="French", tgt_lang="sat_Olck")
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == ("fra_Latn", "sat_Beng")
    tokenizer.src_lang = "de"
    assert tokenizer.src_lang == "deu_Latn"
    assert m2m100(src_lang="fra_Latn").src_lang == "fr"


def test_languages_given_to_a_call_hold_for_that_call(case):
    tokenizer, (source, target, other), _ = case
    encoding = tokenizer("river", text_target="river", src_lang=other, tgt_lang=source)
    assert encoding.input_ids[0] == tokenizer.get_lang_id(other)
    assert encoding.labels[0] == tokenizer.get_lang_id(source)
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == (source, target)
    assert tokenizer("river").input_ids[0] == tokenizer.get_lang_id(source)


def test_translation_inputs_carry_the_token_to_force(case):
    tokenizer, (source, target, other), _ = case
    inputs = tokenizer._build_translation_inputs(
        ["river"], src_lang=other, tgt_lang=source, return_tensors="pt"
    )
    assert inputs.forced_bos_token_id == tokenizer.get_lang_id(source)
    assert inputs.input_ids[0, 0] == tokenizer.get_lang_id(other)
    assert tokenizer.src_lang == other
    assert tokenizer.tgt_lang == target


def test_prepare_seq2seq_batch_sets_the_documented_languages(case):
    tokenizer, _, _ = case
    batch = tokenizer.prepare_seq2seq_batch(
        ["the old mill by the river"],
        tgt_texts=["the river by the old mill"],
        max_length=5,
        max_target_length=7,
        return_tensors="pt",
    )
    assert batch.input_ids.shape == (1, 5)
    assert batch.labels.shape == (1, 7)
    defaults = {"eng_Latn": "fra_Latn", "en": "ro"}
    assert defaults[tokenizer.src_lang] == tokenizer.tgt_lang
    assert batch.labels[0, 0] == tokenizer.get_lang_id(tokenizer.tgt_lang)
    # Without a length for the target, the source's; without either, none.
    shorter = tokenizer.prepare_seq2seq_batch(["a"], tgt_texts=["the old mill"], max_length=4)
    assert len(shorter.labels[0]) == 4
    assert "labels" not in tokenizer.prepare_seq2seq_batch(["a"])


def test_copies_are_independent_and_keep_everything(case):
    tokenizer, (source, _, other), _ = case
    tokenizer.add_tokens(["newword"])
    for copied in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert copied.get_vocab() == tokenizer.get_vocab()
        copied.src_lang = other
        copied.add_tokens(["another"])
        assert tokenizer.src_lang == source
        assert len(copied) == len(tokenizer) + 1
        encoding = copied("the newword", return_tensors="pt")
        assert torch.equal(
            encoding.input_ids,
            tokenizer("the newword", src_lang=other, return_tensors="pt").input_ids,
        )


def files(tokenizer):
    names = ("vocab_file", "spm_file")
    return {name: getattr(tokenizer, name) for name in names if hasattr(tokenizer, name)}


def test_tokens_of_a_pair_may_stand_between_the_language_and_the_end(case):
    tokenizer, _, _ = case
    plain = tokenizer.tokenize("river", "lake")
    assert plain == tokenizer.tokenize("river") + tokenizer.tokenize("lake")
    framed = tokenizer.tokenize("river", pair="lake", add_special_tokens=True)
    assert tokenizer.convert_tokens_to_ids(framed) == tokenizer("river", "lake")["input_ids"]
    assert framed[1:-1] == plain
