"""The documented ``generate``, around the search of ``moe_mt.generation``."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_mt.errors import ConfigError
from moe_mt.generation import Rule, search
from moe_mt.pretrained.generation.call import Call, GivenConfig, resolve_call
from moe_mt.pretrained.generation.config import PublishedGenerationConfig
from moe_mt.pretrained.generation.criteria import ScoredCriterion, as_list, make_criteria
from moe_mt.pretrained.generation.decoders import GeneratingModel
from moe_mt.pretrained.generation.inputs import encoder_arguments
from moe_mt.pretrained.generation.observers import ObservedSearch, Recording, Streamer
from moe_mt.pretrained.generation.search import (
    AllowedTokens,
    add_seen,
    found,
    make_decoder,
    make_rules,
    make_strategy,
)
from moe_mt.pretrained.outputs import ModelOutput, as_encoder_output

__all__ = ["GenerationMixin"]


class GenerationMixin:
    """Gives a documented model ``generate``."""

    @torch.no_grad()
    def generate(  # noqa: PLR0913
        self: GeneratingModel,
        inputs: Tensor | None = None,
        generation_config: GivenConfig | None = None,
        logits_processor: Rule | Sequence[Rule] | None = None,
        stopping_criteria: ScoredCriterion | Sequence[ScoredCriterion] | None = None,
        prefix_allowed_tokens_fn: AllowedTokens | None = None,
        synced_gpus: bool | None = None,
        assistant_model: object = None,
        streamer: Streamer | None = None,
        negative_prompt_ids: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        use_model_defaults: bool | None = None,
        custom_generate: object = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Generate token ids by greedy search, sampling, beam search or beam sampling.

        Keywords win over ``generation_config``, and that over the model's own. A
        ``max_new_tokens`` wins over ``max_length`` wherever it was set; a warning names both.

        Args:
            inputs: (B, S) int64, the same as ``input_ids``. Without any source the encoder reads
                ``bos_token_id``.
            generation_config: Settings instead of the model's: a ``PublishedGenerationConfig`` or
                a ``moe_mt.GenerationConfig``.
            logits_processor: Functions ``(input_ids (rows, length), scores (rows, V)) -> scores``,
                applied before the rules of sampling.
            stopping_criteria: Functions ``(input_ids, scores) -> bool`` for all rows, or (rows,)
                for each.
            prefix_allowed_tokens_fn: ``(sentence, ids (length,)) -> tokens`` that may follow.
            synced_gpus: Not used.
            assistant_model: Not offered.
            streamer: Its ``put`` is given the prompts and then the tokens of every step; at last
                its ``end`` is called.
            negative_prompt_ids: Not offered.
            negative_prompt_attention_mask: Not offered.
            use_model_defaults: Whether what ``generation_config`` leaves at its default is taken
                from the model's.
            custom_generate: Not offered.
            **kwargs: Fields of ``PublishedGenerationConfig``; arguments of ``forward``:
                ``input_ids``, ``attention_mask`` (told from padding where missing),
                ``inputs_embeds``, ``encoder_outputs``, ``decoder_input_ids`` (prompts),
                ``decoder_attention_mask``, head masks, ``past_key_values``; ``tokenizer`` for
                ``stop_strings``.

        Returns:
            (B * num_return_sequences, length) int64, beginning with the decoder's start and padded
            on the right; with ``return_dict_in_generate=True`` a ``GenerateEncoderDecoderOutput``
            or, with beams, a ``GenerateBeamEncoderDecoderOutput``.

        Raises:
            ConfigError: If an option is unknown, not offered, or its value not allowed.
            InputError: If inputs are missing, double, or of the wrong shape.
        """
        _refuse(
            assistant_model=assistant_model,
            negative_prompt_ids=negative_prompt_ids,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            custom_generate=custom_generate,
        )
        tokenizer = kwargs.pop("tokenizer", None)
        user_rules = as_list(logits_processor, "logits_processor")
        user_criteria = as_list(stopping_criteria, "stopping_criteria")
        call = resolve_call(self, inputs, generation_config, use_model_defaults, kwargs)
        if streamer is not None and call.config.num_beams > 1:
            raise ConfigError("a streamer needs num_beams=1; beams take back what they have said")

        encoded = _encode(self, call)
        recording = Recording(scores=call.shows("scores"), logits=call.shows("logits"))
        rules = recording.of(make_rules(call, user_rules, prefix_allowed_tokens_fn))
        criteria = make_criteria(call.config, user_criteria, recording, tokenizer)
        strategy = make_strategy(call, rules, criteria)
        decoder = make_decoder(self, call, encoded)
        if streamer is not None:
            streamer.put(call.prompts.cpu())
        search(decoder, ObservedSearch(strategy, recording, streamer), call.prompts)
        if streamer is not None:
            streamer.end()
        output = found(call, strategy)
        if not call.config.return_dict_in_generate:
            return output.sequences
        add_seen(output, call, strategy, decoder, recording, encoded)
        return output

    def _prepare_encoder_decoder_kwargs_for_generation(
        self: GeneratingModel,
        inputs_tensor: Tensor,
        model_kwargs: dict[str, Any],
        model_input_name: str | None = None,
        generation_config: PublishedGenerationConfig | None = None,
    ) -> dict[str, Any]:
        """Run the encoder and put ``encoder_outputs`` among the arguments; PEFT wraps this."""
        given = encoder_arguments(model_kwargs) | {model_input_name or "input_ids": inputs_tensor}
        model_kwargs["encoder_outputs"] = self.get_encoder()(**given, return_dict=True)
        return model_kwargs

    def compute_transition_scores(
        self,
        sequences: Tensor,
        scores: Sequence[Tensor],
        beam_indices: Tensor | None = None,
        normalize_logits: bool = False,
    ) -> Tensor:
        """Return the score of every generated token.

        Args:
            sequences: (N, length) int64, from ``generate``.
            scores: Per step (rows, V), likewise.
            beam_indices: (N, steps) int64, likewise, of beam search.
            normalize_logits: Whether to make log-probabilities of the scores first.

        Returns:
            (N, steps) float32; 0 behind the end of a beam's hypothesis.
        """
        stacked = torch.stack(tuple(scores), dim=1)
        if normalize_logits:
            stacked = stacked.log_softmax(-1)
        if beam_indices is None:
            rows = torch.arange(len(stacked), device=sequences.device)[:, None]
            rows = rows.expand(-1, len(scores))
        else:
            rows = beam_indices[:, : int((beam_indices >= 0).sum(1).max())]
        steps = rows.shape[1]
        tokens = sequences[:, sequences.shape[1] - steps :]
        found = stacked[rows.clamp(min=0), torch.arange(steps, device=rows.device), tokens]
        return found.masked_fill(rows < 0, 0)


def _refuse(**given: object) -> None:
    for name, value in given.items():
        if value is not None:
            raise ConfigError(
                f"generate does not offer {name}; leave it out. There are greedy search, sampling, "
                "beam search and beam sampling"
            )


def _encode(model: GeneratingModel, call: Call) -> ModelOutput:
    if call.source.name == "encoder_outputs":
        return as_encoder_output(call.source.value, model.get_encoder().output_class)
    arguments = dict(call.arguments) | {
        "attention_mask": call.source.mask,
        "output_attentions": call.shows("attentions"),
        "output_hidden_states": call.shows("hidden_states"),
    }
    arguments = model._prepare_encoder_decoder_kwargs_for_generation(
        call.source.value, arguments, call.source.name, call.config
    )
    return arguments["encoder_outputs"]
