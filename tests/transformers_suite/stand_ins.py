"""Tokenizer files as large as published ones, in which only ids mean what they mean there."""

import json
import struct
from pathlib import Path

from moe_mt.tokenizers import SentencePieceModel

PIECES = Path(__file__).parents[1] / "golden" / "tokenizer" / "sentencepiece.bpe.model"
M2M100, NLLB = "facebook/m2m100_418M", "facebook/nllb-200-distilled-600M"
M2M100_WORDS, NLLB_PIECES = 128_004, 256_000


def write(folder):
    """Write both tokenizers below a folder, under their names on the hub."""
    words = ["<s>", "<pad>", "</s>", "<unk>", *(f"word{i}" for i in range(M2M100_WORDS - 4))]
    files = folder / M2M100
    files.mkdir(parents=True)
    (files / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (files / "sentencepiece.bpe.model").write_bytes(PIECES.read_bytes())
    (files / "config.json").write_text(json.dumps({"model_type": "m2m_100"}))
    files = folder / NLLB
    files.mkdir(parents=True)
    (files / "sentencepiece.bpe.model").write_bytes(PIECES.read_bytes() + further_pieces())
    settings = {"tokenizer_class": "NllbTokenizer"}
    (files / "tokenizer_config.json").write_text(json.dumps(settings))


def further_pieces():
    """Return pieces that match no text; a model is a protobuf message, which they lengthen."""
    count = NLLB_PIECES - len(SentencePieceModel.load(PIECES))
    score = b"\x15" + struct.pack("<f", -1e4)
    return b"".join(_field(_field(f"\ue000{i}".encode()) + score) for i in range(count))


def _field(content):
    return bytes([0x0A, len(content)]) + content
