"""Gradient checkpointing: activations computed anew, and nothing else changes (spec 3.9)."""

import pytest
import torch

from tests.pretrained.tiny_models import (
    FAMILIES,
    QUIET,
    SOURCE,
    TARGET,
    TRAINING_BATCH,
    build,
    gradients,
)

REENTRANT = [None, {"use_reentrant": False}, {"use_reentrant": True}]

SEEN = {"output_hidden_states": True, "output_attentions": True, "use_cache": True}


def checkpointed(family, options, **changes):
    model = build(family, **QUIET | changes).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model


@pytest.mark.parametrize("options", REENTRANT)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_same(family, options):
    expected = gradients(build(family, **QUIET).train())
    torch.testing.assert_close(gradients(checkpointed(family, options)), expected)


@pytest.mark.parametrize("options", REENTRANT)
def test_router_losses_and_every_output_go_with_it(options):
    more = {"output_router_logits": True, **SEEN}
    losses = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.2}
    plain, model = build("moe", **QUIET | losses).train(), checkpointed("moe", options, **losses)
    expected, found = (m(**TRAINING_BATCH, **more) for m in (plain, model))
    assert list(found) == list(expected)
    for side, sparse in (("encoder", [1]), ("decoder", [0, 1])):
        torch.testing.assert_close(
            found[f"{side}_hidden_states"], expected[f"{side}_hidden_states"]
        )
        torch.testing.assert_close(found[f"{side}_attentions"], expected[f"{side}_attentions"])
        routers = found[f"{side}_router_logits"]
        assert [index for index, router in enumerate(routers) if router] == sparse
        for index in sparse:
            torch.testing.assert_close(
                tuple(routers[index]), tuple(expected[f"{side}_router_logits"][index])
            )
    torch.testing.assert_close(found.past_key_values, expected.past_key_values)
    torch.testing.assert_close(gradients(model, **more), gradients(plain, **more))


@pytest.mark.parametrize("options", REENTRANT)
@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_falls_on_the_same_places_in_both_passes(family, options):
    noisy = {"dropout": 0.4, "attention_dropout": 0.3, "activation_dropout": 0.2}
    noisy |= {"moe_token_dropout": 0.3} if family == "moe" else {}
    results = []
    for model in (build(family, **noisy).train(), checkpointed(family, options, **noisy)):
        torch.manual_seed(11)
        results.append(gradients(model))
    torch.testing.assert_close(results[1], results[0])


def layer_calls(model):
    """Return a list that grows by one whenever a layer begins."""
    calls = []
    for layer in [*model.get_encoder().layers, *model.get_decoder().layers]:
        layer.register_forward_pre_hook(lambda layer, given: calls.append(layer))
    return calls


def test_every_layer_runs_twice_in_training_and_once_otherwise():
    model = checkpointed("moe", None)
    assert model.is_gradient_checkpointing
    calls = layer_calls(model)
    model(**TRAINING_BATCH).loss.backward()
    assert len(calls) == 8
    calls.clear()
    with torch.no_grad():
        model(**TRAINING_BATCH)
    model.eval()(**TRAINING_BATCH).loss.backward()
    assert len(calls) == 8
    model.train().gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    calls.clear()
    model(**TRAINING_BATCH).loss.backward()
    assert len(calls) == 4


def test_one_side_can_be_checkpointed_alone():
    model = build("dense", **QUIET).train()
    model.get_encoder().gradient_checkpointing_enable()
    calls = layer_calls(model)
    model(**TRAINING_BATCH).loss.backward()
    assert len(calls) == 2 * 2 + 2


def test_the_configuration_can_ask_for_it():
    # Files of old versions have this field.
    assert build("dense", gradient_checkpointing=True).is_gradient_checkpointing


@pytest.mark.parametrize("options", REENTRANT)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_trainable_layer_above_frozen_ones_gets_its_gradient(family, options):
    # The reentrant way needs an input that wants a gradient; the hook of the embedding makes one.
    model = checkpointed(family, options)
    model.requires_grad_(False)
    model.enable_input_require_grads()
    trained = model.get_decoder().layers[1].self_attn.q_proj.weight.requires_grad_(True)
    model(**TRAINING_BATCH).loss.backward()
    expected = gradients(build(family, **QUIET).train())[1]
    name = "model.decoder.layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(trained.grad, expected[name])
    model.disable_input_require_grads()
    assert not model.get_input_embeddings()(SOURCE).requires_grad


def test_frozen_embeddings_are_no_obstacle_unless_the_reentrant_way_is_asked_for():
    model = checkpointed("dense", None)
    model.requires_grad_(False)
    trained = model.get_encoder().layers[0].fc1.weight.requires_grad_(True)
    model(**TRAINING_BATCH).loss.backward()
    expected = gradients(build("dense", **QUIET).train())[1]
    torch.testing.assert_close(trained.grad, expected["model.encoder.layers.0.fc1.weight"])


def test_a_standalone_decoder_is_checkpointed_over_a_memory_that_wants_gradients():
    results = []
    for enable in (False, True):
        decoder = build("dense", "Decoder", **QUIET).train()
        if enable:
            decoder.gradient_checkpointing_enable({"use_reentrant": True})
        memory = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        decoder(TARGET, encoder_hidden_states=memory)[0].square().sum().backward()
        results.append((memory.grad, [p.grad for p in decoder.parameters()]))
    torch.testing.assert_close(results[1], results[0])
