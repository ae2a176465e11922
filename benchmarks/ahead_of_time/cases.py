"""Which launches are compiled, and what is expected of the kernels that they run.

A case calls a launcher on tensors of the meta device, at the shapes of a layer that exists. Which
kernels that runs, in which tiles, is the launcher's choice; equal launches are compiled once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from packaging.version import Version
from torch import Tensor

from benchmarks.shapes import GPU_TOKENS

# The kernels are imported where a case runs them: a file that cannot be imported while it is being
# written stops the cases of other files no more than it has to.

__all__ = ["ALLOWED", "EXPECTATIONS", "Case", "Expectation", "all_cases"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call of a launcher."""

    family: str
    """What it is; cases that differ in their number of tokens alone are one family."""

    tokens: int
    run: Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What a kernel's binary must show on every target."""

    matrix: str = ""
    """The argument whose 16-bit elements belong on the matrix unit."""

    matrix_dtypes: tuple[str, ...] = ("bf16", "fp16")
    """Of which type that argument's elements must be for it."""

    left_rows: tuple[str, str] = ("", "")
    """The constants that say how many rows the left operand has, without and with ``SWAP``: from
    64 on, Hopper must use the instruction of a warp group (wgmma), Blackwell that of tcgen05."""

    wide_weights: bool = False
    """Whether every load of weights must move 128 bits for each thread, or whole tiles."""


PRODUCT = Expectation(matrix="x_ptr", left_rows=("BLOCK_ROWS", "BLOCK_COLUMNS"), wide_weights=True)

EXPECTATIONS = {
    "router_logits.router_logits": Expectation(
        # Not float16, which three terms of a float32 weight do not fit.
        matrix="x_ptr",
        matrix_dtypes=("bf16",),
        left_rows=("BLOCK_TOKENS", ""),
        wide_weights=True,
    ),
    "grouped_mm.grouped_mm": PRODUCT,
    "grouped_mm.grad_weight": Expectation(matrix="x_ptr", left_rows=("BLOCK_OUT", "")),
    "expert_ffn.grouped.hidden_rows": PRODUCT,
    "expert_ffn.grouped.hidden_grad": Expectation(
        matrix="grad_ptr", left_rows=("BLOCK_ROWS", "BLOCK_COLUMNS"), wide_weights=True
    ),
    "cross_attention.forward.forward": Expectation(
        matrix="query_ptr", left_rows=("BLOCK_QUERIES", "")
    ),
    "cross_attention.decode.decode": Expectation(matrix="query_ptr", left_rows=("BLOCK_KEYS", "")),
    "cross_attention.backward.grad_query": Expectation(
        matrix="query_ptr", left_rows=("BLOCK_QUERIES", "")
    ),
    "cross_attention.backward.grad_key_value": Expectation(
        matrix="query_ptr", left_rows=("BLOCK_KEYS", "")
    ),
    "expert_ffn.decode.expert_up": Expectation(wide_weights=True),
    "expert_ffn.decode.expert_down": Expectation(wide_weights=True),
}

ALLOWED: dict[tuple[str, str, str], str] = {}
"""Why a kernel on a target, in the tiles whose description contains a text, may spill."""

FLOAT32_HEADS = "float32: products without the matrix unit hold their operands in registers"
for kernel in ("forward.forward", "backward.grad_query"):
    for target in ("sm_80", "sm_90", "sm_100"):
        tile = "D_PADDED=256 SENTENCES_PADDED=1 BLOCK_QUERIES=16 BLOCK_KEYS=16"
        ALLOWED[(f"cross_attention.{kernel}", target, tile)] = FLOAT32_HEADS

TWO_WORDS = "two words of stack"
for kernel, tile in (
    ("forward.forward", "D_HEAD=64 "),
    ("backward.grad_query", "BLOCK_QUERIES=64 BLOCK_KEYS=64"),
    ("backward.grad_query", "D_HEAD=256 D_PADDED=256 SENTENCES_PADDED=1 BLOCK_QUERIES=32"),
):
    ALLOWED[(f"cross_attention.{kernel}", "sm_100", tile)] = TWO_WORDS

