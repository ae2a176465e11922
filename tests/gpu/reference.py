"""The gated mixture and its gradients in float64, one expert at a time: all would not fit."""

import torch
from torch.nn import functional

from moe_mt.ops import ACTIVATIONS

__all__ = ["gradients", "mixture", "weights_of"]


def weights_of(experts):
    """Return the weights of an ``Experts`` under the names that ``ops.expert_ffn`` has for them."""
    return dict(experts.named_parameters())


def mixture(x, expert_ids, gates, weights, activation="relu"):
    """Return (T, d_model) float64: ``sum_k gates * ffn(x)``."""
    out = torch.zeros_like(x, dtype=torch.float64)
    with torch.no_grad():
        for expert in _chosen(expert_ids, weights):
            tokens, choices = (expert_ids == expert).nonzero(as_tuple=True)
            rows = _ffn(x[tokens].double(), _wide(weights, expert), activation)
            out.index_add_(0, tokens, gates[tokens, choices].double()[:, None] * rows)
    return out


def gradients(grad, x, expert_ids, gates, weights, activation="relu", *, of=()):
    """Return the gradients of ``x`` and of the gates, and those of the weights of some experts.

    Args:
        grad: (T, d_model), of the mixture.
        x: (T, d_model).
        expert_ids: (T, K); ``E`` means dropped.
        gates: (T, K).
        weights: From ``weights_of``.
        activation: A name of ``ops.ACTIVATIONS``.
        of: Experts whose weights' gradients are wanted, by number.

    Returns:
        (T, d_model), (T, K), and for each expert asked for a dict; all float64.
    """
    grad_x = torch.zeros_like(x, dtype=torch.float64)
    grad_gates = torch.zeros_like(gates, dtype=torch.float64)
    of_weights = {e: {k: torch.zeros_like(w) for k, w in _wide(weights, e).items()} for e in of}
    for expert in _chosen(expert_ids, weights):
        tokens, choices = (expert_ids == expert).nonzero(as_tuple=True)
        leaves = {"x": x[tokens].double(), "gates": gates[tokens, choices].double()}
        leaves |= _wide(weights, expert)
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        rows = _ffn(leaves["x"], leaves, activation) * leaves["gates"][:, None]
        wanted = list(leaves) if expert in of else ["x", "gates"]
        found = torch.autograd.grad(rows, [leaves[k] for k in wanted], grad[tokens].double())
        named = dict(zip(wanted, found, strict=True))
        grad_x.index_add_(0, tokens, named.pop("x"))
        grad_gates[tokens, choices] = named.pop("gates")
        if expert in of:
            of_weights[expert] = named
    return grad_x, grad_gates, of_weights


def _chosen(expert_ids, weights):
    num_experts = len(weights["up_proj"])
    return [expert for expert in expert_ids.unique().tolist() if expert < num_experts]


def _wide(weights, expert):
    return {name: weight[expert].detach().double() for name, weight in weights.items()}


def _ffn(x, weights, activation):
    act = ACTIVATIONS[activation]
    hidden = functional.linear(x, weights["up_proj"], weights.get("up_bias"))
    if "gate_proj" in weights:
        gate = functional.linear(x, weights["gate_proj"], weights.get("gate_bias"))
        hidden = act(gate) * hidden
    else:
        hidden = act(hidden)
    return functional.linear(hidden, weights["down_proj"], weights.get("down_bias"))
