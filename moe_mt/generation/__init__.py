"""Token ids in, token ids out: one loop of decoder steps, and strategies that choose tokens.

Strings, languages and files belong elsewhere. Results are those of transformers 4.57 on the same
logits; ``tests/generation/test_generate.py`` holds them to it.
"""

from moe_mt.generation.config import GenerationConfig
from moe_mt.generation.generate import generate
from moe_mt.generation.hypotheses import Hypothesis, is_repetition_loop

__all__ = ["GenerationConfig", "Hypothesis", "generate", "is_repetition_loop"]
