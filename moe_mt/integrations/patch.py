"""Replace layers inside somebody else's model, and put them back."""

from dataclasses import dataclass, field
from itertools import groupby

from torch import nn

from moe_mt.errors import ConfigError
from moe_mt.integrations.families import KNOWN_FAMILIES, patch_for
from moe_mt.integrations.patched import Patched, is_patched, put_on, take_off
from moe_mt.integrations.versions import check_version

__all__ = ["PatchReport", "patch", "unpatch"]


@dataclass(frozen=True, kw_only=True)
class PatchReport:
    """What was done to a model. Printed, it says so in words."""

    model: str
    """Class of the model."""

    transformers: str
    """Version of transformers."""

    replaced: dict[str, str] = field(default_factory=dict)
    """Name of a layer in the model → what it is."""

    left: dict[str, str] = field(default_factory=dict)
    """Name of a layer of experts that was left as it is → why."""

    restored: bool = False
    """Whether layers were put back, and not replaced."""

    def __str__(self) -> str:
        """Return one line for each kind of layer."""
        done = "compute as before again" if self.restored else "compute with moe_mt"
        lines = [f"{len(self.replaced)} layers of {self.model} {done}:"]
        lines += [f"  {line}" for line in _grouped(self.replaced)]
        if self.left:
            lines.append(f"{len(self.left)} layers were left as they are:")
            lines += [f"  {line}" for line in _grouped(self.left)]
        return "\n".join(lines)


def patch(model: nn.Module, *, cross_attention: bool = False, force: bool = False) -> PatchReport:
    """Make the mixture-of-experts layers of a transformers model compute with this package.

    Layers are changed one instance at a time, inside this model only. Their parameters stay the
    same objects under the same names, so that optimizers, adapters and saved checkpoints see no
    difference; experts that are modules get their weights laid out as slices of stacked tensors,
    one expert after the other, so that no weight is in memory twice for long. A model that is
    already patched may be patched again.

    Args:
        model: A model of transformers, or one that has such a model inside (PEFT, DDP).
        cross_attention: Whether the cross-attention of M2M100, NLLB and BART-like models is
            computed by ``moe_mt.ops.cross_attention`` too. It then does not matter which attention
            implementation the model asks for.
        force: Whether a version of transformers that was not tested will do.

    Returns:
        Which layers were replaced, and which were left and why.

    Raises:
        ConfigError: If the version was not tested, no layer is known, or a layer cannot be
            patched: experts that are quantised, offloaded, sharded, tied, on the meta device or
            under adapters. Nothing has been changed then.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"patch takes a model (torch.nn.Module), not a {type(model).__name__}")
    version = check_version(force=force)
    found = _find(model, cross_attention=cross_attention)
    left = _check(model, found)
    replaced = {
        name: mixin.description(module)
        for name, (module, mixin) in found.items()
        if name not in left
    }
    for name in replaced:
        module, mixin = found[name]
        if not is_patched(module):
            put_on(module, mixin)
    return PatchReport(
        model=type(model).__name__, transformers=version, replaced=replaced, left=left
    )


def unpatch(model: nn.Module) -> PatchReport:
    """Put back every layer that ``patch`` replaced in a model.

    Weights are not copied: parameters of experts stay where they lie, with the values they have.

    Args:
        model: A model that was patched.

    Returns:
        Which layers were put back.

    Raises:
        ConfigError: If none of its layers is patched, or another tool changed the class of one
            since, and must be undone first.
    """
    version = check_version(force=True)
    found = {name: module for name, module in model.named_modules() if isinstance(module, Patched)}
    if not found:
        raise ConfigError(f"no layer of this {type(model).__name__} is patched")
    for name, module in found.items():
        if not is_patched(module):
            raise ConfigError(
                f"the class of {name} was changed after it was patched, to "
                f"{type(module).__name__}; undo that (parametrisations, for instance) first"
            )
    for module in found.values():
        take_off(module)
    replaced = {name: type(module).__name__ for name, module in found.items()}
    return PatchReport(
        model=type(model).__name__, transformers=version, replaced=replaced, restored=True
    )


def _find(model: nn.Module, *, cross_attention: bool) -> dict[str, tuple[nn.Module, type[Patched]]]:
    found: dict[str, tuple[nn.Module, type[Patched]]] = {}
    for name, module in model.named_modules():
        mixin: type[Patched] | None = (
            type(module).mixin
            if isinstance(module, Patched)
            else patch_for(name, module, cross_attention=cross_attention)
        )
        if mixin is not None:
            found[name] = module, mixin
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no layer that patch knows; it knows {KNOWN_FAMILIES}"
            + ("" if cross_attention else " (cross-attention with cross_attention=True)")
        )
    return found


def _check(model: nn.Module, found: dict[str, tuple[nn.Module, type[Patched]]]) -> dict[str, str]:
    """Return the layers to leave as they are; raise where one is in no state to be patched."""
    left: dict[str, str] = {}
    for name, (module, mixin) in found.items():
        if is_patched(module):
            continue
        if why := mixin.foreign(module):
            left[name] = why
        elif why := mixin.obstacle(module):
            raise ConfigError(
                f"{name} ({type(module).__name__}) cannot be patched: {why}. "
                "The model was not changed"
            )
    if len(left) == len(found):
        name, why = next(iter(left.items()))
        raise ConfigError(f"{type(model).__name__} has no layer that can be patched: {name}: {why}")
    return left


def _grouped(layers: dict[str, str]) -> list[str]:
    by_kind = groupby(sorted(layers, key=layers.__getitem__), key=layers.__getitem__)
    return [f"{kind}: {', '.join(names)}" for kind, names in by_kind]
