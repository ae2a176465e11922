"""A model's weights packed for a CPU's products: inference only, float32 in and out.

Linear layers, the head and experts are replaced by modules that are called in the same way, so the
rest of the model does not know. See ``ops.packed_linear`` for the kinds.
"""

# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
# nn.Module is not fully typed.

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_mt.errors import ConfigError, PlacementError
from moe_mt.models.attention import SelfAttention
from moe_mt.models.embedding import TokenEmbedding
from moe_mt.models.feed_forward import FeedForward
from moe_mt.models.transformer import Seq2SeqTransformer
from moe_mt.moe import Experts, PackedExperts, Top2Router
from moe_mt.ops import ACTIVATIONS, pack_weight, packed_linear, quantize_rows

__all__ = [
    "Int8TokenEmbedding",
    "PackedHeadEmbedding",
    "PackedLinear",
    "is_packed",
    "keeps_values",
    "pack_expert",
    "pack_model",
    "pack_parameter",
    "packed_bytes",
]


FUSED = ("q_proj", "k_proj", "v_proj")
"""Projections of self-attention that become one."""


class _Packed(nn.Module):
    """A module that can neither be trained, nor moved, nor saved."""

    def _refuse_training(self) -> None:
        if self.training:
            raise ConfigError(
                "a model with packed weights computes inference only; call eval(), or load it "
                "with prepack=False to train it"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:  # noqa: ANN401
        moved = fn(torch.empty(0))
        if moved.device.type != "cpu" or moved.dtype != torch.float32:
            raise PlacementError(
                f"packed weights were asked to become {moved.dtype} on {moved.device}; they stay "
                "float32 on the CPU: load the model with that device and dtype, or with "
                "prepack=False"
            )
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: Any, keep_vars: Any) -> None:  # noqa: ANN401
        raise ConfigError(
            "a model with packed weights has no state_dict; load it with prepack=False to save it"
        )


