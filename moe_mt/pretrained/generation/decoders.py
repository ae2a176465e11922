"""The two ways in which ``generate`` lets a documented model read tokens."""

import copy
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_mt.errors import InputError
from moe_mt.generation import CachedDecoder
from moe_mt.models import KVCache
from moe_mt.pretrained.config import PublishedConfig
from moe_mt.pretrained.generation.config import PublishedGenerationConfig
from moe_mt.pretrained.generation.outputs import StepTensors
from moe_mt.pretrained.outputs import ModelOutput, PastKeyValues

__all__ = ["FastDecoder", "GeneratingModel", "RecordingDecoder"]


class GeneratingModel(Protocol):
    """What generation needs of a documented model."""

    config: PublishedConfig
    generation_config: PublishedGenerationConfig

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    def get_encoder(self) -> Any:  # noqa: ANN401
        """Return the encoder."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Compute logits, as documented."""
        ...

    def decodes_fast(self) -> bool:
        """Whether decoding may pass by ``forward``."""
        ...

    def new_cache(
        self, memory: Tensor, source_mask: Tensor | None, beams: int = 1, capacity: int = 32
    ) -> KVCache:
        """Return an empty cache for ``beams`` rows per sentence of the memory (B, S, d_model)."""
        ...

    def decode_step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Read tokens (rows, new); return the logits (rows, V) behind the last of them."""
        ...

    def prepare_inputs_for_generation(
        self,
        decoder_input_ids: Tensor,
        **kwargs: Any,  # noqa: ANN401
    ) -> dict[str, Any]:
        """Return the arguments of the next forward pass."""
        ...

    def _reorder_cache(self, past_key_values: PastKeyValues, beam_idx: Tensor) -> PastKeyValues: ...

    def _prepare_encoder_decoder_kwargs_for_generation(
        self,
        inputs_tensor: Tensor,
        model_kwargs: dict[str, Any],
        model_input_name: str | None = None,
        generation_config: PublishedGenerationConfig | None = None,
    ) -> dict[str, Any]: ...


class FastDecoder(CachedDecoder):
    """Decode with a cache that holds the memory once per sentence."""

    def past_key_values(self) -> PastKeyValues:
        """Return the cache in the documented form, the memory once per row."""
        cache = self.cache
        return tuple(
            (
                *cache.rows(layer),
                *(
                    state.repeat_interleave(cache.beams, 0)
                    for state in (layer.cross_key, layer.cross_value)
                ),
            )
            for layer in cache.layers
        )


class RecordingDecoder:
    """Decode with documented forward passes, which take every argument and show every layer."""

    def __init__(
        self,
        model: GeneratingModel,
        encoded: ModelOutput,
        source_mask: Tensor | None,
        rows_per_sentence: int,
        *,
        decoder_mask: Tensor | None = None,
        past: PastKeyValues | None = None,
        head_masks: dict[str, Tensor | None],
        use_cache: bool,
        attentions: bool,
        hidden_states: bool,
    ) -> None:
        """Replicate what there is per sentence to rows.

        Args:
            model: The documented model.
            encoded: Output of its encoder for B sentences.
            source_mask: (B, S), 0 where the source is padding, or ``None``.
            rows_per_sentence: Rows that each sentence gets.
            decoder_mask: (B, P), 0 where a position of the prompts is hidden, or ``None``.
            past: Keys and values of B sentences, or of all rows.
            head_masks: By the documented names.
            use_cache: Whether to keep keys and values, or to read everything at every step.
            attentions: Whether to keep attention weights.
            hidden_states: Whether to keep hidden states.
        """
        self.model = model
        self.use_cache = use_cache
        self.wanted = {"output_attentions": attentions, "output_hidden_states": hidden_states}
        self.mask = _replicated(decoder_mask, rows_per_sentence)
        self.past = _rows_of_past(past, encoded[0].shape[0], rows_per_sentence)
        memory = copy.copy(encoded)
        memory["last_hidden_state"] = _replicated(encoded[0], rows_per_sentence)
        self.arguments = head_masks | {
            "encoder_outputs": memory,
            "attention_mask": _replicated(source_mask, rows_per_sentence),
            "use_cache": use_cache,
        }
        self.tokens: Tensor | None = None
        self.decoder_attentions: StepTensors | None = () if attentions else None
        self.cross_attentions: StepTensors | None = () if attentions else None
        self.hidden_states: StepTensors | None = () if hidden_states else None

    def step(self, tokens: Tensor) -> Tensor:
        """Read tokens (rows, new) and return the logits (rows, V) behind the last of them."""
        if self.tokens is not None:
            new = tokens
            tokens = torch.cat([self.tokens, new], dim=1)
            if self.mask is not None:
                self.mask = torch.cat([self.mask, torch.ones_like(new, dtype=self.mask.dtype)], 1)
        self.tokens = tokens
        arguments = self.model.prepare_inputs_for_generation(
            tokens, past_key_values=self.past, **self.arguments
        )
        if self.mask is not None:
            arguments["decoder_attention_mask"] = self.mask
        outputs = self.model(**arguments, **self.wanted, return_dict=True)
        self.past = outputs.past_key_values if self.use_cache else None
        if self.decoder_attentions is not None and self.cross_attentions is not None:
            self.decoder_attentions += (outputs.decoder_attentions,)
            self.cross_attentions += (outputs.cross_attentions,)
        if self.hidden_states is not None:
            self.hidden_states += (outputs.decoder_hidden_states,)
        return outputs.logits[:, -1]

    def reorder(self, parents: Tensor) -> None:
        """Let row ``i`` continue what row ``parents[i]`` has read."""
        assert self.tokens is not None, "rows have read nothing yet"
        self.tokens = self.tokens[parents]
        if self.past is not None:
            self.past = self.model._reorder_cache(self.past, parents)

    def past_key_values(self) -> PastKeyValues | None:
        """Return the cache, if there is one."""
        return self.past


def _rows_of_past(past: PastKeyValues | None, sentences: int, count: int) -> PastKeyValues | None:
    """Return a cache with ``count`` rows per sentence, whether or not it has them already."""
    if past is None:
        return None
    found = past[0][0].shape[0]
    if found not in (sentences, sentences * count):
        raise InputError(
            f"past_key_values have {found} rows; expected {sentences}, one for each sentence, or "
            f"{sentences * count}, one for each beam or sample"
        )
    repeats = sentences * count // found
    return tuple(tuple(state.repeat_interleave(repeats, 0) for state in layer) for layer in past)


def _replicated(tensor: Tensor | None, count: int) -> Tensor | None:
    return tensor if tensor is None or count == 1 else tensor.repeat_interleave(count, 0)
