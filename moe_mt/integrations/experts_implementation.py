"""This package as an experts implementation of transformers 5."""

from moe_mt.errors import ConfigError
from moe_mt.integrations.stacked_weights import experts_forward
from moe_mt.integrations.versions import check_version

__all__ = ["register_experts_implementation"]

IMPLEMENTATION = "moe_mt"

OPEN_SINCE = (5, 7)
"""Before this version models took the names of transformers' own implementations only."""


def register_experts_implementation(*, force: bool = False) -> None:
    """Let transformers 5 find this package by the name ``"moe_mt"``.

    After it, ``model.set_experts_implementation("moe_mt")``, or ``from_pretrained(...,
    experts_implementation="moe_mt")``, reaches every model whose experts have stacked weights.
    NLLB-MoE and Switch Transformers have no such seam: ``patch`` is for them.

    Args:
        force: Whether a version of transformers that was not tested will do.

    Raises:
        ConfigError: If transformers is not installed, takes no experts implementations of others
            (before 5.7), or was not tested.
    """
    try:
        # Others' models are no run-time need.
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # pyright: ignore
    except ImportError as error:
        raise ConfigError(
            "experts implementations came with transformers 5, and here there are none "
            f"({error}); use moe_mt.patch(model)"
        ) from error
    version = check_version(force=force)
    if tuple(map(int, version.split(".")[:2])) < OPEN_SINCE:
        raise ConfigError(
            f"transformers {version} takes no experts implementation but its own; 5.7 is the first "
            "that does. Use moe_mt.patch(model)"
        )
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
