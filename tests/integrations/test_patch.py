"""A patched model computes what it should: its own outputs where these are right, else 4.57's.

Runs with every tested version of transformers (``make test-transformers``). Goldens were made by
4.57.1, unpatched: ``tests/golden/make_transformers_goldens.py``.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import moe_mt
from moe_mt.errors import ConfigError
from tests.closeness import assert_near
from tests.integrations import families

pytestmark = pytest.mark.transformers

GOLDENS = Path(__file__).parents[1] / "golden" / "transformers"

RIGHT_EVERYWHERE = [name for name in families.MODELS if name not in ("nllb_moe", "switch")]


def logits(model, family):
    with torch.no_grad():
        return model(**families.inputs_for(family)).logits


@pytest.mark.parametrize("case", families.GOLDEN_CASES)
def test_what_some_versions_compute_wrongly_is_what_4_57_computes(case):
    family, settings = families.GOLDEN_CASES[case]
    if family == "switch" and (5, 0) <= families.VERSION < (5, 15):
        pytest.skip("Switch differs outside its sparse layers there, patched or not")
    model = families.make(family, **settings)
    moe_mt.patch(model)
    found = families.golden_tensors(model, family)
    expected = load_file(GOLDENS / f"{case}.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            assert_near(found[name], tensor, torch.float32, name)
        else:
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("case", families.GOLDEN_CASES)
def test_the_goldens_are_what_4_57_computes_unpatched(case):
    if families.VERSION >= (5, 0):
        pytest.skip("this is transformers 5")
    family, settings = families.GOLDEN_CASES[case]
    found = families.golden_tensors(families.make(family, **settings), family)
    expected = load_file(GOLDENS / f"{case}.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", families.MODELS)
def test_outputs_are_those_of_the_unpatched_model(family):
    if family == "nllb_moe" and families.VERSION >= (5, 0):
        pytest.skip("unpatched, transformers 5 computes NLLB-MoE wrongly: see the goldens")
    settings = {"expert_capacity": 64} if family == "switch" else {}
    model = families.make(family, **settings)
    expected = logits(model, family)
    tokens = families.generate(model, family, num_beams=2)
    report = moe_mt.patch(model)
    assert report.replaced
    # Without gradients, and with them, which is another path.
    assert_near(logits(model, family), expected, torch.float32)
    assert_near(model(**families.inputs_for(family)).logits, expected, torch.float32)
    assert torch.equal(families.generate(model, family, num_beams=2), tokens)


@pytest.mark.parametrize("family", families.MODELS)
def test_every_expert_layer_of_the_model_is_replaced_and_reported(family):
    model = families.make(family)
    before = {name: type(module) for name, module in model.named_modules()}
    report = moe_mt.patch(model)
    changed = [name for name, module in model.named_modules() if type(module) is not before[name]]
    assert sorted(changed) == sorted(report.replaced)
    assert len(changed) == (1 if family.startswith("deepseek") else 2)
    assert not report.left
    experts = {"switch": 4, "mixtral": 4, "olmoe": 8, "deepseek_v2": 8, "deepseek_v3": 8}
    for name, what in report.replaced.items():
        assert what == f"{before[name].__name__}, {experts.get(family, 6)} experts"
        assert f"{what}: " in str(report)
        assert name in str(report)


@pytest.mark.parametrize("family", families.MODELS)
def test_parameters_stay_the_same_objects_under_the_same_names(family):
    model = families.make(family)
    before = dict(model.named_parameters())
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moe_mt.patch(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert list(model.state_dict()) == list(values)
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", families.MODELS)
def test_unpatching_restores_bit_for_bit(family):
    model = families.make(family)
    classes = {name: type(module) for name, module in model.named_modules()}
    expected = logits(model, family)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    replaced = moe_mt.patch(model).replaced
    report = moe_mt.unpatch(model)
    assert report.replaced.keys() == replaced.keys()
    assert "compute as before again" in str(report)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert torch.equal(logits(model, family), expected)


def test_nothing_outside_the_model_changes():
    import transformers.models.mixtral.modeling_mixtral as modeling

    def facts():
        classes = [value for value in vars(modeling).values() if isinstance(value, type)]
        return {cls: dict(vars(cls)) for cls in classes}, dict(vars(torch.nn.functional))

    other = families.make("mixtral")
    expected = logits(other, "mixtral")
    before = facts()
    moe_mt.patch(families.make("mixtral"))
    assert facts() == before
    assert type(other.model.layers[0]) is modeling.MixtralDecoderLayer
    assert torch.equal(logits(other, "mixtral"), expected)


def test_a_capacity_is_kept_in_every_sequence():
    """Against the rule itself: of tokens in their order, an expert takes so many a sequence."""
    capacity = 2
    model = families.make("switch", expert_capacity=capacity)
    layer = model.encoder.block[1].layer[1].mlp
    moe_mt.patch(model)
    x = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        output = layer(x)
        output = output[0] if isinstance(output, tuple) else output
        probs = layer.router.classifier(x).softmax(-1)
        expected = torch.zeros_like(x)
        dropped = 0
        for sentence, row in zip(range(3), probs, strict=True):
            taken = [0] * 4
            for position, choice in enumerate(row.argmax(-1).tolist()):
                taken[choice] += 1
                dropped += taken[choice] > capacity
                if taken[choice] <= capacity:
                    expert = layer.experts[f"expert_{choice}"]
                    token = x[sentence, position]
                    expected[sentence, position] = row[position, choice] * expert(token)
    assert dropped > 3
    assert_near(output, expected, torch.float32)


@pytest.mark.parametrize("family", families.MODELS)
def test_gradients_are_those_of_the_unpatched_model(family):
    if family == "nllb_moe" and families.VERSION >= (5, 0):
        pytest.skip("unpatched, transformers 5 computes NLLB-MoE wrongly: see the goldens")
    settings = {"expert_capacity": 64} if family == "switch" else {}
    expected, found = families.make(family, **settings), families.make(family, **settings)
    moe_mt.patch(found)
    for model in (expected, found):
        families.without_chance(model, family)
        model(**families.inputs_for(family)).logits.square().sum().backward()
    compared = 0
    for (name, mine), theirs in zip(found.named_parameters(), expected.parameters(), strict=True):
        if theirs.grad is None:
            # Experts that no token reached: here a gradient of zero.
            assert mine.grad is None or not mine.grad.any(), name
            continue
        if name.endswith("k_proj.bias"):
            continue  # nothing but rounding: a softmax does not see what all keys share
        assert_near(mine.grad, theirs.grad, torch.float32, name)
        compared += "experts" in name
    assert compared > 2


INTERPRETED = """
import moe_mt, torch
from moe_mt.ops import use_backend
from tests.closeness import assert_near
from tests.integrations import families
import triton.runtime.interpreter

