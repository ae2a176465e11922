"""Patched models of the transformers that is installed there, on the kernels."""

import pytest
import torch

import moe_mt
from moe_mt.errors import ConfigError
from moe_mt.ops import use_backend
from tests.closeness import assert_near
from tests.integrations import families

pytestmark = pytest.mark.gpu

FAMILIES = ("nllb_moe", "switch", "mixtral", "qwen2_moe", "deepseek_v3")


@pytest.fixture(autouse=True)
def needs_transformers():
    pytest.importorskip("transformers")


def logits(model, family):
    inputs = {name: ids.to(model.device) for name, ids in families.inputs_for(family).items()}
    return model(**inputs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_patched_there_is_patched_here(family):
    expected, found = families.make(family), families.make(family).to("cuda")
    for model in (expected, found):
        moe_mt.patch(model)
        families.without_chance(model, family)
    here, there = logits(expected, family), logits(found, family)
    assert_near(there, here, torch.float32)
    here.square().sum().backward()
    there.square().sum().backward()
    compared = 0
    for (name, mine), theirs in zip(found.named_parameters(), expected.parameters(), strict=True):
        if "experts" in name:
            assert_near(mine.grad, theirs.grad, torch.float32, name)
            compared += 1
    assert compared > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_definition(family):
    model = families.make(family).to("cuda")
    moe_mt.patch(model)
    inputs = {n: ids.to("cuda") for n, ids in families.inputs_for(family).items()}
    inputs.pop("decoder_input_ids", None)
    options = {"num_beams": 2, "do_sample": False, "max_new_tokens": 12}
    found = model.generate(**inputs, **options)
    with use_backend("eager"):
        assert torch.equal(model.generate(**inputs, **options), found)


def test_a_layer_that_is_spread_over_devices_is_refused():
    model = families.make("nllb_moe")
    layer = model.model.encoder.layers[1].ffn
    layer.experts["expert_1"].to("cuda")
    with pytest.raises(ConfigError, match="weights are on cpu, cuda:0"):
        moe_mt.patch(model)
