"""What the losses of a router need of its logits: counts and sums over real tokens."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# Triton's own annotations take its blocks for tuples, and its ranges for no iterables.

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_mt.kernels._launch import inner_contiguous, launch
from moe_mt.kernels._tiles import element_offset
from moe_mt.kernels.route import block_of, largest, softmax, warps_of

__all__ = ["router_statistics", "router_statistics_backward"]

TOKENS_PER_PROGRAM = 128


@triton.jit
def _load_tokens(logits_ptr, padding_ptr, rows, tokens, columns, num_experts, stride_logits_row):
    """Return logits in float32 and which tokens are real; tokens that are not have zeros."""
    real = rows < tokens
    if padding_ptr is not None:
        real &= tl.load(padding_ptr + rows, mask=real, other=1) == 0
    inside = real[:, None] & (columns < num_experts)[None, :]
    offsets = element_offset(rows, stride_logits_row)[:, None] + columns[None, :]
    return tl.load(logits_ptr + offsets, mask=inside, other=0.0).to(tl.float32), real


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["tokens"])
def _router_statistics_kernel(
    logits_ptr,
    padding_ptr,
    choices_ptr,
    probs_ptr,
    squares_ptr,
    tokens,
    num_experts,
    stride_logits_row,
    E_PADDED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Row p of choices, probs and squares: the sums over the tokens of program p."""
    program = tl.program_id(0)
    columns = tl.arange(0, E_PADDED)
    choices = tl.zeros((E_PADDED,), tl.int32)
    probs = tl.zeros((E_PADDED,), tl.float32)
    squares = tl.zeros((BLOCK_TOKENS,), tl.float32)
    first = program * TOKENS
    for start in tl.range(first, tl.minimum(first + TOKENS, tokens), BLOCK_TOKENS):
        rows = start + tl.arange(0, BLOCK_TOKENS)
        scores, real = _load_tokens(
            logits_ptr, padding_ptr, rows, tokens, columns, num_experts, stride_logits_row
        )
        choice = largest(scores, columns, num_experts)
        chosen = real[:, None] & (columns[None, :] == choice[:, None])
        choices += tl.sum(chosen.to(tl.int32), 0)
        block_probs, best, total = softmax(scores, columns, num_experts)
        probs += tl.sum(tl.where(real[:, None], block_probs, 0.0), 0)
        log_sum = best + tl.log(total)
        squares += tl.where(real, log_sum * log_sum, 0.0)
    inside = columns < num_experts
    offsets = element_offset(program, num_experts) + columns
    tl.store(choices_ptr + offsets, choices, mask=inside)
    tl.store(probs_ptr + offsets, probs, mask=inside)
    tl.store(squares_ptr + program, tl.sum(squares, 0))


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["tokens"])
def _router_statistics_backward_kernel(
    logits_ptr,
    padding_ptr,
    grad_probs_ptr,
    grad_squares_ptr,
    grad_logits_ptr,
    tokens,
    num_experts,
    stride_logits_row,
    E_PADDED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """grad_logits = probs * (grad_probs - <grad_probs, probs> + 2 * logsumexp * grad_squares)."""
    rows = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    columns = tl.arange(0, E_PADDED)
    scores, real = _load_tokens(
        logits_ptr, padding_ptr, rows, tokens, columns, num_experts, stride_logits_row
    )
    probs, best, total = softmax(scores, columns, num_experts)
    grad_probs = tl.load(grad_probs_ptr + columns, mask=columns < num_experts, other=0.0)
    mean = tl.sum(grad_probs[None, :] * probs, 1)
    through_sum = 2 * tl.load(grad_squares_ptr) * (best + tl.log(total))
    grad = probs * (grad_probs[None, :] + (through_sum - mean)[:, None])
    offsets = element_offset(rows, num_experts)[:, None] + columns[None, :]
    tl.store(
        grad_logits_ptr + offsets,
        tl.where(real[:, None], grad, 0.0).to(grad_logits_ptr.dtype.element_ty),
        mask=(rows < tokens)[:, None] & (columns < num_experts)[None, :],
    )


def router_statistics(
    router_logits: Tensor, padding: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return first choices (E,) int64, probabilities (E,) float32 and squares () float32.

    Each program sums up its tokens; their sums are added in a fixed order.

    Args:
        router_logits: (T, E), any kernel dtype.
        padding: (T,) bool or ``None``.
    """
    logits = inner_contiguous(router_logits)
    tokens, num_experts = logits.shape
    programs = triton.cdiv(tokens, TOKENS_PER_PROGRAM)
    choices = logits.new_empty(programs, num_experts, dtype=torch.int32)
    probs = logits.new_empty(programs, num_experts, dtype=torch.float32)
    squares = logits.new_empty(programs, dtype=torch.float32)
    launch(
        _router_statistics_kernel,
        (programs,),
        logits_ptr=logits,
        padding_ptr=None if padding is None else padding.contiguous(),
        choices_ptr=choices,
        probs_ptr=probs,
        squares_ptr=squares,
        tokens=tokens,
        num_experts=num_experts,
        stride_logits_row=logits.stride(0),
        E_PADDED=triton.next_power_of_2(num_experts),
        BLOCK_TOKENS=block_of(num_experts),
        TOKENS=TOKENS_PER_PROGRAM,
        num_warps=warps_of(num_experts),
    )
    return choices.sum(0), probs.sum(0), squares.sum(0)


def router_statistics_backward(
    router_logits: Tensor, padding: Tensor | None, grad_probs: Tensor, grad_squares: Tensor
) -> Tensor:
    """Return the gradient (T, E) of the logits in their dtype.

    Args:
        router_logits: (T, E), any kernel dtype.
        padding: (T,) bool or ``None``.
        grad_probs: (E,) float32.
        grad_squares: () float32.
    """
    logits = inner_contiguous(router_logits)
    tokens, num_experts = logits.shape
    grad_logits = logits.new_empty(tokens, num_experts)
    block_tokens = block_of(num_experts)
    launch(
        _router_statistics_backward_kernel,
        (triton.cdiv(tokens, block_tokens),),
        logits_ptr=logits,
        padding_ptr=None if padding is None else padding.contiguous(),
        grad_probs_ptr=grad_probs.contiguous(),
        grad_squares_ptr=grad_squares,
        grad_logits_ptr=grad_logits,
        tokens=tokens,
        num_experts=num_experts,
        stride_logits_row=logits.stride(0),
        E_PADDED=triton.next_power_of_2(num_experts),
        BLOCK_TOKENS=block_tokens,
        num_warps=warps_of(num_experts),
    )
    return grad_logits
