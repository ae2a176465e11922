"""The experts of a sparse layer, one by one, over weights that lie stacked."""

import copy
from collections.abc import Callable
from itertools import islice
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from moe_mt.models import TransformerConfig
from moe_mt.moe import Experts
from moe_mt.ops import ACTIVATIONS

__all__ = ["NllbMoeDenseActDense", "StackedExperts"]

LEAVES = {
    "up_proj": ("fc1", "weight"),
    "up_bias": ("fc1", "bias"),
    "down_proj": ("fc2", "weight"),
    "down_bias": ("fc2", "bias"),
}
"""Stacked parameter → the layer and the parameter of an expert that is a slice of it."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class NllbMoeDenseActDense(nn.Module):
    """A feed-forward network of NLLB-MoE: ``fc2(dropout(activation(fc1(x))))``."""

    def __init__(self, config: Any, ffn_dim: int) -> None:  # noqa: ANN401
        """Build the two layers.

        Args:
            config: An ``NllbMoeConfig``, or what it is for a model.
            ffn_dim: Inner width.
        """
        super().__init__()
        if not isinstance(config, TransformerConfig):
            config = config.for_model()
        self.fc1 = nn.Linear(config.d_model, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, config.d_model)
        self.dropout = nn.Dropout(config.activation_dropout)
        self.act = ACTIVATIONS[config.activation]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return (..., d_model) for ``hidden_states`` (..., d_model)."""
        return self.fc2(self.dropout(self.act(self.fc1(hidden_states))))


