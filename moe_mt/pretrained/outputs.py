"""What the documented classes return, field by field."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch
from torch import Tensor

from moe_mt.errors import InputError
from moe_mt.moe import Routing

__all__ = [
    "BaseModelOutput",
    "BaseModelOutputWithPastAndCrossAttentions",
    "MoEModelOutput",
    "MoEModelOutputWithPastAndCrossAttentions",
    "ModelOutput",
    "PastKeyValues",
    "RouterOutput",
    "Seq2SeqLMOutput",
    "Seq2SeqMoEModelOutput",
    "Seq2SeqMoEOutput",
    "Seq2SeqModelOutput",
    "Tensors",
    "as_encoder_output",
]

Tensors: TypeAlias = tuple[Tensor | None, ...]
"""One entry per layer; ``None`` where layer drop skipped it."""

PastKeyValues: TypeAlias = tuple[tuple[Tensor, ...], ...]
"""Per decoder layer four tensors (B, H, length, d_head): keys and values of the target so far, then
of the memory. A decoder without a memory has the first two."""


class ModelOutput(Mapping[str, Any]):
    """Named results: fields by attribute or key; those that are not ``None`` also by place.

    Subclasses are dataclasses whose fields default to ``None``. As a mapping it holds the fields
    that are not ``None``; an integer or a slice indexes ``to_tuple()``. The first field may be
    given as a mapping of all fields, so that code which rebuilds mappings can rebuild this one.
    """

    def __post_init__(self) -> None:
        """Spread a mapping that was given for the first field."""
        names = self._names()
        given = getattr(self, names[0])
        if isinstance(given, Mapping) and all(getattr(self, name) is None for name in names[1:]):
            unknown = [key for key in given if key not in names]
            if unknown:
                raise TypeError(
                    f"{type(self).__name__} has no field {unknown[0]!r}; its fields are "
                    f"{', '.join(names)}"
                )
            for name in names:
                setattr(self, name, given.get(name))

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the values that are not ``None``, in the order of the fields."""
        return tuple(self.values())

    def __getitem__(self, key: str | int | slice) -> Any:  # noqa: ANN401
        if not isinstance(key, str):
            return self.to_tuple()[key]
        value = getattr(self, key) if key in self._names() else None
        if value is None:
            raise KeyError(f"{key}: this {type(self).__name__} holds {', '.join(self)}")
        return value

    def __setitem__(self, key: str, value: object) -> None:
        if key not in self._names():
            raise KeyError(f"{key}: {type(self).__name__} has {', '.join(self._names())}")
        setattr(self, key, value)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._names() if getattr(self, name) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @classmethod
    def _names(cls) -> list[str]:
        return [field.name for field in fields(cls)]  # type: ignore[arg-type]


class RouterOutput(tuple[Tensor, Tensor]):
    """What a sparse layer's router gave, ``(router_probs, top_1_index)`` as in transformers 4.x.

    ``router_probs`` (T, E): each expert's gate, after dropping. ``top_1_index`` (T,) int64: the
    first choice, 0 where it was dropped. ``routing`` holds the logits, which losses are made of.
    """

    routing: Routing

    def __new__(cls, routing: Any, dtype: torch.dtype | None = None) -> Any:  # noqa: ANN401
        """Spread a routing out over the experts.

        Args:
            routing: Of T tokens. Code that rebuilds tuples, to move or cast what is in them, gives
                the two values instead and gets a plain tuple.
            dtype: Dtype of ``router_probs``, that of the layer's tokens.
        """
        if not isinstance(routing, Routing):
            return tuple(routing)
        tokens, num_experts = routing.router_logits.shape
        ids = routing.expert_ids.long()
        # Column E collects what was dropped.
        gates = routing.gates.new_zeros(tokens, num_experts + 1).scatter(1, ids, routing.gates)
        first = ids[:, 0]
        output = super().__new__(
            cls, (gates[:, :num_experts].to(dtype), first.masked_fill(first == num_experts, 0))
        )
        output.routing = routing
        return output

    def __getnewargs__(self) -> tuple[Routing, torch.dtype]:
        """Let it be copied and pickled."""
        return self.routing, self[0].dtype


RouterOutputs: TypeAlias = tuple[RouterOutput | None, ...]
"""One entry per layer, ``None`` for a dense one."""


@dataclass(eq=False)
class BaseModelOutput(ModelOutput):
    """The encoder's."""

    last_hidden_state: Tensor | None = None
    """(B, S, d_model), after the final norm."""

    hidden_states: Tensors | None = None
    """Layers + 1 of (B, S, d_model): each layer's input and, last, ``last_hidden_state``."""

    attentions: Tensors | None = None
    """Per layer (B, H, S, S): attention weights, after the head mask, before dropout."""