launches = []
genuine = triton.runtime.interpreter.GridExecutor.__call__
def counted(self, *args, **kwargs):
    launches.append(self)
    return genuine(self, *args, **kwargs)
triton.runtime.interpreter.GridExecutor.__call__ = counted

for family in ("nllb_moe", "switch", "mixtral", "qwen2_moe"):
    model = families.make(family)
    moe_mt.patch(model)
    inputs = families.inputs_for(family)
    with torch.no_grad(), use_backend("eager"):
        expected = model(**inputs).logits
    assert not launches, family
    with torch.no_grad(), use_backend("triton"):
        assert_near(model(**inputs).logits, expected, torch.float32, family)
    assert launches, family
    launches.clear()
"""


def test_kernels_compute_the_same_in_the_interpreter():
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-W", "ignore", "-c", INTERPRETED]
    subprocess.run(command, env=environment, check=True, timeout=300)


def test_a_version_that_was_not_tested_is_refused_unless_forced(monkeypatch):
    import transformers

    model = families.make("mixtral")
    monkeypatch.setattr(transformers, "__version__", f"{transformers.__version__[0]}.99.0")
    with pytest.raises(ConfigError, match=r"99\.0 was not tested with moe_mt; tested are 4\.57, 5"):
        moe_mt.patch(model)
    assert moe_mt.patch(model, force=True).replaced


def test_a_model_without_layers_that_are_known_is_refused():
    with pytest.raises(
        ConfigError, match=r"Linear has no layer that patch knows; it knows NllbMoe"
    ):
        moe_mt.patch(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"patch takes a model \(torch\.nn\.Module\), not a str"):
        moe_mt.patch("facebook/nllb-moe-54b")


def test_what_is_not_patched_cannot_be_unpatched():
    with pytest.raises(ConfigError, match="no layer of this MixtralForCausalLM is patched"):
        moe_mt.unpatch(families.make("mixtral"))


def test_patching_twice_is_patching_once():
    model = families.make("mixtral")
    first = moe_mt.patch(model)
    expected = logits(model, "mixtral")
    assert moe_mt.patch(model) == first
    assert torch.equal(logits(model, "mixtral"), expected)
    moe_mt.unpatch(model)
    assert not any(hasattr(type(module), "original") for module in model.modules())
