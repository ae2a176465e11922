"""Instances of other people's classes that compute with this package.

A patched module stays the object that it is, with its parameters, buffers, hooks and place in the
model. Its class becomes a subclass of its own class, made for it, with another ``forward``: what
PyTorch's parametrisations do. No class is changed that anybody else has an instance of.
"""

import functools
from types import MethodType
from typing import Any, ClassVar

from torch import nn

__all__ = ["Patched", "is_patched", "put_on", "take_off"]


class Patched(nn.Module):
    """What is mixed into the class of a module that is patched."""

    mixin: ClassVar[type["Patched"]]
    """The one of these classes that was mixed in."""

    original: ClassVar[type[nn.Module]]
    """The class that the module had, and will have again."""

    @classmethod
    def foreign(cls, module: nn.Module) -> str | None:
        """Return what a module computes that this package does not, or ``None``."""
        del module
        return None

    @classmethod
    def obstacle(cls, module: nn.Module) -> str | None:
        """Return what state of a module is in the way, or ``None`` if it can be patched."""
        if "forward" in vars(module) and "_old_forward" not in vars(module):
            return "its forward was replaced by another tool; patch the model before that"
        return None

    @classmethod
    def description(cls, module: nn.Module) -> str:
        """Return what a module is, in a few words."""
        return type(module).__name__

    def attach(self) -> None:
        """Prepare what the other ``forward`` needs; called once the class is changed."""

    def detach(self) -> None:
        """Leave nothing behind; called before the class is changed back."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:  # noqa: ANN401
        """Copy and pickle by the two classes that this one was made of."""
        del protocol
        return _empty, (self.mixin, self.original), vars(self).copy()


def is_patched(module: nn.Module) -> bool:
    """Return whether a module is patched, and its class was not changed again since."""
    return type(module) is getattr(type(module), "made", None)


def put_on(module: nn.Module, mixin: type[Patched]) -> None:
    """Patch a module that has no obstacle."""
    _change_class(module, _class_of(mixin, type(module)))
    module.attach()  # pyright: ignore[reportCallIssue]


def take_off(module: Any) -> None:  # noqa: ANN401
    """Give a module its class back."""
    module.detach()
    _change_class(module, type(module).original)


def _change_class(module: Any, new: Any) -> None:  # noqa: ANN401
    module.__class__ = new
    # accelerate keeps a module's forward on the instance, and calls it between its hooks.
    for name in ("forward", "_old_forward"):
        kept = vars(module).get(name)
        if isinstance(kept, MethodType) and kept.__self__ is module:
            setattr(module, name, MethodType(new.forward, module))


@functools.cache
def _class_of(mixin: type[Patched], original: type[nn.Module]) -> type[Patched]:
    # The name stays: libraries keep lists of names of classes.
    attributes = {"mixin": mixin, "original": original, "__module__": original.__module__}
    made = type(original.__name__, (mixin, original), attributes)
    made.made = made  # pyright: ignore[reportAttributeAccessIssue]
    return made


def _empty(mixin: type[Patched], original: type[nn.Module]) -> nn.Module:
    made = _class_of(mixin, original)
    return made.__new__(made)
