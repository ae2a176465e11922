"""NLLB-MoE, as its page documents it."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from moe_mt.models import FeedForward, moe_layer, top2_router
from moe_mt.moe import MoELayer, Top2Router
from moe_mt.pretrained.config import NllbMoeConfig
from moe_mt.pretrained.experts import NllbMoeDenseActDense, StackedExperts
from moe_mt.pretrained.inputs import padding_of
from moe_mt.pretrained.layers import PublishedLayer
from moe_mt.pretrained.outputs import (
    MoEModelOutput,
    MoEModelOutputWithPastAndCrossAttentions,
    PastKeyValues,
    RouterOutput,
    Seq2SeqMoEModelOutput,
    Seq2SeqMoEOutput,
)
from moe_mt.pretrained.router_losses import (
    balancing_loss,
    transformers_4_balancing_loss,
    z_loss,
)
from moe_mt.pretrained.seq2seq import EncoderDecoder, EncoderDecoderWithHead, arguments
from moe_mt.pretrained.stacks import Asked, PublishedDecoder, PublishedEncoder
from moe_mt.pretrained.view import View

__all__ = [
    "NllbMoeDecoder",
    "NllbMoeEncoder",
    "NllbMoeForConditionalGeneration",
    "NllbMoeModel",
    "NllbMoeSparseMLP",
    "NllbMoeTop2Router",
]


ROUTER_SETTINGS = {
    "num_experts": "num_experts",
    "expert_capacity": "train_capacity",
    "router_ignore_padding_tokens": "route_padding",
    "dtype": "router_dtype",
    "second_expert_policy": "policy",
    "normalize_router_prob_before_dropping": "normalize_before_dropping",
    "batch_prioritized_routing": "batch_prioritized",
    "moe_eval_capacity_token_fraction": "eval_capacity_fraction",
}
"""Documented attribute → that of our router."""


class NllbMoeTop2Router(View):
    """Choose two experts for every token, under a capacity. A call changes nothing in it."""

    def __init__(
        self, config: NllbMoeConfig | None = None, *, core: Top2Router | None = None
    ) -> None:
        """Build a router.

        Args:
            config: What it is to be.
            core: The router it is a view of; one is made where ``None``.
        """
        if core is None:
            assert config is not None
            core = top2_router(config.for_model())
        super().__init__(core, {"classifier": "classifier"})

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        if name in ROUTER_SETTINGS:
            return getattr(self.core, ROUTER_SETTINGS[name])
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401
        if name in ROUTER_SETTINGS:
            setattr(self.core, ROUTER_SETTINGS[name], value)
        else:
            super().__setattr__(name, value)

    def route_tokens(
        self,
        router_logits: Tensor,
        input_dtype: torch.dtype = torch.float32,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Route tokens by their logits.

        With the policy "sampling", the noise that was drawn is added to ``router_logits`` in
        place, as the published class does, unless a gradient is wanted of them.

        Args:
            router_logits: (T, E).
            input_dtype: Dtype of the gates.
            padding_mask: (T,) or (B, S), non-zero where a token is padding; or (B, 1, q, k) added
                to scores, of which the last row counts.

        Returns:
            ``top_1_mask`` (T, E) int64, 1 where a token's first choice took it, and
            ``router_probs`` (T, E), the gates.
        """
        tokens = router_logits.shape[0]
        padding = padding_of(padding_mask, tokens)
        noise = self.core.noise(router_logits)
        routing = self.core.choose(
            router_logits.to(self.dtype), None if self.core.route_padding else padding, noise
        )
        if self.core.policy == "sampling" and not router_logits.requires_grad:
            router_logits += noise
        return _mask_and_gates(RouterOutput(routing, input_dtype))

    def forward(
        self, hidden_states: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Route ``hidden_states`` (B, S, d_model); returns as ``route_tokens``."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing = self.core(tokens, padding_of(padding_mask, len(tokens)))
        return _mask_and_gates(RouterOutput(routing, hidden_states.dtype))


def _mask_and_gates(output: RouterOutput) -> tuple[Tensor, Tensor]:
    router_probs, top_1_index = output
    first = output.routing.expert_ids[:, :1].long()
    taken = (first < router_probs.shape[1]).long()
    mask = torch.zeros_like(router_probs, dtype=torch.int64)
    return mask.scatter(1, top_1_index[:, None], taken), router_probs


class NllbMoeSparseMLP(View):
    """A feed-forward layer of experts."""

    def __init__(
        self,
        config: NllbMoeConfig,
        ffn_dim: int,
        expert_class: type[nn.Module] = NllbMoeDenseActDense,
        *,
        core: MoELayer | None = None,
    ) -> None:
        """Build the layer.

        Args:
            config: What it is to be.
            ffn_dim: Inner width of the experts.
            expert_class: ``(config, ffn_dim) -> module``. Experts of another class than the
                default one are called one after the other.
            core: The layer this is a view of; one is made where ``None``.
        """
        made = core is None
        if core is None:
            core = moe_layer(config.for_model(), ffn_dim)
        model_config = config.for_model()
        # A parsed configuration: parsing it once for each expert would take seconds.
        given = model_config if expert_class is NllbMoeDenseActDense else config
        core.experts = StackedExperts(  # type: ignore[assignment]
            core.experts, lambda: expert_class(given, ffn_dim)
        )
        super().__init__(core, {"experts": "experts", "router": "router"})
        self.router = NllbMoeTop2Router(core=cast(Top2Router, core.router))
        self._order("router", "experts")
        if made:
            for name, parameter in self.named_parameters():
                if not parameter.is_meta and expert_class is NllbMoeDenseActDense:
                    nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(
                        parameter, 0, config.init_std
                    )

    @property
    def num_experts(self) -> int:
        """How many experts there are."""
        return self.core.router.num_experts

    @property
    def moe_token_dropout(self) -> float:
        """Probability of expert-output masking."""
        return self.core.token_dropout

    def forward(
        self, hidden_states: Tensor, padding_mask: Tensor | bool | None = False
    ) -> tuple[Tensor, RouterOutput]:
        """Apply the layer.

        Args:
            hidden_states: (B, S, d_model).
            padding_mask: As of ``NllbMoeTop2Router.route_tokens``; ``False`` is none.

        Returns:
            The mixture (B, S, d_model), and ``(router_probs (T, E), top_1_index (T,))``.
        """
        given = padding_mask if isinstance(padding_mask, Tensor) else None
        padding = padding_of(given, hidden_states[..., 0].numel())
        mixture, routing = self.core(
            hidden_states, None if padding is None else padding.view(hidden_states.shape[:-1])
        )
        return mixture, RouterOutput(routing, hidden_states.dtype)


class NllbMoeFeedForward(View):
    """The feed-forward network of a dense layer."""

    def __init__(self, core: FeedForward) -> None:
        """Name its two layers."""
        super().__init__(core, {"fc1": "up_proj", "fc2": "down_proj"})

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return (..., d_model) for ``hidden_states`` (..., d_model)."""
        return self.core(hidden_states)


class NllbMoeLayer(PublishedLayer):
    """A layer with a feed-forward network or experts in ``ffn``."""

    def __init__(self, core: Any, config: NllbMoeConfig) -> None:  # noqa: ANN401
        """Name the layer's parts."""
        super().__init__(core, config)
        self.places["ffn"] = "feed_forward"
        if isinstance(core.feed_forward, FeedForward):
            self.ffn = NllbMoeFeedForward(core.feed_forward)
        else:
            ffn_dim = core.feed_forward.experts.up_proj.shape[1]
            self.ffn = NllbMoeSparseMLP(config, ffn_dim, core=core.feed_forward)
        self._order(*(name for name in self._modules if name != "ff_layer_norm"))


class NllbMoeEncoder(PublishedEncoder):
    """The encoder, within a model or alone."""

    config_class = NllbMoeConfig
    make_layer = NllbMoeLayer
    output_class = MoEModelOutput

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
    ) -> MoEModelOutput | tuple[Tensor, ...]:
        """Encode; arguments as of ``NllbMoeModel.forward``."""
        asked = Asked.of(self.config, output_attentions, output_hidden_states, output_router_logits)
        x, trace = self.encode(input_ids, attention_mask, head_mask, inputs_embeds, asked)
        return self._returned(return_dict, x, trace)


