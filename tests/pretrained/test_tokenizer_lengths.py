"""Padding, truncation and the questionable settings of a documented tokenizer's call.

What the usual settings give stands in the goldens; here is what holds of all of them, and where
these tokenizers say more than the reference or something else.
"""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_mt.errors import InputError
from moe_mt.pretrained.tokenization.batches import truncate
from tests.pretrained.tokenizer_families import m2m100, nllb

LONG = "the old mill by the river"
texts = st.lists(st.sampled_from(["", "a", LONG, "नदी", f"{LONG} {LONG}"]), min_size=1, max_size=4)


@pytest.fixture
def tokenizer():
    return nllb(tgt_lang="fra_Latn")


@given(
    batch=texts,
    side=st.sampled_from(["left", "right"]),
    max_length=st.integers(min_value=4, max_value=30),
    multiple=st.sampled_from([None, 1, 3, 8]),
)
@settings(deadline=None, max_examples=60)
def test_padded_rows_are_of_one_length_and_masks_say_which_tokens_are_real(
    batch, side, max_length, multiple
):
    tokenizer = m2m100()
    bare = tokenizer(batch).input_ids
    encoding = tokenizer(
        batch,
        padding="max_length",
        max_length=max_length,
        truncation=False,
        padding_side=side,
        pad_to_multiple_of=multiple,
    )
    length = -(-max_length // multiple) * multiple if multiple else max_length
    for row, mask, ids in zip(encoding.input_ids, encoding.attention_mask, bare, strict=True):
        assert len(row) == len(mask) == max(length, len(ids))
        assert [token for token, real in zip(row, mask, strict=True) if real] == ids
        padding = len(row) - len(ids)
        assert mask == (
            [0] * padding + [1] * len(ids) if side == "left" else [1] * len(ids) + [0] * padding
        )


@given(
    first=st.integers(min_value=0, max_value=12),
    second=st.integers(min_value=0, max_value=12),
    remove=st.integers(min_value=0, max_value=24),
    side=st.sampled_from(["left", "right"]),
)
def test_longest_first_cuts_the_longer_text_until_both_are_alike(first, second, remove, side):
    ids, pair_ids, overflow = truncate(
        list(range(first)), list(range(second)), remove=remove, side=side
    )
    assert overflow == []
    assert pair_ids is not None
    assert len(ids) + len(pair_ids) == max(first + second - remove, 0)
    lost, pair_lost = first - len(ids), second - len(pair_ids)
    if lost and pair_lost:
        assert abs(len(ids) - len(pair_ids)) <= 1
    kept = range(first)[lost:] if side == "left" else range(first)[: len(ids)]
    assert ids == list(kept)


def test_overflowing_tokens_are_counted_and_overlap_by_the_stride(tokenizer):
    ids = tokenizer.encode(LONG, add_special_tokens=False)
    options = {"truncation": True, "return_overflowing_tokens": True}
    cut = tokenizer(LONG, max_length=len(ids), stride=1, **options)
    assert cut.num_truncated_tokens == 2
    assert cut.overflowing_tokens == ids[-3:]
    whole = tokenizer(LONG, max_length=40, **options)
    assert (whole.num_truncated_tokens, whole.overflowing_tokens) == (0, [])
    with pytest.raises(InputError, match="only_first"):
        tokenizer(LONG, "a", max_length=5, **options)


def test_truncation_keeps_the_language_and_the_end(tokenizer):
    for legacy in (False, True):
        tokenizer.legacy_behaviour = legacy
        ids = tokenizer(LONG, truncation=True, max_length=5).input_ids
        assert len(ids) == 5
        assert (ids[0] if not legacy else ids[-1]) == tokenizer.get_lang_id("eng_Latn")
        assert (ids[-1] if not legacy else ids[-2]) == 2


def test_a_text_of_which_nothing_would_be_left_stays_whole_and_that_is_logged(tokenizer, caplog):
    assert tokenizer(LONG, truncation=True, max_length=2) == tokenizer(LONG)
    assert "none of it would be left" in caplog.text


def test_pad_takes_tensors_and_gives_the_same_back(tokenizer):
    rows = [{"input_ids": torch.tensor([5, 6, 7])}, {"input_ids": torch.tensor([8])}]
    padded = tokenizer.pad(rows)
    assert torch.equal(padded.input_ids, torch.tensor([[5, 6, 7], [8, 1, 1]]))
    assert torch.equal(padded.attention_mask, torch.tensor([[1, 1, 1], [1, 0, 0]]))
    arrays = tokenizer.pad({"input_ids": [np.array([5, 6]), np.array([8])]})
    assert isinstance(arrays.input_ids, np.ndarray)
    assert tokenizer.pad(rows, return_tensors="np").input_ids.tolist() == [[5, 6, 7], [8, 1, 1]]


def test_pad_leaves_what_it_is_given_as_it_is(tokenizer):
    rows = [{"input_ids": [5, 6]}, {"input_ids": [7]}]
    encoding = tokenizer("a")
    tokenizer.pad(rows)
    tokenizer.pad(encoding, padding="max_length", max_length=9)
    assert rows == [{"input_ids": [5, 6]}, {"input_ids": [7]}]
    assert encoding == tokenizer("a")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"labels": [[1]]}, r"'input_ids'.*\['labels'\]"),
        ([5, 6], "input_ids"),
        ({"input_ids": [[1], [2]], "labels": [[1]]}, "'labels' has 1 rows and 'input_ids' 2"),
    ],
)
def test_pad_refuses_what_has_no_ids_or_unlike_rows(tokenizer, inputs, message):
    with pytest.raises(InputError, match=message):
        tokenizer.pad(inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paddding": True}, "no argument 'paddding'. Did you mean 'padding'"),
        ({"padding": "shortest"}, "padding is 'shortest'; choose one of 'longest'"),
        ({"truncation": "first"}, "truncation is 'first'; choose"),
        ({"padding_side": "top"}, "padding_side is 'top'"),
        ({"return_tensors": "tf"}, "return_tensors is 'tf'"),
        (
            {"padding": True, "truncation": True, "max_length": 9, "pad_to_multiple_of": 4},
            "max_length 9 .* pad_to_multiple_of 4",
        ),
    ],
)
def test_a_bad_option_is_an_error_that_names_it(tokenizer, options, message):
    with pytest.raises(InputError, match=message):
        tokenizer([LONG], **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs text or text_target"),
        ({"text": 5}, "A text is 5, of type int"),
        ({"text": ["a", None]}, "A text is None, of type NoneType"),
        ({"text": ["a", float("nan")]}, "A text is nan, of type float"),
        ({"text": ["a", "b"], "text_pair": "c"}, "list of 2 and the second text is one string"),
        ({"text": ["a", "b"], "text_pair": ["c"]}, "list of 2 .* a list of 1"),
        ({"text": [["a", "b", "c"]]}, "is_split_into_words"),
        ({"text": "\ud800"}, "lone surrogate"),
    ],
)
def test_what_is_no_text_is_an_error_that_shows_it(tokenizer, arguments, message):
    with pytest.raises(InputError, match=message):
        tokenizer(**arguments)


