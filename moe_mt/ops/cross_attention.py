"""Attention of a decoder to the memory of its sentences: not causal, keys of ragged length."""

from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from moe_mt.errors import ConfigError
from moe_mt.ops.backend import autocast, register_op, use_triton
from moe_mt.ops.dropout import dropped_below, keep_mask, kept_share

__all__ = [
    "cross_attention",
    "cross_attention_eager",
    "cross_attention_weights",
    "cross_attention_with_lse",
    "cross_attention_with_lse_eager",
]

INTEGERS = (torch.int32, torch.int64)

WIDEST_HEAD = 256
"""Largest d_head of the kernels: a tile of queries and one of keys stay on the chip."""


def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_offsets: Tensor | None = None,
    key_offsets: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Compute ``dropout(softmax(scale * query key^T)) value`` for every sentence and head.

    Nothing limits what a query sees of its sentence, so that the beams of a sentence are query
    rows like any other: ``beams`` hypotheses of ``n`` positions are ``L = beams * n`` queries over
    one memory, and keys and values are never replicated.

    Padding of keys is said by lengths (padding on the right) or by a mask (anywhere). A query of
    a sentence without any valid key gives 0 and gets and gives no gradient. Keys and values of
    padding must be finite: kernels do not read them, but the definition multiplies them by 0.

    Sentences may also stand behind each other without padding: then B = 1, and sentence ``b`` has
    the queries ``query_offsets[b]`` to ``query_offsets[b + 1]`` of L and the keys
    ``key_offsets[b]`` to ``key_offsets[b + 1]`` of S. Rows beyond the last offset belong to no
    sentence: they give 0.

    Args:
        query: (B, H, L, d_head), any strides: (B, L, H, d_head) transposed needs no copy.
        key: (B, H, S, d_head), as ``query``.
        value: (B, H, S, d_head), as ``query``.
        key_lengths: (B,) int32 or int64. How many keys of each sentence are valid.
        key_mask: (B, S) bool, true where a key is valid; not together with ``key_lengths``.
        query_offsets: (sentences + 1,) int32 or int64, ascending from 0; with
            ``key_offsets`` only.
        key_offsets: As ``query_offsets``, for keys; with these only.
        scale: Positive factor of the scores; ``d_head ** -0.5`` where ``None``.
        dropout: Probability with which an attention weight is dropped; 0 outside training.
        seed: () or (1,) int64, from which dropout follows; drawn where ``None``.

    Returns:
        (B, H, L, d_head) in the dtype of ``query``. Kernels lay it out as (B, L, H, d_head), so
        that joining the heads needs no copy.

    Raises:
        ConfigError: If shapes or dtypes do not fit together, a number is out of its range, or
            kernels are to run with a d_head above 256.

    Source: Vaswani et al., arXiv:1706.03762, section 3.2; the kernels' order of computation is
    that of Dao, arXiv:2307.08691 (FlashAttention-2), section 3.
    """
    limits = (key_lengths, key_mask, query_offsets, key_offsets)
    _check(query, key, value, *limits, scale, dropout, seed)
    query, key, value = autocast(query, key, value)
    if use_triton(query):
        return _on_kernels(query, key, value, *limits, scale, dropout, seed)[0]
    return cross_attention_eager(
        query,
        key,
        value,
        key_lengths=key_lengths,
        key_mask=key_mask,
        query_offsets=query_offsets,
        key_offsets=key_offsets,
        scale=scale,
        dropout=dropout,
        seed=seed,
    )


def cross_attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_offsets: Tensor | None = None,
    key_offsets: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute ``cross_attention`` and the logarithm of each query's sum of exponentials.

    With it, results over parts of the keys can be merged into the result over all of them.

    Args, Raises: As ``cross_attention``.

    Returns:
        The output (B, H, L, d_head) and ``log(sum_s exp(scale * query key_s))`` (B, H, L), natural,
        in float32 (float64 for float64 queries); minus infinity without a valid key. Both have
        gradients.
    """
    limits = (key_lengths, key_mask, query_offsets, key_offsets)
    _check(query, key, value, *limits, scale, dropout, seed)
    query, key, value = autocast(query, key, value)
    if use_triton(query):
        return _on_kernels(query, key, value, *limits, scale, dropout, seed)
    return cross_attention_with_lse_eager(
        query,
        key,
        value,
        key_lengths=key_lengths,
        key_mask=key_mask,
        query_offsets=query_offsets,
        key_offsets=key_offsets,
        scale=scale,
        dropout=dropout,
        seed=seed,
    )


