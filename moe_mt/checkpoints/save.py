"""A model → a folder in the published layout, which this package and transformers both read."""

import ctypes
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from moe_mt.checkpoints.fit import parameter_dtype
from moe_mt.checkpoints.published_config import CONFIG_NAME
from moe_mt.errors import CheckpointError
from moe_mt.models import FAMILIES, Family, Seq2SeqTransformer, is_packed

__all__ = ["save", "save_tensors"]

TIED_KEY = "shared.weight"
"""The one of the four tied names that is written."""

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
"""Our dtypes, as the safetensors format spells them."""


def save(
    model: Seq2SeqTransformer,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    extra_config: Mapping[str, Any] | None = None,
) -> None:
    """Write ``config.json`` and the weights, replacing those that the folder holds.

    Args:
        model: On any device.
        folder: Made if it does not exist.
        dtype: Dtype of the weights, routers excepted; the model's own where ``None``.
        max_shard_bytes: As of ``save_tensors``.
        extra_config: Fields to add to ``config.json``, or to write there instead of the model's.

    Raises:
        CheckpointError: If the files cannot be written, or the model's weights are packed.
    """
    if is_packed(model):
        raise CheckpointError(
            "the model's weights are packed for this machine's products and cannot be saved; load "
            "it with prepack=False to save it"
        )
    family = next(f for f in FAMILIES.values() if f.name == model.config.family)
    config = (
        family.config_to_published(model.config)
        | {"model_type": family.model_types[0], "architectures": [family.architecture]}
        | {"torch_dtype": str(dtype or model.embedding.weight.dtype).removeprefix("torch.")}
        | dict(extra_config or {})
    )
    entries = list(_entries(model, family, dtype))
    _write_checkpoint(Path(folder), entries, config, max_shard_bytes, SAFETENSORS)


def save_tensors(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    max_shard_bytes: int = 5_000_000_000,
    pickled: bool = False,
) -> None:
    """Write tensors as the weights of a model, and its ``config.json``, replacing earlier ones.

    One tensor at a time is copied; of a .bin file, all that are in it. Every file is written under
    another name first and renamed when all are whole, so that a failure while writing leaves the
    folder as it was; to replace a model in one step that nothing can split, save to a new folder
    and rename that.

    Args:
        folder: Made if it does not exist.
        tensors: By published name, on any device.
        config: The content of ``config.json``.
        max_shard_bytes: Most bytes of tensors in a file; a larger tensor gets a file of its own.
        pickled: Whether to write .bin files instead of .safetensors.

    Raises:
        CheckpointError: If the files cannot be written.

    Source: the file format, https://github.com/huggingface/safetensors (Format).
    """
    entries = [_Entry(key, tensor.detach(), tensor.dtype) for key, tensor in tensors.items()]
    layout = PICKLE if pickled else SAFETENSORS
    _write_checkpoint(Path(folder), entries, config, max_shard_bytes, layout)


@dataclass(frozen=True)
class _Entry:
    """A tensor to write."""

    key: str
    tensor: Tensor
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return self.tensor.numel() * self.dtype.itemsize


@dataclass(frozen=True)
class _Layout:
    """How the files of one format are called, and what writes them."""

    stem: str
    suffix: str
    write: Callable[[IO[bytes], Iterable[_Entry]], None]

    @property
    def index_name(self) -> str:
        return f"{self.stem}{self.suffix}.index.json"

    def shard_name(self, index: int, count: int) -> str:
        place = "" if count == 1 else f"-{index + 1:05d}-of-{count:05d}"
        return f"{self.stem}{place}{self.suffix}"


def _write_checkpoint(
    folder: Path,
    entries: list[_Entry],
    config: Mapping[str, Any],
    max_shard_bytes: int,
    layout: _Layout,
) -> None:
    shards = _shards(entries, max_shard_bytes)
    weights = {layout.shard_name(i, len(shards)): shard for i, shard in enumerate(shards)}
    with _replacing_files(folder) as write:
        for name, shard in weights.items():
            write(name, lambda file, shard=shard: layout.write(file, shard))
        if len(shards) > 1:
            write(layout.index_name, lambda file: _write_json(file, _index(weights)))
        write(CONFIG_NAME, lambda file: _write_json(file, config))
    _remove_stale(folder, {*weights, *([layout.index_name] if len(shards) > 1 else [])})


