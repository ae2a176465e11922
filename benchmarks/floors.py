"""How fast something could be: bytes and operations, and the two ceilings of a device."""

from dataclasses import dataclass

import torch

from benchmarks.graphs import capture, measure
from benchmarks.shapes import AttentionShape, LayerShape
from benchmarks.timing import synchronized
from moe_mt.models import TransformerConfig

__all__ = [
    "Ceilings",
    "Work",
    "attention_backward",
    "attention_forward",
    "decoder_step",
    "generation",
    "layer_backward",
    "layer_forward",
    "measure_ceilings",
    "measure_reading",
]

COPY_BYTES, PRODUCT_SIDE = 2**30, 8192
READ_ROUNDS = 9


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


def decoder_step(config: TransformerConfig, rows: int, distinct: float, item_bytes: float) -> Work:
    """Return the work of one decoder step: its weights, each read once.

    Left out: keys and values, biases and normalisations, and the projection of the memory, which is
    done once a batch.

    Args:
        config: Of the model.
        rows: Sentences times beams.
        distinct: Experts of a sparse layer that got a row.
        item_bytes: Bytes of one weight.
    """
    dense, sparse = _layers(config, encoder=False)
    attention = 6 * config.d_model**2
    one_expert = 2 * config.d_model * config.decoder_ffn_dim
    shared = (dense + sparse) * attention + dense * one_expert
    shared += config.vocab_size * config.d_model
    return Work(
        bytes=round((shared + sparse * distinct * one_expert) * item_bytes),
        flops=2 * rows * (shared + 2 * sparse * one_expert),
    )


def generation(
    config: TransformerConfig,
    *,
    sentences: int,
    beams: int,
    source_tokens: int,
    new_tokens: int,
    item_bytes: float,
    distinct_encoding: float = 0,
    distinct: float = 0,
) -> Work:
    """Return the work of generating a batch: the encoder once, then a step for every token.

    Args:
        config: Of the model.
        sentences: In the batch.
        beams: Of every sentence.
        source_tokens: Of every sentence.
        new_tokens: Of every translation.
        item_bytes: Bytes of one weight.
        distinct_encoding: Experts of a sparse encoder layer that got a token.
        distinct: The same of a decoder layer in a step.
    """
    dense, sparse = _layers(config, encoder=True)
    attention = 4 * config.d_model**2
    one_expert = 2 * config.d_model * config.encoder_ffn_dim
    memory = 2 * config.decoder_layers * config.d_model**2
    shared = (dense + sparse) * attention + dense * one_expert + memory
    step = decoder_step(config, sentences * beams, distinct, item_bytes)
    encoding = round((shared + sparse * distinct_encoding * one_expert) * item_bytes)
    return Work(
        bytes=encoding + new_tokens * step.bytes,
        flops=2 * sentences * source_tokens * (shared + 2 * sparse * one_expert)
        + new_tokens * step.flops,
    )


def _layers(config: TransformerConfig, *, encoder: bool) -> tuple[int, int]:
    """Return how many layers of one side are dense, and how many hold experts."""
    count = config.encoder_layers if encoder else config.decoder_layers
    is_sparse = config.encoder_layer_is_sparse if encoder else config.decoder_layer_is_sparse
    sparse = sum(map(is_sparse, range(count)))
    return count - sparse, sparse


def measure_reading(count: int = COPY_BYTES, rounds: int = READ_ROUNDS) -> float:
    """Return the bytes per second at which PyTorch's threads read memory at best.

    The best of several rounds, for a floor is what nothing gets under.
    """
    numbers = torch.rand(count // 4)
    seconds = []
    for _ in range(rounds):
        start = synchronized()
        numbers.sum()
        seconds.append(synchronized() - start)
    return numbers.nbytes / min(seconds)


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
