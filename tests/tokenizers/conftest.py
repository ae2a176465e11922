"""The small sentencepiece model and vocabulary of the goldens."""

import json
from pathlib import Path

import pytest

from moe_mt.tokenizers import (
    M2M100Tokenizer,
    NllbTokenizer,
    SentencePieceModel,
    Small100Tokenizer,
    read_word_ids,
)

GOLDEN_FOLDER = Path(__file__).parents[1] / "golden" / "tokenizer"


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    return GOLDEN_FOLDER


@pytest.fixture(scope="session")
def pieces() -> SentencePieceModel:
    return SentencePieceModel.load(GOLDEN_FOLDER / "sentencepiece.bpe.model")


@pytest.fixture(scope="session")
def word_ids() -> dict[str, int]:
    return read_word_ids(GOLDEN_FOLDER / "vocab.json")


@pytest.fixture(scope="session")
def tokenizers(pieces, word_ids):
    return {
        "nllb": NllbTokenizer(pieces),
        "nllb_legacy": NllbTokenizer(pieces, legacy_behaviour=True),
        "m2m100": M2M100Tokenizer(pieces, word_ids),
        "wmt21": M2M100Tokenizer(pieces, word_ids, "wmt21"),
        "small100": Small100Tokenizer(pieces, word_ids),
    }


@pytest.fixture
def checkpoint(tmp_path, golden_folder):
    """Write a checkpoint's tokenizer files; contents given as bytes stand for themselves."""

    def write(*names: str, **contents: object) -> Path:
        for name in names:
            (tmp_path / name).write_bytes((golden_folder / name).read_bytes())
        for name, content in contents.items():
            text = content if isinstance(content, bytes) else json.dumps(content).encode()
            (tmp_path / f"{name}.json").write_bytes(text)
        return tmp_path

    return write
