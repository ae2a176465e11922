"""Experts that are modules of their own, computed all at once over weights that lie stacked."""

# pyright: reportPrivateUsage=false, reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# The dictionaries of a module are looked at as they are; autograd functions are not typed.

import copy
from collections.abc import Mapping, Sequence
from itertools import islice
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from moe_mt.moe.experts import Experts

__all__ = ["ExpertSlices", "experts_in", "hooks_of"]

CACHE_LINE = 64
"""Bytes."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class ExpertSlices:
    """Expert modules whose parameters are slices of stacked tensors.

    The fast path reads the stack as it lies; gradients arrive at the slices. Once an expert has
    been replaced, in whole or in part (LoRA, a quantised layer), has a hook, or has a weight that
    lies elsewhere, the experts are called one after the other instead, as the modules that they
    are. Nothing is registered: every weight is a parameter of its module, under its own name.
    """

    def __init__(
        self,
        container: nn.Module,
        experts: Sequence[nn.Module],
        leaves: Mapping[str, tuple[str, str]],
        stacked: Experts,
    ) -> None:
        """Watch experts; ``bind`` or ``gather`` then makes their parameters slices.

        Args:
            container: The module whose children the experts are.
            experts: The modules that compute what ``stacked`` does, in the order of its stack;
                none where the container's children are others, which are then always called.
            leaves: Name of a parameter of ``stacked`` → the child of an expert, and the parameter
                of that, which is a slice of it.
            stacked: Weights and form of the experts; no child of anything.
        """
        self.container = container
        self.leaves = dict(leaves)
        self.stacked = stacked.requires_grad_(False)
        self.apart = False
        """Whether weights were moved that could not be gathered then."""
        self.sharded = False
        """Whether the weights were sharded, so that there is no stack any more."""
        self.loaded = False
        """Whether weights were loaded since the last call, perhaps as other parameters."""
        self._watch(list(experts))

    def __call__(
        self, x: Tensor, expert_ids: Tensor, gates: Tensor, residual: Tensor | None = None
    ) -> Tensor:
        """Return (T, d_model): ``residual`` plus the gated outputs of each token's experts.

        Args:
            x: (T, d_model).
            expert_ids: (T, K) int32; ``E`` means dropped.
            gates: (T, K) float32; zero where dropped.
            residual: (T, d_model) or ``None``.
        """
        if self.apart or (self.loaded and not self._in_place()):
            self.gather()
        self.loaded = False
        if not self._untouched() or not self._in_place():
            if getattr(self.container, "_is_fsdp_managed_module", False):
                self._let_go()
            return self._one_by_one(x, expert_ids, gates, residual)
        leaves = self._parameters()
        if not torch.is_grad_enabled() or not any(leaf.requires_grad for leaf in leaves):
            return self.stacked(x, expert_ids, gates, residual)
        pieces = iter(leaves)
        weights = {
            name: _Join.apply(getattr(self.stacked, name), *islice(pieces, len(self.made)))
            for name in self.leaves
        }
        return torch.func.functional_call(self.stacked, weights, (x, expert_ids, gates, residual))

    def of(self, container: nn.Module) -> "ExpertSlices":
        """Return what computes the experts of a container, which may have come in place of ours.

        A replica (``nn.DataParallel``) shares this object, and has experts of its own.
        """
        if container is self.container:
            return self
        return ExpertSlices(container, [], self.leaves, self.stacked)

    def bind(self) -> None:
        """Make every expert's parameters slices of the stacked ones, whose values these take."""
        places = iter(self.places)
        for name in self.leaves:
            for piece in getattr(self.stacked, name).data.unbind(0):
                parameters, leaf = next(places)
                parameter = parameters[leaf]
                own = _with_own_storage(piece)
                if parameter.is_meta == own.is_meta:
                    parameter.data = own
                else:
                    wants_grad = parameter.requires_grad
                    parameters[leaf] = nn.Parameter(own, requires_grad=wants_grad)
        self._remember_places()

    def gather(self) -> bool:
        """Bring weights that lie elsewhere into the stack again, and say whether all are there.

        The memory of each weight is free for the next one, so that one stacked projection at most
        is in memory twice, and on a CPU one expert's.
        """
        leaves = self._parameters()
        alike = {(leaf.dtype, leaf.device) for leaf in leaves if isinstance(leaf, nn.Parameter)}
        if self.sharded or any(map(_is_sharded, leaves)):
            self._let_go()
            return False
        parameters = all(isinstance(leaf, nn.Parameter) for leaf in leaves)
        if not self._whole() or not parameters or len(alike) > 1:
            self.apart = True
            return False
        if self.apart or not self._in_place():
            pieces = iter(leaves)
            for name in self.leaves:
                stack = _stack(list(islice(pieces, len(self.made))))
                setattr(self.stacked, name, nn.Parameter(stack, requires_grad=False))
            self._remember_places()
        return True

    def _let_go(self) -> None:
        """Free the stack for good, and call the experts from now on: they were sharded."""
        self.stacked.to("meta")
        self.bound, self.sharded, self.apart = [], True, False

    def _remember_places(self) -> None:
        self.bound = self._parameters()
        self.addresses = _addresses(self.bound)
        self.apart = False

    def _watch(self, experts: list[nn.Module]) -> None:
        """Remember what the experts are made of, to notice when that changes."""
        modules = [module for expert in experts for module in (expert, *expert.children())]
        self.made = experts
        self.classes = [type(expert) for expert in experts]
        self.parts = [dict(expert._modules) for expert in experts]
        # Of the stacked parameters, one after the other.
        self.places: list[tuple[dict[str, Any], str]] = [
            (getattr(expert, layer)._parameters, leaf)
            for layer, leaf in self.leaves.values()
            for expert in experts
        ]
        self.hooks = [hooks for module in modules for hooks in hooks_of(module)]
        self.attributes = [vars(module) for module in modules]
        # The parameters that are slices, and where these begin in memory.
        self.bound: list[Any] = []
        self.addresses: list[int] = []

    def _whole(self) -> bool:
        """Whether every expert, and every part of one, is the module that was there at first."""
        same = experts_in(self.container) == self.made and not self.sharded
        return same and [e._modules for e in self.made] == self.parts

    def _untouched(self) -> bool:
        """Whether a call of the experts would do nothing but compute."""
        return (
            self._whole()
            and not any(self.hooks)
            and not any(map(_has_other_forward, self.attributes))
            and all(map(is_, map(type, self.made), self.classes))
            and all(expert.training is self.stacked.training for expert in self.made)
        )

    def _parameters(self) -> list[Any]:
        return [parameters.get(name) for parameters, name in self.places]

    def _in_place(self) -> bool:
        """Whether the weights are the slices of the stack that they were made."""
        leaves = self._parameters()
        # ``torch.func`` and parametrisations put other tensors there, some without an address.
        if len(leaves) != len(self.bound) or not all(map(is_, leaves, self.bound)):
            return False
        return torch.compiler.is_compiling() or _addresses(leaves) == self.addresses

    def _one_by_one(
        self, x: Tensor, expert_ids: Tensor, gates: Tensor, residual: Tensor | None
    ) -> Tensor:
        experts = experts_in(self.container)
        wide = torch.promote_types(x.dtype, torch.float32)
        mixture = torch.zeros(x.shape, dtype=wide, device=x.device)
        # Sorted, so that the device is waited for once and not for each expert.
        flat = expert_ids.flatten().long()
        counts = torch.bincount(flat, minlength=len(experts) + 1).tolist()
        claims = flat.argsort(stable=True).split(counts)
        for expert, claim in zip(experts, claims[:-1], strict=True):
            if len(claim) > 0:
                rows = claim // expert_ids.shape[1]
                output = expert(x[rows]) * gates.flatten()[claim, None]
                mixture = mixture.index_add(0, rows, output.to(wide))
        return mixture.to(x.dtype) if residual is None else (mixture + residual).to(x.dtype)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the stack out of copies and files: its slices hold all there is."""
        self.gather()
        empty = copy.copy(self.stacked)
        weights = self.stacked._parameters.items()
        empty.__dict__["_parameters"] = {
            name: None if weight is None else nn.Parameter(weight.to("meta"), requires_grad=False)
            for name, weight in weights
        }
        kept = ("container", "leaves", "made")
        return {"stacked": empty} | {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, whose weights are apart until ``rebind`` is called."""
        vars(self).update(state, apart=True, loaded=False, sharded=False)

    def rebind(self) -> None:
        """Gather a copy's weights: to be called when its container is complete."""
        self._watch(self.made)
        self.gather()