def test_offsets_need_a_tokenizer_in_rust(tokenizer):
    with pytest.raises(NotImplementedError, match="return_offsets_mapping"):
        tokenizer("a", return_offsets_mapping=True)


def test_no_texts_give_no_rows(tokenizer):
    assert tokenizer([]) == {"input_ids": [], "attention_mask": []}
    assert tokenizer([], padding=True, return_tensors="pt").input_ids.shape == (0,)


def test_questionable_settings_are_logged_once(tokenizer, caplog):
    def logged(**options):
        caplog.clear()
        tokenizer(LONG, **options)
        return [record.levelno for record in caplog.records]

    tokenizer.model_max_length = 5
    assert logged() == [logging.WARNING]
    assert "made for 5" in caplog.text
    assert logged() == []
    assert logged(max_length=4) == [logging.WARNING]
    assert logged(padding=True, max_length=4) == [logging.WARNING]
    assert logged(padding=True, max_length=4) == []
    tokenizer.model_max_length = int(1e30)
    assert logged(truncation=True) == [logging.WARNING]
    assert "neither truncated nor padded" in caplog.text
    tokenizer.deprecation_warnings = {}
    assert logged(truncation=True, verbose=False) == []


def test_model_max_length_is_where_truncation_ends_if_the_caller_does_not_say(tokenizer):
    tokenizer.model_max_length = 6
    assert len(tokenizer(LONG, truncation=True).input_ids) == 6
    assert len(tokenizer("a", padding="max_length").input_ids) == 6
    assert tokenizer.max_len_single_sentence == tokenizer.max_len_sentences_pair == 4
    assert nllb(max_len=7).model_max_length == 7


def test_token_type_ids_tell_the_texts_of_a_pair_apart_and_count_special_tokens():
    tokenizer = m2m100()
    pair = tokenizer("a", LONG, return_token_type_ids=True)
    second = len(tokenizer.encode(LONG, add_special_tokens=False))
    assert len(pair.token_type_ids) == len(pair.input_ids)
    assert pair.token_type_ids[-second - 1 :] == [1] * (second + 1)
    assert not any(pair.token_type_ids[: -second - 1])
    assert tokenizer.create_token_type_ids_from_sequences([5, 6]) == [0] * 4
    named = m2m100(model_input_names=["input_ids", "token_type_ids"])("a")
    assert list(named) == ["input_ids", "token_type_ids"]


def test_sides_are_checked_when_the_tokenizer_is_made():
    for name in ("padding_side", "truncation_side"):
        with pytest.raises(ValueError, match=f"{name} is 'top'"):
            nllb(**{name: "top"})


def test_ids_that_mean_nothing_are_unknown_tokens(tokenizer):
    # Labels have -100 where there is nothing to learn; transformers raises at them.
    ids = torch.tensor([[-100, 9, len(tokenizer) + 5, 2]])
    (text,) = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert text == tokenizer.decode(9).strip()
    assert tokenizer.convert_ids_to_tokens(ids[0])[0] == "<unk>"
    assert tokenizer.batch_decode(ids.numpy(), skip_special_tokens=True) == [text]
    assert tokenizer.decode(ids[0, 1]) == tokenizer.decode(9)