class NllbMoeDecoder(PublishedDecoder):
    """The decoder, within a model or alone."""

    config_class = NllbMoeConfig
    make_layer = NllbMoeLayer
    output_class = MoEModelOutputWithPastAndCrossAttentions

    def forward(  # noqa: PLR0913
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        cross_attn_head_mask: Tensor | None = None,
        past_key_values: PastKeyValues | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        *,
        prefix: str = "",
    ) -> MoEModelOutputWithPastAndCrossAttentions | tuple[Tensor, ...]:
        """Decode; arguments as of ``NllbMoeModel.forward``, there with ``prefix`` before them."""
        asked = Asked.of(self.config, output_attentions, output_hidden_states, output_router_logits)
        x, present, trace = self.decode(
            input_ids,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            head_mask,
            cross_attn_head_mask,
            past_key_values,
            inputs_embeds,
            self.config.use_cache if use_cache is None else use_cache,
            asked,
            prefix,
        )
        return self._returned(return_dict, x, trace, present)


class NllbMoeModel(EncoderDecoder):
    """The model without a head."""

    config_class = NllbMoeConfig
    encoder_class = NllbMoeEncoder
    decoder_class = NllbMoeDecoder
    _no_split_modules = ("NllbMoeLayer",)

    def forward(  # noqa: PLR0913
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        decoder_head_mask: Tensor | None = None,
        cross_attn_head_mask: Tensor | None = None,
        encoder_outputs: MoEModelOutput | tuple[Tensor, ...] | None = None,
        past_key_values: PastKeyValues | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
    ) -> Seq2SeqMoEModelOutput | tuple[Tensor, ...]:
        """Compute the decoder's last hidden state.

        Arguments, errors and results as of ``M2M100Model.forward``. Padding, where a mask names
        it, claims no expert. With ``output_router_logits``, the output has for each layer
        ``(router_probs (T, E), top_1_index (T,))``, ``None`` for a dense one.
        """
        return self._run_both(arguments(locals()), Seq2SeqMoEModelOutput)


