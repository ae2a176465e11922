"""``patch(model, cross_attention=True)``: M2M100, NLLB and BART-like models attend by our op."""

import pytest
import torch

import moe_mt
from moe_mt.errors import ConfigError
from tests.closeness import assert_near
from tests.integrations import families

pytestmark = pytest.mark.transformers

SIZES = {
    "vocab_size": families.VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "forced_eos_token_id": None,
}
MODELS = {
    "m2m_100": ("M2M100Config", "M2M100ForConditionalGeneration"),
    "bart": ("BartConfig", "BartForConditionalGeneration"),
    "mbart": ("MBartConfig", "MBartForConditionalGeneration"),
    "marian": ("MarianConfig", "MarianMTModel"),
    "pegasus": ("PegasusConfig", "PegasusForConditionalGeneration"),
}


def make(kind, implementation="sdpa"):
    import transformers

    if kind == "nllb_moe":
        return families.make("nllb_moe")
    config_name, model_name = MODELS[kind]
    config = getattr(transformers, config_name)(**SIZES)
    config._attn_implementation = implementation
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
    return model


@pytest.fixture
def calls(monkeypatch):
    """Return a list that grows by the key masks of what is attended to by our op."""
    from moe_mt.integrations import cross_attention

    seen = []
    genuine = cross_attention.cross_attention

    def counted(*args, **kwargs):
        seen.append(kwargs["key_mask"])
        return genuine(*args, **kwargs)

    monkeypatch.setattr(cross_attention, "cross_attention", counted)
    return seen


def logits(model):
    return model(**families.inputs_for("nllb_moe")).logits


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", MODELS)
def test_outputs_tokens_and_gradients_stay(kind, implementation, calls):
    model = make(kind, implementation)
    expected = logits(model)
    expected.square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if "encoder_attn.v_proj" in n}
    model.zero_grad()
    tokens = families.generate(model, "nllb_moe", num_beams=2)
    report = moe_mt.patch(model, cross_attention=True)
    assert [name.rpartition(".")[2] for name in report.replaced] == ["encoder_attn"] * 2
    found = logits(model)
    assert len(calls) == 2
    # The third sentence has padding, which must not be attended to.
    assert all(not mask[2, 7:].any() and mask[2, :7].all() for mask in calls)
    assert_near(found, expected, torch.float32)
    found.square().sum().backward()
    assert len(gradients) == 4
    for name, gradient in gradients.items():
        assert_near(model.get_parameter(name).grad, gradient, torch.float32, name)
    assert torch.equal(families.generate(model, "nllb_moe", num_beams=2), tokens)
    moe_mt.unpatch(model)
    assert torch.equal(logits(model), expected)


def test_experts_and_cross_attention_of_nllb_moe_together(calls):
    model = make("nllb_moe")
    moe_mt.patch(model)
    expected = logits(model)
    assert not calls
    report = moe_mt.patch(model, cross_attention=True)
    assert len(report.replaced) == 4
    assert_near(logits(model), expected, torch.float32)
    assert calls


def test_attention_weights_are_still_to_be_had():
    model = make("m2m_100", "eager")
    inputs = families.inputs_for("nllb_moe") | {"output_attentions": True}
    with torch.no_grad():
        expected = model(**inputs).cross_attentions
        moe_mt.patch(model, cross_attention=True)
        found = model(**inputs).cross_attentions
    assert len(found) == len(expected) == 2
    for mine, theirs in zip(found, expected, strict=True):
        assert_near(mine, theirs, torch.float32)


def test_the_configuration_of_the_model_stays():
    model = make("bart")
    moe_mt.patch(model, cross_attention=True)
    layer = model.model.decoder.layers[0]
    assert model.config._attn_implementation == "sdpa"
    assert layer.self_attn.config is model.config
    assert layer.encoder_attn.config._attn_implementation == "moe_mt"
    assert layer.encoder_attn.config.d_model == 32


def test_a_model_without_experts_needs_the_option():
    with pytest.raises(ConfigError, match=r"\(cross-attention with cross_attention=True\)"):
        moe_mt.patch(make("bart"))