def _entries(
    model: Seq2SeqTransformer, family: Family, dtype: torch.dtype | None
) -> Iterator[_Entry]:
    """Yield every published tensor, one of the tied names only, as a view of the model's own."""
    for key, location in family.locations(model.config).items():
        parameter = model.get_parameter(location.parameter).detach()
        tied = location.parameter == "embedding.weight"
        if not tied or key == TIED_KEY:
            tensor = parameter if location.expert is None else parameter[location.expert]
            kept = parameter_dtype(location.parameter, dtype) if dtype else tensor.dtype
            yield _Entry(f"model.{key}", tensor, kept)


def _shards(entries: Iterable[_Entry], max_shard_bytes: int) -> list[list[_Entry]]:
    shards: list[list[_Entry]] = [[]]
    room = max_shard_bytes
    for entry in entries:
        if entry.size_bytes > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(entry)
        room -= entry.size_bytes
    return shards


def _index(weights: Mapping[str, list[_Entry]]) -> dict[str, Any]:
    total = sum(entry.size_bytes for shard in weights.values() for entry in shard)
    weight_map = {entry.key: name for name, shard in weights.items() for entry in shard}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _write_json(file: IO[bytes], content: Mapping[str, Any]) -> None:
    file.write((json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def _write_safetensors(file: IO[bytes], entries: Iterable[_Entry]) -> None:
    """Write a header of names, shapes and offsets, then the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + entry.size_bytes
        header[entry.key] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    # Spaces bring the tensors to a multiple of eight bytes, where they can be mapped.
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for entry in entries:
        _write_bytes(file, entry.tensor.to("cpu", entry.dtype).contiguous())


def _write_bytes(file: IO[bytes], tensor: Tensor) -> None:
    """Write the memory of a contiguous tensor on the host, without a copy and without NumPy."""
    count = tensor.numel() * tensor.element_size()
    file.write(memoryview((ctypes.c_char * count).from_address(tensor.data_ptr())))


@contextmanager
def _replacing_files(
    folder: Path,
) -> Iterator[Callable[[str, Callable[[IO[bytes]], None]], None]]:
    """Yield ``write(name, writer)``; its files get their names when all have been written."""
    written: dict[Path, Path] = {}

    def write(name: str, writer: Callable[[IO[bytes]], None]) -> None:
        partial = folder / f".{name}.partial"
        written[partial] = folder / name
        with partial.open("wb") as file:
            writer(file)
            file.flush()
            os.fsync(file.fileno())

    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield write
        for partial, final in written.items():
            partial.replace(final)
    except OSError as error:
        raise CheckpointError(
            f"the model cannot be written to {folder} ({error}); free disk space or choose another "
            "folder"
        ) from error
    finally:
        for partial in written:
            partial.unlink(missing_ok=True)


def _remove_stale(folder: Path, weights: set[str]) -> None:
    """Remove weights of an earlier save, which would otherwise be read beside the new ones.

    The .bin files of whoever wrote them stay where safetensors are written, which are read first.
    """
    layouts = [SAFETENSORS] if any(SAFETENSORS.suffix in name for name in weights) else LAYOUTS
    for layout in layouts:
        pattern = f"{layout.stem}-?????-of-?????{layout.suffix}"
        single = {layout.shard_name(0, 1), layout.index_name}
        for name in (single | {path.name for path in folder.glob(pattern)}) - weights:
            (folder / name).unlink(missing_ok=True)


def _write_pickle(file: IO[bytes], entries: Iterable[_Entry]) -> None:
    torch.save({entry.key: entry.tensor.to("cpu", entry.dtype).clone() for entry in entries}, file)


SAFETENSORS = _Layout("model", ".safetensors", _write_safetensors)
PICKLE = _Layout("pytorch_model", ".bin", _write_pickle)
LAYOUTS = [SAFETENSORS, PICKLE]
