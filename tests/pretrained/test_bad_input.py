"""Arguments that are wrong: every complaint names the argument (also as the caller knows it)."""

import pytest
import torch

from moe_mt import ConfigError, InputError
from moe_mt.pretrained import M2M100ForConditionalGeneration, NllbMoeEncoder, shift_tokens_right
from tests.pretrained.tiny_models import (
    BATCH,
    FAMILIES,
    LABELS,
    MASK,
    SOURCE,
    TARGET,
    build,
    config_of,
)

EMBEDS = torch.zeros(2, 5, 16)
# What is changed of a good call, and what the message has to say.
WRONG = {
    "a source mask of another length": (
        {"attention_mask": MASK[:, :3]},
        r"attention_mask.*\(2, 5\)",
    ),
    "a source mask of four dimensions": ({"attention_mask": MASK[:, None, None]}, "attention_mask"),
    "a target mask like the source's": (
        {"decoder_attention_mask": MASK},
        r"decoder_attention_mask.*\(2, 4\)",
    ),
    "a mask that is a list": ({"attention_mask": MASK.tolist()}, "attention_mask.*list"),
    "a row too many of head_mask": ({"head_mask": torch.ones(3, 4)}, r"head_mask.*\(2, 4\)"),
    "the decoder's heads for the encoder": ({"head_mask": torch.ones(2, 2)}, "^head_mask"),
    "the encoder's heads for the decoder": (
        {"decoder_head_mask": torch.ones(2, 4)},
        r"decoder_head_mask.*\(2, 2\)",
    ),
    "too few rows of cross_attn_head_mask": (
        {"cross_attn_head_mask": torch.ones(1, 2)},
        "cross_attn_head_mask",
    ),
    "an id beyond the vocabulary": ({"input_ids": SOURCE + 55}, "^input_ids.* 64.* 59"),
    "an id below zero": ({"input_ids": SOURCE - 100}, "^input_ids.*-99"),
    "a target id beyond the vocabulary": ({"decoder_input_ids": TARGET + 50}, "decoder_input_ids"),
    "ids that are no integers": ({"input_ids": SOURCE.float()}, "input_ids.*float32"),
    "ids without a batch": ({"input_ids": SOURCE[0]}, r"input_ids.*\(batch, length\)"),
    "ids that are a list": ({"input_ids": SOURCE.tolist()}, "input_ids.*return_tensors"),
    "ids and embeddings": ({"inputs_embeds": EMBEDS}, "input_ids.*inputs_embeds.*both"),
    "target ids and embeddings": (
        {"decoder_inputs_embeds": EMBEDS},
        "decoder_input_ids.*decoder_inputs_embeds.*both",
    ),
    "no source": ({"input_ids": None}, "input_ids.*inputs_embeds.*neither"),
    "no target": ({"decoder_input_ids": None}, "decoder_input_ids.*neither"),
    "embeddings of another width": (
        {"input_ids": None, "inputs_embeds": EMBEDS[..., :8]},
        r"inputs_embeds.*\(2, 5, 8\).*16",
    ),
    "other rows in the target": ({"decoder_input_ids": TARGET[:1]}, "decoder_input_ids.* 1 .* 2"),
    "outputs of the encoder that are a tensor": ({"encoder_outputs": EMBEDS}, "encoder_outputs"),
    "outputs of the encoder without a batch": (
        {"encoder_outputs": (EMBEDS[0],)},
        r"encoder_outputs.*\(5, 16\)",
    ),
    "a mask that is not that of the outputs given": (
        {"encoder_outputs": (EMBEDS[:, :3],)},
        r"^attention_mask.*\(2, 3\)",
    ),
    "a cache that is no tuple": ({"past_key_values": object()}, "past_key_values.*object"),
    "a cache of no layer": ({"past_key_values": ()}, "past_key_values.* 0 layers"),
    "a cache of empty layers": ({"past_key_values": ((), ())}, "past_key_values"),
    "a cache of tensors": ({"past_key_values": (EMBEDS, EMBEDS)}, "past_key_values"),
    "labels of another shape": ({"labels": LABELS[:, :2]}, r"labels.*\(2, 2\).*\(2, 4\)"),
    "labels without a batch": ({"labels": LABELS[0], "decoder_input_ids": None}, "labels"),
    "labels that are no integers": ({"labels": LABELS.float()}, "labels.*float32"),
    "a label beyond the vocabulary": (
        {"labels": LABELS + 50, "decoder_input_ids": None},
        "^labels.* 60",
    ),
    "a label below zero": ({"labels": LABELS - 7}, "labels.*-5.*-100"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_wrong_is_named(family, wrong):
    changes, message = WRONG[wrong]
    model = build(family)
    with pytest.raises(InputError, match=message) as raised:
        model(**BATCH | changes)
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_of_other_rows_or_heads_is_refused(family):
    model = build(family)
    past = model(**BATCH).past_key_values
    new = TARGET[:, :1]
    model(**BATCH | {"decoder_input_ids": new}, past_key_values=past)
    for cut in (slice(1), (slice(None), slice(1)), (..., slice(4))):
        wrong = tuple(tuple(state[cut] for state in layer) for layer in past)
        with pytest.raises(InputError, match="past_key_values"):
            model(**BATCH | {"decoder_input_ids": new}, past_key_values=wrong)
    three = tuple(layer[:3] for layer in past)
    with pytest.raises(InputError, match="past_key_values"):
        model(**BATCH | {"decoder_input_ids": new}, past_key_values=three)
    with pytest.raises(InputError, match=r"decoder_attention_mask.*\(2, 5\)"):
        model(
            **BATCH | {"decoder_input_ids": new},
            past_key_values=past,
            decoder_attention_mask=torch.ones(2, 1),
        )


@pytest.mark.parametrize("kind", ["Model", "ForConditionalGeneration", "Encoder", "Decoder"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_keyword_is_named(family, kind):
    with pytest.raises(TypeError, match="attention_maks"):
        build(family, kind)(SOURCE, attention_maks=MASK)


def test_a_decoder_alone_names_its_own_arguments():
    decoder = build("dense", "Decoder")
    with pytest.raises(InputError, match=r"^input_ids contain"):
        decoder(TARGET + 60)
    with pytest.raises(InputError, match=r"^attention_mask"):
        decoder(TARGET, attention_mask=MASK)
    with pytest.raises(InputError, match=r"^head_mask"):
        decoder(TARGET, head_mask=torch.ones(3, 2))
    with pytest.raises(InputError, match=r"^encoder_attention_mask"):
        decoder(TARGET, encoder_hidden_states=EMBEDS, encoder_attention_mask=MASK[:, :2])
    with pytest.raises(InputError, match=r"^encoder_hidden_states"):
        decoder(TARGET, encoder_hidden_states=EMBEDS[..., :8])


def test_a_configuration_of_another_class_is_refused():
    # It would build a model that lacks layers and say nothing.
    with pytest.raises(ConfigError, match=r"NllbMoeConfig.*M2M100Config"):
        M2M100ForConditionalGeneration(config_of("moe"))
    with pytest.raises(ConfigError, match=r"M2M100Config.*NllbMoeConfig"):
        NllbMoeEncoder(config_of("dense"))
    with pytest.raises(ConfigError, match=r"dict.*M2M100Config"):
        M2M100ForConditionalGeneration({"d_model": 16})


def test_labels_cannot_be_shifted_without_padding():
    with pytest.raises(ConfigError, match="pad_token_id"):
        shift_tokens_right(LABELS, None, 2)
    with pytest.raises(ConfigError, match="pad_token_id"):
        build("dense", pad_token_id=None)(SOURCE, labels=LABELS)
