"""What the documented models of both families share: encoder, decoder, head."""

import logging
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe_mt.errors import ConfigError, InputError
from moe_mt.losses import IGNORED_LABEL, label_smoothed_cross_entropy
from moe_mt.models import KVCache, Seq2SeqTransformer
from moe_mt.pretrained.config import PublishedConfig
from moe_mt.pretrained.generation import GenerationMixin, PublishedGenerationConfig
from moe_mt.pretrained.inputs import check_labels
from moe_mt.pretrained.outputs import ModelOutput, PastKeyValues, as_encoder_output
from moe_mt.pretrained.pretrained import PreTrainedModel
from moe_mt.pretrained.stacks import PublishedDecoder, PublishedEncoder

__all__ = ["EncoderDecoder", "EncoderDecoderWithHead", "arguments", "shift_tokens_right"]

logger = logging.getLogger(__name__)


def shift_tokens_right(
    input_ids: Tensor, pad_token_id: int | None, decoder_start_token_id: int
) -> Tensor:
    """Return what the decoder reads to predict labels.

    Args:
        input_ids: (B, L) int64. Labels; -100 where there is none.
        pad_token_id: What -100 becomes.
        decoder_start_token_id: What comes first.

    Raises:
        ConfigError: If there is no padding token.
    """
    if pad_token_id is None:
        raise ConfigError("pad_token_id is None; set it in the model's configuration")
    shifted = input_ids.new_full(input_ids.shape, decoder_start_token_id)
    shifted[:, 1:] = input_ids[:, :-1]
    return shifted.masked_fill(shifted == IGNORED_LABEL, pad_token_id)


class EncoderDecoder(PreTrainedModel):
    """Encoder and decoder over one embedding, without a head."""

    base_model_prefix = "model"
    encoder_class: ClassVar[type[PublishedEncoder]]
    decoder_class: ClassVar[type[PublishedDecoder]]

    _tied_weights_keys = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")

    encoder: PublishedEncoder
    decoder: PublishedDecoder
    shared: Any

    def __init__(self, config: PublishedConfig) -> None:
        """Build the model; its weights are drawn from N(0, ``init_std``).

        Raises:
            ConfigError: If the configuration describes no model.
        """
        self._check_config(config)
        core = Seq2SeqTransformer(config.for_model())
        super().__init__(config, core, {"shared": "embedding"})
        self.encoder = self.encoder_class(config, core=core)
        self.decoder = self.decoder_class(config, core=core)

    def _train_core(self, mode: bool) -> None:
        self.core.training = mode

    def get_encoder(self) -> PublishedEncoder:
        """Return the encoder."""
        return self.encoder

    def get_decoder(self) -> PublishedDecoder:
        """Return the decoder."""
        return self.decoder

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding; its rows are not scaled yet."""
        return self.shared

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding, of both sides."""
        self.shared = self.encoder.embed_tokens = self.decoder.embed_tokens = value

    def _run_both(self, given: dict[str, Any], make: Any) -> Any:  # noqa: ANN401
        """Run encoder and decoder with the documented arguments, by name.

        Args:
            given: The arguments of ``forward``; ``None`` where nothing was said.
            make: The class of the output.
        """
        options = {
            name: given.get(name)
            for name in ("output_attentions", "output_hidden_states", "output_router_logits")
            if name in given
        }
        return_dict = given["return_dict"]
        return_dict = self.config.use_return_dict if return_dict is None else return_dict
        encoded: Any = given["encoder_outputs"]
        if encoded is None:
            encoded = self.encoder(
                input_ids=given["input_ids"],
                attention_mask=given["attention_mask"],
                head_mask=given["head_mask"],
                inputs_embeds=given["inputs_embeds"],
                return_dict=True,
                **options,
            )
        else:
            encoded = as_encoder_output(encoded, self.encoder.output_class)
        decoded = self.decoder(
            input_ids=given["decoder_input_ids"],
            attention_mask=given["decoder_attention_mask"],
            encoder_hidden_states=encoded[0],
            encoder_attention_mask=given["attention_mask"],
            head_mask=given["decoder_head_mask"],
            cross_attn_head_mask=given["cross_attn_head_mask"],
            past_key_values=given["past_key_values"],
            inputs_embeds=given["decoder_inputs_embeds"],
            use_cache=given["use_cache"],
            return_dict=True,
            prefix="decoder_",
            **options,
        )
        if not return_dict:
            return decoded.to_tuple() + encoded.to_tuple()
        fields = {
            "last_hidden_state": decoded.last_hidden_state,
            "past_key_values": decoded.past_key_values,
            "cross_attentions": decoded.cross_attentions,
        }
        for side, output in (("encoder", encoded), ("decoder", decoded)):
            fields[f"{side}_hidden_states"] = output.hidden_states
            fields[f"{side}_attentions"] = output.attentions
            if "output_router_logits" in options:
                fields[f"{side}_router_logits"] = output.router_probs
        return make(encoder_last_hidden_state=encoded[0], **fields)


