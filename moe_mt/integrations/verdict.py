"""Whether the installed transformers computes NLLB-MoE as it is defined."""

from typing import Any

import torch
from torch import Tensor, nn

from moe_mt.integrations.patch import patch

__all__ = ["check_transformers"]

TOLERANCE = 1e-4
TOKENS, EXPERTS = 48, 6
SHAPE = {
    "vocab_size": 64,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_experts": EXPERTS,
}


def check_transformers() -> str:
    """Run transformers' NLLB-MoE, a tiny one, and compare each sparse layer with the definition.

    Returns:
        ``"computes NLLB-MoE right"`` with the relative difference, or ``"computes NLLB-MoE WRONG"``
        with what differs, what to do, and whether ``patch`` makes this version right.

    Raises:
        ImportError: If there is no transformers, or one without this model.
    """
    # Here and not above: the room is entered without transformers too.
    from transformers.models.nllb_moe import (  # pyright: ignore
        NllbMoeConfig,
        NllbMoeForConditionalGeneration,
    )

    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        model = NllbMoeForConditionalGeneration(NllbMoeConfig(**SHAPE)).eval()
        for parameter in model.parameters():
            parameter.normal_()
        scale = 1 - model.config.moe_token_dropout
        layers = [_Watched(module, scale) for module in model.modules() if _is_sparse(module)]
        ids = torch.randint(4, SHAPE["vocab_size"], (1, TOKENS))
        inputs = {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
        model(**inputs)
        found = _finding(layers)
        if found is None:
            return f"computes NLLB-MoE right (relative difference {_difference(layers):.1e})"
        patch(model, force=True)
        model(**inputs)
    return f"computes NLLB-MoE WRONG: {found}. {_advice(_difference(layers))}"


def _is_sparse(module: nn.Module) -> bool:
    return type(module).__name__ == "NllbMoeSparseMLP"


class _Watched:
    """A sparse layer, how far its output is from the definition, and which experts saw tokens."""

    def __init__(self, layer: Any, scale: float) -> None:  # noqa: ANN401
        self.scale = scale
        names = [name for name, _ in layer.experts.named_children() if name.startswith("expert_")]
        names.sort(key=lambda name: int(name.removeprefix("expert_")))
        self.experts = [layer.experts.get_submodule(name) for name in names]
        self.difference = float("nan")
        self.ran: set[int] = set()
        self.chosen: set[int] = set()
        layer.register_forward_hook(self._compare)
        for index, expert in enumerate(self.experts):
            expert.register_forward_pre_hook(self._counter(index))

    def _counter(self, index: int) -> Any:  # noqa: ANN401
        def count(expert: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].numel():
                self.ran.add(index)

        return count

    def _compare(self, layer: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
        tokens = inputs[0].flatten(0, -2)
        theirs = (output[0] if isinstance(output, tuple) else output).view_as(tokens)
        ours = self._definition(layer, tokens)
        self.difference = ((theirs - ours).norm() / ours.norm()).item()

    def _definition(self, layer: Any, tokens: Tensor) -> Tensor:  # noqa: ANN401
        """Return the output token by token: the two best experts, weighted, then scaled."""
        rows: list[Tensor] = []
        for token, probs in zip(tokens, layer.router.classifier(tokens).softmax(-1), strict=True):
            gates, chosen = probs.topk(2)
            self.chosen.update(chosen.tolist())
            # forward() passes by the hooks that count what the layer itself runs.
            first, second = (self.experts[e].forward(token[None])[0] for e in chosen.tolist())
            rows.append(self.scale * (gates[0] * first + gates[1] * second) / gates.sum())
        return torch.stack(rows)


def _difference(layers: list[_Watched]) -> float:
    return max(layer.difference for layer in layers)


def _finding(layers: list[_Watched]) -> str | None:
    """Return what is wrong with layers that have run, or ``None``."""
    difference = _difference(layers)
    if difference <= TOLERANCE:
        return None
    ran = set[int]().union(*(layer.ran for layer in layers))
    chosen = set[int]().union(*(layer.chosen for layer in layers))
    return (
        f"{_missing(ran, chosen)}its sparse layer differs from the definition by {difference:.0%}"
    )


def _advice(patched: float) -> str:
    """Return what to do, for a model that differs so much once it is patched."""
    if patched <= TOLERANCE:
        return (
            f"moe_mt.patch(model) makes it right (relative difference {patched:.1e}), and "
            "moe_mt.from_pretrained needs no transformers"
        )
    return (
        f"Patched, it still differs by {patched:.0%}: use moe_mt.from_pretrained, or transformers "
        "4.57"
    )


def _missing(ran: set[int], chosen: set[int]) -> str:
    """Return the part of the sentence about experts that should have run and did not."""
    if not ran < chosen:
        return ""
    *others, last = map(str, sorted(ran))
    experts = f"experts {', '.join(others)} and {last}" if others else f"expert {last}"
    return f"only {experts} of {EXPERTS} ever run; "
