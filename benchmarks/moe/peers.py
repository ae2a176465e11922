"""The same layer by other means, each on the weights of ours and in its best form.

A peer takes a layer and returns ``(x (T, d_model), residual (T, d_model)) -> (T, d_model)``. All of
them route, compute and combine; none copies a weight.
"""

import importlib.metadata
from collections.abc import Callable
from types import SimpleNamespace

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.graphs import PeerUnavailable
from moe_mt.moe import Experts, MoELayer
from moe_mt.ops import use_backend

__all__ = ["PEERS", "TRAINABLE", "Layer", "mixture_by_grouped_mm", "transformers_layer"]

Layer = Callable[[Tensor, Tensor], Tensor]

MOST_GATHERED_TOKENS = 32
"""Gathering the weights of every claim takes 134 MB each at the shape of the 54B."""


def expert_loop(layer: MoELayer) -> Layer:
    """Return our own definition: one product after the other for every expert that has rows."""

    def run(x: Tensor, residual: Tensor) -> Tensor:
        with use_backend("eager"):
            return layer(x, residual=residual)[0]

    return run


def grouped_mm(layer: MoELayer) -> Layer:
    """Return the layer by PyTorch's grouped product, as transformers 5 uses it for other models."""

    def run(x: Tensor, residual: Tensor) -> Tensor:
        expert_ids, gates = _route(layer, x)
        return residual + mixture_by_grouped_mm(layer.experts, x, expert_ids, gates)

    return run


def mixture_by_grouped_mm(experts: Experts, x: Tensor, expert_ids: Tensor, gates: Tensor) -> Tensor:
    """Return the gated mixture: sort, gather, two grouped products, scatter back, sum."""
    tokens, top_k = expert_ids.shape
    in_order, order = expert_ids.flatten().sort()
    edges = torch.arange(experts.num_experts, device=x.device, dtype=in_order.dtype)
    ends = torch.searchsorted(in_order, edges, right=True).to(torch.int32)
    rows = x[order // top_k]
    hidden = _grouped_mm(rows, experts.up_proj, ends) + experts.up_bias[in_order]
    rows = _grouped_mm(hidden.relu(), experts.down_proj, ends) + experts.down_bias[in_order]
    weighted = rows * gates.flatten()[order, None].to(rows.dtype)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=x.device)
    return weighted[back].view(tokens, top_k, -1).sum(1)


def _grouped_mm(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    product = getattr(functional, "grouped_mm", None) or torch._grouped_mm
    return product(rows, weight.transpose(-2, -1), offs=ends)


def batched_mm(layer: MoELayer) -> Layer:
    """Return the layer by one batched product over weights gathered for every claim."""

    def run(x: Tensor, residual: Tensor) -> Tensor:
        if x.shape[0] > MOST_GATHERED_TOKENS:
            raise PeerUnavailable(
                f"it copies the weights of every claim; measured to T = {MOST_GATHERED_TOKENS}"
            )
        experts = layer.experts
        expert_ids, gates = _route(layer, x)
        claims = expert_ids.flatten()
        rows = x.repeat_interleave(expert_ids.shape[1], dim=0).unsqueeze(-1)
        hidden = torch.bmm(experts.up_proj[claims], rows) + experts.up_bias[claims].unsqueeze(-1)
        out = torch.bmm(experts.down_proj[claims], hidden.relu()).squeeze(-1)
        out = (out + experts.down_bias[claims]).view(*expert_ids.shape, -1)
        return residual + (out * gates.unsqueeze(-1).to(x.dtype)).sum(1)

    return run


def scattermoe(layer: MoELayer) -> Layer:
    """Return the layer by ScatterMoE (arXiv:2403.08245), where its source lies on the path."""
    try:
        from scattermoe.parallel_experts import flatten_sort_count, parallel_linear
    except ImportError as error:
        raise PeerUnavailable(f"ScatterMoE cannot be imported ({error})") from error
    experts = layer.experts

    def run(x: Tensor, residual: Tensor) -> Tensor:
        expert_ids, gates = _route(layer, x)
        order = flatten_sort_count(expert_ids, experts.num_experts)
        hidden = parallel_linear(
            x,
            experts.up_proj.transpose(1, 2),
            expert_ids.shape[1],
            *order,
            expert_biases=experts.up_bias,
            grouped_out=True,
        )
        mixture = parallel_linear(
            hidden.relu(),
            experts.down_proj.transpose(1, 2),
            1,
            *order,
            expert_biases=experts.down_bias,
            gates=gates.to(x.dtype),
            grouped_in=True,
        )
        return residual + mixture

    return run


def transformers(layer: MoELayer) -> Layer:
    """Return the layer of transformers 4.57."""
    peer = transformers_layer(layer)
    return lambda x, residual: residual + peer.layer(x[None])[0]


def transformers_layer(layer: MoELayer) -> SimpleNamespace:
    """Return the layer of transformers on the weights of ours, with its name.

    Raises:
        PeerUnavailable: If no version is installed that computes it.
    """
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError as error:
        raise PeerUnavailable(
            "transformers is not installed here; make bench has an environment with it"
        ) from error
    if not Version("4.57") <= Version(version) < Version("5"):
        raise PeerUnavailable(
            f"transformers {version} is not the peer: 4.57 is the last that computes it"
        )
    from transformers import NllbMoeConfig
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

    experts, router = layer.experts, layer.router
    num_experts, ffn_dim, d_model = experts.up_proj.shape
    config = NllbMoeConfig(
        d_model=d_model,
        encoder_ffn_dim=ffn_dim,
        num_experts=num_experts,
        moe_token_dropout=layer.token_dropout,
        router_bias=router.has_bias,
    )
    with torch.device("meta"):
        peer = NllbMoeSparseMLP(config, ffn_dim).eval()
    peer.router.classifier.weight = router.classifier.weight
    peer.router.classifier.bias = router.classifier.bias
    for index, expert in enumerate(peer.experts.values()):
        expert.fc1.weight = _view(experts.up_proj, index)
        expert.fc1.bias = _view(experts.up_bias, index)
        expert.fc2.weight = _view(experts.down_proj, index)
        expert.fc2.bias = _view(experts.down_bias, index)
    # A two-dimensional padding mask raises in this version; without padding there is none.
    return SimpleNamespace(
        name=f"transformers-{version}", layer=lambda x: peer(x, padding_mask=None)[0]
    )


def _view(weight: Tensor, index: int) -> nn.Parameter:
    return nn.Parameter(weight[index], requires_grad=False)


def _route(layer: MoELayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return expert ids (T, K) int64 and gates (T, K), as PyTorch alone would."""
    classifier = layer.router.classifier
    bias = None if classifier.bias is None else classifier.bias.float()
    probs = functional.linear(x.float(), classifier.weight.float(), bias).softmax(-1)
    gates, expert_ids = probs.topk(2, dim=-1)
    return expert_ids, gates / gates.sum(-1, keepdim=True) * (1 - layer.token_dropout)


PEERS: dict[str, Callable[[MoELayer], Layer]] = {
    "grouped_mm": grouped_mm,
    "batched_mm": batched_mm,
    "expert loop": expert_loop,
    "ScatterMoE": scattermoe,
    "transformers 4.57": transformers,
}
"""vLLM's fused experts are none: they know SiLU, GELU and squared ReLU, but not ReLU."""

TRAINABLE = ("grouped_mm", "expert loop", "ScatterMoE")
"""Peers whose backward pass reaches every weight and is not hopeless at training sizes."""
