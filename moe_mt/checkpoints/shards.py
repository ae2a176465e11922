"""The tensors of a checkpoint folder, one file after the other, each read only when asked for."""

import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_mt.checkpoints.published_config import read_json
from moe_mt.errors import CheckpointError

__all__ = ["LAYOUTS", "Reader", "Shards", "complete_layout", "layout_files", "open_shards"]

LAYOUTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The files that may hold a model, in the order of preference that transformers has: a folder
with several of them is the same model in both."""

Reader = Callable[[], Tensor]
"""Reads one tensor. It works until the next file is opened."""


class Shards:
    """The tensors of a folder's weight files.

    Iterating yields ``(key, read)`` pairs, file by file; one file is open at a time. Tensors that
    ``read`` returns lie in mapped memory where the format allows it, so that nothing is copied
    until they are used.
    """

    def __init__(self, folder: Path, files: dict[str, tuple[str, ...]]) -> None:
        """Describe the tensors of a folder.

        Args:
            folder: Where the files are.
            files: Each weight file's name, and the keys it should hold.
        """
        self.folder = folder
        self.files = files

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key that the folder says it holds, known before a tensor is read."""
        return tuple(key for keys in self.files.values() for key in keys)

    def __iter__(self) -> Iterator[tuple[str, Reader]]:
        """Yield every tensor's key, and what reads it."""
        return self.largest_first(lambda key: 0)

    def largest_first(self, size_of: Callable[[str], int]) -> Iterator[tuple[str, Reader]]:
        """Yield as ``__iter__`` does, of each file the tensors with the largest sizes first."""
        for name, keys in self.files.items():
            with _open_file(self.folder / name) as readers:
                lacking = sorted(set(keys) - set(readers))
                if lacking:
                    raise CheckpointError(
                        f"{self.folder / name} lacks {lacking[0]!r} and {len(lacking) - 1} other "
                        "tensors that the index places in it; fetch the file and its index again"
                    )
                for key in sorted(readers, key=lambda key: -size_of(key)):
                    yield key, readers[key]


def open_shards(folder: Path) -> Shards:
    """Find a folder's weight files; no tensor is read.

    Raises:
        CheckpointError: If the folder holds no weights, or lacks files that its index names, or
            the index cannot be used.
    """
    layout = complete_layout(folder)
    if layout is None:
        raise _no_complete_layout(folder)
    if layout.endswith(".json"):
        files: dict[str, list[str]] = {}
        for key, name in _read_index(folder / layout).items():
            files.setdefault(name, []).append(key)
        return Shards(folder, {name: tuple(files[name]) for name in sorted(files)})
    with _open_file(folder / layout) as readers:
        return Shards(folder, {layout: tuple(readers)})


def complete_layout(folder: Path) -> str | None:
    """Return the first of ``LAYOUTS`` whose files are all in a folder, or ``None``."""
    for layout in LAYOUTS:
        if (folder / layout).exists() and not _missing_files(folder, layout):
            return layout
    return None


def layout_files(folder: Path, layout: str) -> tuple[str, ...]:
    """Return the weight files of one of ``LAYOUTS``: itself, or those that its index names."""
    if layout.endswith(".json"):
        return tuple(sorted(set(_read_index(folder / layout).values())))
    return (layout,)


def _missing_files(folder: Path, layout: str) -> list[str]:
    return [name for name in layout_files(folder, layout) if not (folder / name).exists()]


def _no_complete_layout(folder: Path) -> CheckpointError:
    for layout in LAYOUTS:
        if (folder / layout).exists():
            missing = _missing_files(folder, layout)
            return CheckpointError(
                f"{folder} lacks {missing[0]}, one of {len(missing)} missing files that {layout} "
                "names; fetch the missing files into that folder"
            )
    if not folder.is_dir():
        return CheckpointError(f"there is no folder {folder}; give the folder of a model")
    return CheckpointError(
        f"{folder} holds no weights; expected one of {', '.join(LAYOUTS)}: fetch the weights too"
    )


def _read_index(path: Path) -> dict[str, str]:
    """Return key → file name, every name checked to lie in the index's own folder."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path} has no weight_map that says which file holds which tensor; fetch it again"
        )
    for key, name in weight_map.items():
        # Links are allowed: in a hub cache every file is a link to the folder of blobs.
        if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\:]", name):
            raise CheckpointError(
                f"{path} points outside its folder: it places {key!r} in {name!r}, and only plain "
                "file names are followed; do not use this checkpoint unless you trust its source"
            )
    return weight_map


def _open_file(path: Path) -> AbstractContextManager[dict[str, Reader]]:
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)


@contextmanager
def _open_safetensors(path: Path) -> Iterator[dict[str, Reader]]:
    with _reading(path):
        opened = safe_open(path, framework="pt", device="cpu")
    with opened as file:

        def read(key: str) -> Tensor:
            with _reading(path):
                return file.get_tensor(key)

        yield {key: partial(read, key) for key in file.keys()}


@contextmanager
def _open_pickle(path: Path) -> Iterator[dict[str, Reader]]:
    with _reading(path):
        # Files older than the zip format cannot be mapped and are read whole.
        content = torch.load(
            path, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(path)
        )
    tensors = _checked_state_dict(content, path)
    del content
    try:
        yield {key: partial(tensors.__getitem__, key) for key in tensors}
    finally:
        # A reader that somebody still holds must not keep the whole file in memory.
        tensors.clear()


def _checked_state_dict(content: Any, path: Path) -> dict[str, Tensor]:  # noqa: ANN401
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}; expected a dictionary of tensors, as "
            "torch.save(model.state_dict(), path) writes it"
        )
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} holds a {type(value).__name__} under {key!r}; expected tensors alone. If "
                "the model's tensors are inside it, save that inner dictionary as a file of its "
                "own"
            )
    return content


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever a parser says of a bad file into one kind of error.

    Damaged bytes make the parsers fail with almost any exception, so all are caught here.
    """
    try:
        yield
    except MemoryError:
        raise
    except SafetensorError as error:
        raise CheckpointError(_damaged(path, str(error))) from error
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None:
            found = "its pickle is cut short, or holds something else than tensors"
            raise CheckpointError(_damaged(path, found)) from error
        raise CheckpointError(
            f"{path} is no file of tensors alone: its pickle names {named[1]}. Code in pickles is "
            "never run here; get the weights as .safetensors, or from a source that stores only "
            "tensors"
        ) from error
    except Exception as error:
        found = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(_damaged(path, found)) from error


def _damaged(path: Path, found: str) -> str:
    if path.is_file():
        with path.open("rb") as file:
            if file.read(24).startswith(b"version https://git-lfs"):
                return f"{path} is a git-lfs pointer, not the weights; run: git lfs pull"
    return f"{path} is truncated or damaged ({found}); fetch it again"
