"""The router of NLLB-MoE: two experts per token."""

import torch
from torch import Tensor, nn

from moe_mt.moe.routing import Routing
from moe_mt.ops import expert_capacity, route, router_logits

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
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            return self._route(x, padding)

    def _route(self, x: Tensor, padding: Tensor | None) -> Routing:
        logits = self._score(x)
        return self.choose(logits, padding, self.noise(logits))

    def _score(self, x: Tensor) -> Tensor:
        if type(self.classifier) is nn.Linear:
            bias = self.classifier.bias if self.has_bias else None
            return router_logits(x, self.classifier.weight, bias, dtype=self.router_dtype)
        # LoRA or a quantised layer in its place is called as the module that it is.
        wide = [p.dtype for p in self.classifier.parameters() if p.is_floating_point()]
        return self.classifier(x.to(wide[0]) if wide else x).to(self.router_dtype)

    def choose(
        self, logits: Tensor, padding: Tensor | None = None, noise: Tensor | None = None
    ) -> Routing:
        """Route tokens by their router logits.

        Args:
            logits: (T, E).
            padding: (T,) bool, true for tokens that claim no expert, or ``None``.
            noise: What ``noise`` returned for these logits.
        """
        expert_ids, gates = route(
            logits,
            capacity=expert_capacity(
                logits.shape[0],
                self.num_experts,
                training=self.training,
                eval_fraction=self.eval_capacity_fraction,
                fixed=self.train_capacity,
            ),
            padding=padding,
            policy=self.policy,
            normalize_before_dropping=self.normalize_before_dropping,
            batch_prioritized=self.batch_prioritized,
            noise=noise,
        )
        return Routing(expert_ids=expert_ids, gates=gates, router_logits=logits, padding=padding)

    def noise(self, logits: Tensor) -> Tensor | None:
        """Draw what the policy adds to logits (T, E), or compares second choices with (T,)."""
        if self.policy == "sampling":
            # As torch.distributions draws Gumbel(0, 1), number for number, but on the device of
            # the logits and without a look at values, which would wait for it.
            float32 = torch.finfo(torch.float32)
            uniform = torch.rand(logits.shape, device=logits.device)
            uniform = float32.tiny + uniform * (1 - float32.eps - float32.tiny)
            return -(-uniform.log()).log().to(logits.dtype)
        if self.policy == "random":
            return torch.rand(logits.shape[0], device=logits.device)
        return None
