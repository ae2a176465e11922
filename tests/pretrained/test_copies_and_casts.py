"""Models that are copied, pickled, cast, emptied and filled: weights stay one where they were."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from moe_mt import ConfigError
from tests.pretrained.tiny_models import (
    FAMILIES,
    adapt,
    build,
    config_of,
    logits,
    logits_of_decoding,
)


def saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_computes_the_same_from_weights_of_its_own(family, way):
    model = build(family)
    before = logits(model)
    found = WAYS[way](model)
    assert torch.equal(logits(found), before)
    assert found.lm_head.weight is found.model.shared.weight
    mine, its = dict(model.named_parameters()), dict(found.named_parameters())
    assert mine.keys() == its.keys()
    assert not {p.data_ptr() for p in mine.values()} & {p.data_ptr() for p in its.values()}
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(0.5)
    assert not torch.allclose(logits(found), before, atol=1e-2)
    torch.testing.assert_close(logits_of_decoding(found), logits(found)[:, -1])
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_of_a_model_with_adapters_has_them_too(way):
    model = build("moe")
    adapt(model, "model.decoder.layers.0.ffn.experts.expert_1.fc1")
    adapt(model, "model.encoder.layers.0.ffn.fc1")
    before = logits(model)
    found = WAYS[way](model)
    assert torch.equal(logits(found), before)
    nn.init.zeros_(found.get_submodule("model.decoder.layers.0.ffn.experts.expert_1.fc1.up").weight)
    assert not torch.equal(logits(found), before)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_casting_reaches_every_weight_and_keeps_ties(family, dtype):
    model = build(family)
    expected = logits(model)
    parameters = list(model.parameters())
    assert model.to(dtype) is model
    assert model.dtype == dtype
    assert {p.dtype for p in model.parameters()} == {dtype}
    # Optimizers hold on to them.
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.lm_head.weight is model.model.shared.weight
    found = logits(model)
    assert found.dtype == dtype
    # A choice of experts may flip where weights are rounded, so one norm for all.
    share = (found.double() - expected.double()).norm() / expected.double().norm()
    assert share < {torch.float16: 0.02, torch.bfloat16: 0.1, torch.float64: 1e-6}[dtype]
    stepped = logits_of_decoding(model)
    assert (stepped - found[:, -1]).norm() <= 0.02 * found[:, -1].norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_was_emptied_can_be_filled_again(family):
    state_dict = build(family).state_dict()
    with torch.device("meta"):
        model = type(build(family))(config_of(family)).eval()
    model.to_empty(device="cpu")
    assert model.device.type == "cpu"
    assert model.lm_head.weight is model.model.shared.weight
    model.load_state_dict(state_dict)
    positions = build(family).core.positions.table
    model.core.positions.table.copy_(positions)
    assert torch.equal(logits(model), logits(build(family)))


def other_weights(family):
    """Return a state dict that no model of the tests has, and what it makes a model compute."""
    model = build(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    return copy.deepcopy(model.state_dict()), logits(model)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_dict_loads_strictly(family, assign):
    state_dict, expected = other_weights(family)
    model = build(family)
    report = model.load_state_dict(state_dict, assign=assign)
    assert not report.missing_keys
    assert not report.unexpected_keys
    assert torch.equal(logits(model), expected)
    torch.testing.assert_close(logits_of_decoding(model), expected[:, -1])
    if assign:
        # As everywhere in torch, names that were one are apart until they are tied again.
        model.tie_weights()
    assert model.lm_head.weight is model.model.shared.weight
    with pytest.raises(RuntimeError, match=r"nonsense\.weight"):
        model.load_state_dict(state_dict | {"nonsense.weight": torch.zeros(1)})


@pytest.mark.parametrize("assign", [False, True])
def test_a_part_of_the_weights_can_be_loaded(assign):
    state_dict, _ = other_weights("moe")
    name = "model.decoder.layers.0.ffn.experts.expert_2.fc1.weight"
    model, expected = build("moe"), build("moe")
    report = model.load_state_dict({name: state_dict[name]}, strict=False, assign=assign)
    assert len(report.missing_keys) == len(state_dict) - 1
    with torch.no_grad():
        expected.get_parameter(name).mul_(0.5)
    assert torch.equal(logits(model), logits(expected))
    assert not torch.equal(logits(model), logits(build("moe")))


def test_a_model_on_the_meta_device_can_be_filled_piece_by_piece():
    # As a checkpoint in shards is loaded without a copy.
    expected = build("moe")
    with torch.device("meta"):
        model = type(expected)(config_of("moe")).eval()
    items = list(copy.deepcopy(expected.state_dict()).items())
    for piece in (items[:40], items[40:90], items[90:]):
        model.load_state_dict(dict(piece), strict=False, assign=True)
    model.tie_weights()
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model), logits(expected))
    stacked = model.model.decoder.layers[0].ffn.experts.stacked.up_proj
    last = model.model.decoder.layers[0].ffn.experts.expert_3.fc1.weight
    assert last.data_ptr() == stacked[3].data_ptr()


def test_data_parallel_by_copies_is_refused_before_it_computes_with_stale_weights():
    with pytest.raises(ConfigError, match="DistributedDataParallel"):
        build("dense")._replicate_for_data_parallel()


def test_a_model_that_is_pickled_holds_its_weights_once(tmp_path):
    model = build("moe", d_model=64, encoder_ffn_dim=512)
    torch.save(model, tmp_path / "model.pt")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    experts = sum(p.nbytes for name, p in model.named_parameters() if "expert" in name)
    beside = (tmp_path / "model.pt").stat().st_size - weights
    assert beside < experts / 4
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(loaded), logits(model))
