"""A dense model of the published layout → a model of CTranslate2, without a tokenizer.

CTranslate2's own converter asks a tokenizer for the vocabulary and loses the language tokens of
some. Here the vocabulary is the token ids: id 17 is the token ``17``.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from moe_mt.checkpoints import open_shards, read_config
from moe_mt.models import SinusoidalPositions, TransformerConfig

__all__ = ["convert", "fill_spec"]

UNKNOWN_ID = 3
LAYER_NORMS = {"gamma": "weight", "beta": "bias"}


def convert(folder: Path, *, quantization: str | None = None) -> Path:
    """Return the folder of a checkpoint converted; it is written if it is not there.

    Args:
        folder: Holds a dense checkpoint.
        quantization: As ``ct2-transformers-converter`` takes it: ``None`` or ``"int8"``.
    """
    from ctranslate2.specs import TransformerSpec

    target = folder.with_name(f"{folder.name}-ctranslate2-{quantization or 'float32'}")
    if target.exists():
        return target
    _, config = read_config(folder)
    spec = TransformerSpec.from_config(
        (config.encoder_layers, config.decoder_layers), config.decoder_heads
    )
    tensors = {key.removeprefix("model."): read() for key, read in open_shards(folder)}
    fill_spec(spec, config, tensors)
    vocabulary = [str(token) for token in range(config.vocab_size)]
    spec.register_source_vocabulary(vocabulary)
    spec.register_target_vocabulary(vocabulary)
    spec.config.bos_token = str(config.bos_id)
    spec.config.eos_token = str(config.eos_id)
    spec.config.unk_token = str(UNKNOWN_ID)
    spec.config.decoder_start_token = str(config.decoder_start_id)
    spec.validate()
    spec.optimize(quantization=quantization)
    unfinished = target.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    spec.save(str(unfinished))
    unfinished.rename(target)
    return target


def fill_spec(spec, config: TransformerConfig, tensors: Mapping[str, Tensor]) -> None:
    """Give every variable of a ``TransformerSpec`` its tensor.

    Args:
        spec: Of the model's layers and heads.
        config: What the model is.
        tensors: By published name, without ``model.``.
    """
    embedding = tensors["shared.weight"]
    positions = SinusoidalPositions(config.max_positions, config.d_model, config.pad_id)
    scale = config.d_model**0.5 if config.scale_embedding else 1.0
    for name, side in (("encoder", spec.encoder), ("decoder", spec.decoder)):
        side.scale_embeddings = scale
        side.position_encodings.encodings = positions.table[config.pad_id + 1 :]
        embeddings = side.embeddings[0] if name == "encoder" else side.embeddings
        embeddings.weight = embedding
        _set(side.layer_norm, LAYER_NORMS, _under(tensors, f"{name}.layer_norm"))
        for index, layer in enumerate(side.layer):
            _fill_layer(layer, _under(tensors, f"{name}.layers.{index}"))
    spec.decoder.projection.weight = embedding


def _fill_layer(layer, find: Callable[[str], Tensor]) -> None:
    """Fill one layer; queries, keys and values of self-attention are one product there."""
    attention = layer.self_attention
    _set(attention.layer_norm, LAYER_NORMS, _within(find, "self_attn_layer_norm"))
    _fuse(attention.linear[0], _within(find, "self_attn"), "q_proj", "k_proj", "v_proj")
    _fuse(attention.linear[1], _within(find, "self_attn"), "out_proj")
    if hasattr(layer, "attention"):
        attention = layer.attention
        _set(attention.layer_norm, LAYER_NORMS, _within(find, "encoder_attn_layer_norm"))
        _fuse(attention.linear[0], _within(find, "encoder_attn"), "q_proj")
        _fuse(attention.linear[1], _within(find, "encoder_attn"), "k_proj", "v_proj")
        _fuse(attention.linear[2], _within(find, "encoder_attn"), "out_proj")
    _set(layer.ffn.layer_norm, LAYER_NORMS, _within(find, "final_layer_norm"))
    _fuse(layer.ffn.linear_0, find, "fc1")
    _fuse(layer.ffn.linear_1, find, "fc2")


def _under(tensors: Mapping[str, Tensor], prefix: str) -> Callable[[str], Tensor]:
    return lambda name: tensors[f"{prefix}.{name}"]


def _within(find: Callable[[str], Tensor], module: str) -> Callable[[str], Tensor]:
    return lambda name: find(f"{module}.{name}")


def _set(spec, names: Mapping[str, str], find: Callable[[str], Tensor]) -> None:
    for theirs, published in names.items():
        setattr(spec, theirs, find(published))


def _fuse(linear, find: Callable[[str], Tensor], *modules: str) -> None:
    linear.weight = torch.cat([find(f"{module}.weight") for module in modules])
    linear.bias = torch.cat([find(f"{module}.bias") for module in modules])
