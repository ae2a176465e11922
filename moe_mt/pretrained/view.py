"""The published names of our modules: one set of weights and layers, a second tree over them."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from moe_mt.errors import ConfigError

__all__ = ["View"]


class View(nn.Module):
    """A module of the published tree.

    Its children are modules of the one architecture (``core``) under their published names, or
    views of such; it computes nothing that ``core`` does not. ``core`` itself is no child, so that
    every weight is listed once. A module that is put in place of a published child takes its place
    in ``core`` too, which is how LoRA and quantised layers come to be used.
    """

    core: Any
    places: dict[str, str]

    def __init__(self, core: nn.Module, places: Mapping[str, str]) -> None:
        """Give published names to modules.

        Args:
            core: The module that computes.
            places: Published name of a child → its path in ``core``.
        """
        super().__init__()
        # Past nn.Module's own __setattr__, which would make it a child.
        self.__dict__["core"] = core
        self.__dict__["places"] = dict(places)
        for name, place in places.items():
            self.add_module(name, core.get_submodule(place))

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401
        super().__setattr__(name, value)
        if name in self.__dict__.get("places", {}) and isinstance(value, nn.Module):
            self._put(name, value)

    def settle(self) -> None:
        """Let ``core`` compute with what stands under the published names, however it came there.

        Some libraries put their layers into ``_modules``, past ``__setattr__``.
        """
        for name, child in self._modules.items():
            if name in self.places and child is not None:
                self._put(name, child)
            if isinstance(child, View):
                child.settle()

    def _put(self, name: str, child: nn.Module) -> None:
        owner, _, leaf = self.places[name].rpartition(".")
        module = self.core.get_submodule(owner)
        computing = child.core if isinstance(child, View) else child
        if getattr(module, leaf, None) is not computing:
            setattr(module, leaf, computing)

    def _order(self, *names: str) -> None:
        """List these children first: optimizers number parameters in the published order."""
        for name in (*names, *(other for other in list(self._modules) if other not in names)):
            self._modules[name] = self._modules.pop(name)

    def train(self, mode: bool = True) -> "View":
        """Set training mode here, in the children, and in what computes."""
        super().train(mode)
        self._train_core(mode)
        return self

    def _replicate_for_data_parallel(self) -> "View":
        raise ConfigError(
            "nn.DataParallel copies modules one by one and would leave the weights that compute on "
            "the first device; use DistributedDataParallel"
        )

    def _train_core(self, mode: bool) -> None:
        self.core.train(mode)
