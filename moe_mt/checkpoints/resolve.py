"""A model's name → a folder that holds its files."""

import os
from pathlib import Path

import torch

from moe_mt.checkpoints.fit import check_fits, measure_free_bytes
from moe_mt.checkpoints.hub import (
    HubModel,
    download_small_files,
    download_weights,
    weights_to_download,
)
from moe_mt.checkpoints.published_config import read_config
from moe_mt.errors import CheckpointError

__all__ = ["HUB_ARGUMENTS", "fetch_small_files", "resolve"]

HUB_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only")
"""The keywords that say which files of the hub, and how they are had."""

TINY = Path(__file__).parent.parent / "tiny"
"""The small model of this package, by the name ``"tiny"``."""


def fetch_small_files(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return a model's folder with its configuration, tokenizer files and weight index.

    Args:
        name: A hub id; or a local folder, which is returned as it is; or ``"tiny"``.
        revision: Branch, tag or commit on the hub.
        cache_dir: Where downloads are kept; where ``HF_HOME`` says if ``None``.
        token: Access token for the hub.
        local_files_only: Whether to take what has been downloaded and never ask the hub.

    Raises:
        CheckpointError: If there is no such model, or it cannot be fetched.
    """
    folder = _local_folder(name)
    if folder is not None:
        return folder
    return download_small_files(_hub_model(name, revision, cache_dir, token, local_files_only))


def resolve(
    name: str | os.PathLike[str],
    *,
    device: torch.device,
    dtype: torch.dtype,
    pack: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return a model's folder with all its files, fetching those that are missing.

    Before a weight is fetched, its size is compared with the free disk and memory.

    Args:
        name: A hub id; or a local folder, which is returned as it is; or ``"tiny"``.
        device: Where the model is to go.
        dtype: What its weights are to become.
        pack: How they are to be packed, or ``None``.
        revision: Branch, tag or commit on the hub.
        cache_dir: Where downloads are kept; where ``HF_HOME`` says if ``None``.
        token: Access token for the hub.
        local_files_only: Whether to take what has been downloaded and never ask the hub.

    Raises:
        CheckpointError: If there is no such model, or it cannot be fetched.
        ConfigError: If its configuration describes no model.
        PlacementError: If it does not fit.
    """
    folder = _local_folder(name)
    if folder is not None:
        return folder
    model = _hub_model(name, revision, cache_dir, token, local_files_only)
    folder = download_small_files(model)
    _, config = read_config(folder)
    missing = weights_to_download(model, folder)
    check_fits(
        config,
        name=model.name,
        device=device,
        dtype=dtype,
        free=measure_free_bytes(device, folder),
        download_bytes=sum(missing.values()),
        pack=pack,
    )
    if missing:
        download_weights(model, folder, missing)
    return folder


def _hub_model(
    name: str | os.PathLike[str],
    revision: str | None,
    cache_dir: str | Path | None,
    token: str | bool | None,
    local_files_only: bool,
) -> HubModel:
    return HubModel(
        name=os.fspath(name),
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
    )


def _local_folder(name: str | os.PathLike[str]) -> Path | None:
    """Return the folder that a name means, or ``None`` if it can only be a hub id."""
    text = os.fspath(name)
    if not text.strip():
        raise CheckpointError(
            f"the model name is {text!r}; give a hub id such as facebook/nllb-200-distilled-600M, "
            "or the folder of a model"
        )
    if name == "tiny":
        if (Path(text) / "config.json").exists():
            raise CheckpointError(
                'there is a model in the folder tiny, and "tiny" is also the model of this '
                "package; give ./tiny for the folder, or call from another place for the model"
            )
        return TINY
    path = Path(text).expanduser()
    try:
        if path.is_dir():
            return path
        is_file = path.exists()
    except OSError as error:
        raise CheckpointError(f"{text} cannot be opened as a model folder ({error})") from error
    if is_file:
        raise CheckpointError(f"{text} is a file; give the folder that holds it: {path.parent}")
    if not isinstance(name, str) or text[0] in "./~\\" or "\\" in text or text.count("/") > 1:
        raise CheckpointError(
            f"there is no folder {text}; give the folder of a model, or a hub id such as "
            "facebook/nllb-200-distilled-600M"
        )
    return None
