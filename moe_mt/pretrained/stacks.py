"""The documented encoders and decoders: the loops that can look into every layer."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_mt.models import (
    DecoderMasks,
    HeadProbe,
    KVCache,
    LayerOutput,
    Seq2SeqTransformer,
)
from moe_mt.moe import Routing
from moe_mt.pretrained.config import PublishedConfig
from moe_mt.pretrained.inputs import (
    check_ids,
    check_memory,
    key_mask,
    one_of,
    past_length,
    rows_of_heads,
)
from moe_mt.pretrained.outputs import ModelOutput, PastKeyValues, RouterOutput
from moe_mt.pretrained.pretrained import PreTrainedModel
from moe_mt.pretrained.view import View

__all__ = ["Asked", "PublishedDecoder", "PublishedEncoder", "Trace"]


@dataclass(frozen=True)
class Asked:
    """What a call wants to see beside the result."""

    attentions: bool = False
    hidden_states: bool = False
    routers: bool = False

    @classmethod
    def of(
        cls,
        config: PublishedConfig,
        attentions: bool | None,
        hidden_states: bool | None,
        routers: bool | None = None,
    ) -> "Asked":
        """Return what the arguments say, and where they say nothing the configuration."""
        return cls(
            config.output_attentions if attentions is None else attentions,
            config.output_hidden_states if hidden_states is None else hidden_states,
            getattr(config, "output_router_logits", False) if routers is None else routers,
        )


@dataclass
class Trace:
    """What was seen on the way through a stack; a skipped layer leaves ``None``."""

    asked: Asked
    has_memory: bool = False
    hidden_states: list[Tensor] = field(default_factory=list)
    self_weights: list[Tensor | None] = field(default_factory=list)
    cross_weights: list[Tensor | None] = field(default_factory=list)
    routers: list[RouterOutput | None] = field(default_factory=list)

    def enter(self, x: Tensor) -> None:
        """Note what goes into a layer, or out of the last."""
        if self.asked.hidden_states:
            self.hidden_states.append(x)

    def leave(self, output: LayerOutput | None) -> None:
        """Note what a layer gave beside its output; ``None`` if it was skipped."""
        if self.asked.attentions:
            self.self_weights.append(output.self_weights if output else None)
            self.cross_weights.append(output.cross_weights if output else None)
        if self.asked.routers:
            routing = output.routing if output else None
            self.routers.append(
                RouterOutput(routing, output.x.dtype) if output and routing else None
            )

    def fields(self) -> dict[str, tuple[Any, ...] | None]:
        """Return the documented fields, ``None`` for what was not asked for."""
        return {
            "hidden_states": tuple(self.hidden_states) if self.asked.hidden_states else None,
            "attentions": tuple(self.self_weights) if self.asked.attentions else None,
            "cross_attentions": (
                tuple(self.cross_weights) if self.asked.attentions and self.has_memory else None
            ),
            "router_probs": tuple(self.routers) if self.asked.routers else None,
        }


class _Stack(PreTrainedModel):
    """Embedding, positions, layers and a norm: one side of a model, alone or within it."""

    embed_tokens: Any
    embed_positions: Any
    layer_norm: Any
    make_layer: ClassVar[Callable[..., View]]
    output_class: ClassVar[type[ModelOutput]]

    def __init__(
        self,
        config: PublishedConfig,
        embed_tokens: nn.Embedding | None = None,
        *,
        core: Seq2SeqTransformer | None = None,
    ) -> None:
        """Build the stack.

        Args:
            config: The documented configuration.
            embed_tokens: An embedding to share; one of its own where ``None``.
            core: The model this is a side of; where ``None``, one without the other side is made.
        """
        self._check_config(config)
        if core is None:
            other = {"encoder": "decoder_layers", "decoder": "encoder_layers"}[self.side]
            core = Seq2SeqTransformer(replace(config.for_model(), **{other: 0}))
        places = {
            "embed_tokens": "embedding",
            "embed_positions": "positions",
            "layer_norm": f"{self.side}.norm",
        }
        super().__init__(config, core, places)
        if embed_tokens is not None:
            self.embed_tokens = embed_tokens
        stack = getattr(core, self.side)
        self.layers = nn.ModuleList(type(self).make_layer(layer, config) for layer in stack.layers)
        self._order("embed_tokens", "embed_positions", "layers", "layer_norm")
        self.layerdrop = getattr(core.config, f"{self.side}_layerdrop")
        self.dropout = core.config.dropout
        self.embed_scale = core.embedding_scale
        self.heads = getattr(core.config, f"{self.side}_heads")

    @property
    def stack(self) -> nn.Module:
        """The core's encoder or decoder."""
        return getattr(self.core, self.side)

    def _train_core(self, mode: bool) -> None:
        # The layers see to themselves, and the other side is none of this one's business.
        self.stack.training = mode

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding; its rows are not scaled yet."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.embed_tokens = value

    def embed(self, ids: Tensor, past_length: int = 0, name: str = "input_ids") -> Tensor:
        """Return (B, L, d_model) for ids (B, L), called ``name``, behind ``past_length`` others."""
        check_ids(ids, self.embed_tokens.weight.shape[0], name)
        x = self.embed_tokens(ids) * self.embed_scale
        return self._dropped(x + self.embed_positions(ids, past_length))

    def _embedded(
        self, ids: Tensor | None, embeds: Tensor | None, past_length: int = 0, prefix: str = ""
    ) -> Tensor:
        """Return what goes into the first layer; embeddings that were given are not scaled."""
        if embeds is None:
            assert ids is not None
            return self.embed(ids, past_length, f"{prefix}input_ids")
        positions = self.embed_positions.of_embeddings(embeds.shape[1], past_length)
        return self._dropped(embeds + positions)

    def _returned(
        self, return_dict: bool | None, x: Tensor, trace: "Trace", past: PastKeyValues | None = None
    ) -> Any:  # noqa: ANN401
        """Return the documented output, or its tuple; a class takes the fields that it has."""
        fields = {"last_hidden_state": x, "past_key_values": past, **trace.fields()}
        output = self.output_class(**{name: fields[name] for name in self.output_class._names()})
        wanted = self.config.use_return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()

    def _dropped(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout, self.training)

    def _skips_layer(self) -> bool:
        return self.training and self.layerdrop > 0 and torch.rand(()).item() < self.layerdrop

    def _run(
        self, layer: Callable[..., LayerOutput], x: Tensor, memory: Tensor | None = None
    ) -> LayerOutput:
        """Call a layer, its activations kept or computed anew in the backward pass.

        Args:
            layer: ``(x, memory) -> output``; a gradient is wanted of nothing else it uses.
            x: (B, L, d_model).
            memory: (B, S, d_model), if it reads one.
        """
        if not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return layer(x, memory)
        pieces = self._checkpoint(_flat(layer), x, memory)
        x, ids, gates, logits, padding, self_weights, cross_weights = pieces
        routing = None
        if ids is not None:
            routing = Routing(expert_ids=ids, gates=gates, router_logits=logits, padding=padding)
        return LayerOutput(x, routing, self_weights, cross_weights)


