"""Sum up what a router did, for the losses that keep it in balance."""

from typing import Any

import torch
from torch import Tensor

from moe_mt.ops.backend import register_op, use_triton
from moe_mt.ops.route import check_padding

__all__ = ["router_statistics", "router_statistics_eager"]


def router_statistics(
    router_logits: Tensor, padding: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return first choices, summed probabilities and summed squared logsumexp of real tokens.

    Everything is summed in float32 at least. The first choices are counts without a gradient; they
    add up to the number of real tokens, which is thus known without waiting for the device.

    Args:
        router_logits: (T, E), any float dtype. Scores before softmax.
        padding: (T,) bool, true where a token is padding and counts nowhere; or ``None``.

    Returns:
        First choices (E,) int64: how many tokens each expert is the most probable one of (lowest
        index among equals). Probabilities (E,): their sums over tokens. And (): the sum over
        tokens of ``logsumexp(router_logits) ** 2``.

    Raises:
        ConfigError: If the padding is not bool (T,).

    Source: GShard, arXiv:2006.16668, section 2.2; ST-MoE, arXiv:2202.08906, section 3.
    """
    check_padding(router_logits, padding)
    if use_triton(router_logits):
        probs, squares, first_choices = _router_statistics(router_logits, padding)
        return first_choices, probs, squares
    return router_statistics_eager(router_logits, padding)


def router_statistics_eager(
    router_logits: Tensor, padding: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Define ``router_statistics``."""
    logits = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    experts = torch.arange(logits.shape[-1], device=logits.device)
    first_choices = logits.argmax(-1, keepdim=True) == experts
    if padding is None:
        return first_choices.sum(0), logits.softmax(-1).sum(0), logits.logsumexp(-1).square().sum()
    # Masked before as well as after: the gradient of a masked NaN would still be NaN.
    logits = logits.masked_fill(padding[:, None], 0)
    return (
        first_choices.masked_fill(padding[:, None], False).sum(0),
        logits.softmax(-1).masked_fill(padding[:, None], 0).sum(0),
        logits.logsumexp(-1).square().masked_fill(padding, 0).sum(),
    )


def _launch(router_logits: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    from moe_mt.kernels import router_statistics as kernels

    first_choices, probs, squares = kernels.router_statistics(router_logits, padding)
    return probs, squares, first_choices


def _launch_backward(
    router_logits: Tensor, padding: Tensor | None, grad_probs: Tensor, grad_squares: Tensor
) -> Tensor:
    from moe_mt.kernels import router_statistics as kernels

    return kernels.router_statistics_backward(router_logits, padding, grad_probs, grad_squares)


def _fake(router_logits: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    num_experts = router_logits.shape[-1]
    return (
        router_logits.new_empty(num_experts, dtype=torch.float32),
        router_logits.new_empty((), dtype=torch.float32),
        router_logits.new_empty(num_experts, dtype=torch.int64),
    )


def _fake_backward(
    router_logits: Tensor, padding: Tensor | None, grad_probs: Tensor, grad_squares: Tensor
) -> Tensor:
    return router_logits.new_empty(router_logits.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Any) -> None:  # noqa: ANN401
    ctx.save_for_backward(*inputs)


def _backward(
    ctx: Any,  # noqa: ANN401
    grad_probs: Tensor,
    grad_squares: Tensor,
    grad_choices: Any,  # noqa: ANN401
) -> tuple[Tensor, None]:
    return _router_statistics_backward(*ctx.saved_tensors, grad_probs, grad_squares), None


# Floats first: torch.library.opcheck adds up outputs in the dtype of the first.
_router_statistics = register_op(
    "router_statistics(Tensor router_logits, Tensor? padding) -> (Tensor, Tensor, Tensor)",
    _launch,
    _fake,
    backward=_backward,
    setup_context=_save,
)
_router_statistics_backward = register_op(
    "router_statistics_backward(Tensor router_logits, Tensor? padding, Tensor grad_probs, "
    "Tensor grad_squares) -> Tensor",
    _launch_backward,
    _fake_backward,
)
