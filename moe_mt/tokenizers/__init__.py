"""Strings to token ids and back, for every published model; knows no tensor.

Here live the tokenizers of the two families, the loader that chooses among them and the lists of
languages. The documented classes that return tensors stand in ``pretrained``, over these.
"""

from moe_mt.tokenizers.language_table import (
    list_languages,
    resolve_language,
    sentence_rules_code,
)
from moe_mt.tokenizers.load import (
    load_tokenizer,
    published_language_codes,
    read_word_ids,
    tokenizer_kind,
)
from moe_mt.tokenizers.m2m100 import M2M100Tokenizer, M2M100Vocabulary, Small100Tokenizer
from moe_mt.tokenizers.nllb import NllbIdLayout, NllbTokenizer, NllbVocabulary
from moe_mt.tokenizers.piece_tokenizer import Vocabulary
from moe_mt.tokenizers.sentencepiece import SentencePieceModel
from moe_mt.tokenizers.special_tokens import AddedToken, AddedTokens
from moe_mt.tokenizers.tokenizer import Tokenizer

__all__ = [
    "AddedToken",
    "AddedTokens",
    "M2M100Tokenizer",
    "M2M100Vocabulary",
    "NllbIdLayout",
    "NllbTokenizer",
    "NllbVocabulary",
    "SentencePieceModel",
    "Small100Tokenizer",
    "Tokenizer",
    "Vocabulary",
    "list_languages",
    "load_tokenizer",
    "published_language_codes",
    "read_word_ids",
    "resolve_language",
    "sentence_rules_code",
    "tokenizer_kind",
]