def cross_attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return the attention weights (B, H, L, S), in the dtype of ``query``, before any dropout.

    For looking at, and for what must change them: computed by the definition on every device,
    for kernels exist to never write them down.

    Args, Raises: As ``cross_attention``. Rows sum to 1; without a valid key they are 0.
    """
    _check(query, key, None, key_lengths, key_mask, None, None, scale, 0.0, None)
    query, key = autocast(query, key)
    allowed = _allowed(key, key_lengths, key_mask)
    return _weights(query, key, allowed, _scale(query, scale))[0].to(query.dtype)


def cross_attention_eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_offsets: Tensor | None = None,
    key_offsets: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Define ``cross_attention``: PyTorch's own attention, and the explicit form with dropout."""
    if dropout > 0:
        return cross_attention_with_lse_eager(
            query,
            key,
            value,
            key_lengths=key_lengths,
            key_mask=key_mask,
            query_offsets=query_offsets,
            key_offsets=key_offsets,
            scale=scale,
            dropout=dropout,
            seed=seed,
        )[0]
    if query_offsets is None or key_offsets is None:
        allowed = _allowed(key, key_lengths, key_mask)
        return functional.scaled_dot_product_attention(query, key, value, allowed, scale=scale)
    outputs = [
        functional.scaled_dot_product_attention(*one, scale=scale)
        for one in _sentences(query, key, value, query_offsets, key_offsets)
    ]
    return _joined(outputs, query, 0.0)


def cross_attention_with_lse_eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_offsets: Tensor | None = None,
    key_offsets: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Define ``cross_attention_with_lse``: weights written down, in float32 or wider."""
    scale = _scale(query, scale)
    seed = _seed(query, dropout, seed)
    if query_offsets is None or key_offsets is None:
        allowed = _allowed(key, key_lengths, key_mask)
        return _explicit(query, key, value, allowed, scale, dropout, seed, 0)
    sentences = _sentences(query, key, value, query_offsets, key_offsets)
    results = [
        _explicit(*one, None, scale, dropout, seed, number) for number, one in enumerate(sentences)
    ]
    outputs, lses = [out for out, _ in results], [lse for _, lse in results]
    lse = _joined([lse[..., None] for lse in lses], query[..., :1].to(_wide(query)), -torch.inf)
    return _joined(outputs, query, 0.0), lse[..., 0]


def _explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    first_sentence: int,
) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, L, d_head) and the log-sum-exp (B, H, L)."""
    weights, lse = _weights(query, key, allowed, scale)
    if seed is not None:
        sentences, heads, queries, keys = weights.shape
        kept = keep_mask(
            seed,
            dropout,
            sentences=sentences,
            heads=heads,
            queries=queries,
            keys=keys,
            first_sentence=first_sentence,
        )
        weights = weights * kept / kept_share(dropout)
    return _wide_product(weights, value, weights.dtype).to(query.dtype), lse


