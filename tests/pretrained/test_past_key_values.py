"""The documented cache: four tensors a layer, taken and returned, never written to (spec 3.4)."""

import pytest
import torch

from tests.pretrained.tiny_models import (
    BATCH,
    FAMILIES,
    MASK,
    QUIET,
    SOURCE,
    TARGET,
    TRAINING_BATCH,
    build,
    gradients,
    logits,
)


def step(model, past, tokens, **more):
    with torch.no_grad():
        return model(
            input_ids=SOURCE,
            attention_mask=MASK,
            decoder_input_ids=tokens,
            past_key_values=past,
            **more,
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_has_four_tensors(family):
    model = build(family)
    output = step(model, None, TARGET, output_hidden_states=True)
    assert len(output.past_key_values) == 2
    layer = model.get_decoder().layers[0]
    cross = layer.encoder_attn if family == "dense" else layer.cross_attention
    normed = layer.self_attn_layer_norm(output.decoder_hidden_states[0])
    memory = output.encoder_last_hidden_state
    expected = [
        projection(x).view(2, -1, 2, 8).transpose(1, 2)
        for projection, x in (
            (layer.self_attn.k_proj, normed),
            (layer.self_attn.v_proj, normed),
            (cross.k_proj, memory),
            (cross.v_proj, memory),
        )
    ]
    assert isinstance(output.past_key_values[0], tuple)
    for found, wanted in zip(output.past_key_values[0], expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("cut", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_continuing_equals_one_run(family, cut):
    model = build(family)
    expected = logits(model)
    first = step(model, None, TARGET[:, :cut])
    rest = step(model, first.past_key_values, TARGET[:, cut:])
    torch.testing.assert_close(first.logits, expected[:, :cut])
    torch.testing.assert_close(rest.logits, expected[:, cut:])
    whole = step(model, None, TARGET).past_key_values
    torch.testing.assert_close(rest.past_key_values, whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_continuing_token_by_token_with_padded_targets_equals_one_run(family):
    # Spec 4.4: the published class looks at the last sentence's mask for every row.
    model = build(family)
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1]])
    expected = logits(model, decoder_attention_mask=mask)
    past = None
    more = {"output_router_logits": True} if family == "moe" else {}
    for index in range(4):
        seen = mask[:, : index + 1]
        tokens = TARGET[:, index : index + 1]
        output = step(model, past, tokens, decoder_attention_mask=seen, **more)
        past = output.past_key_values
        torch.testing.assert_close(output.logits[:, 0], expected[:, index])
        if family == "moe":
            probs = output.decoder_router_logits[0][0]
            assert torch.equal(probs.any(1), mask[:, index].bool())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_that_is_given_is_not_changed(family):
    model = build(family)
    past = step(model, None, TARGET[:, :2]).past_key_values
    copies = tuple(tuple(state.clone() for state in layer) for layer in past)
    first, second = (step(model, past, TARGET[:, 2:]) for _ in range(2))
    assert torch.equal(first.logits, second.logits)
    for layer, copied in zip(past, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer, copied, strict=True))
    as_lists = [list(layer) for layer in past]
    assert torch.equal(step(model, as_lists, TARGET[:, 2:]).logits, first.logits)


def test_the_memory_s_keys_are_used_again_and_not_computed():
    model = build("dense")
    past = step(model, None, TARGET[:, :2]).past_key_values
    expected = step(model, past, TARGET[:, 2:])
    for layer in model.get_decoder().layers:
        layer.encoder_attn.k_proj.register_forward_hook(lambda *_: pytest.fail("computed again"))
    found = step(model, past, TARGET[:, 2:])
    assert torch.equal(found.logits, expected.logits)
    assert found.past_key_values[0][2] is past[0][2]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_alone_has_two_tensors_and_continues(family):
    decoder = build(family, "Decoder")
    with torch.no_grad():
        expected = decoder(TARGET).last_hidden_state
        first = decoder(TARGET[:, :2])
        assert [len(layer) for layer in first.past_key_values] == [2, 2]
        assert len(first.to_tuple()) == 2
        rest = decoder(TARGET[:, 2:], past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.last_hidden_state, expected[:, 2:])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_is_returned_if_it_is_asked_for(family):
    model = build(family)
    assert "past_key_values" in model(**BATCH)
    assert "past_key_values" not in model(**BATCH, use_cache=False)
    model.config.use_cache = False
    assert "past_key_values" not in model(**BATCH)
    assert "past_key_values" in model(**BATCH, use_cache=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_changes_nothing_in_training(family):
    results = [gradients(build(family, **QUIET).train(), use_cache=c) for c in (True, False)]
    torch.testing.assert_close(results[0], results[1])


def test_gradients_go_through_a_cache():
    model = build("dense", **QUIET).train()
    whole = model(**BATCH).logits
    first = model(**BATCH | {"decoder_input_ids": TARGET[:, :2]})
    rest = model(
        **BATCH | {"decoder_input_ids": TARGET[:, 2:]}, past_key_values=first.past_key_values
    )
    weight = model.get_decoder().layers[0].self_attn.k_proj.weight
    (expected,) = torch.autograd.grad(whole[:, 2:].square().sum(), weight)
    (found,) = torch.autograd.grad(rest.logits.square().sum(), weight)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_cache_can_be_reordered(family):
    model = build(family)
    past = step(model, None, TARGET[:, :2]).past_key_values
    turned = model._reorder_cache(past, torch.tensor([1, 0]))
    with torch.no_grad():
        found = model(
            input_ids=SOURCE.flip(0),
            attention_mask=MASK.flip(0),
            decoder_input_ids=TARGET.flip(0)[:, 2:],
            past_key_values=turned,
        ).logits
    torch.testing.assert_close(found.flip(0), logits(model)[:, 2:])


def test_positions_behind_a_cache_go_on():
    # Beyond the table's first rows too.
    model = build("dense", max_position_embeddings=4)
    long = torch.arange(2, 22)[None]
    with torch.no_grad():
        expected = model(SOURCE[:1], decoder_input_ids=long).logits
        first = model(SOURCE[:1], decoder_input_ids=long[:, :9])
        rest = model(
            SOURCE[:1], decoder_input_ids=long[:, 9:], past_key_values=first.past_key_values
        )
    torch.testing.assert_close(rest.logits, expected[:, 9:])


def test_labels_and_a_cache_go_together():
    output = build("moe")(**TRAINING_BATCH)
    assert output.loss.dim() == 0
    assert len(output.past_key_values[0]) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_memory_of_another_length_is_not_taken_for_the_cached_one(family):
    model = build(family)
    with torch.no_grad():
        past = model(**BATCH).past_key_values
        shorter = {"input_ids": SOURCE[:, :3], "decoder_input_ids": TARGET[:, :1]}
        found = model(**shorter, past_key_values=past).past_key_values
        expected = model(**shorter).past_key_values
    for layer, fresh in zip(found, expected, strict=True):
        assert layer[2].shape[2] == 3
        assert torch.equal(layer[2], fresh[2])
        assert torch.equal(layer[3], fresh[3])
