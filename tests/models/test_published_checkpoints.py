"""Every published checkpoint, built on the meta device, is the real one key by key.

The tables are spec 1.3; the names and shapes are spelled out here from spec 2.1 and 2.2, without
the package's own tables, so that a slip in one shows in the other.
"""

import json
from typing import Any

import pytest
import torch

from moe_mt.models import FAMILIES, Seq2SeqTransformer

COMMON = {
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "activation_function": "relu",
    "scale_embedding": True,
    "max_position_embeddings": 1024,
    "decoder_start_token_id": 2,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "init_std": 0.02,
    "is_encoder_decoder": True,
    "use_cache": True,
}


def config(
    vocab_size: int, d_model: int, encoder: int, decoder: int, ffn: int, **more: Any
) -> dict[str, Any]:
    return {
        **COMMON,
        "model_type": "m2m_100",
        "vocab_size": vocab_size,
        "d_model": d_model,
        "encoder_layers": encoder,
        "decoder_layers": decoder,
        "num_hidden_layers": encoder,
        "encoder_ffn_dim": ffn,
        "decoder_ffn_dim": ffn,
        "encoder_layerdrop": 0,
        "decoder_layerdrop": 0,
        **more,
    }


NLLB_MOE_54B = config(
    256206, 2048, 24, 24, 8192,
    model_type="nllb-moe",
    encoder_sparse_step=4,
    decoder_sparse_step=4,
    num_experts=128,
    expert_capacity=64,
    batch_prioritized_routing=False,
    moe_eval_capacity_token_fraction=1.0,
    moe_token_dropout=0.2,
    normalize_router_prob_before_dropping=False,
    second_expert_policy="all",
    router_bias=False,
    router_dtype="float32",
    router_ignore_padding_tokens=False,
    router_jitter_noise=0.01,
    router_type="tokens_masked",
    router_aux_loss_coef=0.001,
    router_z_loss_coef=0.001,
    output_router_logits=False,
    max_length=200,
)  # fmt: skip

# Name → config.json and the parameter count, tied weights counted once (spec 1.3).
CHECKPOINTS = {
    "m2m100_418M": (
        config(128112, 1024, 12, 12, 4096, encoder_layerdrop=0.05, decoder_layerdrop=0.05),
        483_905_536,
    ),
    "m2m100_1.2B": (
        config(128112, 1024, 24, 24, 8192, encoder_layerdrop=0.05, decoder_layerdrop=0.05),
        1_239_470_080,
    ),
    "nllb-200-distilled-600M": (config(256206, 1024, 12, 12, 4096), 615_073_792),
    "nllb-200-1.3B": (config(256206, 1024, 24, 24, 8192), 1_370_638_336),
    "nllb-200-3.3B": (config(256206, 2048, 24, 24, 8192), 3_344_863_232),
    "nllb-moe-54b": (NLLB_MOE_54B, 54_500_569_088),
    "wmt21-dense-24-wide": (
        config(128009, 2048, 24, 24, 16384, encoder_attention_heads=32, decoder_attention_heads=32),
        4_693_321_728,
    ),
    "small100": (config(128112, 1024, 12, 3, 4096), 332_735_488),
}

each_checkpoint = pytest.mark.parametrize("name", CHECKPOINTS)


