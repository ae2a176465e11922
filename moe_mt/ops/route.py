"""Choose experts and gates from router logits, under a capacity."""

import math
from typing import Any

import torch
from torch import Tensor

from moe_mt.errors import ConfigError
from moe_mt.ops.backend import register_op, use_triton

__all__ = ["expert_capacity", "route", "route_eager"]

POLICIES = ("all", "sampling", "random")
NORMALIZATIONS = ("after", "before", "never")


def expert_capacity(
    tokens: int,
    num_experts: int,
    *,
    training: bool,
    eval_fraction: float = 1.0,
    fixed: int | None = None,
) -> int:
    """Return how many tokens one expert takes in a call of ``tokens`` tokens.

    Evaluation with a positive fraction: ``ceil(fraction * tokens)``; 1.0 can never drop a token.
    Otherwise ``fixed``, or, where that is ``None``, ``2 * ceil(tokens / num_experts)``.

    Args:
        tokens: Tokens in the call, padding included.
        num_experts: Experts in the layer.
        training: Whether the training rule applies.
        eval_fraction: Capacity in evaluation as a fraction of the tokens; not positive means
            that the training rule applies there too.
        fixed: Capacity in training, in tokens, or ``None`` for the rule above.

    Source: NLLB Team, arXiv:2207.04672, section 6.2; the rules of fairseq's top-2 gate.
    """
    if not training and eval_fraction > 0:
        return math.ceil(eval_fraction * tokens)
    return fixed if fixed is not None else 2 * math.ceil(tokens / num_experts)


