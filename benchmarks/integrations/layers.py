"""Layers of transformers on weights that are the same in every version, and what they compute.

An expert's weights follow from its number alone: however a version lays them out, it computes the
same function, and whoever wants to check a token draws the weights of its experts again.
"""

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.graphs import PeerUnavailable
from benchmarks.shapes import NLLB_MOE_54B, NLLB_MOE_HALF_WIDTH, TOY, LayerShape

__all__ = [
    "LAYERS",
    "OURS",
    "REHEARSED",
    "PeerLayer",
    "build",
    "define",
    "draw_input",
    "layers",
    "transformers_major",
]

OURS = "moe_mt"
"""What this package's results are called."""

TOKEN_DROPOUT = 0.2
"""Expert-output masking of NLLB-MoE: in evaluation, outputs are multiplied by 0.8."""

EXPERTS_OF_5 = ("eager", "grouped_mm", "batched_mm")
"""Implementations of transformers 5 that need nothing but PyTorch."""


@dataclass(frozen=True, kw_only=True)
class PeerLayer(LayerShape):
    """A layer as a family of transformers computes it."""

    family: str

    @property
    def is_gated(self) -> bool:
        """Whether experts are SwiGLU without biases, and not ReLU with biases."""
        return self.family == "mixtral"

    def implementations(self, major: int) -> tuple[str, ...]:
        """Return what experts implementations of its own a version of transformers has for it."""
        return EXPERTS_OF_5 if self.is_gated and major >= 5 else ("",)


def _nllb_moe(shape: LayerShape) -> PeerLayer:
    return PeerLayer(**vars(shape), family="nllb_moe")


def _mixtral(name: str, d_model: int, ffn_dim: int, num_experts: int = 8) -> PeerLayer:
    return PeerLayer(
        name=name, d_model=d_model, ffn_dim=ffn_dim, num_experts=num_experts, family="mixtral"
    )


ON_CPU = (
    _nllb_moe(NLLB_MOE_HALF_WIDTH),
    _mixtral("mixtral-8x7b-quarter-width-layer", 1024, 3584),
)
ON_GPU = (_nllb_moe(NLLB_MOE_54B), _mixtral("mixtral-8x7b-layer", 4096, 14_336))
REHEARSED = (
    PeerLayer(**{**vars(TOY), "name": "toy-nllb-moe-layer"}, family="nllb_moe"),
    _mixtral("toy-mixtral-layer", TOY.d_model, TOY.ffn_dim, TOY.num_experts),
)
LAYERS = {layer.name: layer for layer in (*ON_CPU, *ON_GPU, *REHEARSED)}


def layers(device: torch.device, *, rehearsal: bool) -> tuple[PeerLayer, ...]:
    """Return the layers that are measured on a kind of device."""
    if rehearsal:
        return REHEARSED
    return ON_GPU if device.type == "cuda" else ON_CPU


def transformers_major() -> int:
    """Return the major version of the transformers that is installed here.

    Raises:
        PeerUnavailable: If there is none.
    """
    try:
        return int(importlib.metadata.version("transformers").partition(".")[0])
    except importlib.metadata.PackageNotFoundError as error:
        raise PeerUnavailable("transformers is not installed here") from error


