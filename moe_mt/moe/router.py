"""Routers: which experts each token goes to, and what their outputs weigh."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from moe_mt.errors import ConfigError
from moe_mt.moe.routing import Routing
from moe_mt.ops import expert_capacity, route, router_logits

__all__ = ["Router", "Top1Router", "Top2Router", "TopKRouter"]


class Router(nn.Module, ABC):
    """Score every expert for every token; what becomes of the scores is each router's own.

    Pure: a forward pass changes nothing, so that evaluation never leaks into training. The scores
    are computed in ``router_dtype`` whatever the dtype of the model.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        bias: bool,
        router_dtype: torch.dtype,
        route_padding: bool,
    ) -> None:
        """Build what scores.

        Args:
            d_model: Width of a token.
            num_experts: Experts to choose from.
            bias: Whether the scores have a bias.
            router_dtype: Precision of scores, probabilities and choices.
            route_padding: Whether padding claims experts like any token.
        """
        super().__init__()
        self.num_experts = num_experts
        self.router_dtype = router_dtype
        self.route_padding = route_padding
        self.has_bias = bias
        self.classifier = nn.Linear(d_model, num_experts, bias=bias)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Routing:
        """Route tokens.

        Args:
            x: (..., d_model). Tokens, sentence by sentence; leading axes are flattened in order to
                ``T`` tokens.
            padding: (...) bool, true where a token is padding, or ``None``.

        Returns:
            Expert ids, gates and router logits of every token.
        """
        padding = None if padding is None or self.route_padding else padding.reshape(-1)
        # Autocast would take the scores out of the router's dtype again.
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            # Of no sequence at all there is one group, of no token.
            return self._route(x.reshape(-1, x.shape[-1]), padding, x.shape[:-2].numel() or 1)

    @abstractmethod
    def _route(self, tokens: Tensor, padding: Tensor | None, sequences: int) -> Routing:
        """Route ``tokens`` (T, d_model), which are so many sequences of one length."""

    def _score(self, x: Tensor) -> Tensor:
        if type(self.classifier) is nn.Linear:
            bias = self.classifier.bias if self.has_bias else None
            return router_logits(x, self.classifier.weight, bias, dtype=self.router_dtype)
        # LoRA or a quantised layer in its place is called as the module that it is.
        wide = [p.dtype for p in self.classifier.parameters() if p.is_floating_point()]
        return self.classifier(x.to(wide[0]) if wide else x).to(self.router_dtype)


class Top2Router(Router):
    """The router of NLLB-MoE: the best two experts per token, under a capacity.

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
            normalize_before_dropping: Whether gates are scaled to sum to one before claims are
                dropped rather than after.
            batch_prioritized: See ``ops.route``.
            route_padding: Whether padding claims experts like any token.
            eval_capacity_fraction: Capacity in evaluation as a fraction of the tokens.
            train_capacity: Capacity in training; ``None`` is ``2 * ceil(T / E)``.
        """
        super().__init__(
            d_model, num_experts, bias=bias, router_dtype=router_dtype, route_padding=route_padding
        )
        self.policy = policy
        self.normalize_before_dropping = normalize_before_dropping
        self.batch_prioritized = batch_prioritized
        self.eval_capacity_fraction = eval_capacity_fraction
        self.train_capacity = train_capacity

    def _route(self, tokens: Tensor, padding: Tensor | None, sequences: int) -> Routing:
        logits = self._score(tokens)
        return self.choose(logits, padding, self.noise(logits))

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
            normalize="before" if self.normalize_before_dropping else "after",
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


class TopKRouter(Router):
    """The router of Mixtral, Qwen-MoE and OLMoE: the best ``K`` experts per token, none dropped.

    Source: Jiang et al., arXiv:2401.04088, section 2.1; plain probabilities as gates as in
    Muennighoff et al., arXiv:2409.02060.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        bias: bool = False,
        router_dtype: torch.dtype = torch.float32,
        normalize: bool = True,
        route_padding: bool = False,
    ) -> None:
        """Build a router.

        Args:
            d_model: Width of a token.
            num_experts: Experts to choose from.
            top_k: Experts per token.
            bias: Whether the scores have a bias.
            router_dtype: Precision of scores, probabilities and choices.
            normalize: Whether a token's gates are scaled to sum to one (Mixtral), or are the
                experts' probabilities among all (OLMoE).
            route_padding: Whether padding claims experts like any token.

        Raises:
            ConfigError: If ``top_k`` is not between 1 and ``num_experts``.
        """
        if not 1 <= top_k <= num_experts:
            raise ConfigError(
                f"top_k is {top_k}; it must be between 1 and the {num_experts} experts"
            )
        super().__init__(
            d_model, num_experts, bias=bias, router_dtype=router_dtype, route_padding=route_padding
        )
        self.top_k = top_k
        self.normalize = normalize

    def _route(self, tokens: Tensor, padding: Tensor | None, sequences: int) -> Routing:
        logits = self._score(tokens)
        expert_ids, gates = route(
            logits,
            top_k=self.top_k,
            padding=padding,
            normalize="after" if self.normalize else "never",
        )
        return Routing(expert_ids=expert_ids, gates=gates, router_logits=logits, padding=padding)


class Top1Router(Router):
    """The router of the Switch Transformer: one expert per token, weighted by its probability.

    Capacity is counted in each sequence: of ``x`` (B, L, d_model), an expert takes the first
    ``capacity`` tokens of each of the ``B`` rows that choose it, and later ones are dropped. Tokens
    without a batch axis are one sequence.

    Source: Fedus et al., arXiv:2101.03961, section 2.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        bias: bool = False,
        router_dtype: torch.dtype = torch.float32,
        capacity: int | None = None,
        jitter: float = 0.0,
        route_padding: bool = False,
    ) -> None:
        """Build a router.

        Args:
            d_model: Width of a token.
            num_experts: Experts to choose from.
            bias: Whether the scores have a bias.
            router_dtype: Precision of scores, probabilities and choices.
            capacity: Most tokens that one expert takes of a sequence, in training and evaluation;
                ``None`` drops none.
            jitter: In training, what is scored is multiplied by numbers drawn evenly from
                ``1 - jitter`` to ``1 + jitter``; experts get the tokens as they are.
            route_padding: Whether padding claims experts like any token.
        """
        super().__init__(
            d_model, num_experts, bias=bias, router_dtype=router_dtype, route_padding=route_padding
        )
        self.capacity = capacity
        self.jitter = jitter

    def _route(self, tokens: Tensor, padding: Tensor | None, sequences: int) -> Routing:
        logits = self._score(self._jittered(tokens))
        expert_ids, gates = route(
            logits,
            capacity=self.capacity,
            top_k=1,
            padding=padding,
            normalize="never",
            groups=sequences,
        )
        return Routing(expert_ids=expert_ids, gates=gates, router_logits=logits, padding=padding)

    def _jittered(self, tokens: Tensor) -> Tensor:
        if not self.training or self.jitter == 0:
            return tokens
        wide = tokens.to(self.router_dtype)
        return wide * torch.empty_like(wide).uniform_(1 - self.jitter, 1 + self.jitter)