class PackedLinear(_Packed):
    """What ``nn.Linear`` computes, and with ``relu`` its positive part, over a packed weight."""

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, kind: str, *, relu: bool = False) -> None:
        """Pack the weight of ``linear``, which is not kept; its bias is, wherever it is.

        Args:
            linear: float32 on the CPU.
            kind: One of ``PACKED_KINDS``.
            relu: Whether negative results become zero.
        """
        super().__init__()
        self.weight = pack_weight(linear.weight, kind)
        self.bias = linear.bias
        self.relu = relu
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out_features) for ``x`` (..., in_features).

        Raises:
            ConfigError: In training mode.
        """
        self._refuse_training()
        return packed_linear(x, self.weight, self.bias, relu=self.relu)

    def extra_repr(self) -> str:
        """Return what ``print`` shows of the layer."""
        weight = self.weight
        return f"{weight.in_features}, {weight.out_features}, kind={weight.kind!r}"


class PackedHeadEmbedding(_Packed):
    """A float32 token embedding, and a packed copy of it that is the head."""

    def __init__(self, embedding: TokenEmbedding) -> None:
        """Keep the table of ``embedding``, float32 on the CPU, and pack a copy of it."""
        super().__init__()
        self.weight = embedding.weight
        self.head = pack_weight(embedding.weight, "float32")
        self.train(embedding.training)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the rows (..., d_model) of tokens (...)."""
        self._refuse_training()
        return functional.embedding(tokens, self.weight)

    def project(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states (..., d_model)."""
        return packed_linear(hidden, self.head)


class Int8TokenEmbedding(_Packed):
    """A token embedding in int8 with one scale a row, and a packed int8 head."""

    weight: Tensor
    scale: Tensor

    def __init__(self, embedding: TokenEmbedding) -> None:
        """Quantise the table of ``embedding``, float32 on the CPU, which is not kept."""
        super().__init__()
        rows, scale = quantize_rows(embedding.weight.detach())
        self.register_buffer("weight", rows)
        self.register_buffer("scale", scale)
        self.head = pack_weight(embedding.weight, "int8-dynamic")
        self.train(embedding.training)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the rows (..., d_model) float32 of tokens (...)."""
        self._refuse_training()
        return self.weight[tokens] * self.scale[tokens].unsqueeze(-1)

    def project(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states (..., d_model)."""
        return packed_linear(hidden, self.head)


def is_packed(model: nn.Module) -> bool:
    """Whether any weight of a model is packed."""
    return any(isinstance(module, (_Packed, PackedExperts)) for module in model.modules())


@torch.no_grad()
def pack_model(model: Seq2SeqTransformer, kind: str) -> None:
    """Pack a model in place, one weight after the other, so that none is held twice for long.

    Args:
        model: float32 on the CPU.
        kind: One of ``PACKED_KINDS``.

    Raises:
        ConfigError: If there is no such kind, or it cannot be made here.
    """
    for name in [name for name, _ in model.named_parameters()]:
        pack_parameter(model, name, kind)
    modules: dict[str, nn.Module] = dict(model.named_modules())
    for path, module in modules.items():
        if isinstance(module, Experts):
            _replace(model, path, PackedExperts.pack(module, kind))


@torch.no_grad()
def pack_parameter(model: Seq2SeqTransformer, name: str, kind: str) -> None:
    """Pack the parameter ``name``, now that its values are there, if it is one that is packed.

    Those of experts are not: see ``pack_expert``.
    """
    path, _, leaf = name.rpartition(".")
    attention = _parent(model, path)
    if isinstance(attention, SelfAttention) and path.endswith(FUSED):
        _fuse_when_complete(attention, kind)
        return
    if leaf != "weight" or not _is_packable(model, path):
        return
    module = model.get_submodule(path)
    if isinstance(module, nn.Linear):
        _replace(model, path, PackedLinear(module, kind, relu=_absorb_relu(model, path)))
    elif isinstance(module, TokenEmbedding):
        packed = PackedHeadEmbedding if kind == "float32" else Int8TokenEmbedding
        _replace(model, path, packed(module))


@torch.no_grad()
def pack_expert(
    model: Seq2SeqTransformer, name: str, expert: int, tensor: Tensor, kind: str
) -> None:
    """Give an expert one of its tensors, packed if it is a projection.

    Args:
        model: Experts that have nothing packed yet are replaced by such as have.
        name: The stacked parameter in a model that is not packed.
        expert: Which slice of it.
        tensor: float32 on the CPU; not kept.
        kind: One of ``PACKED_KINDS``.
    """
    path, _, leaf = name.rpartition(".")
    experts = model.get_submodule(path)
    if isinstance(experts, Experts):
        experts = PackedExperts.empty_like(experts, kind)
        _replace(model, path, experts)
    assert isinstance(experts, PackedExperts)
    experts.set(expert, **{leaf: tensor})


def keeps_values(model: Seq2SeqTransformer, name: str, kind: str) -> bool:
    """Whether a packed model keeps a parameter's own values, so that these must be copied.

    Args:
        model: Its embedding and linear layers, as far as they are not packed yet.
        name: The parameter in a model that is not packed.
        kind: One of ``PACKED_KINDS``.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, (Experts, PackedExperts)):
        return not leaf.endswith("proj")
    if leaf != "weight" or not _is_packable(model, path):
        return True
    return isinstance(module, TokenEmbedding) and kind == "float32"


def packed_bytes(model: Seq2SeqTransformer, kind: str) -> int:
    """Return the bytes that a model, here on any device, takes when it is packed."""
    return sum(_sizes(model, kind))


def _sizes(model: Seq2SeqTransformer, kind: str) -> Iterator[int]:
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        stacked = isinstance(model.get_submodule(path), Experts) and leaf.endswith("proj")
        packed = stacked or (leaf == "weight" and _is_packable(model, path))
        # An int8 row has a scale, an offset and, in FBGEMM, the sum of its elements.
        quantized = parameter.numel() + 12 * parameter.shape[:-1].numel()
        size = quantized if packed and kind == "int8-dynamic" else 4 * parameter.numel()
        yield 2 * size if path == "embedding" else size


def _fuse_when_complete(attention: SelfAttention, kind: str) -> None:
    """Pack three projections as one product, once all of them are there: a third of the calls."""
    parts = [part for name in FUSED if (part := getattr(attention, name)) is not None]
    if not parts or any(tensor.is_meta for part in parts for tensor in (part.weight, part.bias)):
        return
    fused = nn.Linear(1, 1, device="meta")
    for name in ("weight", "bias"):
        joined = torch.cat([getattr(part, name) for part in parts])
        setattr(fused, name, nn.Parameter(joined, requires_grad=False))
    attention.qkv_proj = PackedLinear(fused.train(attention.training), kind)
    for name in FUSED:
        setattr(attention, name, None)


def _is_packable(model: nn.Module, path: str) -> bool:
    """Whether a module is a linear layer, routers apart, or the embedding."""
    module = model.get_submodule(path)
    # Routers compute in a precision of their own.
    linear = type(module) is nn.Linear and not isinstance(_parent(model, path), Top2Router)
    return linear or isinstance(module, TokenEmbedding)


def _absorb_relu(model: nn.Module, path: str) -> bool:
    """Take the ReLU from a feed-forward layer if its first product is at ``path``.

    Returns:
        Whether there was one.
    """
    parent = _parent(model, path)
    if not isinstance(parent, FeedForward) or parent.up_proj is not model.get_submodule(path):
        return False
    if parent.activation is not ACTIVATIONS["relu"]:
        return False
    parent.activation = nn.Identity()
    return True


def _parent(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path.rpartition(".")[0])


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    setattr(_parent(model, path), path.rpartition(".")[2], module)
