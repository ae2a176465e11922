"""The documented tokenizers over the small vocabularies of the goldens."""

from pathlib import Path

from moe_mt.pretrained.tokenization.m2m100 import M2M100Tokenizer, SMALL100Tokenizer
from moe_mt.pretrained.tokenization.nllb import NllbTokenizer
from moe_mt.tokenizers import AddedToken

VOCABULARIES = Path(__file__).parents[1] / "golden" / "tokenizer"
PIECES = VOCABULARIES / "sentencepiece.bpe.model"
WORDS = VOCABULARIES / "vocab.json"
PIECE_COUNT, WORD_COUNT = 560, 542


def nllb(**settings):
    return NllbTokenizer(str(PIECES), **settings)


def m2m100(**settings):
    return M2M100Tokenizer(str(WORDS), str(PIECES), **settings)


def small100(**settings):
    return SMALL100Tokenizer(str(WORDS), str(PIECES), **settings)


def with_tokens(tokenizer):
    """Add what the goldens' script adds."""
    tokenizer.add_tokens(["news", "new"])
    tokenizer.add_tokens([AddedToken("left", lstrip=True), AddedToken("right", rstrip=True)])
    tokenizer.add_tokens(AddedToken("solo", single_word=True))
    tokenizer.add_tokens(["<sp1>"], special_tokens=True)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<sp2>", lstrip=True, rstrip=True)]},
        replace_additional_special_tokens=False,
    )
    return tokenizer


def families():
    """Return the tokenizers of the goldens by name."""
    sides = {"truncation_side": "left", "padding_side": "left", "model_max_length": 20}
    return {
        "nllb": nllb(src_lang="eng_Latn", tgt_lang="fra_Latn"),
        "nllb_legacy": nllb(tgt_lang="ron_Latn", legacy_behaviour=True, **sides),
        "nllb_added": with_tokens(nllb(tgt_lang="fra_Latn")),
        "m2m100": m2m100(src_lang="en", tgt_lang="fr"),
        "m2m100_added": with_tokens(m2m100(src_lang="de", tgt_lang="zh")),
        "wmt21": m2m100(
            language_codes="wmt21",
            src_lang="en",
            tgt_lang="de",
            clean_up_tokenization_spaces=True,
        ),
    }
