"""The documented layers: published names of our layers' parts."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from moe_mt.models import FAMILIES, DecoderLayer, LayerOutput
from moe_mt.pretrained.config import PublishedConfig
from moe_mt.pretrained.view import View

__all__ = ["PublishedLayer"]

PROJECTIONS = ("k_proj", "v_proj", "q_proj", "out_proj")
"""In the order in which published classes list their parameters, and optimizers number them."""


class PublishedLayer(View):
    """A layer of the encoder or the decoder.

    Its call is that of our layer (``moe_mt.models``), which returns ``LayerOutput``.
    """

    def __init__(self, core: Any, config: PublishedConfig) -> None:  # noqa: ANN401
        """Name a layer's parts as the family's checkpoints do."""
        super().__init__(core, _places(core, FAMILIES[config.model_type].module_names))
        for attention in (core.self_attention, getattr(core, "cross_attention", None)):
            if attention is not None:
                for name in PROJECTIONS:
                    attention._modules[name] = attention._modules.pop(name)

    def forward(self, x: Tensor, *arguments: Any) -> LayerOutput:  # noqa: ANN401
        """Apply the layer to ``x`` (B, L, d_model)."""
        self.settle()
        call = self.core.step if isinstance(self.core, DecoderLayer) else self.core
        return call(x, *arguments)


def _places(core: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
    """Return published name → path of the parts that this layer has."""
    ours = {name for name, _ in core.named_modules()}
    return {
        published: place
        for place, published in names.items()
        if place in ours and "." not in published
    }