@dataclass(eq=False)
class BaseModelOutputWithPastAndCrossAttentions(ModelOutput):
    """The decoder's; L positions, ``past`` of them in the cache."""

    last_hidden_state: Tensor | None = None
    """(B, L, d_model)."""

    past_key_values: PastKeyValues | None = None
    """What the next positions need, if ``use_cache``."""

    hidden_states: Tensors | None = None
    """Layers + 1 of (B, L, d_model)."""

    attentions: Tensors | None = None
    """Per layer (B, H, L, past + L)."""

    cross_attentions: Tensors | None = None
    """Per layer (B, H, L, S)."""


@dataclass(eq=False)
class MoEModelOutput(ModelOutput):
    """The encoder's, with experts."""

    last_hidden_state: Tensor | None = None
    """(B, S, d_model)."""

    hidden_states: Tensors | None = None
    """Layers + 1 of (B, S, d_model)."""

    attentions: Tensors | None = None
    """Per layer (B, H, S, S)."""

    router_probs: RouterOutputs | None = None
    """Per layer what its router gave, ``None`` for a dense one."""


@dataclass(eq=False)
class MoEModelOutputWithPastAndCrossAttentions(ModelOutput):
    """The decoder's, with experts."""

    last_hidden_state: Tensor | None = None
    """(B, L, d_model)."""

    past_key_values: PastKeyValues | None = None
    """What the next positions need, if ``use_cache``."""

    hidden_states: Tensors | None = None
    """Layers + 1 of (B, L, d_model)."""

    attentions: Tensors | None = None
    """Per layer (B, H, L, past + L)."""

    cross_attentions: Tensors | None = None
    """Per layer (B, H, L, S)."""

    router_probs: RouterOutputs | None = None
    """Per layer what its router gave, ``None`` for a dense one."""


@dataclass(eq=False)
class Seq2SeqModelOutput(ModelOutput):
    """A dense model's, without a head. Fields as of decoder and encoder."""

    last_hidden_state: Tensor | None = None
    past_key_values: PastKeyValues | None = None
    decoder_hidden_states: Tensors | None = None
    decoder_attentions: Tensors | None = None
    cross_attentions: Tensors | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: Tensors | None = None
    encoder_attentions: Tensors | None = None


@dataclass(eq=False)
class Seq2SeqLMOutput(ModelOutput):
    """A dense model's, with its head."""

    loss: Tensor | None = None
    """Scalar: mean cross entropy over labels that are not -100."""

    logits: Tensor | None = None
    """(B, L, V)."""

    past_key_values: PastKeyValues | None = None
    decoder_hidden_states: Tensors | None = None
    decoder_attentions: Tensors | None = None
    cross_attentions: Tensors | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: Tensors | None = None
    encoder_attentions: Tensors | None = None


@dataclass(eq=False)
class Seq2SeqMoEModelOutput(ModelOutput):
    """A mixture-of-experts model's, without a head."""

    last_hidden_state: Tensor | None = None
    past_key_values: PastKeyValues | None = None
    decoder_hidden_states: Tensors | None = None
    decoder_attentions: Tensors | None = None
    decoder_router_logits: RouterOutputs | None = None
    cross_attentions: Tensors | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: Tensors | None = None
    encoder_attentions: Tensors | None = None
    encoder_router_logits: RouterOutputs | None = None


@dataclass(eq=False)
class Seq2SeqMoEOutput(ModelOutput):
    """A mixture-of-experts model's, with its head."""

    loss: Tensor | None = None
    """Scalar: mean cross entropy over labels that are not -100, plus the routers' losses times
    their coefficients if ``output_router_logits``."""

    logits: Tensor | None = None
    """(B, L, V)."""

    encoder_z_loss: Tensor | None = None
    """Scalar: the encoder routers' z-loss, summed over sparse layers."""

    decoder_z_loss: Tensor | None = None
    encoder_aux_loss: Tensor | None = None
    """Scalar: the encoder routers' load-balancing loss."""

    decoder_aux_loss: Tensor | None = None
    past_key_values: PastKeyValues | None = None
    decoder_hidden_states: Tensors | None = None
    decoder_attentions: Tensors | None = None
    decoder_router_logits: RouterOutputs | None = None
    cross_attentions: Tensors | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: Tensors | None = None
    encoder_attentions: Tensors | None = None
    encoder_router_logits: RouterOutputs | None = None


def as_encoder_output(encoded: Any, make: type[ModelOutput]) -> Any:  # noqa: ANN401
    """Return ``encoder_outputs``, however they were given, in the encoder's own class.

    Raises:
        InputError: If they are neither an output object nor a tuple that begins with a tensor.
    """
    if isinstance(encoded, make):
        return encoded
    if hasattr(encoded, "last_hidden_state"):
        # Another family's or another library's object with the same names.
        return make(**{name: getattr(encoded, name, None) for name in make._names()})
    if isinstance(encoded, (tuple, list)) and encoded and isinstance(encoded[0], Tensor):
        return make(**dict(zip(make._names(), encoded, strict=False)))
    raise InputError(
        f"encoder_outputs is a {type(encoded).__name__}; expected what the encoder returns: an "
        "output object, or a tuple that begins with the last hidden state (B, S, d_model)"
    )