def published_shapes(published: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return every key of the published files without the prefix, and its shape (spec 2)."""
    sparse = published["model_type"] != "m2m_100"
    vocab, d_model = published["vocab_size"], published["d_model"]
    tied = ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (vocab, d_model) for name in tied}

    def linear(name: str, outputs: int, inputs: int) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        shapes[f"{name}.bias"] = (outputs,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (d_model,)

    for side in ("encoder", "decoder"):
        ffn = published[f"{side}_ffn_dim"]
        norm(f"{side}.layer_norm")
        cross = [] if side == "encoder" else ["cross_attention" if sparse else "encoder_attn"]
        for index in range(published[f"{side}_layers"]):
            layer = f"{side}.layers.{index}"
            for attention in ("self_attn", *cross):
                for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
                    linear(f"{layer}.{attention}.{projection}", d_model, d_model)
                norm(f"{layer}.{attention}_layer_norm")
            norm(f"{layer}.ff_layer_norm" if sparse else f"{layer}.final_layer_norm")
            networks = [f"{layer}.ffn" if sparse else layer]
            if sparse and (index + 1) % published[f"{side}_sparse_step"] == 0:
                experts = range(published["num_experts"])
                networks = [f"{layer}.ffn.experts.expert_{expert}" for expert in experts]
                shapes[f"{layer}.ffn.router.classifier.weight"] = (len(experts), d_model)
            for network in networks:
                linear(f"{network}.fc1", ffn, d_model)
                linear(f"{network}.fc2", d_model, ffn)
    return shapes


@each_checkpoint
def test_parameter_count_is_the_published_one(name):
    published, parameters = CHECKPOINTS[name]
    family = FAMILIES[published["model_type"]]
    with torch.device("meta"):
        model = Seq2SeqTransformer(family.config_from_published(published))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@each_checkpoint
def test_every_published_key_is_located_with_its_shape_and_no_other(name):
    published, _ = CHECKPOINTS[name]
    family = FAMILIES[published["model_type"]]
    locations = family.locations(family.config_from_published(published))
    found = {key: location.shape for key, location in locations.items()}
    assert found == published_shapes(published)


@each_checkpoint
def test_locations_fill_every_parameter_exactly(name):
    # Slices and whole tensors together must cover each parameter, or one would stay unfilled.
    published, parameters = CHECKPOINTS[name]
    family = FAMILIES[published["model_type"]]
    config = family.config_from_published(published)
    places = {(x.parameter, x.expert): x.shape for x in family.locations(config).values()}
    assert sum(torch.Size(shape).numel() for shape in places.values()) == parameters


def test_54b_has_the_7123_keys_of_its_index():
    # The published index is 653 kB: that many bytes come out only with these keys, prefix-less,
    # with both embed_tokens and without lm_head (spec 2.2).
    keys = sorted(set(published_shapes(NLLB_MOE_54B)) - {"lm_head.weight"})
    assert len(keys) == 7123
    assert not any(key.startswith("model.") for key in keys)
    index = {
        "metadata": {"total_size": 218_002_276_352},
        "weight_map": {key: "pytorch_model-00001-of-00023.bin" for key in keys},
    }
    assert len(json.dumps(index, indent=2)) == pytest.approx(652_800, abs=100)


@pytest.mark.parametrize("spelling", ["nllb-moe", "nllb_moe"])
def test_both_spellings_of_the_moe_model_type_are_one_family(spelling):
    # The first published revision has the underscore (spec 1.3).
    assert FAMILIES[spelling].name == "nllb_moe"
    assert FAMILIES[spelling].model_types[0] == "nllb-moe"


def test_54b_has_twelve_sparse_layers():
    # Layers 3, 7, ... 23 of both stacks (spec 2.2).
    config = FAMILIES["nllb-moe"].config_from_published(NLLB_MOE_54B)
    sparse = [i for i in range(24) if config.encoder_layer_is_sparse(i)]
    assert sparse == [3, 7, 11, 15, 19, 23]
    assert sparse == [i for i in range(24) if config.decoder_layer_is_sparse(i)]


def test_router_z_loss_of_the_published_file_stays_off():
    # The file says 0.001 and no implementation ever used it (spec 1.2).
    config = FAMILIES["nllb-moe"].config_from_published(NLLB_MOE_54B)
    assert config.moe is not None
    assert config.moe.z_loss_coef == 0


@each_checkpoint
def test_config_survives_being_written_and_read(name):
    published, _ = CHECKPOINTS[name]
    family = FAMILIES[published["model_type"]]
    config = family.config_from_published(published)
    assert family.config_from_published(family.config_to_published(config)) == config
