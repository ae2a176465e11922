"""Write ``pretrained_tokenizers/goldens.json``: what transformers 4.57.1's slow tokenizers answer.

Run where transformers 4.57.1 and sentencepiece are installed (``make peers``):

    python tests/golden/make_pretrained_tokenizer_goldens.py

Every case is a call of a method with JSON arguments and its result, so that the test can make the
same call of the documented tokenizers here. The vocabularies are those of ``tokenizer/``.
``saved`` holds the JSON files that transformers writes for a tokenizer with added tokens.
"""

import copy
import json
import platform
import tempfile
from pathlib import Path

import sentencepiece
import transformers
from transformers import AddedToken, M2M100Tokenizer, NllbTokenizer
from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES
from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES as NLLB_CODES

FOLDER = Path(__file__).parent / "pretrained_tokenizers"
MODEL_FILE = Path(__file__).parent / "tokenizer" / "sentencepiece.bpe.model"
VOCABULARY_FILE = MODEL_FILE.with_name("vocab.json")
# transformers lengthens its own list when tokens are added to a tokenizer that was made with it.
LANGUAGES = list(NLLB_CODES)

SENTENCE = "The old mill by the river was sold."
HOSTILE = [
    "",
    "   ",
    "  spaces   inside  and around ",
    "</s> ends <pad> nothing <s>",
    "eng_Latn and __en__ are <mask> here",
    "eng_Latneng_Latn",
    "a <mask> b<mask>c",
    "ﬁ Ａ\u200bb\u200dc",
    "नदी 日本語 😀",
    "▁▁a ▁",
    "new news renew solo solos un-solo x  left right  y <sp1>z <sp2>  ",
]
NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
OPTIONS = [
    {},
    {"padding": True},
    {"padding": "longest", "pad_to_multiple_of": 8},
    {"padding": "max_length", "max_length": 24, "truncation": True},
    {"truncation": True, "max_length": 6},
    {"truncation": "longest_first", "max_length": 9, "padding": True},
    {"max_length": 7},
    {"max_length": 7, "truncation": False},
    {"max_length": 5, "padding": "max_length"},
    {"truncation": True, "max_length": 2},
    {"add_special_tokens": False, "truncation": True, "max_length": 4},
    {"return_special_tokens_mask": True, "padding": "max_length", "max_length": 18},
    {"return_attention_mask": False, "return_length": True},
    {"padding": True, "padding_side": "left"},
]
PAIR_OPTIONS = [
    {},
    {"truncation": "only_first", "max_length": 12, "stride": 2, "return_overflowing_tokens": True},
    {"truncation": "only_second", "max_length": 12, "stride": 1, "return_overflowing_tokens": True},
    {"truncation": "longest_first", "max_length": 12},
    {"truncation": True, "max_length": 9, "padding": "max_length"},
    {"return_special_tokens_mask": True},
]


