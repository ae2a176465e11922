"""Encode once, decode, and say what came out for every source, each with its own limit and seed."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from moe_mt.errors import InputError
from moe_mt.generation.beam import BeamSearch, candidates_per_beam, take_best_several
from moe_mt.generation.config import GenerationConfig
from moe_mt.generation.greedy import GreedySearch, take_best
from moe_mt.generation.hypotheses import Hypothesis, hypothesis_from_tokens
from moe_mt.generation.rules import ForcedTokens, LogitsProcessor, RuleContext, logits_rules
from moe_mt.generation.sampling import draw, draw_several, uniform_table
from moe_mt.generation.search import CachedDecoder, search
from moe_mt.generation.stopping import Stopping
from moe_mt.models import Seq2SeqTransformer, TransformerConfig

__all__ = ["FIRST_CACHE_STEPS", "generate", "translation_rules"]

FIRST_CACHE_STEPS = 64
"""Steps the cache has room for at first; longer outputs make it grow."""

CANDIDATES_PER_BEAM = candidates_per_beam(1)


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
    memory, _ = model.encode(source_tokens, source_mask)
    cache = model.new_cache(memory, source_mask, beams, min(steps, FIRST_CACHE_STEPS))
    start = model.config.decoder_start_id
    prompts = source_tokens.new_full((len(sources) * beams, 1), start)
    found = _search(
        CachedDecoder(model, cache),
        prompts,
        config,
        model.config,
        ForcedTokens(
            [tokens for tokens in forced_tokens for _ in range(beams)], source_tokens.device
        ),
        max_new_tokens,
        uniforms,
    )
    return [
        [
            hypothesis_from_tokens(tokens, score, eos_id=model.config.eos_id, source=source)
            for tokens, score in hypotheses
        ]
        for source, hypotheses in zip(sources, found, strict=True)
    ]


def _search(
    decoder: CachedDecoder,
    prompts: Tensor,
    config: GenerationConfig,
    model_config: TransformerConfig,
    forced: ForcedTokens,
    limits: Sequence[int],
    uniforms: Tensor | None,
) -> list[list[tuple[list[int], float]]]:
    device, eos_ids = prompts.device, (model_config.eos_id,)
    processor = translation_rules(config, forced, model_config.eos_id, device)
    count = config.num_return_sequences
    if config.num_beams > 1:
        beams = BeamSearch(
            prompts.view(len(limits), config.num_beams, 1),
            processor,
            Stopping(limits, eos_ids, device),
            partial(take_best_several, CANDIDATES_PER_BEAM * config.num_beams)
            if uniforms is None
            else partial(_draw_several_at, uniforms),
            length_penalty=config.length_penalty,
            early_stopping=config.early_stopping,
        )
        search(decoder, beams, prompts)
        return beams.results(count)
    greedy = GreedySearch(
        prompts,
        processor,
        Stopping([limit for limit in limits for _ in range(count)], eos_ids, device),
        take_best if uniforms is None else partial(_draw_at, uniforms),
        pad_id=model_config.pad_id,
        forced=forced,
    )
    search(decoder, greedy, prompts)
    return greedy.results(config.length_penalty, count)


def translation_rules(
    config: GenerationConfig, forced: ForcedTokens, eos_id: int, device: torch.device
) -> LogitsProcessor:
    """Return the rules of a configuration.

    Args:
        config: Which rules apply.
        forced: What must follow the decoder's start.
        eos_id: The end mark.
        device: Where the scores will be.
    """
    options = asdict(config) | {"min_new_tokens": config.new_token_minimum}
    context = RuleContext(device=device, eos_ids=(eos_id,), forced=forced)
    return LogitsProcessor(logits_rules(options, context))


def _draw_at(uniforms: Tensor, scores: Tensor, step: int) -> Tensor:
    """Draw a token a row with the numbers (B, steps, sequences) of this step."""
    return draw(scores, uniforms[:, step].flatten())


def _draw_several_at(uniforms: Tensor, totals: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Draw candidates for each sentence with the numbers (B, steps, candidates) of this step."""
    return draw_several(totals, uniforms[:, step])


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
