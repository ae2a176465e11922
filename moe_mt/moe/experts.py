"""The weights of a layer's experts, stacked."""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false
# ``named_modules`` is not fully typed.

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from moe_mt.errors import ConfigError
from moe_mt.ops import expert_ffn

__all__ = ["Experts"]


class Experts(nn.Module):
    """``E`` feed-forward networks of one shape, with their weights stacked on the first axis.

    Parameters: ``up_proj`` (E, ffn_dim, d_model), ``down_proj`` (E, d_model, ffn_dim),
    ``gate_proj`` (E, ffn_dim, d_model), ``up_bias`` (E, ffn_dim), ``gate_bias`` (E, ffn_dim) and
    ``down_bias`` (E, d_model); those that were not asked for are ``None``.
    """

    gate_proj: nn.Parameter | None
    up_bias: nn.Parameter | None
    gate_bias: nn.Parameter | None
    down_bias: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        d_model: int,
        ffn_dim: int,
        *,
        activation: str = "relu",
        activation_dropout: float = 0.0,
        gated: bool = False,
        bias: bool = True,
    ) -> None:
        """Build experts whose weights are those of ``reset_parameters``.

        Args:
            num_experts: ``E``.
            d_model: Width of a token.
            ffn_dim: Inner width.
            activation: A name of ``ops.ACTIVATIONS``.
            activation_dropout: Dropout of hidden rows in training.
            gated: Whether a second product gates the first: SwiGLU with ``"silu"``.
            bias: Whether the products have biases.
        """
        super().__init__()
        self.num_experts = num_experts
        self.activation = activation
        self.activation_dropout = activation_dropout
        self.up_proj = nn.Parameter(torch.empty(num_experts, ffn_dim, d_model))
        self.down_proj = nn.Parameter(torch.empty(num_experts, d_model, ffn_dim))
        optional = {
            "gate_proj": (gated, (num_experts, ffn_dim, d_model)),
            "up_bias": (bias, (num_experts, ffn_dim)),
            "gate_bias": (gated and bias, (num_experts, ffn_dim)),
            "down_bias": (bias, (num_experts, d_model)),
        }
        for name, (wanted, shape) in optional.items():
            parameter = nn.Parameter(torch.empty(shape)) if wanted else None
            self.register_parameter(name, parameter)
        self.reset_parameters()

    @classmethod
    def from_modules(
        cls,
        modules: Sequence[nn.Module] | nn.ModuleList | nn.ModuleDict,
        *,
        up_proj: str = "fc1",
        down_proj: str = "fc2",
        gate_proj: str | None = None,
        activation: str = "relu",
        activation_dropout: float = 0.0,
    ) -> "Experts":
        """Copy the weights of feed-forward modules, expert by expert, into stacked parameters.

        Names are paths of ``nn.Linear`` layers inside a module: ``up_proj="w3", down_proj="w2",
        gate_proj="w1", activation="silu"`` for Mixtral's. Biases are found. A parameter wants a
        gradient where that of any module does.

        Args:
            modules: One an expert, in order, on one device.
            up_proj: Path of the layer (d_model → ffn_dim).
            down_proj: Path of the layer (ffn_dim → d_model).
            gate_proj: Path of the layer that gates ``up_proj``, or ``None``.
            activation: A name of ``ops.ACTIVATIONS``.
            activation_dropout: Dropout of hidden rows in training.

        Raises:
            ConfigError: If there is no module, a path leads to no ``nn.Linear``, weights are on the
                meta device, their shapes, dtypes or devices differ, or only some layers have a
                bias.
        """
        values = modules.values() if isinstance(modules, nn.ModuleDict) else modules
        paths = {"up": up_proj, "down": down_proj}
        if gate_proj is not None:
            paths["gate"] = gate_proj
        weights = [_weights(module, paths, index) for index, module in enumerate(values)]
        if not weights:
            raise ConfigError("there is no module to take experts from; give one for each expert")
        for index, one in enumerate(weights):
            _check_alike(one, weights[0], index)
        stacked = {name: _stack([one[name] for one in weights]) for name in weights[0]}
        return cls.from_stacked(
            stacked.pop("up_proj"),
            stacked.pop("down_proj"),
            **stacked,
            activation=activation,
            activation_dropout=activation_dropout,
        )

    @classmethod
    def from_stacked(
        cls,
        up_proj: Tensor,
        down_proj: Tensor,
        *,
        gate_proj: Tensor | None = None,
        up_bias: Tensor | None = None,
        gate_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        activation: str = "relu",
        activation_dropout: float = 0.0,
    ) -> "Experts":
        """Take stacked weights as they are, without a copy.

        A parameter becomes the layer's own; a tensor becomes a parameter of the same memory. Halves
        of a fused (E, 2 * ffn_dim, d_model) weight can be given as slices of it.

        Args:
            up_proj: (E, ffn_dim, d_model).
            down_proj: (E, d_model, ffn_dim).
            gate_proj: (E, ffn_dim, d_model), or ``None`` for experts without a gate.
            up_bias: (E, ffn_dim), or ``None``; then there is no other bias either.
            gate_bias: (E, ffn_dim), with ``gate_proj`` and ``up_bias``.
            down_bias: (E, d_model), with ``up_bias``.
            activation: A name of ``ops.ACTIVATIONS``.
            activation_dropout: Dropout of hidden rows in training.

        Raises:
            ConfigError: If shapes, dtypes or devices do not fit together, or only some products
                have a bias.
        """
        if up_proj.dim() != 3:
            raise ConfigError(
                f"up_proj is {tuple(up_proj.shape)}; it must be (experts, ffn_dim, d_model)"
            )
        num_experts, ffn_dim, d_model = up_proj.shape
        with torch.device("meta"):
            experts = cls(
                num_experts,
                d_model,
                ffn_dim,
                activation=activation,
                activation_dropout=activation_dropout,
                gated=gate_proj is not None,
                bias=any(bias is not None for bias in (up_bias, gate_bias, down_bias)),
            )
        given = {
            "up_proj": up_proj,
            "down_proj": down_proj,
            "gate_proj": gate_proj,
            "up_bias": up_bias,
            "gate_bias": gate_bias,
            "down_bias": down_bias,
        }
        for name, tensor in given.items():
            _check_fits(name, tensor, experts._parameters[name], up_proj)
            if tensor is not None and not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor)
            setattr(experts, name, tensor)
        return experts

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights and biases as ``nn.Linear`` does: evenly within 1 / sqrt(fan_in) of zero."""
        # Drawing numbers on the meta device draws none, and costs seconds of imports.
        if self.up_proj.is_meta:
            return
        _, ffn_dim, d_model = self.up_proj.shape
        for name, parameter in self.named_parameters():
            fan_in = ffn_dim if name.startswith("down") else d_model
            parameter.uniform_(-(fan_in**-0.5), fan_in**-0.5)

    def forward(
        self, x: Tensor, expert_ids: Tensor, gates: Tensor, residual: Tensor | None = None
    ) -> Tensor:
        """Return (T, d_model): ``residual`` plus the gated outputs of each token's experts.

        Args:
            x: (T, d_model).
            expert_ids: (T, K) int32; ``E`` means dropped.
            gates: (T, K) float32; zero where dropped.
            residual: (T, d_model) or ``None``.
        """
        return expert_ffn(
            x,
            expert_ids,
            gates,
            self.up_proj,
            self.down_proj,
            gate_proj=self.gate_proj,
            up_bias=self.up_bias,
            gate_bias=self.gate_bias,
            down_bias=self.down_bias,
            activation=self.activation,
            activation_dropout=self.activation_dropout if self.training else 0.0,
            residual=residual,
        )


def _weights(module: nn.Module, paths: Mapping[str, str], index: int) -> dict[str, Tensor]:
    """Return an expert's weights by the names of the stacked ones."""
    found: dict[str, Tensor] = {}
    # No subclass, which may compute something else: quantised layers are some.
    layers: dict[str, nn.Linear] = {
        path: layer for path, layer in module.named_modules() if type(layer) is nn.Linear
    }
    for name, path in paths.items():
        if path not in layers:
            raise ConfigError(
                f"expert {index} has no nn.Linear at {path!r}, which is to be its {name}_proj; it "
                f"has {', '.join(map(repr, layers)) or 'none'}: name them in up_proj, down_proj "
                "and gate_proj"
            )
        layer = layers[path]
        if layer.weight.is_meta:
            raise ConfigError(
                f"{path!r} of expert {index} is on the meta device, so that there is nothing to "
                "copy; load the weights first"
            )
        found[f"{name}_proj"] = layer.weight
        if cast("Tensor | None", layer.bias) is not None:
            found[f"{name}_bias"] = layer.bias
    return found


