"""The router of NLLB-MoE: two experts per token."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_mt.moe.routing import Routing
from moe_mt.ops import expert_capacity, route

__all__ = ["Top2Router"]


class Top2Router(nn.Module):
    """Score every expert for every token and keep the best two, under a capacity.

    Pure: a forward pass changes nothing, so that evaluation never leaks into training. The scores
    are computed in ``router_dtype`` whatever the dtype of the model.

    Source: NLLB Team, arXiv:2207.04672, section 6.2.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        bias: bool = False,
        router_dtype: torch.dtype = torch.float32,
        policy: str = "all",
        normalize_before_dropping: bool = False,
        batch_prioritized: bool = False,
        route_padding: bool = False,
        eval_capacity_fraction: float = 1.0,
        train_capacity: int | None = None,
    ) -> None:
        """Build a router.

        Args:
            d_model: Width of a token.
            num_experts: Experts to choose from, at least two.
            bias: Whether the scores have a bias.
            router_dtype: Precision of scores, probabilities and choices.
            policy: What becomes of second choices: ``"all"``, ``"sampling"`` or ``"random"``.
            normalize_before_dropping: See ``ops.route``.
            batch_prioritized: See ``ops.route``.
            route_padding: Whether padding claims experts like any token.
            eval_capacity_fraction: Capacity in evaluation as a fraction of the tokens.
            train_capacity: Capacity in training; ``None`` is ``2 * ceil(T / E)``.
        """
        super().__init__()
        self.num_experts = num_experts
        self.router_dtype = router_dtype
        self.policy = policy
        self.normalize_before_dropping = normalize_before_dropping
        self.batch_prioritized = batch_prioritized
        self.route_padding = route_padding
        self.eval_capacity_fraction = eval_capacity_fraction
        self.train_capacity = train_capacity
        self.has_bias = bias
        self.classifier = nn.Linear(d_model, num_experts, bias=bias)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Routing:
        """Route tokens.

        Args:
            x: (T, d_model). Tokens, flattened sentence by sentence.
            padding: (T,) bool, true where a token is padding, or ``None``.

        Returns:
            Expert ids, gates and router logits of every token.
        """
        if self.route_padding:
            padding = None
        # Autocast would take the scores out of the router's dtype again.
        with torch.autocast(x.device.type, enabled=False):
            return self._route(x, padding)

    def _route(self, x: Tensor, padding: Tensor | None) -> Routing:
        dtype = self.router_dtype
        router_logits = functional.linear(x.to(dtype), self.classifier.weight.to(dtype))
        if self.has_bias:
            router_logits = router_logits + self.classifier.bias.to(dtype)
        expert_ids, gates = route(
            router_logits,
            capacity=expert_capacity(
                x.shape[0],
                self.num_experts,
                training=self.training,
                eval_fraction=self.eval_capacity_fraction,
                fixed=self.train_capacity,
            ),
            padding=padding,
            policy=self.policy,
            normalize_before_dropping=self.normalize_before_dropping,
            batch_prioritized=self.batch_prioritized,
            noise=self._noise(router_logits),
        )
        return Routing(
            expert_ids=expert_ids, gates=gates, router_logits=router_logits, padding=padding
        )

    def _noise(self, router_logits: Tensor) -> Tensor | None:
        if self.policy == "sampling":
            return (
                torch.distributions.Gumbel(0.0, 1.0).rsample(router_logits.shape).to(router_logits)
            )
        if self.policy == "random":
            return torch.rand(router_logits.shape[0], device=router_logits.device)
        return None
