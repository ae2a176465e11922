"""How text is split at added tokens, and joined from them."""

import pickle

import pytest

from moe_mt.tokenizers import AddedToken, AddedTokens


def added(*tokens, **settings):
    by_id = {i: t if isinstance(t, AddedToken) else AddedToken(t) for i, t in enumerate(tokens)}
    return AddedTokens(by_id, **{"spaced": (), **settings})


@pytest.mark.parametrize(
    ("tokens", "text", "expected"),
    [
        (["a"], "xax", ["x", "a", "x"]),
        (["a"], "aa", ["a", "a"]),
        (["a"], "", []),
        # The longest of those that begin at the same place, whatever their order.
        (["ab", "abc"], "abcab", ["abc", "ab"]),
        (["abc", "ab"], "abcab", ["abc", "ab"]),
        # The first place wins over the longer token that begins later.
        (["ab", "bcd"], "abcd", ["ab", "cd"]),
        (["(.*)"], "x(.*)", ["x", "(.*)"]),  # no pattern
        ([""], "x", ["x"]),  # an empty token matches nowhere
    ],
)
def test_text_is_split_at_the_first_and_longest_token(tokens, text, expected):
    assert added(*tokens).tokenize(text, lambda part: [part]) == expected


@pytest.mark.parametrize(
    ("flags", "text", "expected"),
    [
        ({"lstrip": True}, "x  T  y", ["x", "T", "  y"]),
        ({"rstrip": True}, "x  T  y", ["x  ", "T", "y"]),
        ({"lstrip": True, "rstrip": True}, "  T  ", ["T"]),
        ({"lstrip": True}, "T T", ["T", "T"]),  # the space between is eaten whole
        ({"single_word": True}, "x T y", ["x ", "T", " y"]),
        ({"single_word": True}, "xT y", ["xT", " y"]),
        ({"single_word": True}, "x Ty", ["x ", "Ty"]),
        ({"single_word": True}, "T", ["T"]),
    ],
)
def test_a_token_takes_spaces_or_is_part_of_a_word_as_it_says(flags, text, expected):
    tokens = added(AddedToken("T", **flags))
    assert tokens.tokenize(text, lambda part: [part]) == expected


def test_spaced_tokens_stand_alone_and_runs_of_others_are_joined():
    tokens = added("L", "S", spaced=["L"])
    assert tokens.join(["a", "b", "L", "c", "S"], False, "+".join) == "a+b L c+S"
    assert tokens.join(["a", "L", "b"], False, "+".join, separator="") == "aLb"


def test_only_skipped_tokens_are_left_out_and_all_are_by_default():
    assert added("L", "S", skipped=["S"]).join(["a", "L", "S"], True, "".join) == "aL"
    assert added("L", "S").join(["a", "L", "S"], True, "".join) == "a"


def test_a_special_token_is_not_normalized_unless_it_says_so():
    assert AddedToken("a").normalized is True
    assert AddedToken("a", special=True).normalized is False
    assert AddedToken("a", special=True, normalized=True).normalized is True


def test_an_added_token_is_its_content_as_a_string_and_survives_pickling():
    token = AddedToken("a", lstrip=True, special=True)
    assert str(token) == "a"
    assert pickle.loads(pickle.dumps(token)) == token
    assert token.__getstate__()["lstrip"] is True
