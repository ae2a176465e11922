"""Layers of transformers whose experts are modules: another ``forward`` for each kind.

Routers stay the model's own: what they draw, record and learn does not change.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moe_mt.integrations.expert_modules import ExpertLayers, dropout_of
from moe_mt.integrations.patched import Patched
from moe_mt.integrations.versions import transformers_major
from moe_mt.moe import ExpertSlices, experts_in, mask_outputs

__all__ = ["DeepseekBlock", "NllbMoeBlock", "SoftmaxTopKBlock", "SwitchBlock"]

W1_W2_W3 = ExpertLayers(up_proj="w3", down_proj="w2", gate_proj="w1")
UP_DOWN_GATE = ExpertLayers(up_proj="up_proj", down_proj="down_proj", gate_proj="gate_proj")


class _Block(Patched):
    """A layer whose ``experts`` have experts as children: computed all at once, over a stack."""

    router: Any
    gate: Any
    experts: Any
    slices: ExpertSlices

    @classmethod
    def layers(cls, module: Any) -> ExpertLayers:  # noqa: ANN401
        """Return what the layers of the experts are called."""
        return W1_W2_W3 if hasattr(next(iter(module.experts.children())), "w1") else UP_DOWN_GATE

    @classmethod
    def obstacle(cls, module: Any) -> str | None:  # noqa: ANN401
        """Return what state of a layer is in the way, or ``None`` if it can be patched."""
        return super().obstacle(module) or cls.layers(module).obstacle(module.experts)

    @classmethod
    def description(cls, module: Any) -> str:  # noqa: ANN401
        """Return what a module is, in a few words."""
        return f"{type(module).__name__}, {len(experts_in(module.experts))} experts"

    def attach(self) -> None:
        """Stack the weights, one expert after the other: none is in memory twice for long."""
        self.slices = self.layers(self).slices(self.experts)
        self.slices.stacked.train(self.training)
        self.slices.gather()

    def detach(self) -> None:
        """Let go of the stack, which lives on as what the experts' parameters are slices of."""
        del self.slices

    def mix(self, x: Tensor, expert_ids: Tensor, gates: Tensor) -> Tensor:
        """Return the mixture, shaped as ``x`` (..., d_model) and in its dtype."""
        tokens = x.reshape(-1, x.shape[-1])
        self._follow_dropout()
        mixture = self.slices.of(self.experts)(tokens, expert_ids.int(), gates.float())
        return mixture.to(x.dtype).view(x.shape)

    def _follow_dropout(self) -> None:
        """Take over the probability that the experts' dropout has now."""
        stacked = self.slices.stacked
        now = dropout_of(self.slices.made[0])
        if stacked.activation_dropout != now:
            stacked.activation_dropout = now

    def train(self, mode: bool = True) -> "_Block":
        """Set training mode, of the stacked experts too."""
        self.slices.stacked.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Block":
        """Move or cast the experts, then stack their weights again."""
        super()._apply(fn, recurse)
        self.slices.gather()
        return self

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401
        """Load, and notice at the next call if parameters were replaced (``assign=True``)."""
        super()._load_from_state_dict(*arguments, **options)
        self.slices.loaded = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, whose slices were copied one by one."""
        super().__setstate__(state)
        self.slices.rebind()


class NllbMoeBlock(_Block):
    """``NllbMoeSparseMLP``: two experts a token, as its router chose them."""

    @classmethod
    def layers(cls, module: Any) -> ExpertLayers:  # noqa: ANN401
        """Return what the layers of the experts are called."""
        return ExpertLayers(up_proj="fc1", down_proj="fc2", activation="act")

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> Any:  # noqa: ANN401
        """Compute what transformers 4.57 does.

        Args:
            hidden_states: (B, L, d_model).
            padding_mask: As the router takes it.

        Returns:
            The mixture (B, L, d_model); in transformers 4 also the gates (T, E) and the first
            choices (T,).
        """
        # The router of transformers 5 is given tokens, that of 4 sentences.
        rows = hidden_states.flatten(0, 1) if transformers_major() >= 5 else hidden_states
        top_1_mask, router_probs = self.router(rows, padding_mask)[:2]
        gates, expert_ids = router_probs.topk(2)
        expert_ids = expert_ids.masked_fill(gates == 0, router_probs.shape[-1])
        # In transformers 5 the experts have it, in 4 the layer.
        source: Any = self if "moe_token_dropout" in vars(self) else self.experts
        gates = mask_outputs(gates, source.moe_token_dropout, training=self.training)
        output = self.mix(hidden_states, expert_ids, gates)
        if transformers_major() >= 5:
            return output
        return output, (router_probs, top_1_mask.argmax(-1))


class SwitchBlock(_Block):
    """``SwitchTransformersSparseMLP``: one expert a token, with a capacity in every sequence."""

    @classmethod
    def layers(cls, module: Any) -> ExpertLayers:  # noqa: ANN401
        """Return what the layers of the experts are called."""
        return ExpertLayers(up_proj="wi", down_proj="wo", activation="act")

    def forward(self, hidden_states: Tensor) -> Any:  # noqa: ANN401
        """Compute what transformers 4.57 does: versions 5.0 to 5.17 forget the capacity.

        Args:
            hidden_states: (B, L, d_model).

        Returns:
            The mixture (B, L, d_model), zero where an expert had no place left; in transformers 4
            also the router logits (B, L, E) and the experts (B, L).
        """
        sentences = hidden_states.shape[:2]
        outputs = self.router(hidden_states)
        # Versions return choices (one-hot, zero where dropped) and probabilities in either order.
        one_hot = next(output for output in outputs if not output.is_floating_point())
        gates = next(output for output in outputs if output.is_floating_point())
        one_hot = one_hot.view(*sentences, -1)
        place = (one_hot.cumsum(1) * one_hot).sum(-1)
        kept = (place > 0) & (place <= self.router.expert_capacity)
        choices = one_hot.argmax(-1)
        expert_ids = choices.masked_fill(~kept, one_hot.shape[-1])
        gates = gates.masked_fill(~kept[..., None], 0)
        output = self.mix(hidden_states, expert_ids.view(-1, 1), gates.view(-1, 1))
        return output if transformers_major() >= 5 else (output, (outputs[2], choices))


class SoftmaxTopKBlock(_Block):
    """Layers of transformers 4 that take the best of a softmax: Mixtral, Qwen-MoE, OLMoE."""

    top_k: int
    shared_expert: Any
    shared_expert_gate: Any

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the layer.

        Args:
            hidden_states: (B, L, d_model).

        Returns:
            The mixture (B, L, d_model) and the router logits (T, E).
        """
        jitter = getattr(self, "jitter_noise", 0.0)
        if self.training and jitter > 0:
            noise = torch.empty_like(hidden_states).uniform_(1.0 - jitter, 1.0 + jitter)
            hidden_states = hidden_states * noise
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        router_logits = self.gate(tokens)
        # Mixtral has no such setting: its gates always sum to one.
        normalize = getattr(self, "norm_topk_prob", True)
        # As transformers does, so that equal logits, common in bfloat16, draw the same experts.
        gates, expert_ids = router_logits.softmax(-1, dtype=torch.float32).topk(self.top_k)
        if normalize:
            gates = gates / gates.sum(-1, keepdim=True)
        output = self.mix(tokens, expert_ids, gates)
        if hasattr(self, "shared_expert"):
            share = functional.sigmoid(self.shared_expert_gate(tokens))
            output = output + share * self.shared_expert(tokens)
        return output.view(hidden_states.shape), router_logits


class DeepseekBlock(_Block):
    """DeepSeek's layers of transformers 4: gate and shared experts stay, and their ``forward``."""

    def moe(self, hidden_states: Tensor, topk_indices: Tensor, topk_weights: Tensor) -> Tensor:
        """Return the mixture (T, d_model) of the routed experts.

        Args:
            hidden_states: (T, d_model).
            topk_indices: (T, K).
            topk_weights: (T, K).
        """
        return self.mix(hidden_states, topk_indices, topk_weights)
