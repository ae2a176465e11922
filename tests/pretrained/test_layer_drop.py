"""Layer drop in training: skipped layers leave ``None``, and caches stay aligned (spec 3.6)."""

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

DROPPED = {"encoder_layerdrop": 1.0, "decoder_layerdrop": 1.0}
SEEN = {"output_hidden_states": True, "output_attentions": True, "use_cache": True}


def asked(family):
    return SEEN | ({"output_router_logits": True} if family == "moe" else {})


@pytest.mark.parametrize("family", FAMILIES)
def test_skipped_layers_leave_none_where_they_would_have_said_something(family):
    model = build(family, **QUIET | DROPPED).train()
    output = model(**TRAINING_BATCH, **asked(family))
    fields = ["encoder_attentions", "decoder_attentions", "cross_attentions"]
    fields += ["encoder_router_logits", "decoder_router_logits"] if family == "moe" else []
    for field in fields:
        assert output[field] == (None, None), field
    for side in ("encoder", "decoder"):
        first, second, last = output[f"{side}_hidden_states"]
        assert torch.equal(first, second)
        assert last.shape == first.shape
    if family == "moe":
        # No layer that balances, so nothing to balance.
        assert output.encoder_aux_loss is None
        assert output.decoder_z_loss is None
    output.loss.backward()
    assert model.model.shared.weight.grad.any()
    assert model.get_encoder().layers[0].self_attn.q_proj.weight.grad is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_skipped_layer_still_caches_its_keys_so_that_layers_stay_aligned(family):
    model = build(family, **QUIET | DROPPED).train()
    past = model(**TRAINING_BATCH, use_cache=True).past_key_values
    assert [tuple(state.shape) for layer in past for state in layer] == [
        (2, 2, 4, 8),
        (2, 2, 4, 8),
        (2, 2, 5, 8),
        (2, 2, 5, 8),
    ] * 2
    more = model(SOURCE, decoder_input_ids=TARGET[:, :1], past_key_values=past)
    assert {layer[0].shape[2] for layer in more.past_key_values} == {5}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_skipped_as_often_as_asked_and_only_in_training(family):
    model = build(family, **QUIET, encoder_layerdrop=0.3, decoder_layerdrop=0.7).train()
    kept = {"encoder": 0, "decoder": 0}
    with torch.no_grad():
        for _ in range(300):
            output = model(**TRAINING_BATCH, output_attentions=True)
            for side in kept:
                kept[side] += sum(w is not None for w in output[f"{side}_attentions"])
    assert 0.6 < kept["encoder"] / 600 < 0.8
    assert 0.2 < kept["decoder"] / 600 < 0.4
    output = model.eval()(**TRAINING_BATCH, output_attentions=True)
    assert None not in output.encoder_attentions + output.decoder_attentions


@pytest.mark.parametrize("options", [{"use_reentrant": False}, {"use_reentrant": True}])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_goes_with_checkpointing_and_every_output(family, options):
    changes = QUIET | {"encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5}
    plain, model = build(family, **changes).train(), build(family, **changes).train()
    model.gradient_checkpointing_enable(options)
    for seed in range(6):
        results = []
        for one in (plain, model):
            torch.manual_seed(seed)
            results.append(gradients(one, **asked(family)))
        torch.testing.assert_close(results[1], results[0])


def test_a_skipped_layer_passes_its_input_on():
    model = build("dense", **QUIET | {"encoder_layerdrop": 1.0}).train()
    encoder = model.get_encoder()
    output = encoder(SOURCE, output_hidden_states=True)
    expected = encoder.layer_norm(output.hidden_states[0])
    assert torch.equal(output.last_hidden_state, expected)
