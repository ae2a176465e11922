"""Token ids in, token ids out: one loop of decoder steps, and strategies that choose tokens.

Strings, languages and files belong elsewhere. Results are those of transformers 4.57 on the same
logits; ``tests/generation/test_generate.py`` holds them to it.
"""

from moe_mt.generation.beam import BeamSearch, candidates_per_beam, take_best_several
from moe_mt.generation.config import GenerationConfig
from moe_mt.generation.decode_step import CompiledStep, DecodeStep, EagerStep
from moe_mt.generation.generate import (
    FIRST_CACHE_STEPS,
    BatchLimits,
    Request,
    depends_on_token_count,
    generate,
    generate_each,
)
from moe_mt.generation.greedy import GreedySearch, take_best
from moe_mt.generation.hypotheses import Hypothesis, is_repetition_loop
from moe_mt.generation.rules import (
    ForcedTokens,
    LogitsProcessor,
    Rule,
    RuleContext,
    logits_rules,
)
from moe_mt.generation.sampling import draw_several_together, draw_together
from moe_mt.generation.search import CachedDecoder, Strategy, search
from moe_mt.generation.stopping import Criterion, Stopping

__all__ = [
    "FIRST_CACHE_STEPS",
    "BatchLimits",
    "BeamSearch",
    "CachedDecoder",
    "CompiledStep",
    "Criterion",
    "DecodeStep",
    "EagerStep",
    "ForcedTokens",
    "GenerationConfig",
    "GreedySearch",
    "Hypothesis",
    "LogitsProcessor",
    "Request",
    "Rule",
    "RuleContext",
    "Stopping",
    "Strategy",
    "candidates_per_beam",
    "depends_on_token_count",
    "draw_several_together",
    "draw_together",
    "generate",
    "generate_each",
    "is_repetition_loop",
    "logits_rules",
    "search",
    "take_best",
    "take_best_several",
]
