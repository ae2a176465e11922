"""M2M100, NLLB-200 dense, WMT21 and SMaLL-100, as the M2M100 page documents them."""

from torch import Tensor

from moe_mt.pretrained.config import M2M100Config
from moe_mt.pretrained.layers import PublishedLayer
from moe_mt.pretrained.outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    PastKeyValues,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from moe_mt.pretrained.seq2seq import EncoderDecoder, EncoderDecoderWithHead, arguments
from moe_mt.pretrained.stacks import Asked, PublishedDecoder, PublishedEncoder

__all__ = ["M2M100Decoder", "M2M100Encoder", "M2M100ForConditionalGeneration", "M2M100Model"]


class M2M100Encoder(PublishedEncoder):
    """The encoder, within a model or alone."""

    config_class = M2M100Config
    make_layer = PublishedLayer
    output_class = BaseModelOutput

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple[Tensor, ...]:
        """Encode; arguments as of ``M2M100Model.forward``."""
        asked = Asked.of(self.config, output_attentions, output_hidden_states)
        x, trace = self.encode(input_ids, attention_mask, head_mask, inputs_embeds, asked)
        return self._returned(return_dict, x, trace)


class M2M100Decoder(PublishedDecoder):
    """The decoder, within a model or alone."""

    config_class = M2M100Config
    make_layer = PublishedLayer
    output_class = BaseModelOutputWithPastAndCrossAttentions

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
        return_dict: bool | None = None,
        *,
        prefix: str = "",
    ) -> BaseModelOutputWithPastAndCrossAttentions | tuple[Tensor, ...]:
        """Decode; arguments as of ``M2M100Model.forward``, there with ``prefix`` before them."""
        asked = Asked.of(self.config, output_attentions, output_hidden_states)
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


class M2M100Model(EncoderDecoder):
    """The model without a head."""

    config_class = M2M100Config
    encoder_class = M2M100Encoder
    decoder_class = M2M100Decoder
    _no_split_modules = ("PublishedLayer",)

    def forward(  # noqa: PLR0913
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        decoder_head_mask: Tensor | None = None,
        cross_attn_head_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None = None,
        past_key_values: PastKeyValues | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Seq2SeqModelOutput | tuple[Tensor, ...]:
        """Compute the decoder's last hidden state.

        Args:
            input_ids: (B, S) int64. Source tokens.
            attention_mask: (B, S); 0 where a source token is padding.
            decoder_input_ids: (B, L) int64. Target tokens; with ``past_key_values`` the new ones.
            decoder_attention_mask: (B, past + L); 0 hides a target position. Without it, padding
                among target tokens is seen by what follows.
            head_mask: (encoder_layers, H): a factor for each self-attention head's output.
            decoder_head_mask: (decoder_layers, H): the same in the decoder.
            cross_attn_head_mask: (decoder_layers, H): the same of attention to the memory.
            encoder_outputs: What the encoder returned, instead of running it.
            past_key_values: What an earlier call returned. It is not changed.
            inputs_embeds: (B, S, d_model), taken as scaled, instead of ``input_ids``.
            decoder_inputs_embeds: (B, L, d_model), likewise.
            use_cache: Whether to return ``past_key_values``.
            output_attentions: Whether to return attention weights; attention is computed
                explicitly then, and the output is the same up to rounding.
            output_hidden_states: Whether to return what goes into every layer.
            return_dict: Whether to return an object and not a tuple.

        Returns:
            A ``Seq2SeqModelOutput``, or the tuple of its values that are not ``None``, those of
            the decoder first.

        Raises:
            InputError: If ids or embeddings are missing or double, an id is beyond the
                vocabulary, or a mask has the wrong shape.
        """
        return self._run_both(arguments(locals()), Seq2SeqModelOutput)


class M2M100ForConditionalGeneration(EncoderDecoderWithHead):
    """The model with its head, which translates."""

    config_class = M2M100Config
    model_class = M2M100Model
    _no_split_modules = ("PublishedLayer",)

    def forward(  # noqa: PLR0913
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        decoder_head_mask: Tensor | None = None,
        cross_attn_head_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None = None,
        past_key_values: PastKeyValues | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Seq2SeqLMOutput | tuple[Tensor, ...]:
        """Compute logits, and a loss if there are labels.

        Arguments as of ``M2M100Model.forward``, and ``labels`` (B, L) int64: what the decoder
        should say. -100 does not count, padding does. The decoder reads labels shifted by one
        unless it is given something to read.

        Returns:
            A ``Seq2SeqLMOutput``, or a tuple that begins with the loss, if any, and the logits.

        Raises:
            InputError: As there, and if labels have the wrong shape or are no ids.
        """
        given = self._with_labels(arguments(locals()))
        return_dict = self.config.use_return_dict if return_dict is None else return_dict
        outputs = self.model(**{k: v for k, v in given.items() if k != "labels"})
        logits = self.lm_head(outputs[0])
        loss = None if labels is None else self._loss(logits, labels)
        if not return_dict:
            return (() if loss is None else (loss,)) + (logits, *outputs[1:])
        fields = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return Seq2SeqLMOutput(loss=loss, logits=logits, **fields)