def route(
    router_logits: Tensor,
    *,
    capacity: int | None = None,
    top_k: int = 2,
    padding: Tensor | None = None,
    policy: str = "all",
    normalize: str = "after",
    batch_prioritized: bool = False,
    groups: int = 1,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose ``top_k`` experts per token and the gates that weight their outputs.

    Probabilities are taken in the dtype of the logits (float32 in every model here, and the only
    one that the kernel takes: others are routed by the definition on every device). The first
    expert is the most probable one (lowest index among equals), the next ones the most probable of
    the rest. Tokens claim their experts in order, first choices of all tokens before any second
    choice; a claim beyond ``capacity`` is dropped: its expert id becomes ``E``, its gate zero.

    More than one group under a capacity that can bind is routed by the definition too.

    Args:
        router_logits: (T, E) float32. Scores before softmax.
        capacity: Most tokens one expert takes of each group, or ``None`` for no limit.
        top_k: Experts per token, at most ``E``.
        padding: (T,) bool, true where a token is padding and claims no expert; or ``None``.
        policy: ``"all"`` keeps every claim; ``"sampling"`` chooses later experts by logits plus
            Gumbel noise; ``"random"`` keeps a second claim with probability ``2 * gate``.
        normalize: When gates are scaled to sum to one: ``"after"`` claims are dropped (what is
            kept gets it all), ``"before"`` (a dropped gate is lost), or ``"never"`` (gates are
            the probabilities).
        batch_prioritized: Whether tokens claim in descending order of their best probability
            instead of in sequence order.
        groups: Into how many equal runs of tokens the call is parted. Each group counts its claims
            by itself.
        noise: For ``"sampling"``, (T, E) float32 Gumbel(0, 1); for ``"random"``, (T,) float32
            uniform in [0, 1). A tensor, so that the result is a function of the arguments.

    Returns:
        Expert ids (T, K) int32 and gates (T, K) in the logits' dtype, first choice first.

    Raises:
        ConfigError: If ``top_k`` is not between 1 and ``E``, the policy or normalisation is
            unknown, noise that the policy needs is missing, the shape of noise or padding is
            another one, or the tokens do not part into ``groups``.

    Source: NLLB Team, arXiv:2207.04672, section 6.2; top-2 gating of GShard, arXiv:2006.16668;
    batch prioritised routing of V-MoE, arXiv:2106.05974; plain probabilities and groups of the
    Switch Transformer, arXiv:2101.03961.
    """
    _check(router_logits, top_k, policy, noise)
    _check_normalization(normalize)
    _check_groups(router_logits, groups)
    check_padding(router_logits, padding)
    if groups > 1 and capacity is not None and capacity >= router_logits.shape[0] // groups:
        capacity = None
    counted_together = groups == 1 or capacity is None
    is_float32 = router_logits.dtype == torch.float32
    if use_triton(router_logits) and is_float32 and counted_together:
        gates, expert_ids, _ = _route(
            router_logits,
            padding,
            None if policy == "all" else noise,
            capacity,
            top_k,
            policy,
            normalize,
            batch_prioritized,
        )
        return expert_ids, gates
    return route_eager(
        router_logits,
        capacity=capacity,
        top_k=top_k,
        padding=padding,
        policy=policy,
        normalize=normalize,
        batch_prioritized=batch_prioritized,
        groups=groups,
        noise=noise,
    )


def route_eager(
    router_logits: Tensor,
    *,
    capacity: int | None = None,
    top_k: int = 2,
    padding: Tensor | None = None,
    policy: str = "all",
    normalize: str = "after",
    batch_prioritized: bool = False,
    groups: int = 1,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Define ``route``."""
    num_experts = router_logits.shape[-1]
    if padding is not None:
        # What a padded token holds decides nothing; a NaN would spoil even a gradient of zero.
        router_logits = router_logits.masked_fill(padding[:, None], 0)
    probs = router_logits.softmax(dim=-1)
    expert_ids = _choose(router_logits, top_k, noise if policy == "sampling" else None)
    gates = probs.gather(-1, expert_ids)
    if normalize == "before":
        gates = _normalize(gates)
    if capacity is not None and capacity >= router_logits.shape[0] // groups:
        capacity = None
    if policy != "random" and padding is None and capacity is None:
        # Nothing can be dropped, as sizes and options tell: decoding takes this way.
        return expert_ids.to(torch.int32), _normalize(gates) if normalize == "after" else gates
    kept = torch.ones_like(expert_ids, dtype=torch.bool)
    if policy == "random":
        assert noise is not None
        kept[:, 1:] = 2 * gates[:, 1:] > noise[:, None]
    if padding is not None:
        kept &= ~padding[:, None]
    if capacity is not None:
        order = _by_best_probability(probs, groups) if batch_prioritized else None
        kept &= _slots(expert_ids, kept, num_experts, order, groups) < capacity
    # Not a product: a dropped gate is zero whatever a padded token holds, NaN included.
    gates = gates.masked_fill(~kept, 0)
    if normalize == "after":
        # Zero again: beside a NaN, zero divided is none.
        gates = _normalize(gates).masked_fill(~kept, 0)
    return expert_ids.masked_fill(~kept, num_experts).to(torch.int32), gates


def check_padding(router_logits: Tensor, padding: Tensor | None) -> None:
    """Raise ``ConfigError`` unless padding is ``None`` or says of each token whether it is one."""
    tokens = router_logits.shape[0]
    if padding is not None and (padding.shape != (tokens,) or padding.dtype != torch.bool):
        raise ConfigError(
            f"padding is {padding.dtype} {tuple(padding.shape)}; it must be bool ({tokens},), "
            "true where a token is padding"
        )


def _check(router_logits: Tensor, top_k: int, policy: str, noise: Tensor | None) -> None:
    tokens, num_experts = router_logits.shape
    if not 1 <= top_k <= num_experts:
        raise ConfigError(f"top_k is {top_k}; it must be between 1 and the {num_experts} experts")
    if policy not in POLICIES:
        raise ConfigError(f"second expert policy {policy!r} is unknown; choose from {POLICIES}")
    if policy == "all":
        return
    if noise is None:
        raise ConfigError(f"second expert policy {policy!r} needs its noise as a tensor")
    shape = (tokens, num_experts) if policy == "sampling" else (tokens,)
    if noise.shape != shape:
        raise ConfigError(
            f"noise is {tuple(noise.shape)}; second expert policy {policy!r} needs {shape}"
        )


def _check_normalization(normalize: str) -> None:
    if normalize not in NORMALIZATIONS:
        raise ConfigError(f"normalize {normalize!r} is unknown; choose from {NORMALIZATIONS}")


def _check_groups(router_logits: Tensor, groups: int) -> None:
    tokens = router_logits.shape[0]
    if groups < 1 or tokens % groups != 0:
        raise ConfigError(
            f"groups is {groups}; it must be positive and part the {tokens} tokens into equal runs"
        )


def _choose(router_logits: Tensor, top_k: int, noise: Tensor | None) -> Tensor:
    """Return (T, K) int64: one argmax a choice, because argmax promises the lowest index."""
    scores = router_logits.detach()
    choices = [scores.argmax(-1, keepdim=True)]
    if noise is not None:
        scores = scores + noise
    for _ in range(top_k - 1):
        scores = scores.scatter(-1, choices[-1], -torch.inf)
        choices.append(scores.argmax(-1, keepdim=True))
    return torch.cat(choices, dim=-1)


def _normalize(gates: Tensor) -> Tensor:
    total = gates.sum(-1, keepdim=True)
    return gates / total.clamp(min=torch.finfo(gates.dtype).eps)


def _by_best_probability(probs: Tensor, groups: int) -> Tensor:
    """Return (T,): the tokens of each group, in descending order of their best probability."""
    size = probs.shape[0] // groups
    best = probs.amax(-1).view(groups, size)
    places = best.argsort(dim=-1, descending=True, stable=True)
    starts = size * torch.arange(groups, device=probs.device)
    return (starts[:, None] + places).flatten()


def _slots(
    expert_ids: Tensor, kept: Tensor, num_experts: int, order: Tensor | None, groups: int
) -> Tensor:
    """Return (T, K): how many earlier claims the expert had in its group, in claiming order."""
    tokens, top_k = expert_ids.shape
    if order is None:
        order = torch.arange(tokens, device=expert_ids.device)
    # Choice-major, so that all first choices stand before any second one.
    by_group = groups, tokens // groups, top_k
    claims = expert_ids[order].view(by_group).transpose(1, 2).flatten(1)
    wanted = kept[order].view(by_group).transpose(1, 2).flatten(1)
    one_hot = torch.nn.functional.one_hot(claims, num_experts) * wanted[..., None]
    earlier = one_hot.cumsum(1) - one_hot
    slots = earlier.gather(-1, claims[..., None]).view(groups, top_k, tokens // groups)
    slots = slots.transpose(1, 2).reshape(tokens, top_k)
    return torch.empty_like(slots).index_copy_(0, order, slots)


def _launch(
    router_logits: Tensor,
    padding: Tensor | None,
    noise: Tensor | None,
    capacity: int | None,
    top_k: int,
    policy: str,
    normalize: str,
    batch_prioritized: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from moe_mt.kernels import route as kernels

    expert_ids, gates, choices = kernels.route(
        router_logits,
        padding,
        noise,
        capacity=capacity,
        top_k=top_k,
        policy=policy,
        normalize=normalize,
        batch_prioritized=batch_prioritized,
    )
    return gates, expert_ids, choices


def _launch_backward(
    router_logits: Tensor,
    expert_ids: Tensor,
    choices: Tensor,
    grad_gates: Tensor,
    normalize: str,
) -> Tensor:
    from moe_mt.kernels import route as kernels

    return kernels.route_backward(
        router_logits,
        expert_ids,
        choices,
        grad_gates,
        normalize=normalize,
    )


def _fake(
    router_logits: Tensor,
    padding: Tensor | None,
    noise: Tensor | None,
    capacity: int | None,
    top_k: int,
    *rest: Any,  # noqa: ANN401
) -> tuple[Tensor, Tensor, Tensor]:
    shape = router_logits.shape[0], top_k
    expert_ids = router_logits.new_empty(shape, dtype=torch.int32)
    return router_logits.new_empty(shape), expert_ids, torch.empty_like(expert_ids)


def _fake_backward(router_logits: Tensor, *rest: Any) -> Tensor:  # noqa: ANN401
    return router_logits.new_empty(router_logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:  # noqa: ANN401
    _, expert_ids, choices = output
    ctx.save_for_backward(inputs[0], expert_ids, choices)
    ctx.normalize = inputs[6]


def _backward(ctx: Any, grad_gates: Tensor, grad_ids: Any, grad_choices: Any) -> tuple[Any, ...]:  # noqa: ANN401
    grad = _route_backward(*ctx.saved_tensors, grad_gates, ctx.normalize)
    return grad, *[None] * 7


# Floats first: torch.library.opcheck adds up outputs in the dtype of the first.
_route = register_op(
    "route(Tensor router_logits, Tensor? padding, Tensor? noise, SymInt? capacity, int top_k, "
    "str policy, str normalize, bool batch_prioritized) "
    "-> (Tensor, Tensor, Tensor)",
    _launch,
    _fake,
    backward=_backward,
    setup_context=_save,
)
_route_backward = register_op(
    "route_backward(Tensor router_logits, Tensor expert_ids, Tensor choices, Tensor grad_gates, "
    "str normalize) -> Tensor",
    _launch_backward,
    _fake_backward,
)