class NllbMoeForConditionalGeneration(EncoderDecoderWithHead):
    """The model with its head, which translates."""

    config_class = NllbMoeConfig
    model_class = NllbMoeModel
    _no_split_modules = ("NllbMoeLayer",)

    def forward(  # noqa: PLR0913
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        decoder_head_mask: Tensor | None = None,
        cross_attn_head_mask: Tensor | None = None,
        encoder_outputs: MoEModelOutput | tuple[Tensor, ...] | None = None,
        past_key_values: PastKeyValues | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
    ) -> Seq2SeqMoEOutput | tuple[Any, ...]:
        """Compute logits, and a loss if there are labels.

        Arguments as of ``NllbMoeModel.forward`` and ``M2M100ForConditionalGeneration.forward``.
        With labels and ``output_router_logits``, the loss has the routers' losses in it, each
        times its coefficient: ``router_aux_loss_coef`` and, of the fairseq definition,
        ``router_z_loss_coef``. A side has none where it has no sparse layer, or its outputs were
        given without what its routers said.

        Returns:
            A ``Seq2SeqMoEOutput``, or a tuple that begins with the loss, if any, the logits and,
            with ``output_router_logits``, the balancing losses of both sides.
        """
        given = self._with_labels(arguments(locals()))
        return_dict = self.config.use_return_dict if return_dict is None else return_dict
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        own = {"output_router_logits": output_router_logits, "return_dict": True}
        outputs = self.model(**{k: v for k, v in given.items() if k != "labels"} | own)
        logits = self.lm_head(outputs.last_hidden_state)
        loss, extra = None, {}
        if labels is not None:
            loss = self._loss(logits, labels)
            if output_router_logits:
                extra = self._router_losses(outputs)
                loss = self._added(loss, extra)
        if not return_dict:
            balancing = (extra.get("encoder_aux_loss"), extra.get("decoder_aux_loss"))
            rest = self._tuple_of(outputs)
            head = (() if loss is None else (loss,)) + (logits,)
            return head + (balancing if output_router_logits else ()) + rest
        fields = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return Seq2SeqMoEOutput(loss=loss, logits=logits, **extra, **fields)

    def _router_losses(self, outputs: Seq2SeqMoEModelOutput) -> dict[str, Tensor | None]:
        """Return the losses of both sides' routers, by field."""
        losses: dict[str, Tensor | None] = {}
        for side in ("encoder", "decoder"):
            routers = outputs[f"{side}_router_logits"] if f"{side}_router_logits" in outputs else ()
            if self.config.router_aux_loss == "transformers-4":
                losses[f"{side}_aux_loss"] = transformers_4_balancing_loss(routers)
                continue
            # A side's outputs may have been given as plain tuples, which hold no logits.
            known = all(router is None or isinstance(router, RouterOutput) for router in routers)
            losses[f"{side}_aux_loss"] = balancing_loss(routers) if known else None
            if known and self.config.router_z_loss_coef > 0:
                losses[f"{side}_z_loss"] = z_loss(routers)
        return losses

    def _added(self, loss: Tensor, extra: dict[str, Tensor | None]) -> Tensor:
        for name, value in extra.items():
            coefficient = (
                self.config.router_aux_loss_coef
                if name.endswith("aux_loss")
                else self.config.router_z_loss_coef
            )
            if value is not None:
                loss = loss + coefficient * value.to(loss.device)
        return loss

    @staticmethod
    def _tuple_of(outputs: Seq2SeqMoEModelOutput) -> tuple[Any, ...]:
        """Return what follows the logits in a tuple: the decoder's values, then the encoder's."""
        names = list(outputs)
        if "decoder_router_logits" in names and "cross_attentions" in names:
            # The decoder's own order has its routers last.
            names.remove("decoder_router_logits")
            names.insert(names.index("cross_attentions") + 1, "decoder_router_logits")
        return tuple(outputs[name] for name in names if name != "last_hidden_state")
