"""Tokens that users add, and special tokens they name."""

import pytest

from moe_mt.errors import InputError
from moe_mt.pretrained.tokenization.auto import AutoTokenizer
from moe_mt.tokenizers import AddedToken
from tests.pretrained.tokenizer_families import PIECE_COUNT, WORD_COUNT, m2m100, nllb, with_tokens

LAST = {"nllb": PIECE_COUNT + 1 + 202 + 1, "m2m100": WORD_COUNT + 100}


@pytest.fixture(params=["nllb", "m2m100"])
def tokenizer(request):
    return nllb() if request.param == "nllb" else m2m100()


def kind(tokenizer):
    return type(tokenizer).__name__.removesuffix("Tokenizer").lower()


def test_new_tokens_follow_the_last_and_are_never_cut(tokenizer):
    last = len(tokenizer)
    assert last == LAST[kind(tokenizer)]
    size = tokenizer.vocab_size
    assert tokenizer.add_tokens(["wug", "two words", "wug", ""]) == 2
    assert tokenizer.convert_tokens_to_ids(["wug", "two words"]) == [last, last + 1]
    assert len(tokenizer) == last + 2
    assert tokenizer.vocab_size == size
    assert tokenizer.tokenize("awugb two words")[1] == "wug"
    assert "two words" in tokenizer.tokenize("awugb two words")
    assert tokenizer.add_tokens("wug") == 0


def test_a_token_that_is_a_piece_keeps_its_id(tokenizer):
    piece = "▁the"
    piece_id, size = tokenizer.convert_tokens_to_ids(piece), len(tokenizer)
    assert tokenizer.add_tokens([piece]) == 0
    assert tokenizer.convert_tokens_to_ids(piece) == piece_id
    assert len(tokenizer) == size
    assert tokenizer.tokenize("a▁theb") == ["▁a", piece, *tokenizer.tokenize("b")]


def test_special_tokens_are_left_out_of_text_and_others_are_not(tokenizer):
    tokenizer.add_tokens(["<word>"])
    tokenizer.add_tokens(["<mark>"], special_tokens=True)
    ids = tokenizer.encode("the<word><mark>river", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the <word> river"
    assert tokenizer.decode(ids) == "the <word> <mark> river"
    assert "<mark>" in tokenizer.additional_special_tokens
    # What was a word becomes special when it is added as that; transformers passes over it.
    tokenizer.add_tokens(["<word>"], special_tokens=True)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the river"


def test_names_stand_for_tokens_and_new_ones_get_ids(tokenizer):
    size = len(tokenizer)
    assert tokenizer.add_special_tokens({"pad_token": "[PAD]", "cls_token": "</s>"}) == 1
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("[PAD]", size)
    assert tokenizer.cls_token_id == tokenizer.eos_token_id == 2
    assert tokenizer(["a", "the old mill"], padding=True).input_ids[0][-1] == size
    # An assignment alone gives no id.
    tokenizer.sep_token = "[SEP]"
    assert tokenizer.sep_token_id == tokenizer.unk_token_id
    tokenizer.sep_token_id = size
    assert tokenizer.sep_token == "[PAD]"
    tokenizer.sep_token = None
    assert tokenizer.sep_token_id is None
    assert "sep_token" not in tokenizer.special_tokens_map


def test_padding_without_a_token_for_it_is_refused(tokenizer):
    tokenizer.pad_token = None
    with pytest.raises(InputError, match="no pad_token"):
        tokenizer(["a", "the old mill"], padding=True)
    assert len(tokenizer(["a", "the old mill"]).input_ids) == 2


def test_the_list_of_special_tokens_is_replaced_or_lengthened(tokenizer):
    tokens = {"additional_special_tokens": ["<1>", "<2>"]}
    assert tokenizer.add_special_tokens(tokens) == 2
    assert tokenizer.additional_special_tokens == ["<1>", "<2>"]
    tokens = {"additional_special_tokens": ["<2>", "<3>"]}
    assert tokenizer.add_special_tokens(tokens, replace_additional_special_tokens=False) == 1
    assert tokenizer.additional_special_tokens == ["<1>", "<2>", "<3>"]
    tokenizer.additional_special_tokens = ["<3>"]
    assert tokenizer.convert_ids_to_tokens(tokenizer.additional_special_tokens_ids) == ["<3>"]
    # Languages are special in any case, and tokens keep their ids.
    language = tokenizer.get_lang_token(tokenizer.src_lang)
    assert language in tokenizer.all_special_tokens
    assert tokenizer.convert_tokens_to_ids("<1>") == LAST[kind(tokenizer)]
    # What is returned is no handle on the list.
    tokenizer.additional_special_tokens.append("<4>")
    assert tokenizer.additional_special_tokens == ["<3>"]


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ({"end_token": "x"}, InputError, "No special token is called 'end_token'.*eos_token"),
        ({"additional_special_tokens": "<1>"}, InputError, "must be a list"),
        ({"pad_token": 3}, TypeError, "string or an AddedToken"),
    ],
)
def test_special_tokens_that_are_none_are_refused(tokenizer, tokens, error, message):
    with pytest.raises(error, match=message):
        tokenizer.add_special_tokens(tokens)


def test_a_new_language_of_m2m100_is_its_token():
    tokenizer = m2m100()
    tokenizer.add_tokens(["__xx__"], special_tokens=True)
    tokenizer.src_lang = "xx"
    assert tokenizer.prefix_tokens == [LAST["m2m100"]]
    assert tokenizer.lang_code_to_id["xx"] == tokenizer.get_lang_id("xx") == LAST["m2m100"]
    assert tokenizer.id_to_lang_token[LAST["m2m100"]] == "__xx__"


def test_what_looks_like_a_language_but_was_not_added_is_none():
    tokenizer = nllb()
    with pytest.raises(KeyError):
        tokenizer.src_lang = "myv_Cyrl"
    for special in ("</s>", "<mask>"):
        with pytest.raises(KeyError):
            tokenizer.src_lang = special


def test_special_tokens_in_text_can_be_read_as_text(tokenizer):
    language = tokenizer.get_lang_token(tokenizer.src_lang)
    text = f"the </s> {language}"
    reserved = {2, tokenizer.get_lang_id(tokenizer.src_lang)}
    assert reserved <= set(tokenizer.encode(text, add_special_tokens=False))
    split = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert not reserved & set(split)
    assert "</s>" not in tokenizer.tokenize(text, split_special_tokens=True)
    tokenizer.split_special_tokens = True
    assert tokenizer(text).input_ids[1:-1] == split
    assert tokenizer([text]).input_ids[0][1:-1] == split


def test_added_tokens_survive_saving_and_loading(tokenizer, tmp_path):
    with_tokens(tokenizer)
    tokenizer.add_special_tokens({"cls_token": AddedToken("[C]", lstrip=True)})
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(tokenizer)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.added_tokens_decoder == tokenizer.added_tokens_decoder
    assert loaded.special_tokens_map_extended == tokenizer.special_tokens_map_extended
    text = "the news left right solos <sp1> <sp2> [C]"
    assert loaded(text).input_ids == tokenizer(text).input_ids


def test_a_method_s_name_is_no_setting():
    with pytest.raises(AttributeError, match=r"add_special_tokens .* conflicts with"):
        nllb(add_special_tokens=True)
