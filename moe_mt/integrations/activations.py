"""Which of our activations a module of somebody else's is."""

from typing import Any

from torch import nn

__all__ = ["activation_of"]

ACTIVATIONS = {
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_new",
    "GELUTanh": "gelu_new",
    "PytorchGELUTanh": "gelu_new",
}
"""Class, in PyTorch or transformers → a name of ``moe_mt.ops.ACTIVATIONS``."""


def activation_of(function: Any) -> str | None:  # noqa: ANN401
    """Return the name of a function in ``moe_mt.ops.ACTIVATIONS``, or ``None`` if it is not there.

    Known by its class and not by values, so that a compiler can follow.
    """
    if type(function) is nn.GELU:
        return "gelu_new" if function.approximate == "tanh" else "gelu"
    return ACTIVATIONS.get(type(function).__name__)