def _weights(
    query: Tensor, key: Tensor, allowed: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the weights (B, H, L, S) and the log-sum-exp (B, H, L), both wide."""
    scores = _wide_product(query, key.mT, _wide(query)) * scale
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    lse = scores.logsumexp(-1)
    # Where nothing is allowed, every weight is exp(-inf - 0) = 0 and not exp(-inf + inf).
    return (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp(), lse


def _allowed(key: Tensor, key_lengths: Tensor | None, key_mask: Tensor | None) -> Tensor | None:
    """Return (B, 1, 1, S) bool, true where a key is valid, or ``None`` where all are."""
    if key_lengths is not None:
        places = torch.arange(key.shape[2], device=key.device)
        key_mask = places < key_lengths[:, None]
    return None if key_mask is None else key_mask.view(key.shape[0], 1, 1, key.shape[2])


def _sentences(
    query: Tensor, key: Tensor, value: Tensor, query_offsets: Tensor, key_offsets: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return the queries, keys and values of each sentence of a packed batch."""
    query_bounds = pairwise(cast(list[int], query_offsets.tolist()))  # pyright: ignore
    key_bounds = pairwise(cast(list[int], key_offsets.tolist()))  # pyright: ignore
    return [
        (query[:, :, q0:q1], key[:, :, k0:k1], value[:, :, k0:k1])
        for (q0, q1), (k0, k1) in zip(query_bounds, key_bounds, strict=True)
    ]


def _joined(pieces: list[Tensor], like: Tensor, fill: float) -> Tensor:
    """Return the pieces behind each other along L, filled up to the length of ``like``."""
    missing = like.shape[2] - sum(piece.shape[2] for piece in pieces)
    shape = (*like.shape[:2], missing, like.shape[3])
    return torch.cat([*pieces, like.new_full(shape, fill)], 2)


def _wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``a @ b`` computed in ``dtype``, also where autocast would round its operands."""
    with torch.autocast("cpu" if a.is_meta else a.device.type, enabled=False):
        return a.to(dtype) @ b.to(dtype)


def _wide(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


def _scale(query: Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def _seed(query: Tensor, dropout: float, seed: Tensor | None) -> Tensor | None:
    """Return the seed of a call, drawn from the device's generator if it has none."""
    if dropout == 0:
        return None
    if seed is None:
        seed = torch.randint(1 << 62, (1,), device=query.device)
    return seed


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    key_lengths: Tensor | None,
    key_mask: Tensor | None,
    query_offsets: Tensor | None,
    key_offsets: Tensor | None,
    scale: float | None,
    dropout: float,
    seed: Tensor | None,
) -> None:
    if query.dim() != 4 or key.dim() != 4:
        raise ConfigError(
            f"query is {tuple(query.shape)} and key {tuple(key.shape)}; they must be "
            "(B, H, L, d_head) and (B, H, S, d_head)"
        )
    sentences, heads, _, d_head = query.shape
    expected = (sentences, heads, key.shape[2], d_head)
    if key.shape != expected or (value is not None and value.shape != expected):
        values = "" if value is None else f" and value {tuple(value.shape)}"
        raise ConfigError(
            f"key is {tuple(key.shape)}{values}; beside query {tuple(query.shape)} they must be "
            f"({sentences}, {heads}, S, {d_head}). Beams of a sentence are rows of query, not "
            "sentences"
        )
    _check_keys(key, key_lengths, key_mask)
    if query_offsets is not None or key_offsets is not None:
        _check_offsets(sentences, query_offsets, key_offsets, key_lengths, key_mask)
    if scale is not None and not 0 < scale < float("inf"):
        raise ConfigError(f"scale is {scale}; it must be positive and finite")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout is {dropout}; it must be at least 0 and below 1")
    if seed is not None and (seed.numel() != 1 or seed.dtype != torch.int64):
        raise ConfigError(
            f"seed is {tuple(seed.shape)} {seed.dtype}; it must be one number of torch.int64"
        )


def _check_keys(key: Tensor, key_lengths: Tensor | None, key_mask: Tensor | None) -> None:
    sentences, _, keys, _ = key.shape
    if key_lengths is not None and key_mask is not None:
        raise ConfigError("key_lengths and key_mask were both given; give one of them")
    if key_lengths is not None and (
        key_lengths.shape != (sentences,) or key_lengths.dtype not in INTEGERS
    ):
        raise ConfigError(
            f"key_lengths are {tuple(key_lengths.shape)} {key_lengths.dtype}; they must be "
            f"({sentences},) torch.int32 or torch.int64"
        )
    if key_mask is not None and (
        key_mask.shape != (sentences, keys) or key_mask.dtype != torch.bool
    ):
        raise ConfigError(
            f"key_mask is {tuple(key_mask.shape)} {key_mask.dtype}; it must be "
            f"({sentences}, {keys}) torch.bool, true where a key is valid"
        )


def _check_offsets(
    sentences: int,
    query_offsets: Tensor | None,
    key_offsets: Tensor | None,
    key_lengths: Tensor | None,
    key_mask: Tensor | None,
) -> None:
    if query_offsets is None or key_offsets is None:
        raise ConfigError("query_offsets and key_offsets belong together; give both or neither")
    if key_lengths is not None or key_mask is not None:
        raise ConfigError("offsets say where keys end; give no key_lengths and no key_mask")
    if sentences != 1:
        raise ConfigError(f"packed sentences stand in one row, B = 1; query has B = {sentences}")
    if (
        query_offsets.dim() != 1
        or query_offsets.shape != key_offsets.shape
        or query_offsets.numel() == 0
        or query_offsets.dtype not in INTEGERS
        or key_offsets.dtype not in INTEGERS
    ):
        raise ConfigError(
            f"query_offsets are {tuple(query_offsets.shape)} {query_offsets.dtype}, key_offsets "
            f"{tuple(key_offsets.shape)} {key_offsets.dtype}; both must be (sentences + 1,) "
            "torch.int32 or torch.int64"
        )


