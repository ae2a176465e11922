"""``model.set_experts_implementation("moe_mt")`` in transformers 5, and what 4 says to it."""

import pytest
import torch

import moe_mt
from moe_mt.errors import ConfigError
from tests.closeness import assert_near
from tests.integrations import families

pytestmark = pytest.mark.transformers

STACKED = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3")


@pytest.fixture
def registered():
    """Register, and forget it again."""
    if families.VERSION < (5, 7):
        pytest.skip("others' experts implementations are taken since transformers 5.7")
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    moe_mt.register_experts_implementation()
    yield
    ALL_EXPERTS_FUNCTIONS._global_mapping.pop("moe_mt")


@pytest.fixture
def calls(monkeypatch):
    """Return a list that grows by one whenever the registered function computes."""
    from moe_mt.integrations import stacked_weights

    seen = []
    genuine = stacked_weights.expert_ffn

    def counted(*args, **kwargs):
        seen.append(args)
        return genuine(*args, **kwargs)

    monkeypatch.setattr(stacked_weights, "expert_ffn", counted)
    return seen


@pytest.mark.parametrize("family", STACKED)
def test_outputs_and_gradients_are_those_of_transformers_own(family, registered, calls):
    def results(model):
        model.zero_grad()
        logits = model(**families.inputs_for(family)).logits
        logits.square().sum().backward()
        return logits.detach(), {
            name: parameter.grad.clone()
            for name, parameter in model.named_parameters()
            if "experts" in name or "gate" in name
        }

    model = families.make(family)
    model.set_experts_implementation("eager")
    expected_logits, expected = results(model)
    assert not calls
    model.set_experts_implementation("moe_mt")
    logits, gradients = results(model)
    assert calls
    assert_near(logits, expected_logits, torch.float32)
    assert len(gradients) > 2
    for name, gradient in gradients.items():
        assert_near(gradient, expected[name], torch.float32, name)


def test_a_model_is_loaded_with_it(registered, calls, tmp_path):
    import transformers

    model = families.make("mixtral")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, experts_implementation="moe_mt"
    )
    inputs = families.inputs_for("mixtral")
    with torch.no_grad():
        expected = model(**inputs).logits
        assert not calls
        assert_near(loaded(**inputs).logits, expected, torch.float32)
    assert calls


def test_choices_of_experts_elsewhere_add_nothing(registered):
    """Under expert parallelism the number of experts stands for an expert of another rank."""
    experts = families.make("mixtral").model.layers[0].mlp.experts
    experts.config._experts_implementation = "moe_mt"
    x = torch.randn(3, 32)
    ids = torch.tensor([[0, 3], [4, 1], [4, 4]])
    gates = torch.rand(3, 2)
    with torch.no_grad():
        found = experts(x, ids, gates)
        alone = experts(x[1:2], torch.tensor([[1, 4]]), gates[1:2, 1:].expand(1, 2))
    assert_near(found[1:2], alone, torch.float32)
    assert not found[2].any()


def test_experts_that_no_kernel_computes_are_refused(registered):
    import transformers

    config = transformers.GptOssConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = transformers.GptOssForCausalLM(config).eval()
    model.set_experts_implementation("moe_mt")
    with pytest.raises(ConfigError, match=r"transposed or interleaved, .*; choose another"):
        model(torch.tensor([[5, 6]]))
    with pytest.raises(ConfigError, match=r"no layer that can be patched: model\.layers\.0\.mlp"):
        moe_mt.patch(model)


def test_versions_that_take_none_are_told_to_patch():
    if families.VERSION >= (5, 7):
        pytest.skip("this version takes others' implementations")
    said = (
        r"came with transformers 5,"
        if families.VERSION < (5, 0)
        else r"takes no experts implementation"
    )
    with pytest.raises(ConfigError, match=rf"{said}.*[uU]se moe_mt\.patch"):
        moe_mt.register_experts_implementation()