if Version(triton.__version__) < Version("3.7"):
    EARLY_BLACKWELL = "two words of stack with Triton 3.6; none with 3.9"
    ALLOWED[("route.choose", "sm_100", "K=8 ")] = EARLY_BLACKWELL
    ALLOWED[("expert_ffn.grouped.hidden_rows", "sm_100", "ACTIVATION=silu")] = EARLY_BLACKWELL


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A mixture-of-experts layer."""

    name: str
    num_experts: int
    top_k: int
    d_model: int
    ffn_dim: int
    activation: str = "silu"
    gated: bool = True
    biased: bool = False
    normalize: str = "before"


NLLB_MOE = Layer(
    name="NLLB-MoE 54B",
    num_experts=128,
    top_k=2,
    d_model=2048,
    ffn_dim=8192,
    activation="relu",
    gated=False,
    biased=True,
)
MANY_SMALL = Layer(name="128 small SwiGLU", num_experts=128, top_k=8, d_model=2048, ffn_dim=768)
FEW_LARGE = Layer(name="8 large SwiGLU", num_experts=8, top_k=2, d_model=4096, ffn_dim=14336)
SWITCH = Layer(
    name="Switch base", num_experts=128, top_k=1, d_model=768, ffn_dim=3072, normalize="never"
)


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The heads of a layer of cross-attention."""

    name: str
    heads: int
    d_head: int


NLLB_HEADS = Attention(name="NLLB-MoE 54B", heads=16, d_head=128)
WHISPER_HEADS = Attention(name="heads of 64", heads=20, d_head=64)
ODD_HEADS = Attention(name="heads of 80", heads=16, d_head=80)
WIDE_HEADS = Attention(name="heads of 256", heads=8, d_head=256)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def all_cases() -> Iterator[Case]:
    """Yield every case: what stands around the experts, the experts, then attention."""
    for tokens in GPU_TOKENS:
        for training in (False, True):
            yield from _around_experts(NLLB_MOE, "bf16", tokens, training=training)
        yield _experts(NLLB_MOE, "bf16", tokens, training=False)
    for tokens in (32, 1024, 4096, 16384):
        yield _experts(NLLB_MOE, "bf16", tokens, training=True)
    for dtype in ("fp16", "fp32"):
        yield from _around_experts(NLLB_MOE, dtype, 1024, training=True)
        yield _experts(NLLB_MOE, dtype, 1, training=False)
        yield _experts(NLLB_MOE, dtype, 1024, training=True)
    for layer in (MANY_SMALL, FEW_LARGE):
        yield from _around_experts(layer, "bf16", 1024, training=True)
        for tokens in (1, 32, 1024, 8192):
            yield _experts(layer, "bf16", tokens, training=False)
        for tokens in (1024, 8192):
            yield _experts(layer, "bf16", tokens, training=True)
    for training in (False, True):
        yield from _router(SWITCH, "bf16", 1024, training=training)
    yield from _all_attention()


def _all_attention() -> Iterator[Case]:
    # A sentence alone, whose keys are cut into parts, then many.
    for sentences in (1, 32):
        for keys in (64, 512):
            yield _decoding(NLLB_HEADS, "bf16", sentences, 4, keys, "lengths")
    yield _decoding(NLLB_HEADS, "bf16", 32, 4, 64, "mask")
    yield _decoding(NLLB_HEADS, "bf16", 32, 10, 64, "lengths")
    for limited in ("lengths", "nothing", "mask", "dropout", "packed"):
        for keys in (128, 512):
            yield from _trained_attention(NLLB_HEADS, "bf16", keys, limited)
    for dtype in ("fp16", "fp32"):
        yield _decoding(NLLB_HEADS, dtype, 32, 4, 64, "lengths")
        for limited in ("lengths", "dropout"):
            yield from _trained_attention(NLLB_HEADS, dtype, 128, limited)
    yield _decoding(WIDE_HEADS, "fp32", 32, 4, 64, "lengths")
    yield from _trained_attention(WIDE_HEADS, "fp32", 128, "dropout")
    for heads in (WHISPER_HEADS, ODD_HEADS, WIDE_HEADS):
        yield _decoding(heads, "bf16", 32, 4, 64, "lengths")
        yield from _trained_attention(heads, "bf16", 128, "lengths")
        yield from _trained_attention(heads, "bf16", 128, "dropout")


