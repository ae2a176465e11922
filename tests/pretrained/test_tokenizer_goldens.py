"""Call for call what transformers 4.57.1's slow tokenizers answer, and file for file."""

import copy
import json
import shutil
from pathlib import Path

import pytest

from moe_mt.pretrained.tokenization.auto import AutoTokenizer
from moe_mt.pretrained.tokenization.batch_encoding import BatchEncoding
from tests.pretrained.tokenizer_families import PIECES, WORDS, families

FILE = Path(__file__).parents[1] / "golden" / "pretrained_tokenizers" / "goldens.json"
GOLDENS = json.loads(FILE.read_text(encoding="utf-8"))
CALLS = [case for case in GOLDENS["cases"] if "call" in case]
FACTS = {case["family"]: case["facts"] for case in GOLDENS["cases"] if "facts" in case}
# Written by transformers for itself; nothing depends on them.
IGNORED_SETTINGS = {"extra_special_tokens", "tokenizer_file"}


@pytest.fixture(scope="module")
def tokenizers():
    return families()


def answer(tokenizer, call):
    method, arguments, options = copy.deepcopy(call)
    result = getattr(tokenizer, method)(*arguments, **options)
    if not isinstance(result, BatchEncoding):
        return result
    return {name: value for name, value in result.items() if name != "num_truncated_tokens"}


def test_the_reference_is_the_version_these_tokenizers_promise_to_follow(tokenizers):
    assert GOLDENS["versions"]["transformers"] == "4.57.1"
    assert set(FACTS) == set(tokenizers)
    assert len(CALLS) > 500


@pytest.mark.parametrize("family", FACTS)
def test_tokens_ids_and_names(tokenizers, family):
    tokenizer, facts = tokenizers[family], FACTS[family]
    assert len(tokenizer) == len(tokenizer.get_vocab()) == facts["length"]
    for name, token in facts["named"].items():
        assert getattr(tokenizer, f"{name}_token") == token
        assert getattr(tokenizer, f"{name}_token_id") == facts["named_ids"][name]
    assert sorted(tokenizer.all_special_ids) == facts["all_special_ids"]
    decoder = tokenizer.added_tokens_decoder
    for content, (token_id, lstrip, rstrip, single_word, special) in facts["added"].items():
        token = decoder[token_id]
        assert token.content == content
        assert [token.lstrip, token.rstrip] == [lstrip, rstrip]
        assert [token.single_word, token.special] == [single_word, special]


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=f"{c['family']}-{i}") for i, c in enumerate(CALLS)]
)
def test_a_call_answers_as_the_reference_does(tokenizers, case):
    assert answer(tokenizers[case["family"]], case["call"]) == case["result"]


@pytest.mark.parametrize("family", GOLDENS["saved"])
def test_what_transformers_saved_loads_and_answers_alike(tmp_path, family):
    for name, content in GOLDENS["saved"][family].items():
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    for path in (PIECES, WORDS):
        shutil.copy(path, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for case in CALLS:
        if case["family"] == family:
            assert answer(tokenizer, case["call"]) == case["result"]


@pytest.mark.parametrize("family", GOLDENS["saved"])
def test_what_is_saved_says_what_transformers_says(tokenizers, tmp_path, family):
    tokenizers[family].save_pretrained(tmp_path)
    written = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    for name, expected in GOLDENS["saved"][family].items():
        found = written[name]
        if name == "special_tokens_map.json":
            # A token without flags may be spelled as a string or as an object.
            assert contents(found) == contents(expected)
        else:
            assert without(found, IGNORED_SETTINGS) == without(expected, IGNORED_SETTINGS)


def without(settings, names):
    return {name: value for name, value in settings.items() if name not in names}


def contents(value):
    if isinstance(value, list):
        return [contents(item) for item in value]
    if isinstance(value, dict) and "content" in value:
        return value["content"]
    if isinstance(value, dict):
        return {name: contents(item) for name, item in value.items()}
    return value
