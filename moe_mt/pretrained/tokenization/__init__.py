"""The documented tokenizers: state, calls and tensors around the stateless ``tokenizers``."""

from moe_mt.pretrained.tokenization.auto import AutoTokenizer
from moe_mt.pretrained.tokenization.batch_encoding import BatchEncoding
from moe_mt.pretrained.tokenization.languages import LanguageCodeError
from moe_mt.pretrained.tokenization.m2m100 import M2M100Tokenizer, SMALL100Tokenizer
from moe_mt.pretrained.tokenization.nllb import NllbTokenizer
from moe_mt.pretrained.tokenization.options import EncodingOptions
from moe_mt.pretrained.tokenization.tokenizer import PretrainedTokenizer

__all__ = [
    "AutoTokenizer",
    "BatchEncoding",
    "EncodingOptions",
    "LanguageCodeError",
    "M2M100Tokenizer",
    "NllbTokenizer",
    "PretrainedTokenizer",
    "SMALL100Tokenizer",
]
