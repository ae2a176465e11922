"""What a checkpoint folder says about its model: ``config.json``, read with care."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_mt.errors import CheckpointError, ConfigError
from moe_mt.models import FAMILIES, Family, TransformerConfig

__all__ = ["CONFIG_NAME", "parse_config", "read_config", "read_json"]

CONFIG_NAME = "config.json"


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        CheckpointError: If the file is missing, is not JSON, or holds something else than an
            object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} has no {path.name}; a model folder needs it: fetch that file too, or "
            "give the folder that holds it"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} should be JSON and is not ({error}); fetch the file again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} should hold a JSON object and holds a {type(content).__name__}; fetch the "
            "file again"
        )
    return content


def read_config(folder: Path) -> tuple[Family, TransformerConfig]:
    """Return the family and the configuration that a folder's ``config.json`` describes.

    Raises:
        CheckpointError: If the file is missing, unreadable, or names no family known here.
        ConfigError: If a value in it is of the wrong type or out of range.
    """
    path = folder / CONFIG_NAME
    published = read_json(path)
    model_type = published.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        found = f"model_type {model_type!r}" if "model_type" in published else "no model_type"
        raise CheckpointError(
            f"{path} has {found}; the models that run here have one of {', '.join(FAMILIES)}"
        )
    return family, parse_config(published, family, origin=str(path))


def parse_config(published: Mapping[str, Any], family: Family, *, origin: str) -> TransformerConfig:
    """Return the configuration that the fields of a ``config.json`` describe.

    Args:
        published: The fields.
        family: Which family they are of.
        origin: Where they come from, for messages.

    Raises:
        ConfigError: If a value is of the wrong type or out of range.
    """
    _check_types(published, family, origin)
    try:
        return family.config_from_published(published)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error


def _check_types(published: Mapping[str, Any], family: Family, origin: str) -> None:
    """Refuse values whose type is not that of the field's default; a null is a default."""
    defaults = family.config_to_published(family.config_from_published({}))
    for name, default in defaults.items():
        value = published.get(name)
        expected = (int, float) if isinstance(default, float) else (type(default),)
        # A bool counts as an int in Python, and must not as a size.
        if value is not None and type(value) not in expected:
            raise ConfigError(
                f"{origin}: {name} is {value!r}; expected a value like {default!r}, of type "
                f"{expected[-1].__name__}"
            )
