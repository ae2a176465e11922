"""Which versions of transformers the patches were tested with."""

import sys

from moe_mt.errors import ConfigError

__all__ = ["TESTED_VERSIONS", "check_version", "transformers_major"]

TESTED_VERSIONS = (
    "4.57",
    # 5.4 refuses its own configurations of OLMoE and M2M100.
    *(f"5.{minor}" for minor in range(24) if minor != 4),
)
"""Minor versions, each with its patch releases: ``make test-transformers TRANSFORMERS=5.17.0``."""


def check_version(*, force: bool) -> str:
    """Return the version of the transformers that is imported.

    Args:
        force: Whether a version that was not tested will do.

    Raises:
        ConfigError: If no transformers is imported, or one that was not tested.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None:
        raise ConfigError(
            "transformers is not imported in this process, so that no model of it can be here; "
            "load a model with transformers first"
        )
    version = str(transformers.__version__)
    if not force and ".".join(version.split(".")[:2]) not in TESTED_VERSIONS:
        raise ConfigError(
            f"transformers {version} was not tested with moe_mt; tested are "
            f"{', '.join(TESTED_VERSIONS)}. Install one of these, or pass force=True and compare "
            "outputs yourself"
        )
    return version


def transformers_major() -> int:
    """Return the major version of the transformers that is imported."""
    return int(sys.modules["transformers"].__version__.split(".")[0])
