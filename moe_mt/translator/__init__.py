"""Sentences in, sentences out.

What lies between text and tokens: cutting text into sentences and putting translations back where
they were, batches of similar length, the order of results, and what to tell the caller about each.
"""

from moe_mt.translator.loading import from_pretrained
from moe_mt.translator.pipeline import TranslationPipeline, pipeline
from moe_mt.translator.progress import Progress, ProgressBar
from moe_mt.translator.result import TranslationResult
from moe_mt.translator.translator import Translator

__all__ = [
    "Progress",
    "ProgressBar",
    "TranslationPipeline",
    "TranslationResult",
    "Translator",
    "from_pretrained",
    "pipeline",
]
