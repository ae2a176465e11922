"""Attention weights and head masks: an explicit way beside the fast one, with the same result."""

import pytest
import torch
from torch.nn import functional

from tests.pretrained.tiny_models import (
    BATCH,
    FAMILIES,
    MASK,
    SOURCE,
    TARGET,
    build,
    logits,
)

HIDDEN_TARGET = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 0]])


def projected(attention, name, x, heads):
    rows = getattr(attention, f"{name}_proj")(x)
    return rows.view(*x.shape[:2], heads, -1).transpose(1, 2)


def softmax_of(attention, queries, keys, heads, allowed):
    q, k = projected(attention, "q", queries, heads), projected(attention, "k", keys, heads)
    scores = q @ k.transpose(2, 3) / (16 / heads) ** 0.5
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_the_softmax_of_scores(family):
    model = build(family)
    with torch.no_grad():
        output = model(
            **BATCH,
            decoder_attention_mask=HIDDEN_TARGET,
            output_attentions=True,
            output_hidden_states=True,
        )
        encoder, decoder = model.get_encoder().layers[1], model.get_decoder().layers[1]
        x = encoder.self_attn_layer_norm(output.encoder_hidden_states[1])
        seen = MASK.bool()[:, None, None]
        expected = softmax_of(encoder.self_attn, x, x, 4, seen)
        torch.testing.assert_close(output.encoder_attentions[1], expected)
        x = decoder.self_attn_layer_norm(output.decoder_hidden_states[1])
        causal = torch.ones(4, 4, dtype=torch.bool).tril() & HIDDEN_TARGET.bool()[:, None, None]
        weights = softmax_of(decoder.self_attn, x, x, 2, causal)
        torch.testing.assert_close(output.decoder_attentions[1], weights)
        values = projected(decoder.self_attn, "v", x, 2)
        attended = decoder.self_attn.out_proj((weights @ values).transpose(1, 2).flatten(2))
        x = output.decoder_hidden_states[1] + attended
        if family == "dense":
            x, cross = decoder.encoder_attn_layer_norm(x), decoder.encoder_attn
        else:
            x, cross = decoder.cross_attention_layer_norm(x), decoder.cross_attention
        expected = softmax_of(cross, x, output.encoder_last_hidden_state, 2, seen)
        torch.testing.assert_close(output.cross_attentions[1], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_looking_at_a_model_changes_no_output(family):
    model = build(family)
    expected = logits(model)
    torch.testing.assert_close(logits(model, output_attentions=True), expected)
    assert torch.equal(logits(model, output_hidden_states=True), expected)
    if family == "moe":
        assert torch.equal(logits(model, output_router_logits=True), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_a_continued_run_are_rows_of_the_whole(family):
    model = build(family)
    with torch.no_grad():
        whole = model(**BATCH, output_attentions=True)
        first = model(**BATCH | {"decoder_input_ids": TARGET[:, :3]})
        rest = model(
            **BATCH | {"decoder_input_ids": TARGET[:, 3:]},
            past_key_values=first.past_key_values,
            output_attentions=True,
        )
    for field in ("decoder_attentions", "cross_attentions"):
        for found, expected in zip(rest[field], whole[field], strict=True):
            torch.testing.assert_close(found, expected[:, :, 3:])


MASKS = {
    "head_mask": (4, "encoder_attentions"),
    "decoder_head_mask": (2, "decoder_attentions"),
    "cross_attn_head_mask": (2, "cross_attentions"),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_mask_is_a_factor_of_each_layer_s_heads(family, name):
    heads, field = MASKS[name]
    model = build(family)
    factors = torch.ones(2, heads)
    factors[0, 0], factors[1, 1] = 0.0, 0.5
    masked, plain = (
        logits(model, **{name: factors}),
        logits(model, **{name: torch.ones(2, heads)}),
    )
    torch.testing.assert_close(plain, logits(model))
    assert not torch.allclose(masked, plain, atol=1e-2)
    with torch.no_grad():
        seen = model(**BATCH, output_attentions=True, **{name: factors})
    torch.testing.assert_close(seen.logits, masked)
    sums = torch.stack([weights.sum(-1) for weights in seen[field]])
    expected = factors[:, None, :, None].expand_as(sums)
    torch.testing.assert_close(sums, expected)
    # The same as what those heads give to the output, cut out of the projection.
    expected_model = build(family)
    side = expected_model.get_encoder() if name == "head_mask" else expected_model.get_decoder()
    cross = "encoder_attn" if family == "dense" else "cross_attention"
    part = cross if name == "cross_attn_head_mask" else "self_attn"
    with torch.no_grad():
        for index, layer in enumerate(side.layers):
            columns = factors[index].repeat_interleave(16 // heads)
            getattr(layer, part).out_proj.weight.mul_(columns)
    torch.testing.assert_close(masked, logits(expected_model))


def test_every_kind_of_mask_dtype_is_a_head_mask():
    model = build("dense")
    factors = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0]])
    expected = logits(model, head_mask=factors.float())
    assert torch.equal(logits(model, head_mask=factors.bool()), expected)
    assert torch.equal(logits(model, head_mask=factors), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_weights_and_head_masks(family):
    model = build(family)
    factors = torch.ones(2, 4, requires_grad=True)
    output = model(**BATCH, output_attentions=True, head_mask=factors)
    seen = [output.encoder_attentions[0], output.decoder_attentions[1], output.cross_attentions[0]]
    for weights in seen:
        weights.retain_grad()
    output.logits.square().sum().backward()
    assert all(weights.grad.any() for weights in seen)
    assert factors.grad.ne(0).all()


def test_weights_are_before_dropout_and_the_output_after_it():
    model = build("dense", dropout=0.0, attention_dropout=0.5).train()
    with torch.no_grad():
        output = model(**BATCH, output_attentions=True)
    for weights in output.encoder_attentions + output.cross_attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    torch.manual_seed(0)
    first = logits(model, output_attentions=True)
    assert not torch.allclose(first, logits(model, output_attentions=True), atol=1e-2)


def test_heads_that_are_masked_have_nothing_to_drop():
    model = build("dense", dropout=0.0, attention_dropout=0.5).train()
    silent = {name: torch.zeros(2, heads) for name, (heads, _) in MASKS.items()}
    assert torch.equal(logits(model, **silent), logits(model, **silent))
    silent["cross_attn_head_mask"][1, 0] = 1
    assert not torch.equal(logits(model, **silent), logits(model, **silent))


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_what_goes_into_layers_and_last_what_comes_out_of_the_norm(family):
    model = build(family)
    with torch.no_grad():
        output = model(**BATCH, output_hidden_states=True)
    for side, stack in (("encoder", model.get_encoder()), ("decoder", model.get_decoder())):
        states = output[f"{side}_hidden_states"]
        assert len(states) == 3
        normed = functional.layer_norm(
            states[-1], (16,), stack.layer_norm.weight, stack.layer_norm.bias
        )
        # Normed already.
        torch.testing.assert_close(normed, states[-1], rtol=1e-3, atol=1e-3)
    assert output.encoder_hidden_states[-1] is output.encoder_last_hidden_state
    rows = model.get_input_embeddings().weight[SOURCE[0]] * 4
    positions = model.get_encoder().embed_positions(SOURCE[:1])
    torch.testing.assert_close(output.encoder_hidden_states[0][:1], rows[None] + positions)
