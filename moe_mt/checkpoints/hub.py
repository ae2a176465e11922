"""A model on the Hugging Face hub → a folder on this machine, with the files it needs alone."""

import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from moe_mt.checkpoints.published_config import CONFIG_NAME
from moe_mt.checkpoints.shards import LAYOUTS, complete_layout, layout_files
from moe_mt.errors import CheckpointError

__all__ = ["HubModel", "download_small_files", "download_weights", "weights_to_download"]

SMALL_FILES = (
    CONFIG_NAME,
    "generation_config.json",
    "sentencepiece.bpe.model",
    "vocab.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
"""All that a model needs beside its weights, a few megabytes."""


@dataclass(frozen=True, kw_only=True)
class HubModel:
    """A model on the hub, as the caller asked for it."""

    name: str
    """``owner/model``."""

    revision: str | None = None
    """Branch, tag or commit; the main branch where ``None``."""

    cache_dir: str | Path | None = None
    """Where downloads are kept; where ``HF_HOME`` says if ``None``."""

    token: str | bool | None = None
    """Access token; the one that ``hf auth login`` stored where ``None``."""

    local_files_only: bool = False
    """Whether to take what has been downloaded and never ask the hub."""

    def command(self, files: Iterable[str] = ()) -> str:
        """Return the command that fetches files of this model, or the whole of it."""
        words = ["hf", "download", self.name, *files]
        words += ["--revision", self.revision] if self.revision else []
        words += ["--cache-dir", str(self.cache_dir)] if self.cache_dir else []
        return shlex.join(words)

    def download(self, files: Iterable[str], revision: str | None) -> Path:
        """Fetch those of ``files`` that the model has; return the folder they are in."""
        folder = snapshot_download(
            self.name,
            revision=revision,
            cache_dir=self.cache_dir,
            token=self.token,
            local_files_only=self.local_files_only,
            allow_patterns=list(files),
        )
        return Path(folder)


def download_small_files(model: HubModel) -> Path:
    """Fetch a model's configuration, tokenizer and weight index; return their folder.

    Where the hub cannot be reached, what an earlier download left is taken.

    Raises:
        CheckpointError: If the model cannot be had; the message says how it can.
    """
    with _explained(model, f"{CONFIG_NAME}, or a file beside it,", model.command()):
        folder = model.download(SMALL_FILES, model.revision)
    if not (folder / CONFIG_NAME).exists():
        raise CheckpointError(
            f"{model.name} was asked for and {folder} has no {CONFIG_NAME}; if the hub has it, "
            f"fetch it: {model.command((CONFIG_NAME,))}"
        )
    return folder


def weights_to_download(model: HubModel, folder: Path) -> dict[str, int]:
    """Return the weight files that are still to be fetched, with their bytes; none is fetched.

    Where the folder already holds a whole model, nothing is to be fetched and the hub is not
    asked. Otherwise .safetensors are chosen where the model has them, and .bin where not.

    Args:
        model: What was asked for.
        folder: From ``download_small_files``.

    Raises:
        CheckpointError: If the model has no weights that can be read here, or the hub cannot be
            asked which it has.
    """
    if complete_layout(folder) is not None:
        return {}
    lacking = _files_known_to_lack(folder)
    if model.local_files_only:
        raise CheckpointError(_not_here(model, *_named(model, lacking)))
    with _explained(model, *_named(model, lacking)):
        info = HfApi(token=model.token).model_info(
            model.name, revision=folder.name, files_metadata=True
        )
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    layout = next((layout for layout in LAYOUTS if layout in sizes), None)
    if layout is None:
        raise CheckpointError(
            f"{model.name} has no weights that can be read here; expected one of "
            f"{', '.join(LAYOUTS)}, found {', '.join(sorted(sizes)) or 'no file'}"
        )
    files = layout_files(folder, layout)
    absent = sorted(set(files) - set(sizes))
    if absent:
        raise CheckpointError(
            f"{model.name} has no {absent[0]}, which its {layout} names; ask its owner to mend it"
        )
    return {name: sizes[name] for name in files if not (folder / name).exists()}


def download_weights(model: HubModel, folder: Path, files: Iterable[str]) -> None:
    """Fetch weight files into the folder that holds the small ones.

    Args:
        model: What was asked for.
        folder: From ``download_small_files``.
        files: From ``weights_to_download``.

    Raises:
        CheckpointError: If they cannot be had; what has arrived is kept for the next attempt.
    """
    with _explained(model, *_named(model, list(files))):
        # The folder's name is the commit, so that all files are of one version.
        model.download(files, folder.name)


def _files_known_to_lack(folder: Path) -> list[str]:
    """Return the weight files that a folder's own index names and it lacks."""
    for layout in LAYOUTS:
        if (folder / layout).exists():
            return [n for n in layout_files(folder, layout) if not (folder / n).exists()]
    return []


def _named(model: HubModel, files: list[str]) -> tuple[str, str]:
    """Return words for files that are missing, and the command that fetches them."""
    if len(files) == 1:
        return files[0], model.command(files)
    what = f"{files[0]}, one of {len(files)} missing files," if files else "the file of its weights"
    return what, model.command()


def _not_here(model: HubModel, what: str, command: str, why: str = "local_files_only") -> str:
    return (
        f"{model.name} was asked for; {what} is not in the cache and could not be fetched ({why}). "
        f"Where there is a network, run: {command}"
    )


EXPLANATIONS: tuple[tuple[type[Exception], str, str], ...] = (
    (
        GatedRepoError,
        "its owner grants access one by one",
        "ask at https://huggingface.co/{name}, then run `hf auth login` or pass token=",
    ),
    (
        RepositoryNotFoundError,
        "the hub has no such model, or hides it from you, and there is no such folder here",
        "check the spelling; for a private model run `hf auth login` or pass token=",
    ),
    (
        RevisionNotFoundError,
        "the model has no such revision",
        "choose a branch, tag or commit listed at https://huggingface.co/{name}",
    ),
    (
        HFValidationError,
        "that is neither a folder here nor a hub id",
        "give a hub id, owner/model, or the folder of a model",
    ),
    (
        LocalTokenNotFoundError,
        "token=True was given and no token is stored",
        "run `hf auth login`, or pass the token itself",
    ),
)
"""Error of the hub's library → what was found and what to do; a class stands before its base."""


@contextmanager
def _explained(model: HubModel, what: str, command: str) -> Iterator[None]:
    """Turn any failure of the hub into one kind of error that says what to do."""
    try:
        yield
    except Exception as error:
        # The network's errors have no common base over the range of versions that is supported.
        behind = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
        raise CheckpointError(_message(model, what, command, behind or error)) from error


def _message(model: HubModel, what: str, command: str, error: BaseException) -> str:
    revision = f" at revision {model.revision!r}" if model.revision else ""
    for kind, found, to_do in EXPLANATIONS:
        if isinstance(error, kind):
            to_do = to_do.format(name=model.name)
            return f"{model.name}{revision} was asked for; {found}: {to_do}"
    why = " ".join(f"{type(error).__name__}: {error}".split())
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return (
            f"{model.name}{revision} was asked for; the hub refuses ({why}): run `hf auth login` "
            "or pass token="
        )
    return _not_here(model, what, command, why)
