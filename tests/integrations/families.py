"""Tiny random models of transformers, one for each family that is patched."""

import functools
import importlib.metadata
import importlib.util
import zlib

import torch

VERSION = (
    tuple(map(int, importlib.metadata.version("transformers").split(".")[:2]))
    if importlib.util.find_spec("transformers")
    else (0, 0)
)
"""Of the transformers that is installed; tests of it are collected also where there is none."""

VOCABULARY = 96

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}

DEEPSEEK = {
    **COMMON,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "routed_scaling_factor": 1.5,
}

MODELS = {
    "nllb_moe": (
        "NllbMoeConfig",
        "NllbMoeForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
            "num_experts": 6,
            "max_position_embeddings": 64,
            "decoder_start_token_id": 2,
            "scale_embedding": True,
        },
    ),
    "switch": (
        "SwitchTransformersConfig",
        "SwitchTransformersForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "num_experts": 4,
            # Transformers 5.0 to 5.17 forgets it, so that it must not bind where these are peers.
            "expert_capacity": 64 if (5, 0) <= VERSION < (5, 18) else 3,
            "decoder_start_token_id": 0,
        },
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {
            **COMMON,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "norm_topk_prob": False,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            **COMMON,
            "head_dim": 8,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
    "olmoe": (
        "OlmoeConfig",
        "OlmoeForCausalLM",
        {**COMMON, "num_experts": 8, "num_experts_per_tok": 4},
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        # To 5.12, its layer lacks an attribute that the other method asks for.
        {
            **DEEPSEEK,
            "topk_method": "greedy" if (5, 0) <= VERSION < (5, 13) else "group_limited_greedy",
        },
    ),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", DEEPSEEK),
}

ENCODER_DECODERS = ("nllb_moe", "switch")


def make(family: str, seed: int = 0, **settings):
    """Return a model with weights that make every expert matter, in evaluation mode."""
    # Collected also where there is no transformers.
    import transformers

    config_name, model_name, defaults = MODELS[family]
    config = getattr(transformers, config_name)(**{**defaults, **settings})
    model = getattr(transformers, model_name)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_embedding = "embed" in name or name in ("shared.weight", "lm_head.weight")
            # By name: versions list parameters, and tie embeddings, in other orders.
            drawn = torch.Generator().manual_seed(
                seed + zlib.crc32(b"embedding" if is_embedding else name.encode())
            )
            if parameter.dim() >= 2:
                # Small embeddings: layers, not the last token, say what comes next.
                scale = 0.2 if is_embedding else 2.0
                parameter.normal_(std=scale * parameter.shape[-1] ** -0.5, generator=drawn)
            elif "bias" in name:
                parameter.normal_(std=0.1, generator=drawn)
    return model


@functools.cache
def token_ids() -> torch.Tensor:
    """Return (3, 10) ids, the last sentence padded on the right by the id 1."""
    ids = torch.randint(3, VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(5))
    ids[2, 7:] = 1
    return ids


def inputs_for(family: str) -> dict[str, torch.Tensor]:
    """Return what the forward pass of a family's model is given."""
    ids = token_ids()
    inputs = {"input_ids": ids, "attention_mask": (ids != 1).long()}
    if family in ENCODER_DECODERS:
        inputs["decoder_input_ids"] = ids.flip(0)[:, :6].clone()
    return inputs


WITHOUT_CHANCE = {
    "nllb_moe": {
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "moe_token_dropout": 0.0,
    },
    "switch": {"dropout_rate": 0.0, "router_jitter_noise": 0.0},
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "olmoe": {},
    "deepseek_v2": {},
    "deepseek_v3": {},
}
"""Settings with which a training step is a function of its inputs."""

GOLDEN_CASES = {
    "nllb_moe": ("nllb_moe", {}),
    # Four tenths of the tokens: claims are dropped in evaluation.
    "nllb_moe_capacity": ("nllb_moe", {"moe_eval_capacity_token_fraction": 0.4}),
    # Two tokens an expert and sentence: most sentences lose some.
    "switch_capacity": ("switch", {"expert_capacity": 2}),
}
"""What some version of transformers computes wrongly: case → family and settings."""


def golden_tensors(model, family: str) -> dict[str, torch.Tensor]:
    """Return what a model computes, as the goldens keep it."""
    with torch.no_grad():
        tensors = {"logits": model(**inputs_for(family)).logits}
        tensors["greedy"] = generate(model, family, num_beams=1)
        tensors["beams"] = generate(model, family, num_beams=3)
    tensors |= gradients(model, family)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def generate(model, family: str, num_beams: int) -> torch.Tensor:
    """Return twelve tokens a sentence, after the prompt; random models would repeat one."""
    inputs = {k: v for k, v in inputs_for(family).items() if k != "decoder_input_ids"}
    return model.generate(
        **inputs,
        num_beams=num_beams,
        do_sample=False,
        max_new_tokens=12,
        min_new_tokens=12,
        no_repeat_ngram_size=1,
    )


def gradients(model, family: str) -> dict[str, torch.Tensor]:
    """Return the loss of a training step with nothing random, and gradients of a sparse layer."""
    without_chance(model, family)
    for module in model.modules():
        if hasattr(module, "expert_capacity"):
            # The router of NLLB-MoE keeps the capacity of its last evaluation.
            module.expert_capacity = model.config.expert_capacity
    model.zero_grad()
    # Not the model's own loss: versions add other losses of routers to it.
    found = model(**inputs_for(family)).logits.flatten(0, 1)
    labels = token_ids().flip(1)[:, :6].flatten()
    loss = torch.nn.functional.cross_entropy(found, labels)
    loss.backward()
    prefix = "model.encoder.layers.1.ffn." if family == "nllb_moe" else "encoder.block.1.layer.1."
    found = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        if name.startswith(prefix):
            zero = torch.zeros_like(parameter)
            found[name] = zero if parameter.grad is None else parameter.grad.clone()
    return found


def without_chance(model, family: str) -> None:
    """Set training mode with nothing random: dropout of every kind is off."""
    model.train()
    for name, value in WITHOUT_CHANCE[family].items():
        setattr(model.config, name, value)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        for name in ("moe_token_dropout", "jitter_noise"):
            if hasattr(module, name):
                setattr(module, name, 0.0)
