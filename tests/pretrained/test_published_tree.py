"""The published names over the one architecture: what is done to the tree is done to the model."""

import copy

import pytest
import torch
from torch import nn

from moe_mt.models import FAMILIES as FACTS
from moe_mt.models import TIED_KEYS
from tests.pretrained.tiny_models import (
    BATCH,
    FAMILIES,
    MASK,
    SOURCE,
    TARGET,
    adapt,
    build,
    config_of,
    logits,
    logits_of_decoding,
)

# Linear layers of every kind there is.
ADAPTED = [
    ("dense", "model.encoder.layers.0.self_attn.q_proj"),
    ("dense", "model.encoder.layers.1.fc1"),
    ("dense", "model.decoder.layers.0.self_attn.v_proj"),
    ("dense", "model.decoder.layers.1.encoder_attn.k_proj"),
    ("dense", "model.decoder.layers.1.encoder_attn.out_proj"),
    ("dense", "model.decoder.layers.0.fc2"),
    ("dense", "lm_head"),
    ("moe", "model.encoder.layers.0.ffn.fc1"),
    ("moe", "model.encoder.layers.1.self_attn.k_proj"),
    ("moe", "model.decoder.layers.0.cross_attention.q_proj"),
    ("moe", "model.encoder.layers.1.ffn.experts.expert_2.fc1"),
    ("moe", "model.decoder.layers.1.ffn.experts.expert_0.fc2"),
    ("moe", "model.encoder.layers.1.ffn.router.classifier"),
    ("moe", "model.decoder.layers.0.ffn.router.classifier"),
    ("moe", "lm_head"),
]


@pytest.mark.parametrize("kind", ["ForConditionalGeneration", "Model"])
@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_shapes_are_the_published_ones(family, kind):
    config = config_of(family, router_bias=True) if family == "moe" else config_of(family)
    locations = FACTS[config.model_type].locations(config.for_model())
    shapes = {key: location.shape for key, location in locations.items()}
    prefix = "" if kind == "Model" else "model."
    expected = {prefix + key: shape for key, shape in shapes.items() if key != "lm_head.weight"}
    if kind != "Model":
        expected["lm_head.weight"] = shapes["lm_head.weight"]
    more = {"router_bias": True} if family == "moe" else {}
    state_dict = build(family, kind, **more).state_dict()
    assert {key: tuple(tensor.shape) for key, tensor in state_dict.items()} == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_listed_once_and_under_every_tied_name_on_request(family):
    model = build(family)
    once = dict(model.named_parameters())
    every = dict(model.named_parameters(remove_duplicate=False))
    tied = {key if key.startswith("lm_head") else f"model.{key}" for key in TIED_KEYS}
    assert every.keys() == model.state_dict().keys()
    assert every.keys() - once.keys() == tied - {"model.shared.weight"}
    assert len({id(parameter) for parameter in every.values()}) == len(once)
    assert model.num_parameters() == sum(parameter.numel() for parameter in once.values())
    assert all(parameter.requires_grad for parameter in once.values())


def test_the_weights_of_the_tree_are_those_that_compute():
    model = build("moe")
    places = FACTS["nllb-moe"].locations(model.config.for_model())
    experts = model.core.decoder.layers[0].feed_forward.experts.stacked
    named = dict(model.named_parameters(remove_duplicate=False))
    for key, place in places.items():
        if place.expert is None:
            mine = named[key if key == "lm_head.weight" else f"model.{key}"]
            assert mine is model.core.get_parameter(place.parameter), key
    first = named["model.decoder.layers.0.ffn.experts.expert_1.fc1.weight"]
    assert first.data_ptr() == experts.up_proj[1].data_ptr()


def test_published_paths_resolve():
    dense, moe = build("dense"), build("moe")
    assert dense.model.encoder.layers[0].fc1.out_features == 12
    assert dense.model.decoder.layers[1].encoder_attn.q_proj.in_features == 16
    assert dense.get_encoder().layers[0].final_layer_norm.normalized_shape == (16,)
    assert moe.model.encoder.layers[1].ffn.experts.expert_3.fc1.out_features == 12
    assert moe.model.encoder.layers[1].ffn.experts["expert_3"].fc2.in_features == 12
    assert moe.model.decoder.layers[0].ffn.router.classifier.out_features == 4
    assert moe.model.encoder.layers[0].ffn.fc2.in_features == 12
    for model in (dense, moe):
        assert model.model.encoder.embed_tokens is model.model.decoder.embed_tokens
        assert model.model.shared is model.get_input_embeddings()
        assert model.base_model is model.model
        assert model.model.base_model is model.model
        assert model.get_encoder() is model.model.get_encoder() is model.model.encoder


@pytest.mark.parametrize(("family", "path"), ADAPTED)
def test_an_adapter_is_used_by_forward_and_by_fast_decoding(family, path):
    model = build(family)
    before = logits(model)
    adapter = adapt(model, path)
    assert model.get_submodule(path) is adapter
    after = logits(model)
    assert not torch.allclose(after, before, atol=1e-2)
    torch.testing.assert_close(logits_of_decoding(model), after[:, -1])


@pytest.mark.parametrize(("family", "path"), ADAPTED)
def test_an_adapter_of_frozen_weights_gets_gradients_and_goes_away_again(family, path):
    model = build(family)
    before = logits(model)
    model.requires_grad_(False)
    adapter = adapt(model, path)
    model(**BATCH, labels=TARGET).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {f"{path}.down.weight", f"{path}.up.weight"}
    assert adapter.up.weight.grad.any()
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, adapter.base_layer)
    assert torch.equal(logits(model), before)


