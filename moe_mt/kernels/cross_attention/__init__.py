"""Flash cross-attention: which kernels run, forward and backward."""

import torch
from torch import Tensor

from moe_mt.kernels._launch import inner_contiguous
from moe_mt.kernels.cross_attention.backward import grad_key_value, grad_query
from moe_mt.kernels.cross_attention.call import Call
from moe_mt.kernels.cross_attention.decode import DECODE_QUERIES, attend_decode
from moe_mt.kernels.cross_attention.forward import attend
from moe_mt.kernels.cross_attention.limits import Limits

__all__ = ["Limits", "cross_attention", "cross_attention_backward"]


def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    limits: Limits,
    *,
    scale: float,
    dropped_below: int,
) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, L, d_head) and the log-sum-exp (B, H, L)."""
    query, key, value = map(_readable, (query, key, value))
    call = Call(query, key, value, limits, scale, dropped_below)
    out = _heads_last(query, packed=limits.packed())
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if limits.packed():
        lse.fill_(-torch.inf)
    if query.shape[2] <= DECODE_QUERIES and not limits.packed() and limits.seed is None:
        attend_decode(call, out, lse)
    else:
        attend(call, out, lse)
    return out, lse


def cross_attention_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    limits: Limits,
    *,
    scale: float,
    dropped_below: int,
    need_key_value: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of query, key and value; of the last two only where needed."""
    grad, query, key, value = map(_readable, (grad.to(query.dtype), query, key, value))
    call = Call(query, key, value, limits, scale, dropped_below)
    packed = limits.packed()
    # The gradient of the query is written with the strides of the output.
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    for_query = _heads_last(query, packed=packed)
    lse = lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    delta = grad_query(call, grad, grad_lse, out, lse, for_query)
    if not need_key_value:
        return for_query, None, None
    for_key, for_value = _heads_last(key, packed=packed), _heads_last(value, packed=packed)
    grad_key_value(call, grad, lse, delta, for_key, for_value)
    return for_query, for_key, for_value


def _readable(tensor: Tensor) -> Tensor:
    """Return a tensor itself, or a copy where kernels could not read it as it lies.

    The last stride must be 1, and the elements of a tile of 128 rows lie within 32 bits.
    """
    return inner_contiguous(tensor) if tensor.stride(2) < 1 << 24 else tensor.contiguous()


def _heads_last(like: Tensor, *, packed: bool = False) -> Tensor:
    """Return a new (B, H, L, d_head) that lies as (B, L, H, d_head).

    Zeros for a packed batch, whose last rows may belong to no sentence.
    """
    sentences, heads, length, d_head = like.shape
    make = like.new_zeros if packed else like.new_empty
    return make(sentences, length, heads, d_head).transpose(1, 2)