def _on_kernels(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    key_mask: Tensor | None,
    query_offsets: Tensor | None,
    key_offsets: Tensor | None,
    scale: float | None,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if not query.dtype == key.dtype == value.dtype:
        raise ConfigError(
            f"query is {query.dtype}, key {key.dtype} and value {value.dtype}; they must be of one "
            "dtype (autocast makes them so)"
        )
    if query.shape[3] > WIDEST_HEAD:
        raise ConfigError(
            f"d_head is {query.shape[3]}; kernels take up to {WIDEST_HEAD}, backend 'eager' any"
        )
    limits = (key_lengths, key_mask, query_offsets, key_offsets)
    seed = _seed(query, dropout, seed)
    for tensor in (key, value, *limits, seed):
        if tensor is not None and tensor.device != query.device:
            raise ConfigError(
                f"query is on {query.device} and another argument on {tensor.device}; all must be "
                "on one device"
            )
    return _cross_attention(
        query, key, value, *limits, seed, _scale(query, scale), dropped_below(dropout)
    )


_LIMITS = (
    "Tensor? key_lengths, Tensor? key_mask, Tensor? query_offsets, Tensor? key_offsets, "
    "Tensor? seed, float scale, int dropped_below"
)


def _launch(query: Tensor, key: Tensor, value: Tensor, *limits: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    from moe_mt.kernels import cross_attention as kernels

    *tensors, scale, dropped_below = limits
    return kernels.cross_attention(
        query, key, value, kernels.Limits(*tensors), scale=scale, dropped_below=dropped_below
    )


def _fake(query: Tensor, *others: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    return _heads_last(query), query.new_empty(query.shape[:3], dtype=torch.float32)


def _heads_last(like: Tensor) -> Tensor:
    """Return an empty (B, H, L, d_head) that lies as (B, L, H, d_head)."""
    sentences, heads, length, d_head = like.shape
    return like.new_empty(sentences, length, heads, d_head).transpose(1, 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401
    *tensors, scale, dropped_below = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.scale, ctx.dropped_below = scale, dropped_below
    # Nearly always only one of the two outputs has a gradient.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    need_query, need_key, need_value = ctx.needs_input_grad[:3]
    if grad is None and grad_lse is None:
        return (None,) * 10
    query, key, value, out, lse, *limits = ctx.saved_tensors
    grad_query, grad_key, grad_value = _cross_attention_backward(
        torch.zeros_like(out) if grad is None else grad,
        grad_lse,
        query,
        key,
        value,
        out,
        lse,
        *limits,
        ctx.scale,
        ctx.dropped_below,
        need_key or need_value,
    )
    return (
        grad_query if need_query else None,
        grad_key if need_key else None,
        grad_value if need_value else None,
        *(None,) * 7,
    )


def _launch_backward(grad: Tensor, grad_lse: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    from moe_mt.kernels import cross_attention as kernels

    query, key, value, out, lse, *limits, scale, dropped_below, need_key_value = arguments
    found = kernels.cross_attention_backward(
        grad,
        grad_lse,
        query,
        key,
        value,
        out,
        lse,
        kernels.Limits(*limits),
        scale=scale,
        dropped_below=dropped_below,
        need_key_value=need_key_value,
    )
    return tuple(query.new_empty(0) if tensor is None else tensor for tensor in found)


def _fake_backward(grad: Tensor, grad_lse: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    query, key, value, *_, need_key_value = arguments
    if not need_key_value:
        return _heads_last(query), query.new_empty(0), query.new_empty(0)
    return _heads_last(query), _heads_last(key), _heads_last(value)


_cross_attention_backward = register_op(
    "cross_attention_backward(Tensor grad, Tensor? grad_lse, Tensor query, Tensor key, "
    f"Tensor value, Tensor out, Tensor lse, {_LIMITS}, bool need_key_value) -> "
    "(Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)
_cross_attention = register_op(
    f"cross_attention(Tensor query, Tensor key, Tensor value, {_LIMITS}) -> (Tensor, Tensor)",
    _launch,
    _fake,
    backward=_backward,
    setup_context=_setup_context,
)
