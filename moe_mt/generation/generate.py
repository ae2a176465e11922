"""Encode once, then loop: one decoder step, one choice."""

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from moe_mt.errors import InputError
from moe_mt.generation.beam import CANDIDATES_PER_BEAM, BeamSearch
from moe_mt.generation.config import GenerationConfig
from moe_mt.generation.greedy import GreedySearch, take_best
from moe_mt.generation.hypotheses import Hypothesis, hypothesis_from_tokens
from moe_mt.generation.logits import LogitsProcessor
from moe_mt.generation.sampling import draw, uniform_table
from moe_mt.models import Seq2SeqTransformer

__all__ = ["generate"]

FIRST_CACHE_STEPS = 64
"""Steps the cache has room for at first; longer outputs make it grow."""


class Strategy(Protocol):
    """Choose tokens from logits, and remember what was chosen."""

    def advance(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the tokens to read next and the rows they continue, ``None`` for each its own."""
        ...

    def all_done(self) -> bool:
        """Whether nothing is left to decode."""
        ...

    def results(self) -> list[list[tuple[list[int], float]]]:
        """Return tokens and score of every sentence's hypotheses."""
        ...


@torch.no_grad()
def generate(
    model: Seq2SeqTransformer,
    source_tokens: Tensor,
    source_mask: Tensor | None,
    config: GenerationConfig,
    *,
    forced_tokens: Sequence[Sequence[int]],
    max_new_tokens: Sequence[int],
    generator: torch.Generator | None = None,
) -> list[list[Hypothesis]]:
    """Generate ``num_return_sequences`` hypotheses for every source.

    A sentence's hypotheses do not depend on what else is in the batch, up to rounding. The memory
    is computed once per sentence; beams and samples are rows that attend to it.

    Args:
        model: In evaluation mode.
        source_tokens: (B, S) int64, on the model's device.
        source_mask: (B, S) bool, true where a token is real; ``None`` where all are.
        config: How to decode. Its length limit is not read here.
        forced_tokens: For each sentence the tokens that must follow the decoder's start: a
            language token, a prefix of the target, both or nothing. They add nothing to scores.
        max_new_tokens: Most tokens for each sentence, forced tokens and the end mark counted.
        generator: A CPU generator that sampling draws from, instead of ``config.seed``.

    Returns:
        For each sentence its hypotheses; those of beam search are sorted, best first, and fewer
        than asked for where fewer are possible because all tokens were forced.

    Raises:
        InputError: If the arguments disagree about the number of sentences, or a limit is below 1.
    """
    _check(source_tokens.shape[0], forced_tokens, max_new_tokens)
    if source_tokens.shape[0] == 0:
        return []
    sources = _without_padding(source_tokens, source_mask)
    beams = max(config.num_beams, config.num_return_sequences)
    steps = max(max_new_tokens)
    uniforms = None
    if config.do_sample:
        uniforms = uniform_table(
            [(*source, *forced) for source, forced in zip(sources, forced_tokens, strict=True)],
            steps,
            CANDIDATES_PER_BEAM * beams if config.num_beams > 1 else beams,
            seed=config.seed,
            generator=generator,
        ).to(source_tokens.device)
    strategy = _strategy(model, config, forced_tokens, max_new_tokens, uniforms)

    memory, _ = model.encode(source_tokens, source_mask)
    cache = model.new_cache(memory, source_mask, beams, min(steps, FIRST_CACHE_STEPS))
    start = model.config.decoder_start_id
    tokens = source_tokens.new_full((len(sources) * beams,), start)
    while True:
        tokens, parents = strategy.advance(model.decode_step(tokens[:, None], cache))
        if strategy.all_done():
            break
        if parents is not None:
            cache.reorder(parents)
    return [
        [
            hypothesis_from_tokens(tokens, score, eos_id=model.config.eos_id, source=source)
            for tokens, score in found
        ]
        for source, found in zip(sources, strategy.results(), strict=True)
    ]


def _strategy(
    model: Seq2SeqTransformer,
    config: GenerationConfig,
    forced_tokens: Sequence[Sequence[int]],
    limits: Sequence[int],
    uniforms: Tensor | None,
) -> Strategy:
    device = model.embedding.weight.device
    beams = max(config.num_beams, config.num_return_sequences)
    processor = LogitsProcessor(
        config,
        [tokens for tokens in forced_tokens for _ in range(beams)],
        eos_id=model.config.eos_id,
        device=device,
    )
    if config.num_beams > 1:
        return BeamSearch(config, model.config, processor, limits, uniforms, device)
    choose = take_best if uniforms is None else partial(_draw_at, uniforms)
    row_limits = [limit for limit in limits for _ in range(beams)]
    return GreedySearch(config, model.config, processor, row_limits, choose, device)


def _draw_at(uniforms: Tensor, scores: Tensor, step: int) -> Tensor:
    """Draw a token a row with the numbers (B, steps, sequences) of this step."""
    return draw(scores, uniforms[:, step].flatten())


def _without_padding(source_tokens: Tensor, source_mask: Tensor | None) -> list[list[int]]:
    sources = source_tokens.tolist()
    if source_mask is None:
        return sources
    return [
        [token for token, real in zip(tokens, mask, strict=True) if real]
        for tokens, mask in zip(sources, source_mask.tolist(), strict=True)
    ]


def _check(sentences: int, forced: Sequence[Sequence[int]], limits: Sequence[int]) -> None:
    if not len(forced) == len(limits) == sentences:
        raise InputError(
            f"generation got {sentences} sources, {len(forced)} rows of forced tokens and "
            f"{len(limits)} limits; give one of each per source"
        )
    if any(limit < 1 for limit in limits):
        raise InputError(
            f"a limit of {min(limits)} new tokens leaves room for none; give 1 or more"
        )
