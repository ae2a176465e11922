"""transformers 4.57's slow tokenizers load what is saved here, and answer alike.

Needs transformers 4.57 in the same environment: ``pytest -m peers``. Goldens hold the other
direction without it.
"""

import random

import pytest

from tests.pretrained.tokenizer_families import families

pytestmark = pytest.mark.peers

FRAGMENTS = (
    *("the old mill", "river", "</s>", "<mask>", "<pad>", "eng_Latn", "__en__", " ", "  \t", ""),
    *("é", "नदी", "日本", "ﬁ", "\u200b", "news", "new", "x left", "right  x", "solo", "solos"),
    *("<sp1>", " <sp2> ", ".", " , ", "don 't", "▁", "▁a", "eng_Latneng_Latn"),
)
FAMILIES = ("nllb", "nllb_legacy", "nllb_added", "m2m100", "m2m100_added", "wmt21")


@pytest.fixture(params=FAMILIES)
def both(request, tmp_path):
    import transformers

    assert transformers.__version__.startswith("4.57")
    ours = families()[request.param]
    ours.save_pretrained(tmp_path)
    theirs = getattr(transformers, type(ours).__name__).from_pretrained(tmp_path)
    return ours, theirs


def drawn_text(draw):
    return draw.choice(("", " ")).join(draw.choices(FRAGMENTS, k=draw.randrange(7)))


def drawn_options(draw):
    choices = {
        "padding": (True, "longest", "max_length", False),
        "truncation": (True, "longest_first", "only_first", "only_second", False),
        "max_length": (3, 5, 8, 20),
        "pad_to_multiple_of": (4,),
        "padding_side": ("left", "right"),
        "add_special_tokens": (False,),
        "return_special_tokens_mask": (True,),
        "return_length": (True,),
    }
    return {name: draw.choice(values) for name, values in choices.items() if draw.random() < 0.4}


def answer(tokenizer, call):
    arguments, options = call
    try:
        return dict(tokenizer(*arguments, **options))
    except ValueError:
        return "ValueError"


def test_tokens_and_ids_are_the_same(both):
    ours, theirs = both
    assert theirs.get_vocab() == ours.get_vocab()
    assert sorted(theirs.all_special_ids) == sorted(ours.all_special_ids)
    assert (theirs.src_lang, theirs.tgt_lang) == (ours.src_lang, ours.tgt_lang)
    assert theirs.model_max_length == ours.model_max_length


@pytest.mark.filterwarnings("ignore:`max_length` is ignored")
def test_calls_answer_alike(both):
    ours, theirs = both
    draw = random.Random(0)
    answers = 0
    for _ in range(300):
        batch = [drawn_text(draw) + "a" for _ in range(draw.randrange(1, 4))]
        pairs = [drawn_text(draw) + "b" for _ in batch]
        arguments = draw.choice([(batch,), (batch, pairs), (batch[0],), (batch[0], pairs[0])])
        call = arguments, drawn_options(draw)
        expected = answer(theirs, call)
        assert answer(ours, call) == expected, call
        answers += expected != "ValueError"
    assert answers > 200


def test_text_comes_back_alike(both):
    ours, theirs = both
    draw = random.Random(1)
    for _ in range(300):
        ids = [draw.randrange(len(ours)) for _ in range(draw.randrange(10))]
        for skip in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == expected, ids
