"""What encoder and decoder read first: the documented ways to give ``generate`` its inputs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_mt.errors import InputError
from moe_mt.pretrained.generation.settings import SpecialTokens

__all__ = [
    "MODEL_ARGUMENTS",
    "DecoderStart",
    "Source",
    "decoder_start",
    "encoder_arguments",
    "find_source",
]

MODEL_ARGUMENTS = (
    "input_ids",
    "attention_mask",
    "inputs_embeds",
    "encoder_outputs",
    "head_mask",
    "decoder_input_ids",
    "decoder_attention_mask",
    "decoder_head_mask",
    "cross_attn_head_mask",
    "past_key_values",
    "labels",
    "output_router_logits",
    "return_dict",
)
"""Arguments of ``forward`` that ``generate`` takes. The last three change nothing: a batch that was
made for training can be passed as it is."""

ENCODER_ARGUMENTS = ("attention_mask", "head_mask", "output_attentions", "output_hidden_states")


@dataclass(frozen=True)
class Source:
    """What the encoder reads."""

    name: str
    """``input_ids``, ``inputs_embeds`` or ``encoder_outputs``."""

    value: Any

    tokens: Tensor | None
    """(B, S) int64, where they are known."""

    mask: Tensor | None
    """(B, S), 0 where the source is padding; ``None`` where nothing is."""

    sentences: int
    device: torch.device


def find_source(
    inputs: Tensor | None,
    arguments: Mapping[str, Any],
    special: SpecialTokens,
    device: torch.device,
) -> Source:
    """Find the source among the arguments.

    Args:
        inputs: The first argument of ``generate``, which is ``input_ids``.
        arguments: Those for the model.
        special: Special tokens; without a source, the encoder reads ``bos``.
        device: Where to make that.

    Raises:
        InputError: If the source is missing or given twice, or its mask has another shape.
    """
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    encoded = arguments.get("encoder_outputs")
    if inputs is not None and ids is not None:
        raise InputError("generate got inputs and input_ids, which are the same; pass one of them")
    ids = inputs if ids is None else ids
    if ids is not None and embeds is not None:
        raise InputError("generate got both input_ids and inputs_embeds; pass one of them")
    if ids is None and embeds is None and encoded is None:
        ids = _begin(arguments, special, device)
    given: dict[str, Any] = {
        "encoder_outputs": encoded,
        "inputs_embeds": embeds,
        "input_ids": ids,
    }
    name, value = next(pair for pair in given.items() if pair[1] is not None)
    tensor: Tensor = value[0] if name == "encoder_outputs" else value
    if not isinstance(tensor, Tensor):
        # The commonest of these is a tokenizer's output handed over whole.
        raise InputError(
            f"{name} is a {type(tensor).__name__}; expected a tensor: pass a tokenizer's output as "
            'generate(**inputs), made with return_tensors="pt"'
        )
    shape, mask = tensor.shape[:2], arguments.get("attention_mask")
    if mask is None and name == "input_ids":
        mask = _inferred_mask(tensor, special)
    if mask is not None and mask.shape != shape:
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}; expected {tuple(shape)}, batch and "
            f"length of {name}"
        )
    if shape[0] == 0:
        raise InputError(f"{name} hold no sentence; give one at least")
    return Source(name, value, ids, mask, shape[0], tensor.device)


def _begin(arguments: Mapping[str, Any], special: SpecialTokens, device: torch.device) -> Tensor:
    """Return (B, 1) int64: the begin mark for as many sentences as the decoder is told of."""
    if special.bos_id is None:
        raise InputError(
            "generate got no input_ids, inputs_embeds or encoder_outputs, and bos_token_id is "
            "None; pass one of them"
        )
    prompts = arguments.get("decoder_input_ids")
    sentences = 1 if prompts is None else prompts.shape[0]
    return torch.full((sentences, 1), special.bos_id, dtype=torch.int64, device=device)


def _inferred_mask(ids: Tensor, special: SpecialTokens) -> Tensor | None:
    """Return the mask that padding implies, if padding can be told from an end mark."""
    if special.pad_id is None or special.pad_id in special.eos_ids:
        return None
    real = ids != special.pad_id
    return None if bool(real.all()) else real.long()


def encoder_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return those that are the encoder's, its input left out."""
    return {name: arguments.get(name) for name in ENCODER_ARGUMENTS}


@dataclass(frozen=True)
class DecoderStart:
    """What the decoder reads first."""

    prompts: Tensor
    """(B, P) int64, the start token and what may follow it."""

    mask: Tensor | None
    """(B, P), 0 where a position is hidden; ``None`` where none is."""


def decoder_start(
    arguments: Mapping[str, Any], special: SpecialTokens, source: Source
) -> DecoderStart:
    """Return the decoder's prompts; where no prompt begins with the start token, it is put first.

    Raises:
        InputError: If start tokens or prompts are not one per sentence.
    """
    mask = arguments.get("decoder_attention_mask")
    sentences = source.sentences
    start = torch.tensor(special.start, dtype=torch.int64, device=source.device)
    if start.dim() == 1 and len(start) != sentences:
        raise InputError(
            f"decoder_start_token_id lists {len(start)} tokens for {sentences} sentences; give one "
            "for each, or one for all"
        )
    start = start.expand(sentences)[:, None]
    prompts = arguments.get("decoder_input_ids")
    if prompts is None:
        prompts = start
    elif prompts.dim() != 2 or prompts.shape[0] != sentences:
        raise InputError(
            f"decoder_input_ids have shape {tuple(prompts.shape)}; expected ({sentences}, length), "
            "a prompt for each sentence"
        )
    elif prompts.shape[1] == 0 or bool((prompts[:, :1] != start).all()):
        prompts = torch.cat([start, prompts], dim=1)
        if mask is not None:
            mask = torch.cat([torch.ones_like(start, dtype=mask.dtype), mask], dim=1)
    past = arguments.get("past_key_values")
    if past is not None and past[0][0].shape[2] >= prompts.shape[1]:
        raise InputError(
            f"past_key_values hold {past[0][0].shape[2]} positions and the decoder begins with "
            f"{prompts.shape[1]}; pass all tokens so far as decoder_input_ids, and at least one "
            "that is not in the cache"
        )
    if mask is not None and mask.shape != prompts.shape:
        raise InputError(
            f"decoder_attention_mask has shape {tuple(mask.shape)}; expected "
            f"{tuple(prompts.shape)}, that of what the decoder reads first"
        )
    return DecoderStart(prompts, mask)