def experts_in(container: nn.Module) -> list[Any]:
    """Return the experts among the children of a container, in order."""
    children = container._modules.values()
    return [child for child in children if child is not None and type(child) is not nn.Dropout]


def hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    """Return what holds the hooks that a call of a module runs; they fill as hooks are added."""
    return [getattr(module, name) for name in HOOKS]


def _stack(leaves: list[nn.Parameter]) -> Tensor:
    """Return leaves stacked, each of which is a slice of the stack afterwards."""
    # Weights that can be trained must not become inference tensors.
    with torch.no_grad(), torch.inference_mode(any(leaf.is_inference() for leaf in leaves)):
        stack = _empty_stack(leaves)
        for piece, leaf in zip(stack.unbind(0), leaves, strict=True):
            piece.copy_(leaf.detach())
            leaf.data = _with_own_storage(piece)
    return stack


def _empty_stack(leaves: list[nn.Parameter]) -> Tensor:
    """Return memory for a stack, its slices as far behind a line of the cache as the leaves are.

    A CPU's products may round by that, and tensors of a file begin where its header ends; a layer
    that is put back is to compute the same bits again.
    """
    first = leaves[0]
    shape = len(leaves), *first.shape
    starts = {leaf.data_ptr() % CACHE_LINE for leaf in leaves}
    if first.device.type != "cpu" or len(starts) > 1:
        return torch.empty(shape, dtype=first.dtype, device=first.device)
    size = first.element_size()
    memory = torch.empty(first.numel() * len(leaves) + CACHE_LINE // size, dtype=first.dtype)
    ahead = (starts.pop() - memory.data_ptr()) % CACHE_LINE // size
    return memory[ahead : ahead + first.numel() * len(leaves)].view(shape)


def _is_sharded(leaf: Any) -> bool:  # noqa: ANN401
    return type(leaf).__name__ == "DTensor"


def _addresses(leaves: list[Any]) -> list[int]:
    return [leaf.data_ptr() for leaf in leaves]


def _has_other_forward(attributes: dict[str, Any]) -> bool:
    """Whether a module's forward was replaced on the instance, but for accelerate's devices."""
    if "forward" not in attributes:
        return False
    hook = attributes.get("_hf_hook")
    # Without offloading, that hook moves inputs to where the weights are, and these are together.
    return hook is None or bool(getattr(hook, "offload", True))


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