def _around_experts(layer: Layer, dtype: str, tokens: int, *, training: bool) -> Iterator[Case]:
    yield from _router(layer, dtype, tokens, training=training)
    yield _order(layer, dtype, tokens, training=training)


def _meta(*shape: int, dtype: torch.dtype | str = torch.float32) -> Tensor:
    dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    return torch.empty(shape, dtype=dtype, device="meta")


def _family(layer: Layer, what: str, dtype: str) -> str:
    return f"{layer.name} {what} {dtype}"


def _router(layer: Layer, dtype: str, tokens: int, *, training: bool) -> Iterator[Case]:
    def logits() -> None:
        from moe_mt.kernels.router_logits import router_logits

        x = _meta(tokens, layer.d_model, dtype=dtype)
        router_logits(x, _meta(layer.num_experts, layer.d_model), None)

    def route(*, backward: bool) -> None:
        from moe_mt.kernels import route as kernels

        scores = _meta(tokens, layer.num_experts)
        expert_ids, gates, choices = kernels.route(
            scores,
            _meta(tokens, dtype=torch.bool),
            _meta(tokens, layer.num_experts) if backward else None,
            capacity=2 * -(-tokens // layer.num_experts) if backward else None,
            top_k=layer.top_k,
            policy="sampling" if backward else "all",
            normalize=layer.normalize,
            batch_prioritized=backward,
        )
        if backward:
            kernels.route_backward(scores, expert_ids, choices, gates, normalize=layer.normalize)

    def statistics() -> None:
        from moe_mt.kernels import router_statistics as kernels

        scores, padding = _meta(tokens, layer.num_experts), _meta(tokens, dtype=torch.bool)
        kernels.router_statistics(scores, padding)
        kernels.router_statistics_backward(
            scores, padding, _meta(layer.num_experts), torch.empty((), device="meta")
        )

    what = "training" if training else "inference"
    yield Case(family=_family(layer, "router", dtype), tokens=tokens, run=logits)
    yield Case(
        family=_family(layer, f"route {what}", "fp32"),
        tokens=tokens,
        run=lambda: route(backward=training),
    )
    if training:
        yield Case(family=_family(layer, "statistics", "fp32"), tokens=tokens, run=statistics)


def _order(layer: Layer, dtype: str, tokens: int, *, training: bool) -> Case:
    claims = tokens * layer.top_k
    x = _meta(tokens, layer.d_model, dtype=dtype)
    expert_rows = _meta(claims, layer.d_model, dtype=dtype)
    rows = _meta(tokens, layer.top_k, dtype=torch.int64)
    gates = _meta(tokens, layer.top_k)

    def forward() -> None:
        from moe_mt.kernels import combine, permute

        permute.permute(x, _meta(claims, dtype=torch.int64), layer.top_k)
        combine.combine(expert_rows, rows, gates, x)

    def backward() -> None:
        from moe_mt.kernels import combine

        combine.combine(expert_rows, rows, None, None)  # the gradient of permute
        combine.combine_backward(x, expert_rows, rows, gates)

    what = "backward" if training else "forward"
    run = backward if training else forward
    return Case(family=_family(layer, f"order {what}", dtype), tokens=tokens, run=run)


def _experts(layer: Layer, dtype: str, tokens: int, *, training: bool) -> Case:
    def run() -> None:
        from moe_mt.kernels import expert_ffn as kernels

        x = _meta(tokens, layer.d_model, dtype=dtype)
        expert_ids = _meta(tokens, layer.top_k, dtype=torch.int32)
        gates = _meta(tokens, layer.top_k)
        weights = _weights(layer, dtype)
        options: Any = {"activation": layer.activation}
        if not training:
            kernels.expert_ffn(x, expert_ids, gates, weights, residual=x, **options)
            return
        _, saved = kernels.expert_ffn_forward(x, expert_ids, gates, weights, residual=x, **options)
        needed = kernels.Needed(x=True, up=True, gate=True, down=True)
        kernels.expert_ffn_backward(x, x, expert_ids, gates, weights, saved, needed, **options)

    what = "training" if training else "inference"
    return Case(family=_family(layer, f"experts {what}", dtype), tokens=tokens, run=run)


def _weights(layer: Layer, dtype: str) -> Any:
    from moe_mt.kernels.expert_ffn import Weights

    def bias(features: int, *, wanted: bool = True) -> Tensor | None:
        wanted = wanted and layer.biased
        return _meta(layer.num_experts, features, dtype=dtype) if wanted else None

    up_shape = (layer.num_experts, layer.ffn_dim, layer.d_model)
    return Weights(
        up_proj=_meta(*up_shape, dtype=dtype),
        down_proj=_meta(layer.num_experts, layer.d_model, layer.ffn_dim, dtype=dtype),
        gate_proj=_meta(*up_shape, dtype=dtype) if layer.gated else None,
        up_bias=bias(layer.ffn_dim),
        gate_bias=bias(layer.ffn_dim, wanted=layer.gated),
        down_bias=bias(layer.d_model),
    )


def _decoding(
    shape: Attention, dtype: str, sentences: int, beams: int, keys: int, limited: str
) -> Case:
    query = _heads(shape, dtype, sentences, beams)
    memory = _heads(shape, dtype, sentences, keys)

    def run() -> None:
        from moe_mt.kernels.cross_attention import cross_attention

        limits = _limits(limited, sentences, keys)
        cross_attention(query, memory, memory, limits, scale=0.1, dropped_below=0)

    what = f"decoding {sentences} x {beams} {limited}"
    return Case(family=f"{shape.name} {what} {dtype}", tokens=keys, run=run)


def _trained_attention(shape: Attention, dtype: str, length: int, limited: str) -> Iterator[Case]:
    packed = limited == "packed"
    sentences = 1 if packed else 32
    # 32 sentences, padded or behind each other.
    query = _heads(shape, dtype, sentences, 32 * length // sentences)
    lse = _meta(*query.shape[:3])
    options: Any = {"scale": 0.1, "dropped_below": 1 << 20 if limited == "dropout" else 0}

    def forward() -> None:
        from moe_mt.kernels import cross_attention as kernels

        limits = _limits(limited, sentences, length)
        kernels.cross_attention(query, query, query, limits, **options)

    def backward() -> None:
        from moe_mt.kernels import cross_attention as kernels

        limits = _limits(limited, sentences, length)
        kernels.cross_attention_backward(
            query, None, query, query, query, query, lse, limits, **options, need_key_value=True
        )

    for run in (forward, backward):
        what = f"attention {run.__name__} {limited}"
        yield Case(family=f"{shape.name} {what} {dtype}", tokens=length, run=run)


def _heads(shape: Attention, dtype: str, sentences: int, length: int) -> Tensor:
    """Return (B, H, L, d_head), laid out as the model's projections leave it."""
    return _meta(sentences, length, shape.heads, shape.d_head, dtype=dtype).transpose(1, 2)


def _limits(limited: str, sentences: int, keys: int) -> Any:
    from moe_mt.kernels.cross_attention import Limits

    offsets = _meta(33, dtype=torch.int32) if limited == "packed" else None
    return Limits(
        key_lengths=_meta(sentences, dtype=torch.int32) if limited == "lengths" else None,
        key_mask=_meta(sentences, keys, dtype=torch.bool) if limited == "mask" else None,
        query_offsets=offsets,
        key_offsets=offsets,
        seed=_meta(1, dtype=torch.int64) if limited == "dropout" else None,
    )
