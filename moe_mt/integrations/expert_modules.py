"""Reading experts that are modules: where their weights are, and what hinders to stack them."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_mt.integrations.activations import activation_of
from moe_mt.moe import Experts, ExpertSlices, experts_in, hooks_of

__all__ = ["ExpertLayers", "dropout_of", "weights_obstacle"]


@dataclass(frozen=True, kw_only=True)
class ExpertLayers:
    """What the layers of an expert are called."""

    up_proj: str
    """The layer from ``d_model`` to ``ffn_dim``."""

    down_proj: str
    """The layer back."""

    gate_proj: str | None = None
    """The layer whose activated output the first one's is multiplied with."""

    activation: str = "act_fn"
    """The activation function."""

    def names(self) -> dict[str, str]:
        """Return projection → layer."""
        names = {"up_proj": self.up_proj, "down_proj": self.down_proj}
        return names if self.gate_proj is None else {**names, "gate_proj": self.gate_proj}

    def slices(self, container: nn.Module) -> ExpertSlices:
        """Return the experts of a container that has no obstacle, their weights not yet stacked."""
        experts = experts_in(container)
        first = {name: getattr(experts[0], layer) for name, layer in self.names().items()}
        leaves = {name: (layer, "weight") for name, layer in self.names().items()}
        with torch.device("meta"):
            stacked = Experts(
                len(experts),
                first["up_proj"].in_features,
                first["up_proj"].out_features,
                activation=activation_of(getattr(experts[0], self.activation)) or "",
                activation_dropout=dropout_of(experts[0]),
                gated=self.gate_proj is not None,
                bias=first["up_proj"].bias is not None,
            )
        for name, layer in self.names().items():
            if first[name].bias is not None:
                leaves[name.replace("proj", "bias")] = (layer, "bias")
        return ExpertSlices(container, experts, leaves, stacked)

    def obstacle(self, container: nn.Module) -> str | None:
        """Return why the weights of a container's experts cannot be stacked, or ``None``."""
        experts = experts_in(container)
        if not experts:
            return "it has no experts"
        if any(hooks_of(container)):
            return (
                "its container of experts has hooks, which would no longer be called; remove them"
            )
        for index, expert in enumerate(experts):
            if found := self._obstacle_of_one(expert):
                return f"expert {index} {found}"
        if len({repr(expert) for expert in experts}) > 1:
            return "its experts are not all alike"
        weights = [tensor for expert in experts for tensor in expert.parameters()]
        return weights_obstacle(weights)

    def _obstacle_of_one(self, expert: nn.Module) -> str | None:
        if isinstance(getattr(expert, "base_layer", None), nn.Module):
            return f"is {type(expert).__name__}; patch the model before adapters are added"
        if not type(expert).__module__.startswith("transformers."):
            return f"is {type(expert).__name__}, which is no class of transformers"
        for layer in self.names().values():
            found = getattr(expert, layer, None)
            if type(found) is not nn.Linear:
                return (
                    f"has {type(found).__name__} as {layer} where Linear is needed: quantised "
                    "and adapted experts cannot be stacked; load plain weights, and patch the "
                    "model before adapters are added"
                )
            if getattr(getattr(found, "_hf_hook", None), "offload", False):
                return (
                    f"has {layer} offloaded by accelerate; load the model without offloading "
                    "(device_map), or use moe_mt.from_pretrained"
                )
        biases = {getattr(expert, layer).bias is None for layer in self.names().values()}
        if len(biases) > 1:
            return "has layers with a bias and others without"
        function = getattr(expert, self.activation)
        if activation_of(function) is None:
            return f"has the activation {type(function).__name__}, which no kernel computes"
        return None


def dropout_of(expert: nn.Module) -> float:
    """Return the probability with which an expert drops hidden units in training."""
    return getattr(getattr(expert, "dropout", None), "p", 0.0)


def weights_obstacle(weights: Iterable[Tensor]) -> str | None:
    """Return why weights of a layer cannot be computed with together, or ``None`` if they can."""
    weights = list(weights)
    if any(weight.is_meta for weight in weights):
        return "weights are on the meta device; load them first"
    if len({id(weight) for weight in weights}) < len(weights):
        return "experts share weights (tied); each needs weights of its own"
    kinds = sorted({type(weight).__name__ for weight in weights} - {"Parameter"})
    if kinds:
        return f"weights are {', '.join(kinds)}; quantised or sharded ones cannot be read"
    dtypes = sorted({str(weight.dtype) for weight in weights})
    if len(dtypes) > 1 or not weights[0].is_floating_point():
        return f"weights are {', '.join(dtypes)}; they must be of one floating-point dtype"
    devices = sorted({str(weight.device) for weight in weights})
    if len(devices) > 1:
        return f"weights are on {', '.join(devices)}; a layer must be on one device"
    return None