def nllb_layout() -> dict[int, AddedToken]:
    """Return the added tokens in the order of the published tokenizer.json."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(MODEL_FILE)).get_piece_size()
    languages = [AddedToken(code, normalized=False, special=True) for code in LANGUAGES]
    mask = AddedToken("<mask>", lstrip=True, normalized=True, special=True)
    return dict(enumerate([*languages, mask], start=pieces + 1))


def nllb(**settings):
    return NllbTokenizer(
        str(MODEL_FILE),
        added_tokens_decoder=nllb_layout(),
        additional_special_tokens=list(LANGUAGES),
        **settings,
    )


def m2m100(codes="m2m100", **settings):
    return M2M100Tokenizer(
        str(VOCABULARY_FILE),
        str(MODEL_FILE),
        language_codes=codes,
        additional_special_tokens=[f"__{code}__" for code in FAIRSEQ_LANGUAGE_CODES[codes]],
        **settings,
    )


def with_tokens(tokenizer):
    tokenizer.add_tokens(["news", "new"])
    tokenizer.add_tokens([AddedToken("left", lstrip=True), AddedToken("right", rstrip=True)])
    tokenizer.add_tokens(AddedToken("solo", single_word=True))
    tokenizer.add_tokens(["<sp1>"], special_tokens=True)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<sp2>", lstrip=True, rstrip=True)]},
        replace_additional_special_tokens=False,
    )
    return tokenizer


def tokenizers() -> dict[str, transformers.PreTrainedTokenizer]:
    sides = {"truncation_side": "left", "padding_side": "left", "model_max_length": 20}
    return {
        "nllb": nllb(src_lang="eng_Latn", tgt_lang="fra_Latn"),
        "nllb_legacy": nllb(tgt_lang="ron_Latn", legacy_behaviour=True, **sides),
        "nllb_added": with_tokens(nllb(tgt_lang="fra_Latn")),
        "m2m100": m2m100(src_lang="en", tgt_lang="fr"),
        "m2m100_added": with_tokens(m2m100(src_lang="de", tgt_lang="zh")),
        "wmt21": m2m100("wmt21", src_lang="en", tgt_lang="de", clean_up_tokenization_spaces=True),
    }


def calls(size: int):
    """Yield the method, the arguments and the keyword arguments of every case."""
    for text in [SENTENCE, *HOSTILE]:
        yield "__call__", [text], {}
        yield "tokenize", [text], {}
    for options in OPTIONS:
        yield "__call__", [SENTENCE], options
        yield "__call__", [[SENTENCE, "river", ""]], options
    for options in PAIR_OPTIONS:
        yield "__call__", [SENTENCE, "river"], options
        yield "__call__", [[SENTENCE, "a"], ["river", SENTENCE]], options
        yield "__call__", [[["a", SENTENCE], ["river", "b"]]], options
    yield "__call__", [SENTENCE], {"text_target": "river"}
    yield "__call__", [["a", SENTENCE]], {"text_target": ["river", SENTENCE], "padding": True}
    yield "__call__", [], {"text_target": [SENTENCE, "a"], "padding": True}
    words = {"is_split_into_words": True}
    yield "__call__", [["The", "old", "mill", "<mask>"]], words
    yield "__call__", [[["old", "mill"], ["river"]]], {**words, "padding": True}
    yield "encode", [SENTENCE, "river"], {"add_special_tokens": False}
    yield "encode_plus", [["▁the", "▁river", "eng_Latn"]], {}
    yield "encode_plus", [[5, 6, 7]], {}
    yield "prepare_for_model", [[5, 6, 7, 8], [9, 10]], {"max_length": 5, "truncation": True}
    rows = [{"input_ids": [5, 6, 7], "labels": [1, 2]}, {"input_ids": [8], "labels": [3]}]
    yield "pad", [rows], {}
    yield "pad", [{"input_ids": [[5, 6, 7], [8]]}], {"padding": "max_length", "max_length": 5}
    yield "pad", [{"input_ids": [5, 6], "attention_mask": [1, 0]}], {"pad_to_multiple_of": 4}
    sequences = [[], [2], [size - 1, 5, 9, 2, 1, 1], [size - 9, size - 8, 11, size - 2, 12], [0, 3]]
    for skip in (True, False):
        yield "batch_decode", [sequences], {"skip_special_tokens": skip}
        yield "convert_ids_to_tokens", [sequences[2]], {"skip_special_tokens": skip}
    yield "decode", [sequences[3]], {"spaces_between_special_tokens": False}
    yield "decode", [7], {}
    for clean in (True, False, None):
        yield "clean_up_tokenization", ["I do n't ' know , we 've . It 's ! ?"], {}
        yield "decode", [[9, 10, 11, 12]], {"clean_up_tokenization_spaces": clean}
    yield "convert_tokens_to_ids", [["</s>", "▁the", "no such token", "eng_Latn", "__de__"]], {}
    yield "convert_tokens_to_string", [["▁the", "</s>", "▁river"]], {}
    yield "get_special_tokens_mask", [[5, 6], [7]], {}
    yield "get_special_tokens_mask", [[0, 5, 2, size - 1]], {"already_has_special_tokens": True}
    yield "build_inputs_with_special_tokens", [[5, 6], [7]], {}
    yield "num_special_tokens_to_add", [], {"pair": True}


def plain(result):
    if not hasattr(result, "data"):
        return result
    # transformers counts below zero here where a text is shorter than max_length.
    return {name: value for name, value in result.items() if name != "num_truncated_tokens"}


def compact(content) -> str:
    return json.dumps(content, separators=(",", ":"))


def facts(tokenizer) -> dict:
    return {
        "length": len(tokenizer),
        "named": {n: getattr(tokenizer, f"{n}_token") for n in NAMES},
        "named_ids": {n: getattr(tokenizer, f"{n}_token_id") for n in NAMES},
        "all_special_ids": sorted(tokenizer.all_special_ids),
        "added": {
            token.content: [i, token.lstrip, token.rstrip, token.single_word, token.special]
            for i, token in tokenizer.added_tokens_decoder.items()
            if i >= len(tokenizer) - 9 or i < 4
        },
    }


def saved_files(tokenizer) -> dict[str, dict]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        paths = [path for path in Path(folder).glob("*.json") if path.name != "vocab.json"]
        return {path.name: json.loads(path.read_text()) for path in sorted(paths)}


def main() -> None:
    """Write the file."""
    FOLDER.mkdir(exist_ok=True)
    lines, saved = [], {}
    for family, tokenizer in tokenizers().items():
        lines.append(compact({"family": family, "facts": facts(tokenizer)}))
        for method, arguments, options in calls(len(tokenizer)):
            given = copy.deepcopy([method, arguments, options])
            result = plain(getattr(tokenizer, method)(*arguments, **options))
            lines.append(compact({"family": family, "call": given, "result": result}))
        if family.endswith("_added"):
            saved[family] = saved_files(tokenizer)
    versions = {
        "python": platform.python_version(),
        "sentencepiece": sentencepiece.__version__,
        "transformers": transformers.__version__,
    }
    body = ",\n".join(lines)
    (FOLDER / "goldens.json").write_text(
        f'{{"versions": {json.dumps(versions)},\n"saved": {compact(saved)},\n'
        f'"cases": [\n{body}\n]}}\n'
    )


if __name__ == "__main__":
    main()
