"""How fast something could be: bytes and operations, and the two ceilings of a device."""

from dataclasses import dataclass

import torch

from benchmarks.graphs import capture, measure
from benchmarks.shapes import AttentionShape, LayerShape

__all__ = [
    "Ceilings",
    "Work",
    "attention_backward",
    "attention_forward",
    "layer_backward",
    "layer_forward",
    "measure_ceilings",
]

COPY_BYTES, PRODUCT_SIDE = 2**30, 8192


@dataclass(frozen=True, kw_only=True)
class Work:
    """What must be moved through memory and what must be computed."""

    bytes: int
    flops: int


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What a device reaches on the two simplest things there are."""

    bytes_per_s: float
    """Bytes read plus bytes written by a copy."""

    flops_per_s: float
    """Of a large square product in the dtype that is measured."""

    def floor_s(self, work: Work) -> float:
        """Return the seconds under which no implementation gets."""
        return max(work.bytes / self.bytes_per_s, work.flops / self.flops_per_s)


def layer_forward(shape: LayerShape, tokens: int, distinct: float, item_bytes: int) -> Work:
    """Return the work of the experts of one layer, forward.

    Moved: the weights of the experts hit, once; tokens read and mixture written; hidden and expert
    rows written and read.

    Args:
        shape: Of the layer.
        tokens: ``T``.
        distinct: Experts that got a token.
        item_bytes: Bytes of one number.
    """
    claims = shape.top_k * tokens
    rows = 2 * tokens * shape.d_model + 2 * claims * (shape.ffn_dim + shape.d_model)
    return Work(
        bytes=round(distinct * shape.expert_weights * item_bytes) + rows * item_bytes,
        flops=2 * claims * shape.expert_weights,
    )


def layer_backward(shape: LayerShape, tokens: int, distinct: float, item_bytes: int) -> Work:
    """Return the work of the experts of one layer, backward.

    Moved: the weights of the experts hit, read once; the gradient of all weights, written once,
    zeros included; hidden rows read twice (as ReLU's mask, as an operand), their gradient written
    once and read twice; tokens and the mixture's gradient read; the tokens' gradient written and
    read claim by claim.

    Args:
        shape: Of the layer.
        tokens: ``T``.
        distinct: Experts that got a token.
        item_bytes: Bytes of one number.
    """
    claims = shape.top_k * tokens
    weights = round((distinct + shape.num_experts) * shape.expert_weights)
    rows = 5 * claims * shape.ffn_dim + 2 * (tokens + claims) * shape.d_model
    return Work(
        bytes=(weights + rows) * item_bytes,
        flops=4 * claims * shape.expert_weights,
    )


def attention_forward(shape: AttentionShape, valid_keys: int, item_bytes: int) -> Work:
    """Return the work of one cross-attention, forward.

    Moved: queries read, output written, valid keys and values read once for all beams. Computed:
    two products.

    Args:
        shape: Of the call.
        valid_keys: Keys of all sentences that are no padding.
        item_bytes: Bytes of one number.
    """
    width = shape.heads * shape.d_head
    query_rows = shape.sentences * shape.queries
    return Work(
        bytes=(2 * query_rows + 2 * valid_keys) * width * item_bytes,
        flops=4 * shape.queries * valid_keys * width,
    )


def attention_backward(shape: AttentionShape, valid_keys: int, item_bytes: int) -> Work:
    """Return the work of one cross-attention, backward.

    Moved: queries, output and its gradient read, the gradient of queries written; valid keys and
    values read; the gradients of all keys and values written, zeros included. Computed: five
    products, for the weights, which nobody keeps, are one of them.

    Args:
        shape: Of the call.
        valid_keys: Keys of all sentences that are no padding.
        item_bytes: Bytes of one number.
    """
    width = shape.heads * shape.d_head
    query_rows, key_rows = shape.sentences * shape.queries, shape.sentences * shape.keys
    return Work(
        bytes=(4 * query_rows + 2 * valid_keys + 2 * key_rows) * width * item_bytes,
        flops=10 * shape.queries * valid_keys * width,
    )


def measure_ceilings(
    device: torch.device,
    dtype: torch.dtype,
    *,
    copy_bytes: int = COPY_BYTES,
    side: int = PRODUCT_SIDE,
    rounds: int | None = None,
) -> Ceilings:
    """Measure a copy and a product of random numbers (zeros are faster and prove nothing)."""
    source = torch.randint(0, 255, (copy_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    copy = measure(capture([lambda: target.copy_(source)], device), rounds=rounds)
    product = measure(capture([lambda: left @ right], device), rounds=rounds)
    return Ceilings(
        bytes_per_s=2 * copy_bytes / copy["median"], flops_per_s=2 * side**3 / product["median"]
    )