def _check_alike(one: Mapping[str, Tensor], first: Mapping[str, Tensor], index: int) -> None:
    if one.keys() != first.keys():
        raise ConfigError(
            f"expert {index} has {', '.join(one)} and expert 0 has {', '.join(first)}; either all "
            "experts have a bias or none"
        )
    for name, tensor in one.items():
        mine, theirs = _form(tensor), _form(first[name])
        if mine != theirs:
            raise ConfigError(
                f"{name} of expert {index} is {mine} and that of expert 0 {theirs}; experts that "
                "are stacked must be alike"
            )


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"


@torch.no_grad()
def _stack(tensors: Sequence[Tensor]) -> nn.Parameter:
    stacked = tensors[0].new_empty(len(tensors), *tensors[0].shape)
    for index, tensor in enumerate(tensors):
        stacked[index] = tensor
    return nn.Parameter(stacked, requires_grad=any(tensor.requires_grad for tensor in tensors))


def _check_fits(name: str, tensor: Tensor | None, wanted: Tensor | None, like: Tensor) -> None:
    """Raise unless a stacked tensor is there where it must be, and is like ``up_proj``."""
    if (tensor is None) != (wanted is None):
        raise ConfigError(
            f"{name} was {'not ' if tensor is None else ''}given; either every product has a bias "
            "or none"
        )
    if tensor is None or wanted is None:
        return
    if (tensor.shape, tensor.dtype, tensor.device) != (wanted.shape, like.dtype, like.device):
        raise ConfigError(
            f"{name} is {_form(tensor)}; beside an up_proj that is {_form(like)} it must be "
            f"{tuple(wanted.shape)}, of its dtype and on its device"
        )
