"""Token for token what transformers 4.57.1's slow tokenizers give."""

import json
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "golden" / "tokenizer" / "goldens.json"
GOLDENS = json.loads(FILE.read_text(encoding="utf-8"))
CASES = GOLDENS["cases"]
LANGUAGES = {
    "nllb": ("eng_Latn", "fra_Latn"),
    "nllb_legacy": ("eng_Latn", "fra_Latn"),
    "m2m100": ("en", "fr"),
    "wmt21": ("en", "de"),
}


def cases_with(key):
    return [
        pytest.param(case, id=f"{case['family']}-{i}")
        for i, case in enumerate(c for c in CASES if key in c)
    ]


def test_the_reference_is_the_version_these_tokenizers_promise_to_follow():
    assert GOLDENS["versions"]["transformers"] == "4.57.1"
    assert {case["family"] for case in CASES} == set(LANGUAGES)


@pytest.mark.parametrize("case", cases_with("language_ids"))
def test_ids_and_size(tokenizers, case):
    tokenizer = tokenizers[case["family"]]
    assert tokenizer.vocab_size == case["length"]
    ids = [tokenizer.language_id(code) for code in tokenizer.languages]
    assert {tokenizer.token(token_id): token_id for token_id in ids} == case["language_ids"]


@pytest.mark.parametrize("case", cases_with("text"))
def test_text(tokenizers, case):
    tokenizer = tokenizers[case["family"]]
    source, target = LANGUAGES[case["family"]]
    text = case["text"]
    as_reference = {"special_tokens_in_text": True}
    assert tokenizer.tokenize(text, **as_reference) == case["tokens"]
    assert tokenizer.encode_source(text, source, target, **as_reference) == case["source"]
    assert tokenizer.encode_target(text, target, **as_reference) == case["target"]
    assert tokenizer.decode(case["source"]) == case["skipped"]
    assert tokenizer.decode(case["source"], skip_special_tokens=False) == case["kept"]


@pytest.mark.parametrize("case", cases_with("ids"))
def test_any_ids_decode_as_the_reference_decodes_them(tokenizers, case):
    tokenizer = tokenizers[case["family"]]
    assert tokenizer.decode(case["ids"]) == case["skipped"]
    assert tokenizer.decode(case["ids"], skip_special_tokens=False) == case["kept"]


def test_text_without_special_tokens_is_the_same_read_either_way(tokenizers):
    compared = 0
    for case in CASES:
        tokenizer = tokenizers[case["family"]]
        text = case.get("text", "")
        if text and not any(token in text for token in tokenizer.special_tokens):
            plain = tokenizer.encode_text(text)
            assert plain == tokenizer.encode_text(text, special_tokens_in_text=True)
            compared += 1
    assert compared > 100