def draw_input(
    layer: PeerLayer, tokens: int, index: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return one of several inputs (1, T, d_model) of a size."""
    generator = torch.Generator().manual_seed(100 * tokens + index)
    return torch.randn(1, tokens, layer.d_model, generator=generator).to(device, dtype)


def draw_router(layer: PeerLayer, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the router's weight (E, d_model)."""
    return _drawer(layer, 0, device, dtype)(layer.num_experts, layer.d_model)


def draw_expert(
    layer: PeerLayer, index: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the weights of one expert, and its biases where it has some."""
    draw = _drawer(layer, 1 + index, device, dtype)
    weights = {"up": draw(layer.ffn_dim, layer.d_model), "down": draw(layer.d_model, layer.ffn_dim)}
    if layer.is_gated:
        return {**weights, "gate": draw(layer.ffn_dim, layer.d_model)}
    return {**weights, "up_bias": draw(layer.ffn_dim), "down_bias": draw(layer.d_model)}


def _drawer(
    layer: PeerLayer, seed: int, device: torch.device, dtype: torch.dtype
) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    bound = layer.d_model**-0.5

    def draw(*shape: int) -> Tensor:
        empty = torch.empty(shape, device=device, dtype=dtype)
        return empty.uniform_(-bound, bound, generator=generator)

    return draw


def define(layer: PeerLayer, x: Tensor) -> Tensor:
    """Return what a layer is of a few tokens (T, d_model), token by token, in float64."""
    router = draw_router(layer, x.device, x.dtype).double()
    outputs: list[Tensor] = []
    for token in x.double():
        gates, chosen = (router @ token).softmax(0).topk(layer.top_k)
        output = torch.zeros_like(token)
        for gate, index in zip(gates / gates.sum(), chosen.tolist(), strict=True):
            drawn = draw_expert(layer, index, x.device, x.dtype)
            output += gate * _define_expert(
                {key: one.double() for key, one in drawn.items()}, token
            )
        outputs.append(output if layer.is_gated else (1 - TOKEN_DROPOUT) * output)
    return torch.stack(outputs)


def _define_expert(weights: dict[str, Tensor], token: Tensor) -> Tensor:
    hidden = weights["up"] @ token
    if "gate" in weights:
        return weights["down"] @ (functional.silu(weights["gate"] @ token) * hidden)
    hidden = (hidden + weights["up_bias"]).relu()
    return weights["down"] @ hidden + weights["down_bias"]


def build(layer: PeerLayer, device: torch.device, dtype: torch.dtype) -> SimpleNamespace:
    """Return the layer of the installed transformers on these weights.

    Returns:
        ``block``, the module; ``call``, which takes (1, T, d_model) and returns the like; and
        ``choose``, which sets the experts implementation.
    """
    major = transformers_major()
    with torch.device("meta"):
        block, config, call = (_build_mixtral if layer.is_gated else _build_nllb_moe)(layer)
    block = block.to(dtype).to_empty(device=device).eval().requires_grad_(requires_grad=False)
    parameters = dict(block.named_parameters())
    router = "gate.weight" if layer.is_gated else "router.classifier.weight"
    parameters[router].copy_(draw_router(layer, device, dtype))
    for index in range(layer.num_experts):
        drawn = draw_expert(layer, index, device, dtype)
        for key, value in _laid_out(layer, major, index, drawn, parameters).items():
            value.copy_(drawn[key])

    def choose(implementation: str) -> None:
        config._experts_implementation = implementation or None

    return SimpleNamespace(block=block, call=call, choose=choose)


def _laid_out(
    layer: PeerLayer,
    major: int,
    index: int,
    drawn: dict[str, Tensor],
    parameters: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return where the weights of an expert go in a version of transformers."""
    if not layer.is_gated:
        names = {"up": "fc1.weight", "up_bias": "fc1.bias"}
        names |= {"down": "fc2.weight", "down_bias": "fc2.bias"}
        return {key: parameters[f"experts.expert_{index}.{names[key]}"] for key in drawn}
    if major < 5:
        names = {"gate": "w1", "down": "w2", "up": "w3"}
        return {key: parameters[f"experts.{index}.{names[key]}.weight"] for key in drawn}
    gate, up = parameters["experts.gate_up_proj"][index].chunk(2)
    return {"gate": gate, "up": up, "down": parameters["experts.down_proj"][index]}


def _build_mixtral(layer: PeerLayer) -> tuple[nn.Module, Any, Callable[..., Tensor]]:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=layer.d_model,
        intermediate_size=layer.ffn_dim,
        num_local_experts=layer.num_experts,
        num_experts_per_tok=layer.top_k,
    )
    block = MixtralSparseMoeBlock(config)
    return block, config, lambda x: _first(block(x))


def _build_nllb_moe(layer: PeerLayer) -> tuple[nn.Module, Any, Callable[..., Tensor]]:
    from transformers import NllbMoeConfig
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

    config = NllbMoeConfig(
        d_model=layer.d_model,
        encoder_ffn_dim=layer.ffn_dim,
        num_experts=layer.num_experts,
        moe_token_dropout=TOKEN_DROPOUT,
    )
    block = NllbMoeSparseMLP(config, layer.ffn_dim)
    # A two-dimensional padding mask raises in some versions; without padding there is none.
    return block, config, lambda x: _first(block(x, None))


def _first(found: Any) -> Tensor:
    """Return the hidden states: transformers 4 returns the routing beside them."""
    return found[0] if isinstance(found, tuple) else found
