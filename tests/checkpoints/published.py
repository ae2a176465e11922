"""Small random checkpoints in every published layout, written without the package's own writer."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

LAYOUTS = ("safetensors", "sharded safetensors", "bin", "sharded bin")
TIED = (
    "shared.weight",
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "lm_head.weight",
)

DENSE = {
    "model_type": "m2m_100",
    "vocab_size": 40,
    "d_model": 8,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 10,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "max_position_embeddings": 16,
}
MOE = DENSE | {
    "model_type": "nllb-moe",
    "decoder_layers": 2,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "num_experts": 3,
    "router_bias": True,
}
NLLB_MOE_54B = {
    "model_type": "nllb-moe",
    "vocab_size": 256206,
    "d_model": 2048,
    "encoder_layers": 24,
    "decoder_layers": 24,
    "encoder_ffn_dim": 8192,
    "decoder_ffn_dim": 8192,
    "encoder_sparse_step": 4,
    "decoder_sparse_step": 4,
    "num_experts": 128,
}
CONFIGS = {"dense": DENSE, "moe": MOE}


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Return every tensor of a model by its published name, all four tied names among them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = tensor_shapes(config)
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    return tensors | {name: tensors["shared.weight"].clone() for name in TIED[1:]}


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor by its published name, of the tied ones the first."""
    shapes = {"shared.weight": (config["vocab_size"], config["d_model"])}
    for side in ("encoder", "decoder"):
        shapes |= _norm(f"{side}.layer_norm", config)
        for index in range(config[f"{side}_layers"]):
            shapes |= _layer_shapes(config, side, index)
    return shapes


def _layer_shapes(config: dict[str, Any], side: str, index: int) -> dict[str, tuple[int, ...]]:
    moe = config["model_type"] != "m2m_100"
    d_model, ffn_dim = config["d_model"], config[f"{side}_ffn_dim"]
    layer = f"{side}.layers.{index}"
    shapes = _norm(f"{layer}.ff_layer_norm" if moe else f"{layer}.final_layer_norm", config)
    cross = [] if side == "encoder" else ["cross_attention" if moe else "encoder_attn"]
    for attention in ("self_attn", *cross):
        shapes |= _norm(f"{layer}.{attention}_layer_norm", config)
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= _linear(f"{layer}.{attention}.{projection}", d_model, d_model)
    networks = [f"{layer}.ffn" if moe else layer]
    if moe and (index + 1) % config[f"{side}_sparse_step"] == 0:
        experts = config["num_experts"]
        networks = [f"{layer}.ffn.experts.expert_{expert}" for expert in range(experts)]
        router = _linear(f"{layer}.ffn.router.classifier", experts, d_model)
        shapes |= dict(list(router.items())[: 1 + config.get("router_bias", False)])
    for network in networks:
        shapes |= _linear(f"{network}.fc1", ffn_dim, d_model)
        shapes |= _linear(f"{network}.fc2", d_model, ffn_dim)
    return shapes


def _linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (config["d_model"],), f"{name}.bias": (config["d_model"],)}


def write_folder(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    *,
    layout: str = "safetensors",
    prefix: bool = False,
    shards: int = 3,
) -> Path:
    """Write a checkpoint folder.

    Args:
        folder: Made here.
        config: Its ``config.json``.
        tensors: By published name without prefix.
        layout: One of ``LAYOUTS``.
        prefix: Whether names get the ``model.`` that the classes with a head write.
        shards: Weight files of the sharded layouts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if prefix:
        tensors = {
            key if key == "lm_head.weight" else f"model.{key}": value
            for key, value in tensors.items()
        }
    kind = layout.split()[-1]
    stem = "model" if kind == "safetensors" else "pytorch_model"
    if not layout.startswith("sharded"):
        write_tensors(folder / f"{stem}.{kind}", tensors)
        return folder
    keys = list(tensors)
    weight_map = {}
    for shard in range(shards):
        name = f"{stem}-{shard + 1:05d}-of-{shards:05d}.{kind}"
        part = {key: tensors[key] for key in keys[shard::shards]}
        write_tensors(folder / name, part)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    return folder


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one weight file, in the format of its suffix."""
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save(tensors, path)


def expected_parameters(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return our model's parameters, spelled out by hand from the published tensors."""
    names = {
        "self_attn_layer_norm": "self_attention_norm",
        "self_attn": "self_attention",
        "encoder_attn_layer_norm": "cross_attention_norm",
        "cross_attention_layer_norm": "cross_attention_norm",
        "encoder_attn": "cross_attention",
        "final_layer_norm": "feed_forward_norm",
        "ff_layer_norm": "feed_forward_norm",
        "layer_norm": "norm",
        "ffn.router": "feed_forward.router",
        "ffn.fc1": "feed_forward.up_proj",
        "ffn.fc2": "feed_forward.down_proj",
        "fc1": "feed_forward.up_proj",
        "fc2": "feed_forward.down_proj",
    }
    leaves = {
        "fc1.weight": "up_proj",
        "fc1.bias": "up_bias",
        "fc2.weight": "down_proj",
        "fc2.bias": "down_bias",
    }
    parameters = {"embedding.weight": tensors["shared.weight"]}
    for key, tensor in tensors.items():
        if key in TIED:
            continue
        expert = re.fullmatch(r"(.+)\.ffn\.experts\.expert_(\d+)\.(.+)", key)
        if expert is None:
            published = next((name for name in names if f".{name}." in key), "cross_attention")
            ours = names.get(published, published)
            parameters[key.replace(f".{published}.", f".{ours}.")] = tensor
        elif expert[2] == "0":
            stacked = [
                tensors[f"{expert[1]}.ffn.experts.expert_{e}.{expert[3]}"]
                for e in range(config["num_experts"])
            ]
            parameters[f"{expert[1]}.feed_forward.experts.{leaves[expert[3]]}"] = torch.stack(
                stacked
            )
    return parameters
