"""Routing: which experts a token claims, which claims are dropped, and the gates; its gradient.

Without a capacity that binds, one launch does everything. With one, a claim's slot depends on all
tokens: one launch makes claims, the counting sort of ``expert_order`` finds their slots, and
another launch drops claims and finishes the gates.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# Triton's own annotations take its blocks for tuples, and its ranges for no iterables.

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_mt.kernels._launch import inner_contiguous, launch
from moe_mt.kernels._tiles import element_offset
from moe_mt.kernels.expert_order import expert_order

__all__ = ["block_of", "largest", "route", "route_backward", "softmax", "warps_of"]

EPSILON = tl.constexpr(torch.finfo(torch.float32).eps)


@triton.jit
def largest(scores, columns, num_experts):
    """Return the column of each row's largest score, as argmax does, among ``num_experts``.

    A NaN is larger than anything; the lowest column wins among equals.
    """
    inside = (columns < num_experts)[None, :]
    is_nan = (scores != scores) & inside
    any_nan = tl.max(is_nan.to(tl.int32), 1) > 0
    best = tl.max(tl.where(inside & (scores == scores), scores, float("-inf")), 1)
    # Looked for inside alone: a row of -inf has a column to return there too.
    is_best = tl.where(any_nan[:, None], is_nan, inside & (scores == best[:, None]))
    return tl.min(tl.where(is_best, columns[None, :], num_experts), 1)


@triton.jit
def softmax(scores, columns, num_experts):
    """Return probabilities, each row's maximum and the sum of exponentials below it.

    NaN is left out of the maximum, where GPUs differ in what they make of it, and is in the sum.
    """
    inside = (columns < num_experts)[None, :]
    best = tl.max(tl.where(inside & (scores == scores), scores, float("-inf")), 1)
    exponentials = tl.exp(tl.where(inside, scores - best[:, None], float("-inf")))
    total = tl.sum(exponentials, 1)
    return exponentials / total[:, None], best, total


@triton.jit
def _normalize(gates):
    total = tl.sum(gates, 1)
    # Not maximum, which may drop a NaN.
    return gates / tl.where(total < EPSILON, EPSILON, total)[:, None]


@triton.jit(
    do_not_specialize=["tokens", "stride_claim_token", "stride_claim_choice"],
    do_not_specialize_on_alignment=["tokens", "stride_claim_token", "stride_claim_choice"],
)
def _choose_kernel(
    logits_ptr,
    noise_ptr,
    padding_ptr,
    choices_ptr,
    claims_ptr,
    gates_ptr,
    best_probs_ptr,
    tokens,
    num_experts,
    stride_logits_row,
    stride_noise_row,
    stride_claim_token,
    stride_claim_choice,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    E_PADDED: tl.constexpr,
    POLICY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    FINISH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Choose: choices = top K of logits, claims = choices or E, gates = softmax[choices].

    One program owns a block of tokens and all experts. Where ``FINISH``, no claim will be dropped
    later, and gates are finished.
    """
    rows = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    columns = tl.arange(0, E_PADDED)
    ranks = tl.arange(0, K_PADDED)
    exists = rows < tokens
    claims_any = exists
    if padding_ptr is not None:
        claims_any &= tl.load(padding_ptr + rows, mask=exists, other=1) == 0
    inside = claims_any[:, None] & (columns < num_experts)[None, :]
    offsets = element_offset(rows, stride_logits_row)[:, None] + columns[None, :]
    scores = tl.load(logits_ptr + offsets, mask=inside, other=0.0)
    probs, _, total = softmax(scores, columns, num_experts)
    choices = tl.zeros((BLOCK_TOKENS, K_PADDED), tl.int32)
    gates = tl.zeros((BLOCK_TOKENS, K_PADDED), tl.float32)
    for k in tl.static_range(K):
        choice = largest(scores, columns, num_experts)
        is_chosen = columns[None, :] == choice[:, None]
        prob = tl.sum(tl.where(is_chosen, probs, 0.0), 1)
        choices = tl.where(ranks[None, :] == k, choice[:, None], choices)
        gates = tl.where(ranks[None, :] == k, prob[:, None], gates)
        if POLICY == "sampling" and k == 0:
            offsets = element_offset(rows, stride_noise_row)[:, None] + columns[None, :]
            scores += tl.load(noise_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        scores = tl.where(is_chosen, float("-inf"), scores)
    if NORMALIZE == "before":
        gates = _normalize(gates)
    written = exists[:, None] & (ranks < K)[None, :]
    wanted = written & claims_any[:, None]
    if POLICY == "random":
        chance = tl.load(noise_ptr + rows, mask=exists, other=0.0).to(tl.float32)
        wanted &= (ranks == 0)[None, :] | (2 * gates > chance[:, None])
    if FINISH:
        gates = tl.where(wanted, gates, 0.0)
        if NORMALIZE == "after":
            # Zero again: beside a NaN, zero divided is none.
            gates = tl.where(wanted, _normalize(gates), 0.0)
    offsets = element_offset(rows, K)[:, None] + ranks[None, :]
    tl.store(choices_ptr + offsets, choices, mask=written)
    tl.store(gates_ptr + offsets, gates, mask=written)
    claim_offsets = (
        element_offset(rows, stride_claim_token)[:, None]
        + element_offset(ranks, stride_claim_choice)[None, :]
    )
    claims = tl.where(wanted, choices, num_experts)
    tl.store(claims_ptr + claim_offsets, claims, mask=written)
    if best_probs_ptr is not None:
        # The best logit's exponential is 1; divided by a sum that is NaN where any logit is.
        tl.store(best_probs_ptr + rows, 1.0 / total, mask=exists)


@triton.jit(
    do_not_specialize=["tokens", "capacity"],
    do_not_specialize_on_alignment=["tokens", "capacity"],
)
def _drop_kernel(
    claims_ptr,
    rows_ptr,
    expert_offsets_ptr,
    turns_ptr,
    gates_ptr,
    expert_ids_ptr,
    tokens,
    num_experts,
    capacity,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """expert_ids = claims, or E where the slot is beyond the capacity; gates are finished in place.

    ``claims`` (K, T) and their rows stand in claiming order: the token at ``turns[i]`` is the
    ``i``-th to claim. One program owns a block of turns.
    """
    turns = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    ranks = tl.arange(0, K_PADDED)
    exists = turns < tokens
    inside = exists[:, None] & (ranks < K)[None, :]
    claim_offsets = element_offset(ranks, tokens)[None, :] + turns[:, None]
    claims = tl.load(claims_ptr + claim_offsets, mask=inside, other=0)
    rows = tl.load(rows_ptr + claim_offsets, mask=inside, other=0)
    slots = rows - tl.load(expert_offsets_ptr + claims, mask=inside, other=0)
    kept = inside & (claims < num_experts) & (slots < capacity)
    owners = turns.to(tl.int64)
    if turns_ptr is not None:
        owners = tl.load(turns_ptr + turns, mask=exists, other=0)
    offsets = element_offset(owners, K)[:, None] + ranks[None, :]
    gates = tl.load(gates_ptr + offsets, mask=kept, other=0.0)
    if NORMALIZE == "after":
        gates = tl.where(kept, _normalize(gates), 0.0)
    tl.store(gates_ptr + offsets, gates, mask=inside)
    tl.store(expert_ids_ptr + offsets, tl.where(kept, claims, num_experts), mask=inside)


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["tokens"])
def _route_backward_kernel(
    logits_ptr,
    choices_ptr,
    expert_ids_ptr,
    grad_gates_ptr,
    grad_logits_ptr,
    tokens,
    num_experts,
    stride_logits_row,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    E_PADDED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """grad_logits = probs * (grad_probs - <grad_probs, probs>), grad_probs zero but at choices.

    One program owns a block of tokens and all experts.
    """
    rows = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    columns = tl.arange(0, E_PADDED)
    ranks = tl.arange(0, K_PADDED)
    exists = rows < tokens
    inside = exists[:, None] & (columns < num_experts)[None, :]
    claimed = exists[:, None] & (ranks < K)[None, :]
    logit_offsets = element_offset(rows, stride_logits_row)
    scores = tl.load(
        logits_ptr + (logit_offsets[:, None] + columns[None, :]), mask=inside, other=0.0
    )
    probs, best, total = softmax(scores, columns, num_experts)

    offsets = element_offset(rows, K)[:, None] + ranks[None, :]
    choices = tl.load(choices_ptr + offsets, mask=claimed, other=0)
    kept = tl.load(expert_ids_ptr + offsets, mask=claimed, other=num_experts) < num_experts
    grad = tl.load(grad_gates_ptr + offsets, mask=kept, other=0.0)
    chosen = tl.load(logits_ptr + (logit_offsets[:, None] + choices), mask=claimed, other=0.0)
    chosen = tl.where(claimed, tl.exp(chosen - best[:, None]) / total[:, None], 0.0)

    if NORMALIZE != "never":
        shares = chosen if NORMALIZE == "before" else tl.where(kept, chosen, 0.0)
        divisor = tl.sum(shares, 1)
        # Below epsilon the divisor is a constant, and no gradient flows through it.
        constant = divisor < EPSILON
        divisor = tl.where(constant, EPSILON, divisor)
        through = tl.where(constant, 0.0, tl.sum(grad * shares, 1) / divisor)
        grad = (grad - through[:, None]) / divisor[:, None]
    if NORMALIZE == "after":
        grad = tl.where(kept, grad, 0.0)

    weighted = tl.where(claimed, grad * chosen, 0.0)
    grad_logits = -probs * tl.sum(weighted, 1)[:, None]
    for k in tl.static_range(K):
        choice = tl.sum(tl.where(ranks[None, :] == k, choices, 0), 1)
        share = tl.sum(tl.where(ranks[None, :] == k, weighted, 0.0), 1)
        is_chosen = columns[None, :] == choice[:, None]
        grad_logits += tl.where(is_chosen, share[:, None], 0.0)
    # A token that no expert keeps has no gradient, even if it is NaN.
    reached = tl.max(kept.to(tl.int32), 1) > 0
    grad_logits = tl.where(reached[:, None], grad_logits, 0.0)
    offsets = element_offset(rows, num_experts)[:, None] + columns[None, :]
    tl.store(grad_logits_ptr + offsets, grad_logits, mask=inside)


def block_of(num_experts: int, most: int = 64) -> int:
    """Return how many tokens a program takes, so that its tile has about 2048 scores."""
    return min(most, max(1, 2048 // triton.next_power_of_2(num_experts)))


def warps_of(num_experts: int) -> int:
    """Return how many warps hold a program's scores, a row of very many experts among them."""
    return min(16, max(4, triton.next_power_of_2(num_experts) // 512))


def route(
    router_logits: Tensor,
    padding: Tensor | None,
    noise: Tensor | None,
    *,
    capacity: int | None,
    top_k: int,
    policy: str,
    normalize: str,
    batch_prioritized: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return expert ids (T, K) int32, gates (T, K) float32 and choices (T, K) int32.

    Choices are what expert ids were before any claim was dropped; the gradient needs them.

    Args:
        router_logits: (T, E) float32.
        padding: (T,) bool or ``None``.
        noise: (T, E) for ``"sampling"``, (T,) for ``"random"``, float32; else ``None``.
        capacity: Most claims an expert takes, or ``None``.
        top_k: ``K``.
        policy: ``"all"``, ``"sampling"`` or ``"random"``.
        normalize: When gates are made to sum to one: ``"after"`` claims are dropped, ``"before"``,
            or ``"never"``.
        batch_prioritized: Whether tokens claim in descending order of their best probability.
    """
    tokens, num_experts = router_logits.shape
    binding = capacity is not None and capacity < tokens
    logits = inner_contiguous(router_logits)
    choices = logits.new_empty(tokens, top_k, dtype=torch.int32)
    gates = logits.new_empty(tokens, top_k)
    # Claims that must be counted stand choice by choice: all first choices before any second one.
    claims = choices.new_empty((top_k, tokens) if binding else (tokens, top_k))
    best_probs = logits.new_empty(tokens) if binding and batch_prioritized else None
    noise = None if noise is None else inner_contiguous(noise)
    block_tokens = block_of(num_experts)
    launch(
        _choose_kernel,
        (triton.cdiv(tokens, block_tokens),),
        logits_ptr=logits,
        noise_ptr=noise,
        padding_ptr=None if padding is None else padding.contiguous(),
        choices_ptr=choices,
        claims_ptr=claims,
        gates_ptr=gates,
        best_probs_ptr=best_probs,
        tokens=tokens,
        num_experts=num_experts,
        stride_logits_row=logits.stride(0),
        stride_noise_row=0 if noise is None else noise.stride(0),
        stride_claim_token=1 if binding else top_k,
        stride_claim_choice=tokens if binding else 1,
        K=top_k,
        K_PADDED=triton.next_power_of_2(top_k),
        E_PADDED=triton.next_power_of_2(num_experts),
        POLICY=policy,
        NORMALIZE=normalize,
        FINISH=not binding,
        BLOCK_TOKENS=block_tokens,
        num_warps=warps_of(num_experts),
    )
    if not binding:
        return claims, gates, choices
    expert_ids = torch.empty_like(choices)
    turns = None
    if best_probs is not None:
        turns = best_probs.argsort(descending=True, stable=True)
        claims = claims.index_select(1, turns)
    _, rows, offsets = expert_order(claims.view(-1, 1), num_experts)
    block_tokens = 128
    launch(
        _drop_kernel,
        (triton.cdiv(tokens, block_tokens),),
        claims_ptr=claims,
        rows_ptr=rows,
        expert_offsets_ptr=offsets,
        turns_ptr=turns,
        gates_ptr=gates,
        expert_ids_ptr=expert_ids,
        tokens=tokens,
        num_experts=num_experts,
        capacity=capacity,
        K=top_k,
        K_PADDED=triton.next_power_of_2(top_k),
        NORMALIZE=normalize,
        BLOCK_TOKENS=block_tokens,
    )
    return expert_ids, gates, choices


def route_backward(
    router_logits: Tensor,
    expert_ids: Tensor,
    choices: Tensor,
    grad_gates: Tensor,
    *,
    normalize: str,
) -> Tensor:
    """Return the gradient (T, E) float32 of the logits.

    Args:
        router_logits: (T, E) float32.
        expert_ids: (T, K) int32, contiguous; ``E`` where dropped.
        choices: (T, K) int32, contiguous.
        grad_gates: (T, K) float32.
        normalize: As in ``route``.
    """
    tokens, num_experts = router_logits.shape
    top_k = choices.shape[1]
    logits = inner_contiguous(router_logits)
    grad_logits = logits.new_empty(tokens, num_experts)
    block_tokens = block_of(num_experts)
    launch(
        _route_backward_kernel,
        (triton.cdiv(tokens, block_tokens),),
        logits_ptr=logits,
        choices_ptr=choices,
        expert_ids_ptr=expert_ids,
        grad_gates_ptr=grad_gates.contiguous(),
        grad_logits_ptr=grad_logits,
        tokens=tokens,
        num_experts=num_experts,
        stride_logits_row=logits.stride(0),
        K=top_k,
        K_PADDED=triton.next_power_of_2(top_k),
        E_PADDED=triton.next_power_of_2(num_experts),
        NORMALIZE=normalize,
        BLOCK_TOKENS=block_tokens,
        num_warps=warps_of(num_experts),
    )
    return grad_logits
