"""The mixture-of-experts layer: route, dispatch, compute, combine."""

import torch
from torch import Tensor, nn

from moe_mt.moe.dispatcher import Dispatcher, LocalDispatcher
from moe_mt.moe.experts import Experts
from moe_mt.moe.router import Router
from moe_mt.moe.routing import Routing

__all__ = ["MoELayer", "mask_outputs"]


class MoELayer(nn.Module):
    """A feed-forward layer whose weights are chosen token by token.

    The layer knows neither where experts live (the dispatcher does) nor what their weights are
    (the experts do).
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        *,
        token_dropout: float = 0.0,
        dispatcher: Dispatcher | None = None,
    ) -> None:
        """Join a router and experts.

        Args:
            router: ``(x (..., d_model), padding (...) | None) -> Routing`` of the tokens,
                flattened.
            experts: ``(x, expert_ids, gates, residual) -> (T, d_model)``.
            token_dropout: Expert-output masking: in training each expert output vector is zeroed
                with this probability, without rescaling; in evaluation outputs are multiplied by
                ``1 - token_dropout`` (NLLB Team, arXiv:2207.04672, section 6.3).
            dispatcher: Where tokens go; all experts on this device where ``None``.
        """
        super().__init__()
        self.router = router
        self.experts = experts
        self.token_dropout = token_dropout
        self.dispatcher: Dispatcher = dispatcher or LocalDispatcher()

    def forward(
        self, x: Tensor, padding: Tensor | None = None, residual: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """Apply the layer.

        Args:
            x: (..., d_model). Tokens; leading axes are flattened in order.
            padding: (...) bool, true where a token is padding, or ``None``.
            residual: Shaped like ``x``; added to the mixture before its one rounding. ``None``
                adds nothing.

        Returns:
            The mixture, shaped like ``x`` (zero, or the residual, where a token reached no
            expert), and the routing.
        """
        routing: Routing = self.router(x, padding)
        tokens = x.reshape(-1, x.shape[-1])
        mixture = self.dispatcher.dispatch(
            self.experts,
            tokens,
            routing.expert_ids,
            mask_outputs(routing.gates, self.token_dropout, training=self.training),
            None if residual is None else residual.reshape(tokens.shape),
        )
        return mixture.view(x.shape), routing


def mask_outputs(gates: Tensor, dropout: float, *, training: bool) -> Tensor:
    """Return gates (T, K) with which expert outputs are masked, or scaled in evaluation.

    Args:
        gates: (T, K).
        dropout: Probability that an expert's whole output for a token is zeroed in training,
            without rescaling; in evaluation outputs are multiplied by ``1 - dropout``.
        training: Which of the two.

    Source: NLLB Team, arXiv:2207.04672, section 6.3.
    """
    if dropout == 0:
        return gates
    if not training:
        return gates * (1 - dropout)
    return gates * (torch.rand_like(gates) >= dropout)
