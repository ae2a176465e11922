"""A documented tokenizer's files, in the layout that transformers 4.57 reads and writes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_mt.checkpoints import read_json
from moe_mt.errors import CheckpointError
from moe_mt.pretrained.tokenization.tokens import NAMED_TOKENS, as_added_token, special_token
from moe_mt.tokenizers import AddedToken

__all__ = ["read_settings", "require_file", "write_file", "write_settings"]

_CONFIG, _SPECIAL, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_FAST = "tokenizer.json"
_ADDITIONAL = "additional_special_tokens"
# What tokenizer_config.json says of the program that wrote it or of where it lay.
_NOT_SETTINGS = (
    "auto_map",
    "device_map",
    "init_inputs",
    "name_or_path",
    "processor_class",
    "special_tokens_map_file",
    "tokenizer_class",
    "tokenizer_file",
)


def read_settings(folder: Path, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that a folder's files give the constructor.

    Args:
        folder: The folder; what it lacks has nothing to say.
        chosen: Arguments that take the place of the files'.

    Returns:
        The arguments, ``added_tokens_decoder`` (token by id) among them; not the vocabulary.

    Raises:
        CheckpointError: If a file is not what it should be.
    """
    settings = {k: v for k, v in _read(folder / _CONFIG).items() if k not in _NOT_SETTINGS}
    settings |= chosen
    if "added_tokens_decoder" in settings:
        declared = settings["added_tokens_decoder"].items()
        added = {int(token_id): as_added_token(token) for token_id, token in declared}
    else:
        _add_special_tokens_map(settings, _read(folder / _SPECIAL), chosen)
        added = _older_added_tokens(folder, settings)
    by_content = {token.content: token for token in added.values()}
    for name in NAMED_TOKENS:
        if settings.get(name) is not None and name not in chosen:
            content = as_added_token(settings[name]).content
            settings[name] = by_content.get(content, settings[name])
    return {**settings, "added_tokens_decoder": added}


def write_settings(
    folder: Path,
    prefix: str,
    *,
    tokenizer_class: str,
    settings: Mapping[str, Any],
    special_tokens: Mapping[str, AddedToken | Sequence[AddedToken]],
    added_tokens: Mapping[int, AddedToken],
    first_id: int,
) -> tuple[str, str, str]:
    """Write all that is said of a tokenizer beside its vocabulary.

    Args:
        folder: Where to.
        prefix: What the files' names begin with.
        tokenizer_class: The class that can read them.
        settings: The constructor's arguments.
        special_tokens: The special tokens by name.
        added_tokens: The tokens that are matched as a whole, by id.
        first_id: The id after the last piece.

    Returns:
        The files' paths; that of added_tokens.json also where there is nothing to write into it.
    """
    decoder = {str(token_id): _fields(token) for token_id, token in added_tokens.items()}
    config = {name: value for name, value in settings.items() if name not in _NOT_SETTINGS}
    config |= {name: _contents(tokens) for name, tokens in special_tokens.items()}
    config |= {"added_tokens_decoder": decoder, "tokenizer_class": tokenizer_class}
    named = {name: _spelled(tokens) for name, tokens in special_tokens.items()}
    after = {token.content: i for i, token in added_tokens.items() if i >= first_id}
    paths = tuple(folder / f"{prefix}{name}" for name in (_CONFIG, _SPECIAL, _ADDED))
    for path, content in zip(paths, (config, named, after), strict=True):
        if content:
            write_file(path, (_json(content) + "\n").encode())
    return str(paths[0]), str(paths[1]), str(paths[2])


def write_file(path: Path, content: bytes) -> None:
    """Write a file, unless it has this content already.

    Raises:
        CheckpointError: If its folder is missing; also an ``OSError``.
    """
    if not path.parent.is_dir():
        raise CheckpointError(
            f"{path.name} cannot be written: {path.parent} is no folder. Make it first."
        )
    if not path.is_file() or path.read_bytes() != content:
        path.write_bytes(content)


def require_file(folder: Path, name: str) -> Path:
    """Return the path of a file of a vocabulary.

    Raises:
        CheckpointError: If the folder has no such file.
    """
    if not (folder / name).is_file():
        raise CheckpointError(
            f"The tokenizer needs {name} and there is none in {folder}: fetch it from the "
            f"repository the model comes from. {_FAST}, if it is there, cannot replace it."
        )
    return folder / name


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _add_special_tokens_map(
    settings: dict[str, Any], special: Mapping[str, Any], chosen: Mapping[str, Any]
) -> None:
    """Let special_tokens_map.json, which older checkpoints have, speak where the caller did not."""
    for name, token in special.items():
        if name == _ADDITIONAL and not chosen.get(name):
            listed: dict[str, AddedToken] = {}
            for each in [*(settings.get(name) or ()), *token]:
                added = as_added_token(each, special=True)
                listed.setdefault(added.content, added)
            settings[name] = list(listed.values())
        elif name in NAMED_TOKENS and not chosen.get(name):
            settings[name] = as_added_token(token, special=True)


def _older_added_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Return the added tokens as checkpoints tell them that have no ``added_tokens_decoder``."""
    named = [settings[name] for name in NAMED_TOKENS if settings.get(name) is not None]
    listed = [*named, *(settings.get(_ADDITIONAL) or ())]
    special = {as_added_token(token).content for token in listed}
    added = {
        int(token_id): AddedToken(content, special=content in special)
        for content, token_id in _read(folder / _ADDED).items()
    }
    for token in _read(folder / _FAST).get("added_tokens") or ():
        added[int(token["id"])] = as_added_token(token)
    return added


def _contents(tokens: AddedToken | Sequence[AddedToken]) -> str | list[str]:
    return str(tokens) if isinstance(tokens, AddedToken) else [str(token) for token in tokens]


def _spelled(tokens: AddedToken | Sequence[AddedToken]) -> Any:  # noqa: ANN401
    """Return special_tokens_map.json's spelling: a string where it says everything."""
    if not isinstance(tokens, AddedToken):
        return [_spelled(token) for token in tokens]
    if tokens == special_token(tokens.content):
        return tokens.content
    return {name: value for name, value in _fields(tokens).items() if name != "special"}


def _fields(token: AddedToken) -> dict[str, Any]:
    return dict(vars(token))


def _json(content: object) -> str:
    return json.dumps(
        content,
        indent=2,
        sort_keys=True,
        ensure_ascii=False,
        default=lambda token: {"__type": "AddedToken", **_fields(as_added_token(token))},
    )
