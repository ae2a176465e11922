"""The NLLB-MoE model of transformers 4.57 whose weights are those of ours, none of them copied."""

import importlib.metadata

import torch
from packaging.version import Version
from torch import nn

from benchmarks.graphs import PeerUnavailable
from moe_mt.models import FAMILIES, TIED_KEYS, Seq2SeqTransformer

__all__ = ["transformers_model"]


def transformers_model(model: Seq2SeqTransformer) -> nn.Module:
    """Return a model of transformers in evaluation mode.

    Raises:
        PeerUnavailable: If no version is installed that computes it.
    """
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError as error:
        raise PeerUnavailable("transformers is not installed here") from error
    if not Version("4.57") <= Version(version) < Version("5"):
        raise PeerUnavailable(f"transformers {version} is not the peer: 4.57 is the last")
    from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration

    family = FAMILIES["nllb-moe"]
    config = NllbMoeConfig(**family.config_to_published(model.config))
    with torch.device("meta"):
        peer = NllbMoeForConditionalGeneration(config).eval()
    for key, location in family.locations(model.config).items():
        weight = model.get_parameter(location.parameter)
        if location.expert is not None:
            weight = weight[location.expert]
        owner, _, leaf = (key if key == "lm_head.weight" else f"model.{key}").rpartition(".")
        shared = nn.Parameter(weight.detach(), requires_grad=False)
        peer.get_submodule(owner).register_parameter(leaf, shared)
    weight = peer.get_parameter(f"model.{TIED_KEYS[0]}")
    for side in (peer.model.encoder, peer.model.decoder):
        positions = side.embed_positions
        rows, width = positions.weights.shape
        table = positions.get_embedding(rows, width, positions.padding_idx)
        positions.weights = table.to(weight.device, weight.dtype)
    return peer
