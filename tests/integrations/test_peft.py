"""PEFT's LoRA on the documented classes: it trains, is used by generation, and saves.

Needs peft (and transformers, which it imports) in the same environment: ``pytest -m peers``.
"""

import pytest
import torch

from moe_mt.pretrained import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
)

# Libraries that are not ours may warn.
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]

SMALL = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "init_std": 0.3,
}


def dense():
    torch.manual_seed(1)
    return M2M100ForConditionalGeneration(M2M100Config(**SMALL))


def sparse():
    torch.manual_seed(1)
    config = NllbMoeConfig(
        **SMALL, num_experts=4, encoder_sparse_step=2, decoder_sparse_step=2, moe_token_dropout=0.0
    )
    return NllbMoeForConditionalGeneration(config)


def with_lora(model, targets=("q_proj", "v_proj")):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=4, lora_alpha=32, lora_dropout=0.0, target_modules=list(targets)
    )
    return get_peft_model(model, config)


def batch():
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 40, (2, 6), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.flip(1)}


def train(model, steps):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-2)
    losses = []
    for _ in range(steps):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("make", [dense, sparse])
def test_lora_on_attention_learns_and_leaves_the_weights_alone(make):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = with_lora(model)
    losses = train(adapted, 30)
    assert losses[-1] < losses[0] / 2
    after = adapted.unload().state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("make", [dense, sparse])
def test_generation_uses_the_adapter_on_its_fast_route(make):
    adapted = with_lora(make())
    train(adapted, 30)
    inputs = {name: tensor for name, tensor in batch().items() if name != "labels"}
    adapted.eval()
    fast = adapted.generate(**inputs, max_new_tokens=8, num_beams=2)
    # The route that looks into every layer calls the forward pass, whose use of LoRA is above.
    seen = adapted.generate(
        **inputs,
        max_new_tokens=8,
        num_beams=2,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    with adapted.disable_adapter():
        without = adapted.generate(**inputs, max_new_tokens=8, num_beams=2)
    assert torch.equal(fast, seen.sequences)
    assert fast.shape != without.shape or not torch.equal(fast, without)


@pytest.mark.parametrize("make", [dense, sparse])
def test_a_saved_adapter_gives_the_same_logits_on_a_fresh_model(make, tmp_path):
    from peft import PeftModel

    adapted = with_lora(make())
    train(adapted, 5)
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(), tmp_path)
    with torch.no_grad():
        expected, found = adapted.eval()(**batch()), again.eval()(**batch())
    assert torch.equal(found.logits, expected.logits)


def test_the_adapter_has_the_names_it_has_on_transformers_own_model(tmp_path):
    from safetensors.torch import load_file
    from transformers import M2M100Config as TheirConfig
    from transformers import M2M100ForConditionalGeneration as TheirModel

    with_lora(dense()).save_pretrained(tmp_path / "ours")
    with_lora(TheirModel(TheirConfig(**SMALL))).save_pretrained(tmp_path / "theirs")
    names = [
        set(load_file(tmp_path / who / "adapter_model.safetensors")) for who in ("ours", "theirs")
    ]
    assert names[0] == names[1]
    # Two matrices, two projections, one attention a layer in the encoder and two in the decoder.
    assert len(names[0]) == 2 * 2 * (2 + 4)


def test_lora_on_experts_is_computed_expert_by_expert_and_learns():
    adapted = with_lora(sparse(), targets=("fc1", "fc2"))
    losses = train(adapted, 30)
    assert losses[-1] < losses[0] / 2
    merged = adapted.merge_and_unload().eval()
    with torch.no_grad():
        found = merged(**batch()).loss
    # Merged into the stacked weights, the adapter is there in the fast path.
    assert found.item() == pytest.approx(losses[-1], rel=0.2)
