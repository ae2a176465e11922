"""What is done to a patched model afterwards: it computes what the unpatched model would."""

import copy

import pytest
import torch
from torch import nn

from moe_mt.errors import ConfigError
from moe_mt.integrations import patch
from tests.closeness import assert_near
from tests.integrations.families import VERSION, inputs_for, make

pytestmark = pytest.mark.transformers

MAJOR = VERSION[0]
# Those whose experts are modules there.
FAMILIES = ["switch", *(["mixtral"] if MAJOR < 5 else [])]


def pair(family, **settings):
    plain = make(family, **settings)
    patched = copy.deepcopy(plain)
    patch(patched)
    return plain, patched


def logits_of(model, family):
    with torch.no_grad():
        return model(**inputs_for(family)).logits


def containers(model):
    """Return the parents of the experts, whose attribute ``experts`` these are."""
    return [m for m in model.modules() if isinstance(getattr(m, "experts", None), nn.Module)]


def blocks(model):
    return [module for module in model.modules() if hasattr(module, "slices")]


def give_a_forward_of_its_own(model):
    for block in containers(model):
        for expert in block.experts.children():
            kind = type(expert)
            forward = lambda self, x, kind=kind: 3 * kind.forward(self, x)  # noqa: E731
            expert.__class__ = type("Mine", (kind,), {"forward": forward, "__module__": __name__})


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_a_users_class_are_refused(family):
    model = make(family)
    give_a_forward_of_its_own(model)
    with pytest.raises(ConfigError, match="Mine"):
        patch(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_whose_class_changes_after_patching_are_called(family):
    plain, patched = pair(family)
    for model in (plain, patched):
        give_a_forward_of_its_own(model)
    assert_near(logits_of(patched, family), logits_of(plain, family), torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_list_of_other_experts_is_used(family):
    plain, patched = pair(family)
    for model in (plain, patched):
        for block, other in zip(containers(model), containers(make(family, seed=1)), strict=True):
            block.experts = other.experts
    assert_near(logits_of(patched, family), logits_of(plain, family), torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replica_of_data_parallel_uses_its_own_experts(family):
    block = blocks(pair(family)[1])[0]
    others = containers(make(family, seed=1))[0].experts
    # As nn.DataParallel does for every device.
    replica = block._replicate_for_data_parallel()
    replica.experts = others
    expected = copy.deepcopy(block)
    expected.experts.load_state_dict(others.state_dict())
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        found, wanted = (b(x) if MAJOR >= 5 else b(x)[0] for b in (replica, expected))
    assert_near(found, wanted, torch.float32)


def test_experts_in_evaluation_mode_drop_nothing_in_a_layer_that_trains():
    plain, patched = pair("switch", dropout_rate=0.5, router_jitter_noise=0.0)
    for model in (plain, patched):
        for block in containers(model):
            block.train()
            block.experts.eval()
    assert_near(logits_of(patched, "switch"), logits_of(plain, "switch"), torch.float32)


@pytest.mark.skipif(MAJOR >= 5, reason="the router stays transformers' own there")
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "olmoe"])
def test_equal_logits_draw_the_experts_that_they_draw_unpatched(family):
    # In bfloat16, some tokens in a hundred have equal logits where the last expert is chosen.
    plain, patched = pair(family)
    for model in (plain, patched):
        for block in containers(model):
            nn.init.zeros_(block.gate.weight)
    assert_near(logits_of(patched, family), logits_of(plain, family), torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_patched_in_inference_mode_trains(family):
    model = make(family)
    with torch.inference_mode():
        patch(model)
    model(**inputs_for(family)).logits.sum().backward()


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_loaded_by_assignment_are_stacked_at_the_next_call(family):
    patched = pair(family)[1]
    values = {name: tensor.clone() for name, tensor in patched.state_dict().items()}
    patched.load_state_dict(values, assign=True)
    logits_of(patched, family)
    first = blocks(patched)[0]
    stack, expert = first.slices.stacked.up_proj, first.slices.made[0]
    assert stack.data_ptr() in {parameter.data_ptr() for parameter in expert.parameters()}


@pytest.mark.skipif(MAJOR < 5, reason="nothing calls the list of experts in transformers 4")
@pytest.mark.parametrize("family", ["switch", "nllb_moe"])
def test_a_hook_of_the_list_of_experts_is_called_or_refused(family):
    model = make(family)
    calls = []
    for block in containers(model):
        block.experts.register_forward_hook(lambda *_: calls.append(1))
    try:
        patch(model)
    except ConfigError:
        return
    logits_of(model, family)
    assert calls
