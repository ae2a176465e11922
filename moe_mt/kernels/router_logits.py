"""Router logits as exact as a float32 product, from bfloat16 tokens and float32 weights."""

# pyright: reportGeneralTypeIssues=false
# Triton's own annotations take its ranges for no iterables.

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_mt.kernels._launch import accelerator_of, inner_contiguous, launch
from moe_mt.kernels._tiles import dot, element_offset

__all__ = ["router_logits"]


@triton.jit
def _dot_split(x, weight, accumulator):
    """Return ``accumulator + x @ weight`` for bfloat16 ``x`` and float32 ``weight``, unrounded.

    Three bfloat16 terms of 8 bits each hold the 24 bits of a float32, and a product of two
    bfloat16 numbers is exact in float32. The terms are made here because 4 bytes a weight from
    memory are less than the 6 of stored terms.
    """
    high = weight.to(tl.bfloat16)
    rest = weight - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    # The smallest first: added to a large sum, it would lose its last bits. Into a sum of their
    # own, because matrix units truncate what they add to a large one.
    product = dot(x, low, tl.zeros_like(accumulator))
    product = dot(x, middle, product)
    return accumulator + dot(x, high, product)


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["tokens"])
def _router_logits_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    logits_ptr,
    tokens,
    num_experts,
    stride_x_row,
    stride_weight_row,
    D_MODEL: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """Compute logits = x @ weight.T + bias; one program owns a block of tokens and of experts."""
    rows = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    experts = tl.program_id(1) * BLOCK_EXPERTS + tl.arange(0, BLOCK_EXPERTS)
    inner = tl.arange(0, BLOCK_INNER)
    # Rows beyond the last read the last one again: nothing of them is stored, and loads without a
    # mask are wider.
    safe_rows = tl.minimum(rows, tokens - 1)
    safe_experts = tl.minimum(experts, num_experts - 1)
    x_ptrs = x_ptr + (element_offset(safe_rows, stride_x_row)[:, None] + inner[None, :])
    weight_ptrs = weight_ptr + (
        element_offset(safe_experts, stride_weight_row)[None, :] + inner[:, None]
    )
    accumulator = tl.zeros((BLOCK_TOKENS, BLOCK_EXPERTS), tl.float32)
    for start in tl.range(0, D_MODEL, BLOCK_INNER):
        if D_MODEL % BLOCK_INNER == 0:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(inner < D_MODEL - start)[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=(inner < D_MODEL - start)[:, None], other=0.0)
        if SPLIT:
            accumulator = _dot_split(x, weight, accumulator)
        else:
            accumulator = dot(x.to(weight_ptr.dtype.element_ty), weight, accumulator)
        x_ptrs += BLOCK_INNER
        weight_ptrs += BLOCK_INNER
    if bias_ptr is not None:
        accumulator += tl.load(bias_ptr + safe_experts).to(tl.float32)[None, :]
    tl.store(
        logits_ptr + (element_offset(rows, num_experts)[:, None] + experts[None, :]),
        accumulator,
        mask=(rows < tokens)[:, None] & (experts < num_experts)[None, :],
    )


def router_logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias`` (T, E) in float32.

    Args:
        x: (T, d_model), any kernel dtype.
        weight: (E, d_model), any float dtype.
        bias: (E,), any float dtype, or ``None``.
    """
    x, weight = inner_contiguous(x), inner_contiguous(weight)
    # Widening in the kernel, beside float32 tokens, would not fit the registers.
    weight = weight if weight.dtype == x.dtype else weight.float()
    tokens, num_experts = x.shape[0], weight.shape[0]
    logits = x.new_empty(tokens, num_experts, dtype=torch.float32)
    split = x.dtype == torch.bfloat16 and weight.dtype == torch.float32
    block_tokens, block_experts, block_inner, num_warps, num_stages = _blocks(x, num_experts)
    launch(
        _router_logits_kernel,
        (triton.cdiv(tokens, block_tokens), triton.cdiv(num_experts, block_experts)),
        x_ptr=x,
        weight_ptr=weight,
        bias_ptr=None if bias is None else bias.contiguous(),
        logits_ptr=logits,
        tokens=tokens,
        num_experts=num_experts,
        stride_x_row=x.stride(0),
        stride_weight_row=weight.stride(0),
        D_MODEL=x.shape[1],
        SPLIT=split,
        BLOCK_TOKENS=block_tokens,
        BLOCK_EXPERTS=block_experts,
        BLOCK_INNER=block_inner,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return logits


def _blocks(x: Tensor, num_experts: int) -> tuple[int, int, int, int, int]:
    """Return tokens, experts and inner elements of a tile, warps, and stages of the pipeline.

    The largest tile that leaves few multiprocessors idle: large ones read tokens and weights less
    often; small ones let several programs stream the weights of a few tokens side by side.
    """
    accelerator = accelerator_of(x)
    if accelerator.arch == "interpreter":
        return 16, 32, 64, 4, 2
    # The largest tile in more stages would not fit the 64 KB of shared memory of AMD's GPUs.
    stages = 2 if accelerator.arch.startswith("gfx") else 4
    widest = max(16, triton.next_power_of_2(num_experts))
    for block_tokens, most_experts, block_inner in ((64, 128, 32), (64, 64, 32), (32, 32, 64)):
        block_experts = min(most_experts, widest)
        programs = triton.cdiv(x.shape[0], block_tokens) * triton.cdiv(num_experts, block_experts)
        if 4 * programs >= 3 * accelerator.multiprocessors:
            return block_tokens, block_experts, block_inner, 4, stages
    return 16, 16, 128, 8, stages
