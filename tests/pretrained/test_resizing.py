"""Another number of embedding rows, and which weights are one."""

import pytest
import torch
from torch import nn

from moe_mt import ConfigError
from tests.pretrained.tiny_models import (
    BATCH,
    FAMILIES,
    build,
    gradients,
    logits,
    logits_of_decoding,
)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_more_rows_leave_the_old_logits_as_they_were(family, tied):
    model = build(family, tie_word_embeddings=tied)
    before = logits(model)
    kind = type(model.get_input_embeddings())
    embedding = model.resize_token_embeddings(70)
    assert type(embedding) is kind
    assert embedding is model.get_input_embeddings() is model.get_encoder().embed_tokens
    assert (embedding.num_embeddings, embedding.padding_idx) == (70, 1)
    assert model.config.vocab_size == model.vocab_size == 70
    assert model.lm_head.out_features == 70
    assert (model.lm_head.weight is embedding.weight) == tied
    after = logits(model)
    assert after.shape == (2, 4, 70)
    assert torch.equal(after[..., :60], before)
    torch.testing.assert_close(logits_of_decoding(model), after[:, -1])


@pytest.mark.parametrize("family", FAMILIES)
def test_new_rows_can_be_read_and_trained(family):
    model = build(family)
    model.resize_token_embeddings(70)
    ids = torch.tensor([[65, 69, 2]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.shared.weight.grad[69].any()
    assert dict(model.named_parameters()).keys() == dict(build(family).named_parameters()).keys()


def test_fewer_rows_cut_the_last_ones():
    model = build("dense")
    before = logits(model)
    model.resize_token_embeddings(20)
    assert model.lm_head.weight is model.model.shared.weight
    assert torch.equal(logits(model), before[..., :20])


def test_rows_are_rounded_up_to_a_multiple():
    model = build("dense")
    assert model.resize_token_embeddings(pad_to_multiple_of=16).num_embeddings == 64
    assert model.resize_token_embeddings(65, pad_to_multiple_of=16).num_embeddings == 80
    assert model.resize_token_embeddings(80, pad_to_multiple_of=16).num_embeddings == 80


def test_the_same_number_changes_nothing():
    model = build("dense")
    before = model.get_input_embeddings()
    assert model.resize_token_embeddings() is model.resize_token_embeddings(60) is before


def test_new_rows_are_like_the_mean_of_the_old_ones():
    model = build("dense")
    with torch.no_grad():
        model.model.shared.weight.add_(3)
    old = model.model.shared.weight.detach().clone()
    new = model.resize_token_embeddings(1060).weight.detach()[60:]
    torch.testing.assert_close(new.mean(0), old.mean(0), rtol=0, atol=1e-3)
    # A little apart, so that they do not stay one in training.
    assert 0 < new.std(0).max() < 0.01
    # Their noise has the covariance of the old rows, but for its size.
    shares = new.var(0) / old.var(0)
    assert shares.max() < 2 * shares.min()


def test_new_rows_can_be_drawn_as_those_of_a_new_model():
    model = build("dense")
    with torch.no_grad():
        model.model.shared.weight.add_(3)
    new = model.resize_token_embeddings(1060, mean_resizing=False).weight.detach()[60:]
    assert abs(new.mean()) < 0.01
    assert 0.28 < new.std() < 0.32


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtype_and_frozen_weights_stay(dtype):
    model = build("moe", tie_word_embeddings=False).to(dtype)
    model.requires_grad_(False)
    model.resize_token_embeddings(64)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not any(p.requires_grad for p in model.parameters())


def test_resized_models_are_saved_and_read(tmp_path):
    model = build("moe")
    model.resize_token_embeddings(64)
    model.save_pretrained(tmp_path)
    found = type(model).from_pretrained(tmp_path)
    assert found.config.vocab_size == 64
    assert torch.equal(logits(found), logits(model))


@pytest.mark.parametrize("kind", ["Model", "Encoder", "Decoder"])
def test_models_without_a_head_are_resized_too(kind):
    model = build("dense", kind)
    model.resize_token_embeddings(70)
    assert model.get_input_embeddings().num_embeddings == 70
    assert model.get_output_embeddings() is None
    ids = torch.tensor([[65, 2]])
    more = {"decoder_input_ids": ids} if kind == "Model" else {}
    assert model(input_ids=ids, **more)[0].shape == (1, 2, 16)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"new_num_tokens": 0}, "new_num_tokens"),
        ({"new_num_tokens": 3.5}, "new_num_tokens"),
        ({"pad_to_multiple_of": 1.5}, "multiple"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of"),
    ],
)
def test_a_number_of_rows_that_cannot_be_is_refused(arguments, named):
    model = build("dense")
    with pytest.raises(ConfigError, match=named) as raised:
        model.resize_token_embeddings(**arguments)
    assert isinstance(raised.value, ValueError)
    assert model.get_input_embeddings().num_embeddings == 60


def test_a_head_can_be_replaced_and_tied_again():
    model = build("dense")
    own = nn.Linear(16, 60, bias=False)
    model.set_output_embeddings(own)
    assert model.get_output_embeddings() is own
    with torch.no_grad():
        hidden = model.model(**BATCH).last_hidden_state
        assert torch.equal(logits(model), own(hidden))
    torch.testing.assert_close(logits_of_decoding(model), logits(model)[:, -1])
    model.tie_weights()
    assert own.weight is model.model.shared.weight
    assert torch.equal(logits(model), logits(build("dense")))


@pytest.mark.parametrize("option", [{"tie_word_embeddings": False}, {"torchscript": True}])
def test_a_head_of_its_own_is_not_tied(option):
    model = build("dense", **option)
    model.tie_weights()
    assert model.lm_head.weight is not model.model.shared.weight
    names = dict(model.named_parameters())
    assert "lm_head.weight" in names
    assert gradients(model, return_dict=True)[1]["lm_head.weight"].any()


def test_a_new_embedding_becomes_the_head_by_tying():
    model = build("dense")
    new = nn.Embedding(30, 16, padding_idx=1)
    model.set_input_embeddings(new)
    assert model.lm_head.weight is not new.weight
    model.tie_weights()
    assert model.lm_head.weight is new.weight
    assert model.lm_head.out_features == 30
    assert logits(model).shape == (2, 4, 30)


@pytest.mark.parametrize("kind", ["Model", "Encoder"])
def test_what_has_no_head_refuses_one(kind):
    with pytest.raises(ConfigError, match="no head"):
        build("dense", kind).set_output_embeddings(nn.Linear(16, 60))


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_weights_are_drawn_as_published(family):
    # Spec 2.6: N(0, init_std), biases and the padding row zero, norms one.
    model = build(family, init_std=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    model.init_weights()
    weights = []
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            weights.append(parameter.detach().flatten())
    assert not model.model.shared.weight[1].any()
    drawn = torch.cat(weights)
    assert abs(drawn.mean()) < 0.02
    assert 0.48 < drawn.std() < 0.52
    built = build(family, init_std=0.5)
    assert not built.model.shared.weight[1].any()
    assert 0.4 < built.model.encoder.layers[0].self_attn.q_proj.weight.std() < 0.6
