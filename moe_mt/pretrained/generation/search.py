"""From a call of ``generate`` to a search of ``generation``, and from what it found to outputs."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from moe_mt.generation import (
    FIRST_CACHE_STEPS,
    BeamSearch,
    Criterion,
    ForcedTokens,
    GreedySearch,
    LogitsProcessor,
    Rule,
    RuleContext,
    Stopping,
    candidates_per_beam,
    draw_several_together,
    draw_together,
    logits_rules,
    take_best,
    take_best_several,
)
from moe_mt.pretrained.generation.call import Call
from moe_mt.pretrained.generation.decoders import FastDecoder, GeneratingModel, RecordingDecoder
from moe_mt.pretrained.generation.observers import Recording
from moe_mt.pretrained.generation.outputs import (
    GenerateBeamEncoderDecoderOutput,
    GenerateEncoderDecoderOutput,
)
from moe_mt.pretrained.outputs import ModelOutput

__all__ = [
    "AllowedTokens",
    "GenerateOutput",
    "add_seen",
    "found",
    "make_decoder",
    "make_rules",
    "make_strategy",
]

AllowedTokens: TypeAlias = Callable[[int, Tensor], Sequence[int]]

GenerateOutput: TypeAlias = GenerateEncoderDecoderOutput | GenerateBeamEncoderDecoderOutput

DECODER_HEAD_MASKS = ("decoder_head_mask", "cross_attn_head_mask")


def make_rules(
    call: Call, user_rules: Sequence[Rule], allowed_tokens: AllowedTokens | None
) -> LogitsProcessor:
    """Return the rules of a call, the caller's own among them."""
    device, language = call.start.prompts.device, call.config.forced_bos_token_id
    forced = None
    # A prompt says for itself which language it is in.
    if language is not None and call.prompt_length == 1:
        forced = ForcedTokens([[language]] * call.rows, device)
    context = RuleContext(
        device=device,
        eos_ids=call.special.eos_ids,
        prompt_length=call.prompt_length,
        forced=forced,
        max_length=call.limit,
        source_tokens=call.source.tokens,
        rows_per_sentence=call.rows_per_sentence,
        allowed_tokens=allowed_tokens,
        extra=user_rules,
    )
    return LogitsProcessor(logits_rules(vars(call.config), context))


def make_strategy(
    call: Call, rules: Rule, criteria: Sequence[Criterion]
) -> BeamSearch | GreedySearch:
    """Return the search that a call asks for."""
    config, eos_ids = call.config, call.special.eos_ids
    limits = call.source.sentences if config.num_beams > 1 else call.rows
    stopping = Stopping(
        [call.limit - call.prompt_length] * limits, eos_ids, call.start.prompts.device, criteria
    )
    if config.num_beams == 1:
        return GreedySearch(
            call.prompts,
            rules,
            stopping,
            draw_together if config.do_sample else take_best,
            # As in transformers: rows that other criteria have ended go on where nothing else can.
            pad_id=call.special.pad_id if eos_ids else None,
        )
    count = candidates_per_beam(len(eos_ids)) * config.num_beams
    return BeamSearch(
        call.prompts.view(-1, config.num_beams, call.prompt_length),
        rules,
        stopping,
        partial(draw_several_together if config.do_sample else take_best_several, count),
        length_penalty=config.length_penalty,
        early_stopping=config.early_stopping,
    )


def make_decoder(
    model: GeneratingModel, call: Call, encoded: ModelOutput
) -> FastDecoder | RecordingDecoder:
    """Return the fast decoder, or the one that takes and shows what that one cannot."""
    head_masks = {name: call.arguments.get(name) for name in DECODER_HEAD_MASKS}
    past = call.arguments.get("past_key_values")
    given = (past, call.start.mask, *head_masks.values())
    shown = call.shows("attentions") or call.shows("hidden_states")
    plain = not shown and all(argument is None for argument in given)
    if call.config.use_cache and plain and model.decodes_fast():
        mask = None if call.source.mask is None else call.source.mask != 0
        capacity = min(call.limit, call.prompt_length + FIRST_CACHE_STEPS)
        cache = model.new_cache(encoded[0], mask, call.rows_per_sentence, capacity)
        return FastDecoder(model, cache)
    return RecordingDecoder(
        model,
        encoded,
        call.source.mask,
        call.rows_per_sentence,
        decoder_mask=call.start.mask,
        past=past,
        head_masks=head_masks,
        use_cache=call.config.use_cache,
        attentions=call.shows("attentions"),
        hidden_states=call.shows("hidden_states"),
    )


def found(call: Call, strategy: BeamSearch | GreedySearch) -> GenerateOutput:
    """Return the sequences, and what the search knows about them."""
    if isinstance(strategy, GreedySearch):
        return GenerateEncoderDecoderOutput(sequences=strategy.history)
    count, finished = call.config.num_return_sequences, strategy.finished
    lengths = finished.lengths[:, :count].flatten()
    longest = int(lengths.max())
    tokens = finished.tokens[:, :count, :longest].flatten(0, 1)
    beyond = torch.arange(longest, device=tokens.device) >= lengths[:, None]
    tokens = tokens.masked_fill(beyond, call.special.pad_id or 0)
    prompts = call.start.prompts.repeat_interleave(count, 0)
    output = GenerateBeamEncoderDecoderOutput(sequences=torch.cat([prompts, tokens], dim=1))
    if call.config.return_dict_in_generate:
        output.beam_indices = strategy.paths()[:, :count, :longest].flatten(0, 1)
    if call.shows("scores"):
        output.sequences_scores = finished.scores[:, :count].flatten()
    return output


def add_seen(
    output: GenerateOutput,
    call: Call,
    strategy: BeamSearch | GreedySearch,
    decoder: FastDecoder | RecordingDecoder,
    recording: Recording,
    encoded: ModelOutput,
) -> None:
    """Add what was seen on the way, as far as it was asked for, and the cache."""
    output.scores, output.logits = recording.scores, recording.logits
    if call.shows("attentions"):
        output.encoder_attentions = encoded.get("attentions")
    if call.shows("hidden_states"):
        output.encoder_hidden_states = encoded.get("hidden_states")
    if isinstance(decoder, RecordingDecoder):
        output.decoder_attentions = decoder.decoder_attentions
        output.cross_attentions = decoder.cross_attentions
        output.decoder_hidden_states = decoder.hidden_states
    if call.config.use_cache:
        if isinstance(strategy, BeamSearch):
            decoder.reorder(strategy.continued[-1])
        output.past_key_values = decoder.past_key_values()