def test_a_model_whose_head_has_an_adapter_can_still_be_cast():
    # The adapter shows the head's weight and lets nobody set it.
    model = build("dense")
    adapt(model, "lm_head")
    model.double()
    assert model.lm_head.weight is model.model.shared.weight
    assert logits(model).dtype == torch.float64


class Doubled(nn.Module):
    """Twice what it reads, as a feed-forward network."""

    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("path", ["model.encoder.layers.0.ffn", "model.decoder.layers.1.ffn"])
def test_a_whole_feed_forward_network_can_be_replaced(path):
    # The first is dense, the second sparse.
    model = build("moe")
    before = logits(model)
    owner, _, name = path.rpartition(".")
    published = model.get_submodule(path)
    setattr(model.get_submodule(owner), name, Doubled())
    after = logits(model)
    assert not torch.allclose(after, before, atol=1e-2)
    torch.testing.assert_close(logits_of_decoding(model), after[:, -1])
    setattr(model.get_submodule(owner), name, published)
    assert torch.equal(logits(model), before)


def test_a_router_of_another_layer_can_be_put_in_place():
    model = build("moe")
    first, second = (layer.ffn for layer in model.model.decoder.layers)
    first.router = second.router
    found = logits(model)
    expected = build("moe")
    weights = [layer.ffn.router.classifier.weight for layer in expected.model.decoder.layers]
    weights[0].data.copy_(weights[1])
    assert torch.equal(found, logits(expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_can_be_taken_out_of_the_list(family):
    model = build(family)
    model.model.encoder.layers = model.model.encoder.layers[:1]
    del model.model.decoder.layers[0]
    found = logits(model)
    assert len(model(**BATCH).past_key_values) == 1
    torch.testing.assert_close(logits_of_decoding(model), found[:, -1])
    assert not any(".layers.1." in name for name in model.state_dict())


def test_an_embedding_that_is_replaced_is_read_by_both_sides():
    model = build("dense")
    new = nn.Embedding(60, 16, padding_idx=1)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new
    assert model.core.embedding is new
    with torch.no_grad():
        new.weight.copy_(model.lm_head.weight)
    assert torch.equal(logits(model), logits(build("dense")))


def training_parts(model):
    """Return the names of the core's modules that are in training mode."""
    containers = (nn.ModuleList, nn.Sequential)
    return {
        name
        for name, module in model.core.named_modules()
        if module.training and not isinstance(module, containers)
    }


PARTS = {
    "model": [""],
    "model.encoder": ["encoder", "embedding", "positions"],
    "model.decoder": ["decoder", "embedding", "positions"],
    "model.encoder.layers": ["encoder.layers.0", "encoder.layers.1"],
    "model.decoder.layers.1": ["decoder.layers.1"],
    "model.encoder.layers.0.ffn": ["encoder.layers.0.feed_forward"],
    "model.decoder.layers.0.ffn": ["decoder.layers.0.feed_forward"],
    "model.decoder.layers.0.ffn.router": ["decoder.layers.0.feed_forward.router"],
    "model.decoder.layers.0.ffn.experts": ["decoder.layers.0.feed_forward.experts"],
    "model.decoder.layers.0.cross_attention": ["decoder.layers.0.cross_attention"],
    "lm_head": [],
}


@pytest.mark.parametrize("part", PARTS)
def test_training_mode_of_a_part_reaches_what_computes_it_and_nothing_else(part):
    model = build("moe")
    assert training_parts(model) == set()
    model.get_submodule(part).train()
    everything = training_parts(build("moe").train())
    expected = {
        name
        for name in everything
        if any(not place or name == place or name.startswith(f"{place}.") for place in PARTS[part])
    }
    assert training_parts(model) == expected
    stacked = model.core.decoder.layers[0].feed_forward.experts.stacked
    assert stacked.training == ("decoder.layers.0.feed_forward.experts" in expected)
    assert training_parts(model.eval()) == set()


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_active_in_the_part_that_is_in_training(family):
    model = build(family, dropout=0.5)
    memory = model.get_encoder()(SOURCE, MASK)

    def decoded():
        return logits(model, input_ids=None, encoder_outputs=memory)

    def encoded():
        with torch.no_grad():
            return model.get_encoder()(SOURCE, MASK)[0]

    model.get_encoder().train()
    assert not torch.equal(encoded(), encoded())
    assert torch.equal(decoded(), decoded())
    model.eval().get_decoder().train()
    assert torch.equal(encoded(), encoded())
    assert not torch.equal(decoded(), decoded())
    model.train().eval()
    assert torch.equal(logits(model), logits(model))


def test_half_is_float16():
    model = build("moe").half()
    assert model.dtype == torch.float16
    assert model.model.decoder.layers[0].ffn.experts.stacked.up_proj.dtype == torch.float16


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("dense", "model.decoder.layers.0.fc2"),
        ("dense", "model.decoder.layers.1.encoder_attn_layer_norm"),
        ("moe", "model.encoder.layers.0.ffn.fc1"),
    ],
)
def test_what_a_library_writes_into_modules_is_used(family, path):
    """Quantisation libraries put their layers there, past every ``__setattr__``."""
    model = build(family)
    by_name = build(family)
    owner, _, name = path.rpartition(".")
    for changed, put in (
        (by_name, lambda module, new: setattr(module, name, new)),
        (model, lambda module, new: module._modules.update({name: new})),
    ):
        module = changed.get_submodule(owner)
        new = copy.deepcopy(getattr(module, name))
        with torch.no_grad():
            new.weight.mul_(3)
        put(module, new)
    assert torch.equal(logits(model), logits(by_name))
    assert not torch.allclose(logits(model), logits(build(family)), atol=1e-3)
    torch.testing.assert_close(logits_of_decoding(model), logits(model)[:, -1])