class StackedExperts(nn.ModuleDict):
    """Experts ``expert_0`` to ``expert_{E-1}`` as modules, computed all at once.

    The parameters of every expert are slices of four stacked tensors, which the fast path reads as
    they lie; gradients arrive at the slices. Once an expert has been replaced, in whole or in part
    (LoRA, a quantised layer), has a hook, or has a weight that lies elsewhere, the experts are
    called one after the other instead, as the modules that they are.
    """

    stacked: Any
    made: Any
    parts: Any
    places: Any
    hooks: Any
    bound: Any
    addresses: Any
    apart: Any

    def __init__(self, stacked: Experts, make_expert: Callable[[], nn.Module]) -> None:
        """Take over the weights of ``stacked``.

        Args:
            stacked: The core's experts.
            make_expert: Makes one expert, called on the meta device. An expert that is no
                ``NllbMoeDenseActDense`` has weights of its own: it is made where ``stacked`` is.
        """
        with torch.device("meta"):
            experts = [make_expert() for _ in range(stacked.num_experts)]
        plain = all(type(expert) is NllbMoeDenseActDense for expert in experts)
        if not plain:
            with stacked.up_proj.device:
                experts = [make_expert() for _ in range(stacked.num_experts)]
        super().__init__({f"expert_{index}": expert for index, expert in enumerate(experts)})
        # No child: its weights are listed once, as those of the experts.
        self.__dict__["stacked"] = stacked.requires_grad_(False)
        self._watch(experts if plain else [])
        if plain:
            self._bind()
        self.register_load_state_dict_post_hook(_gather_after_load)

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
        if self.apart:
            self._gather()
        if not self._whole() or any(self.hooks) or not self._in_place():
            return self._one_by_one(x, expert_ids, gates, residual)
        if not torch.is_grad_enabled():
            return self.stacked(x, expert_ids, gates, residual)
        leaves = iter(self._leaves())
        weights = {
            name: _Join.apply(getattr(self.stacked, name), *islice(leaves, len(self)))
            for name in LEAVES
        }
        return torch.func.functional_call(self.stacked, weights, (x, expert_ids, gates, residual))

    def _one_by_one(
        self, x: Tensor, expert_ids: Tensor, gates: Tensor, residual: Tensor | None
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        mixture = torch.zeros(x.shape, dtype=wide, device=x.device)
        # Sorted, so that the device is waited for once and not for each expert.
        flat = expert_ids.flatten().long()
        counts = torch.bincount(flat, minlength=len(self) + 1).tolist()
        claims = flat.argsort(stable=True).split(counts)
        for expert, claim in zip(self.values(), claims[:-1], strict=True):
            if len(claim) > 0:
                rows = claim // expert_ids.shape[1]
                output = expert(x[rows]) * gates.flatten()[claim, None]
                mixture = mixture.index_add(0, rows, output.to(wide))
        return mixture.to(x.dtype) if residual is None else (mixture + residual).to(x.dtype)

    def train(self, mode: bool = True) -> "StackedExperts":
        """Set training mode, of the core's experts too."""
        self.stacked.train(mode)
        return super().train(mode)

    def _watch(self, experts: list[nn.Module]) -> None:
        """Remember what the experts are made of, to notice when that changes."""
        modules = [module for expert in experts for module in (expert, *expert.children())]
        state = {
            "made": experts,
            "parts": [dict(expert._modules) for expert in experts],
            # Of the stacked parameters, one after the other.
            "places": [
                (getattr(expert, layer)._parameters, leaf)
                for layer, leaf in LEAVES.values()
                for expert in experts
            ],
            "hooks": [getattr(module, name) for module in modules for name in HOOKS],
            # The parameters that are slices, and where these begin in memory.
            "bound": [],
            "addresses": [],
            # Whether weights were moved that could not be gathered then.
            "apart": False,
        }
        self.__dict__.update(state)

    def _whole(self) -> bool:
        """Whether every expert, and every part of one, is the module that was made here."""
        experts = list(self._modules.values())
        return experts == self.made and [e._modules for e in self.made] == self.parts

    def _leaves(self) -> list[Any]:
        return [parameters.get(name) for parameters, name in self.places]

    def _in_place(self) -> bool:
        """Whether the weights are the slices of the stack that they were made."""
        leaves = self._leaves()
        # ``torch.func`` and parametrisations put other tensors there, some without an address.
        if not all(map(is_, leaves, self.bound)):
            return False
        return torch.compiler.is_compiling() or _addresses(leaves) == self.addresses

    def _bind(self) -> None:
        """Make every expert's parameters slices of the stacked ones."""
        places = iter(self.places)
        for name in LEAVES:
            for piece in getattr(self.stacked, name).data.unbind(0):
                parameters, leaf = next(places)
                parameter = parameters[leaf]
                own = _with_own_storage(piece)
                if parameter.is_meta == own.is_meta:
                    parameter.data = own
                else:
                    wants_grad = parameter.requires_grad
                    parameters[leaf] = nn.Parameter(own, requires_grad=wants_grad)
        leaves = self._leaves()
        self.__dict__.update(bound=leaves, addresses=_addresses(leaves), apart=False)

    def _gather(self) -> bool:
        """Bring weights that lie elsewhere into the stack again, and say whether all are there."""
        leaves = self._leaves()
        alike = {(leaf.dtype, leaf.device) for leaf in leaves if isinstance(leaf, nn.Parameter)}
        parameters = all(isinstance(leaf, nn.Parameter) for leaf in leaves)
        if not self._whole() or not parameters or len(alike) > 1:
            self.__dict__["apart"] = True
            return False
        if self.apart or not self._in_place():
            pieces = iter(leaves)
            for name in LEAVES:
                stack = torch.stack([leaf.detach() for leaf in islice(pieces, len(self))])
                setattr(self.stacked, name, nn.Parameter(stack, requires_grad=False))
            self._bind()
        return True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StackedExperts":
        """Move or cast the stack, then let the experts be its slices again."""
        if not self._gather():
            return super()._apply(fn, recurse)
        gradients = {
            parameter: fn(parameter.grad)
            for parameter in self.parameters()
            if parameter.grad is not None
        }
        for parameter in gradients:
            parameter.grad = None
        self.stacked._apply(fn)
        self._bind()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, whose slices were copied one by one."""
        super().__setstate__(state)
        self.__dict__["apart"] = True
        self._gather()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the stack out of copies and files: its slices hold all there is."""
        if not self._gather():
            return self.__dict__
        empty = copy.copy(self.stacked)
        weights = self.stacked._parameters.items()
        empty.__dict__["_parameters"] = {
            name: None if weight is None else nn.Parameter(weight.to("meta"), requires_grad=False)
            for name, weight in weights
        }
        return {**self.__dict__, "stacked": empty}


def _addresses(leaves: list[Any]) -> list[int]:
    return [leaf.data_ptr() for leaf in leaves]


def _gather_after_load(module: Any, incompatible_keys: object) -> None:  # noqa: ANN401
    module._gather()


def _with_own_storage(piece: Tensor) -> Tensor:
    """Return a tensor at the same place in memory whose storage is nothing but that place.

    Code that saves models takes tensors of one storage for copies, or writes the storage whole.
    """
    plain = type(piece) is Tensor and piece.device.type in ("cpu", "cuda")
    return torch.from_dlpack(piece) if plain and piece.numel() > 0 else piece


class _Join(torch.autograd.Function):
    """The stack as if made of its slices: nothing is copied, and each slice gets its gradient."""

    @staticmethod
    def forward(ctx: Any, stacked: Tensor, *slices: Tensor) -> Tensor:  # noqa: ANN401
        return stacked.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        return (None, *grads[0].unbind(0))