def arguments(of_call: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a forward pass from its ``locals()``."""
    return {name: value for name, value in of_call.items() if name not in ("self", "__class__")}


class EncoderDecoderWithHead(PreTrainedModel, GenerationMixin):
    """Encoder, decoder and the projection to logits."""

    base_model_prefix = "model"
    _tied_weights_keys = (
        "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
        "lm_head.weight",
    )
    model_class: ClassVar[type[EncoderDecoder]]

    model: EncoderDecoder
    lm_head: Any

    def __init__(self, config: PublishedConfig) -> None:
        """Build the model; its weights are drawn from N(0, ``init_std``).

        The head is the embedding, unless the configuration has ``tie_word_embeddings=False``.

        Raises:
            ConfigError: If the configuration describes no model.
        """
        model = self.model_class(config)
        super().__init__(config, model.core, {})
        self.model = model
        with torch.device("meta"):
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_word_embeddings and not config.torchscript:
            self.lm_head.weight = model.shared.weight
        else:
            weight = torch.empty_like(model.shared.weight).normal_(0, config.init_std)
            self.lm_head.weight = nn.Parameter(weight)
        self.generation_config = PublishedGenerationConfig.from_model_config(config)

    def _train_core(self, mode: bool) -> None:
        """Leave the core to ``model``."""

    def get_encoder(self) -> PublishedEncoder:
        """Return the encoder."""
        return self.model.encoder

    def get_decoder(self) -> PublishedDecoder:
        """Return the decoder."""
        return self.model.decoder

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding; its rows are not scaled yet."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding, of both sides; the head stays until ``tie_weights``."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.lm_head = new_embeddings

    def _tied(self) -> bool:
        return getattr(self.lm_head, "weight", None) is self.model.shared.weight

    def tie_weights(self) -> None:
        """Make the head's weight the embedding's, unless the configuration has them apart."""
        # A head that is tied already may be wrapped, and let nobody set its weight.
        apart = not self.config.tie_word_embeddings or self.config.torchscript
        if apart or self._tied():
            return
        self.lm_head.weight = self.model.shared.weight
        self.lm_head.out_features = self.lm_head.weight.shape[0]

    def _with_labels(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments, with labels shifted into what the decoder reads."""
        labels = given["labels"]
        if labels is None:
            return given
        if given["decoder_input_ids"] is None and given["decoder_inputs_embeds"] is None:
            check_labels(labels, self.model.shared.weight.shape[0])
            shifted = shift_tokens_right(
                labels, self.config.pad_token_id, self.config.decoder_start_token_id
            )
            given = given | {"decoder_input_ids": shifted}
        return given

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross entropy of logits (B, L, V) over labels that are not -100."""
        check_labels(labels, logits.shape[-1])
        if labels.shape != logits.shape[:2]:
            raise InputError(
                f"labels have shape {tuple(labels.shape)}; expected {tuple(logits.shape[:2])}, "
                "that of what the decoder reads"
            )
        return label_smoothed_cross_entropy(logits, labels.to(logits.device))

    # What generation needs.

    def decodes_fast(self) -> bool:
        """Whether decoding may pass by ``forward``, which nobody has changed or watches."""
        own = (type(self).forward, type(self).prepare_inputs_for_generation)
        ours = all(method.__module__.startswith("moe_mt.") for method in own)
        replaced = {"forward", "prepare_inputs_for_generation"} & self.__dict__.keys()
        layers: Any = self.model.decoder.layers
        watched = (self, self.model, self.model.decoder, *layers)
        hooks = any(m._forward_hooks or m._forward_pre_hooks for m in watched)
        return ours and not replaced and not hooks

    def new_cache(
        self, memory: Tensor, source_mask: Tensor | None, beams: int = 1, capacity: int = 32
    ) -> KVCache:
        """Return an empty cache for ``beams`` rows per sentence of the memory (B, S, d_model)."""
        return self.model.decoder.new_cache(memory, source_mask, beams, capacity)

    def decode_step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Read tokens (rows, new); return the logits (rows, V) behind the last of them."""
        return self.lm_head(self.model.decoder.step(tokens, cache)[:, -1])

    def prepare_inputs_for_generation(
        self,
        decoder_input_ids: Tensor,
        past_key_values: PastKeyValues | None = None,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        decoder_head_mask: Tensor | None = None,
        cross_attn_head_mask: Tensor | None = None,
        use_cache: bool | None = None,
        encoder_outputs: ModelOutput | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> dict[str, Any]:
        """Return the arguments of the next forward pass: with a cache, new tokens alone."""
        if past_key_values is not None:
            past = past_key_values[0][0].shape[2]
            # Where a cache was given with the first tokens, they may be all new.
            first = past if decoder_input_ids.shape[1] > past else decoder_input_ids.shape[1] - 1
            decoder_input_ids = decoder_input_ids[:, first:]
        return {
            "input_ids": None,
            "encoder_outputs": encoder_outputs,
            "past_key_values": past_key_values,
            "decoder_input_ids": decoder_input_ids,
            "attention_mask": attention_mask,
            "head_mask": head_mask,
            "decoder_head_mask": decoder_head_mask,
            "cross_attn_head_mask": cross_attn_head_mask,
            "use_cache": use_cache,
        }

    @staticmethod
    def _reorder_cache(past_key_values: PastKeyValues, beam_idx: Tensor) -> PastKeyValues:
        """Let row i continue row ``beam_idx[i]`` (rows,)."""
        return tuple(
            tuple(state.index_select(0, beam_idx.to(state.device)) for state in layer)
            for layer in past_key_values
        )

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Return what the decoder reads to predict labels (B, L)."""
        return shift_tokens_right(
            labels, self.config.pad_token_id, self.config.decoder_start_token_id
        )

    def _read_generation_config(self, folder: Path | None) -> None:
        if folder is not None and (folder / "generation_config.json").is_file():
            self.generation_config = PublishedGenerationConfig.from_pretrained(folder)
        else:
            self.generation_config = PublishedGenerationConfig.from_model_config(self.config)

    def _check_generation_config(self) -> None:
        if self.generation_config is not None:
            self.generation_config.validate()

    def _write_generation_config(self, folder: Path) -> None:
        self.generation_config.save_pretrained(folder)
