"""Strings to token ids and back, for every published model; knows no tensor.

Here live the tokenizers of the two families, the loader that chooses among them and the lists of
languages. The documented classes that return tensors stand in ``pretrained``, over these.
"""

from moe_mt.tokenizers.language_table import list_languages, sentence_rules_code
from moe_mt.tokenizers.load import load_tokenizer, read_word_ids
from moe_mt.tokenizers.m2m100 import M2M100Tokenizer, Small100Tokenizer
from moe_mt.tokenizers.nllb import NllbIdLayout, NllbTokenizer
from moe_mt.tokenizers.sentencepiece import SentencePieceModel
from moe_mt.tokenizers.tokenizer import Tokenizer

__all__ = [
    "M2M100Tokenizer",
    "NllbIdLayout",
    "NllbTokenizer",
    "SentencePieceModel",
    "Small100Tokenizer",
    "Tokenizer",
    "list_languages",
    "load_tokenizer",
    "read_word_ids",
    "sentence_rules_code",
]
