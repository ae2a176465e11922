"""Whether the installed transformers computes NLLB-MoE as it is defined."""

import torch
from torch import Tensor
from transformers.models.nllb_moe import NllbMoeConfig  # pyright: ignore
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP  # pyright: ignore

__all__ = ["check_transformers"]

TOLERANCE = 1e-4
TOKENS, D_MODEL, FFN_DIM, EXPERTS = 24, 16, 32, 6


def check_transformers() -> str:
    """Run transformers' sparse layer on random tokens and compare it with the definition.

    Returns:
        ``"right"``, or ``"wrong"`` with what differs and what to do.
    """
    config = NllbMoeConfig(
        d_model=D_MODEL, encoder_ffn_dim=FFN_DIM, num_experts=EXPERTS, activation_dropout=0.0
    )
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        layer = NllbMoeSparseMLP(config, FFN_DIM).eval()
        for parameter in layer.parameters():
            parameter.normal_()
        tokens = torch.randn(1, TOKENS, D_MODEL)
        ours = _definition(layer, tokens[0], 1 - config.moe_token_dropout)
        output = layer(tokens, None)
    theirs = (output[0] if isinstance(output, tuple) else output).view(TOKENS, D_MODEL)
    difference = ((theirs - ours).norm() / ours.norm()).item()
    if difference <= TOLERANCE:
        return f"computes NLLB-MoE right (relative difference {difference:.1e})"
    return (
        f"computes NLLB-MoE WRONG: its sparse layer differs from the definition by "
        f"{difference:.0%}. Use moe_mt, or transformers 4.57"
    )


def _definition(layer: NllbMoeSparseMLP, x: Tensor, scale: float) -> Tensor:
    """Return the layer's output, token by token: the two best experts, weighted, then scaled."""
    experts = layer.experts
    names = [name for name, _ in experts.named_children() if name.startswith("expert_")]
    names.sort(key=lambda name: int(name.removeprefix("expert_")))
    probs = layer.router.classifier(x).softmax(-1)
    rows: list[Tensor] = []
    for token, row in zip(x, probs, strict=True):
        gates, chosen = row.topk(2)
        first, second = (getattr(experts, names[e])(token[None])[0] for e in chosen.tolist())
        rows.append(scale * (gates[0] * first + gates[1] * second) / gates.sum())
    return torch.stack(rows)
