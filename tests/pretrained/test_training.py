"""Losses of the documented models: labels, what the routers add, and what is random."""

import pytest
import torch
from torch.nn import functional

from moe_mt.pretrained import shift_tokens_right
from tests.pretrained.tiny_models import (
    BATCH,
    FAMILIES,
    LABELS,
    MASK,
    QUIET,
    SOURCE,
    TARGET,
    TRAINING_BATCH,
    build,
    logits,
)


def test_labels_are_shifted_into_what_the_decoder_reads():
    shifted = shift_tokens_right(torch.tensor([[5, 6, 2], [7, -100, -100]]), 1, 2)
    assert shifted.tolist() == [[2, 5, 6], [2, 7, 1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_mean_over_labels_that_count(family):
    model = build(family)
    output = model(**TRAINING_BATCH)
    shifted = torch.tensor([[2, 10, 11, 12], [2, 12, 13, 2]])
    expected_logits = logits(model, decoder_input_ids=shifted)
    torch.testing.assert_close(output.logits, expected_logits)
    counted = LABELS != -100
    log_probs = expected_logits.log_softmax(-1)[counted]
    expected = -log_probs[torch.arange(7), LABELS[counted]].mean()
    torch.testing.assert_close(output.loss, expected)
    assert output.loss.dim() == 0


def test_padding_in_labels_counts_unless_it_is_minus_100():
    # Published so: callers put -100.
    model = build("dense")
    padded = torch.where(LABELS == -100, 1, LABELS)
    counted = model(SOURCE, MASK, labels=padded).loss
    assert not torch.isclose(counted, model(SOURCE, MASK, labels=LABELS).loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_do_not_replace_what_the_decoder_is_given(family):
    model = build(family)
    expected = logits(model)
    output = model(**BATCH, labels=LABELS)
    torch.testing.assert_close(output.logits, expected)
    torch.testing.assert_close(
        output.loss, functional.cross_entropy(expected.flatten(0, 1), LABELS.flatten())
    )
    embeds = model.get_input_embeddings().weight.detach()[TARGET] * 4
    output = model(SOURCE, MASK, decoder_inputs_embeds=embeds, labels=LABELS)
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_of_half_precision_is_taken_in_float32(dtype):
    output = build("dense").to(dtype)(**TRAINING_BATCH)
    assert output.logits.dtype == dtype
    assert output.loss.dtype == torch.float32


def test_a_tuple_begins_with_the_loss():
    model = build("moe")
    output = model(**TRAINING_BATCH, output_router_logits=True)
    plain = model(**TRAINING_BATCH, output_router_logits=True, return_dict=False)
    names = ("loss", "logits", "encoder_aux_loss", "decoder_aux_loss")
    for found, name in zip(plain[:4], names, strict=True):
        assert torch.equal(found, output[name]), name


def transformers_4_loss(routers):
    """Spec 3.9: layers side by side, first choices all in the first layer's columns."""
    routers = [router for router in routers if router is not None]
    columns = sum(probs.shape[1] for probs, _ in routers)
    counts = torch.zeros(columns)
    for _, first in routers:
        for index in first.tolist():
            counts[index] += 1 / (len(routers) * len(first))
    means = torch.cat([probs.mean(0) for probs, _ in routers])
    return columns**2 * (counts * means).sum() / columns


def test_the_number_of_transformers_4_is_there_on_request():
    # One sparse layer in the encoder, two in the decoder.
    model = build("moe", router_aux_loss="transformers-4", router_aux_loss_coef=0.5)
    output = model(**TRAINING_BATCH, output_router_logits=True)
    encoder = transformers_4_loss(output.encoder_router_logits)
    decoder = transformers_4_loss(output.decoder_router_logits)
    torch.testing.assert_close(output.encoder_aux_loss, encoder)
    torch.testing.assert_close(output.decoder_aux_loss, decoder)
    assert output.encoder_z_loss is None
    assert output.decoder_z_loss is None
    plain = model(**TRAINING_BATCH).loss
    torch.testing.assert_close(output.loss, plain + 0.5 * (encoder + decoder))
    output.loss.backward()
    assert model.model.encoder.layers[1].ffn.router.classifier.weight.grad.any()


def fairseq_losses(routers):
    """Return balancing loss and z-loss of sparse layers, from scores and padding alone."""
    balancing = z_loss = 0
    for router in routers:
        if router is None:
            continue
        scores, padding = router.routing.router_logits, router.routing.padding
        real = scores if padding is None else scores[~padding]
        firsts = functional.one_hot(real.argmax(1), 4).float().mean(0)
        balancing = balancing + 4 * (firsts * real.softmax(1).mean(0)).sum()
        z_loss = z_loss + real.logsumexp(1).square().mean()
    return balancing, z_loss


@pytest.mark.parametrize("masked", [False, True])
def test_router_losses_are_those_of_fairseq_and_of_real_tokens(masked):
    model = build("moe", router_aux_loss_coef=0.3, router_z_loss_coef=0.1)
    more = {"decoder_attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])} if masked else {}
    output = model(**TRAINING_BATCH, **more, output_router_logits=True)
    total = model(**TRAINING_BATCH, **more).loss
    for side in ("encoder", "decoder"):
        balancing, z_loss = fairseq_losses(output[f"{side}_router_logits"])
        torch.testing.assert_close(output[f"{side}_aux_loss"], balancing)
        torch.testing.assert_close(output[f"{side}_z_loss"], z_loss)
        total = total + 0.3 * balancing + 0.1 * z_loss
    torch.testing.assert_close(output.loss, total)
    decoder_padding = output.decoder_router_logits[0].routing.padding
    assert (decoder_padding is not None) == masked


def test_there_is_no_z_loss_where_its_coefficient_is_zero():
    output = build("moe", router_z_loss_coef=0.0)(**TRAINING_BATCH, output_router_logits=True)
    assert output.encoder_z_loss is None
    assert output.encoder_aux_loss > 0


def test_router_losses_need_labels_and_the_request():
    model = build("moe")
    assert model(**BATCH, output_router_logits=True).encoder_aux_loss is None
    assert model(**TRAINING_BATCH).encoder_aux_loss is None
    model.config.output_router_logits = True
    assert model(**TRAINING_BATCH).encoder_aux_loss > 0
    assert model(**TRAINING_BATCH, output_router_logits=False).encoder_aux_loss is None


def test_a_side_without_sparse_layers_has_no_router_loss():
    model = build("moe", decoder_sparse_step=0)
    output = model(**TRAINING_BATCH, output_router_logits=True)
    assert output.decoder_aux_loss is None
    assert output.decoder_z_loss is None
    assert output.decoder_router_logits == (None, None)
    weights = model.config.router_aux_loss_coef, model.config.router_z_loss_coef
    expected = model(**TRAINING_BATCH).loss + weights[0] * output.encoder_aux_loss
    torch.testing.assert_close(output.loss, expected + weights[1] * output.encoder_z_loss)


@pytest.mark.parametrize("form", ["object", "tuple", "states alone"])
def test_outputs_of_the_encoder_may_be_given_in_training(form):
    model = build("moe")
    expected = model(**TRAINING_BATCH, output_router_logits=True)
    encoded = model.get_encoder()(SOURCE, MASK, output_router_logits=True)
    if form != "object":
        # Plain tuples hold gates and first choices, and no scores to make a loss of.
        routers = tuple(router and tuple(router) for router in encoded.router_probs)
        encoded = (encoded[0],) if form == "states alone" else (encoded[0], None, None, routers)
    output = model(
        encoder_outputs=encoded, attention_mask=MASK, labels=LABELS, output_router_logits=True
    )
    torch.testing.assert_close(output.decoder_aux_loss, expected.decoder_aux_loss)
    if form == "object":
        torch.testing.assert_close(output.loss, expected.loss)
    else:
        assert output.encoder_aux_loss is None
        assert output.loss < expected.loss


@pytest.fixture
def dropped(monkeypatch):
    """Return a list of the probabilities with which something was dropped."""
    probabilities, dropout = [], functional.dropout

    def recording(x, p=0.5, training=True, inplace=False):
        if training and p > 0:
            probabilities.append(p)
        return dropout(x, p, training, inplace)

    monkeypatch.setattr(functional, "dropout", recording)
    return probabilities


@pytest.mark.parametrize(
    ("family", "changes", "behind_feed_forward"),
    [
        ("dense", {}, 0.3),
        # The published class has activation_dropout behind the network, which is 0 by default.
        ("moe", {}, None),
        ("moe", {"ffn_output_dropout": "dropout"}, 0.3),
    ],
)
def test_what_follows_a_feed_forward_network_in_training(
    family, changes, behind_feed_forward, dropped
):
    changes = QUIET | {"dropout": 0.3} | changes
    model = build(family, **changes).train()
    with torch.no_grad():
        model(**TRAINING_BATCH)
    # Two embeddings, and behind attention three times in each of two layers.
    elsewhere = 2 + 2 + 4
    assert set(dropped) == {0.3}
    assert len(dropped) == elsewhere + (4 if behind_feed_forward else 0)


def test_activation_dropout_is_behind_the_activation_and_as_published_behind_the_network(dropped):
    model = build("moe", **QUIET | {"activation_dropout": 0.4}).train()
    with torch.no_grad():
        model.get_encoder().layers[0].ffn(torch.randn(1, 3, 16))
        assert dropped == [0.4]
        dropped.clear()
        model(**TRAINING_BATCH)
    # Four networks, of which the sparse ones drop hidden rows expert by expert.
    assert set(dropped) == {0.4}
    assert len(dropped) > 8


def test_training_with_float16_and_bfloat16_runs():
    for dtype in (torch.float16, torch.bfloat16):
        model = build("moe").to(dtype).train()
        output = model(**TRAINING_BATCH, output_router_logits=True)
        output.loss.backward()
        assert output.loss.isfinite()
        assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_trains_float32_weights(family):
    model = build(family, **QUIET).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**TRAINING_BATCH)
    output.loss.backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    expected = build(family, **QUIET).train()(**TRAINING_BATCH).loss
    torch.testing.assert_close(output.loss, expected, rtol=0.05, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_documented_activation_runs_and_is_what_its_name_says(family):
    known = {
        "relu": functional.relu,
        "gelu": functional.gelu,
        "silu": functional.silu,
        # GPT-2's form: Hendrycks and Gimpel, arXiv:1606.08415, section 2.
        "gelu_new": lambda x: (
            0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
        ),
    }
    x = torch.linspace(-4, 4, 33)[:, None].expand(33, 16)
    for name, function in known.items():
        layer = build(family, activation_function=name).get_encoder().layers[0]
        ffn = layer if family == "dense" else layer.ffn
        with torch.no_grad():
            found = layer.core.feed_forward(x)
            expected = ffn.fc2(function(ffn.fc1(x)))
        torch.testing.assert_close(found, expected)