class PublishedEncoder(_Stack):
    """The encoder of both families."""

    side = "encoder"

    def encode(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        head_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        asked: Asked,
    ) -> tuple[Tensor, Trace]:
        """Encode; arguments as of ``forward``.

        Returns:
            (B, S, d_model), and what was asked for.
        """
        shape = one_of(input_ids, inputs_embeds, self.core.config.d_model)
        mask = key_mask(attention_mask, shape, "attention_mask")
        head_masks = rows_of_heads(head_mask, len(self.layers), self.heads, "head_mask")
        x = self._embedded(input_ids, inputs_embeds)
        allowed = None if mask is None else mask[:, None, None, :]
        padding = None if mask is None else ~mask
        trace = Trace(asked)
        for layer, heads in zip(self.layers, head_masks, strict=True):
            trace.enter(x)
            if self._skips_layer():
                trace.leave(None)
                continue
            probe = HeadProbe(self_mask=heads, weights=asked.attentions)
            output = self._run(partial(_encode, layer, (allowed, padding, probe)), x)
            trace.leave(output)
            x = output.x
        x = self.layer_norm(x)
        trace.enter(x)
        return x, trace


class PublishedDecoder(_Stack):
    """The decoder of both families."""

    side = "decoder"

    def decode(  # noqa: PLR0913
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        memory: Tensor | None,
        memory_mask: Tensor | None,
        head_mask: Tensor | None,
        cross_head_mask: Tensor | None,
        past: PastKeyValues | None,
        inputs_embeds: Tensor | None,
        use_cache: bool,
        asked: Asked,
        prefix: str = "",
    ) -> tuple[Tensor, PastKeyValues | None, Trace]:
        """Decode; arguments as of ``forward``, ``prefix`` as the caller's arguments have it.

        Returns:
            (B, L, d_model), the cache if ``use_cache``, and what was asked for.
        """
        d_model = self.core.config.d_model
        batch, new = one_of(input_ids, inputs_embeds, d_model, prefix)
        length = past_length(past, len(self.layers), (batch, self.heads, d_model // self.heads))
        mask = key_mask(attention_mask, (batch, length + new), f"{prefix}attention_mask")
        if memory is not None:
            check_memory(memory, batch, d_model, prefix)
            memory_shape = (memory.shape[0], memory.shape[1])
            # The whole model's one mask of the source is this one too.
            name = "attention_mask" if prefix else "encoder_attention_mask"
            memory_mask = key_mask(memory_mask, memory_shape, name)
        name = "decoder_head_mask" if prefix else "head_mask"
        self_masks = rows_of_heads(head_mask, len(self.layers), self.heads, name)
        cross_masks = rows_of_heads(
            cross_head_mask, len(self.layers), self.heads, "cross_attn_head_mask"
        )
        x = self._embedded(input_ids, inputs_embeds, length, prefix)
        masks = _masks(mask, memory_mask, new, length, x.device)
        trace = Trace(asked, has_memory=memory is not None)
        caches = [_LayerPast(layer) for layer in (past or [()] * len(self.layers))]
        for index, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            trace.enter(x)
            if self._skips_layer():
                trace.leave(None)
                cache.pass_by(layer, x, memory)
                continue
            probe = HeadProbe(
                self_mask=self_masks[index],
                cross_mask=cross_masks[index],
                weights=asked.attentions,
            )
            output = self._run(partial(_decode, layer, cache, (masks, probe)), x, memory)
            trace.leave(output)
            x = output.x
        x = self.layer_norm(x)
        trace.enter(x)
        return x, tuple(cache.present() for cache in caches) if use_cache else None, trace

    def new_cache(
        self, memory: Tensor, source_mask: Tensor | None, beams: int, capacity: int
    ) -> KVCache:
        """Return an empty fast cache for ``beams`` rows per sentence of memory (B, S, d_model)."""
        # Layers may have been put in or taken out of the published list since.
        layers: Any = self.layers
        self.stack.layers = nn.ModuleList(layer.core for layer in layers)
        for view in (self, *layers):
            view.settle()
        return self.core.new_cache(memory, source_mask, beams, capacity)

    def step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Return (rows, new, d_model) for new tokens (rows, new) behind those of a fast cache."""
        new = tokens.shape[1]
        cache.reserve(new)
        x = self.embed(tokens, cache.length, "decoder_input_ids")
        hidden = self.core.decoder.step(x, cache)
        cache.advance(new)
        return hidden


class _LayerPast:
    """One layer's documented cache: old tensors are never written to, new ones are made."""

    def __init__(self, past: tuple[Tensor, ...]) -> None:
        """Take a layer's earlier tensors, if any."""
        self.past = past
        self.kept: tuple[Tensor, ...] = past[:2]
        self.cross: tuple[Tensor, ...] = ()

    def read(self, layer: Any, memory: Tensor | None) -> None:  # noqa: ANN401
        """Take the memory (B, S, d_model) as a layer's keys and values, unless they are here."""
        if memory is not None:
            reusable = len(self.past) == 4 and self.past[2].shape[2] == memory.shape[1]
            attention = layer.core.cross_attention
            self.cross = self.past[2:] if reusable else attention.project_key_value(memory)

    @property
    def cross_key(self) -> Tensor | None:
        return self.cross[0] if self.cross else None

    @property
    def cross_value(self) -> Tensor | None:
        return self.cross[1] if self.cross else None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.past:
            key, value = torch.cat([self.past[0], key], 2), torch.cat([self.past[1], value], 2)
        self.kept = (key, value)
        return key, value

    def pass_by(self, layer: Any, x: Tensor, memory: Tensor | None) -> None:  # noqa: ANN401
        """Take the keys and values of a layer that is skipped, so that caches stay aligned."""
        self.read(layer, memory)
        normed = layer.core.self_attention_norm(x)
        key, value = layer.core.self_attention.project_key_value(normed)
        self.append(key, value)

    def present(self) -> tuple[Tensor, ...]:
        """Return what the next positions need."""
        return (*self.kept, *self.cross)


def _masks(
    mask: Tensor | None,
    memory_mask: Tensor | None,
    new: int,
    length: int,
    device: torch.device,
) -> DecoderMasks:
    """Return what new positions behind ``length`` others may see."""
    padding = None if mask is None else ~mask[:, length:]
    if mask is None and length == 0:
        return DecoderMasks(causal=True, memory=memory_mask, padding=padding)
    target = None
    if new > 1:
        target = torch.ones(new, length + new, dtype=torch.bool, device=device).tril(length)
    if mask is not None:
        seen = mask[:, None, None, :]
        target = seen if target is None else seen & target
    return DecoderMasks(target=target, memory=memory_mask, padding=padding)


def _encode(
    layer: nn.Module, arguments: tuple[Any, ...], x: Tensor, memory: Tensor | None
) -> LayerOutput:
    return layer(x, *arguments)


def _decode(
    layer: nn.Module,
    cache: _LayerPast,
    arguments: tuple[Any, ...],
    x: Tensor,
    memory: Tensor | None,
) -> LayerOutput:
    cache.read(layer, memory)
    return layer(x, cache, *arguments)


def _flat(layer: Callable[..., LayerOutput]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Return a layer as a function of tensors to tensors, as checkpointing wants it."""

    def run(x: Tensor, memory: Tensor | None) -> tuple[Tensor | None, ...]:
        output = layer(x, memory)
        pieces: tuple[Tensor | None, ...] = (None,) * 4
        if output.routing is not None:
            routing = output.routing
            pieces = (routing.expert_ids, routing.gates, routing.router_logits, routing.padding)
        return (output.x, *pieces, output.self_weights, output.cross_weights)

    return run
