"""From a checkpoint's folder to its tokenizer."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_mt.errors import CheckpointError
from moe_mt.tokenizers.language_table import TABLES
from moe_mt.tokenizers.m2m100 import M2M100Tokenizer, Small100Tokenizer
from moe_mt.tokenizers.nllb import NllbTokenizer
from moe_mt.tokenizers.sentencepiece import SentencePieceModel
from moe_mt.tokenizers.tokenizer import Tokenizer

__all__ = ["load_tokenizer", "published_language_codes", "read_word_ids", "tokenizer_kind"]

_logger = logging.getLogger(__name__)

_SENTENCEPIECE_FILE = "sentencepiece.bpe.model"
_VOCABULARY_FILE = "vocab.json"
_KIND_OF_CLASS = {
    "NllbTokenizer": "nllb",
    "NllbTokenizerFast": "nllb",
    "M2M100Tokenizer": "m2m100",
    "SMALL100Tokenizer": "small100",
}
_KIND_OF_MODEL_TYPE = {"nllb-moe": "nllb", "nllb_moe": "nllb", "m2m_100": "m2m100"}
# SMaLL-100's own repository calls its tokenizer M2M100Tokenizer; these tell it apart.
_SMALL100_CODE_FILE = "tokenization_small100.py"
_SMALL100_SHAPE = {"d_model": 1024, "encoder_layers": 12, "decoder_layers": 3}
_WMT21_TOKENS = frozenset(f"__{code}__" for code in TABLES["wmt21"].codes)
_WMT21_WORDS = 128_001


def load_tokenizer(folder: Path, model_type: str | None = None) -> Tokenizer:
    """Make the tokenizer of a checkpoint in the published layout.

    See ``tokenizer_kind`` for which it is. WMT21 is known by its list of languages and the size
    of its vocabulary.

    Args:
        folder: The checkpoint's folder.
        model_type: The model's type, if already known; default is what config.json says.

    Returns:
        The tokenizer.

    Raises:
        CheckpointError: If a file is missing or is not what it should be, the family cannot be
            told, or the files disagree with each other.
    """
    folder = Path(folder)
    settings = _read_object(folder / "tokenizer_config.json")
    kind = tokenizer_kind(folder, model_type)
    _logger.info("The tokenizer in %s is read as %s", folder, kind)
    if kind == "nllb":
        pieces = SentencePieceModel.load(_require(folder, _SENTENCEPIECE_FILE))
        legacy = bool(settings.get("legacy_behaviour", False))
        tokenizer: Tokenizer = NllbTokenizer(pieces, legacy_behaviour=legacy)
    else:
        word_ids = read_word_ids(_require(folder, _VOCABULARY_FILE))
        pieces = SentencePieceModel.load(_require(folder, _SENTENCEPIECE_FILE))
        language_codes = published_language_codes(folder, len(word_ids))
        tokenizer_class = Small100Tokenizer if kind == "small100" else M2M100Tokenizer
        tokenizer = tokenizer_class(pieces, word_ids, language_codes)
    _check_rows(folder, tokenizer)
    _check_language_ids(folder, tokenizer, settings)
    return tokenizer


def tokenizer_kind(folder: Path, model_type: str | None = None) -> str:
    """Return which tokenizer a checkpoint in the published layout needs.

    The family is that of ``tokenizer_class`` in tokenizer_config.json or, where that says nothing,
    of the model type: ``nllb-moe`` is NLLB and ``m2m_100`` is M2M100. SMaLL-100, whose repository
    calls its tokenizer M2M100Tokenizer, is also known by the tokenizer code it ships and by the
    shape of its model.

    Args:
        folder: The checkpoint's folder.
        model_type: The model's type, if already known; default is what config.json says.

    Returns:
        ``"nllb"``, ``"m2m100"`` (also WMT21's) or ``"small100"``.

    Raises:
        CheckpointError: If the family cannot be told.
    """
    config = _read_object(folder / "config.json")
    named = _read_object(folder / "tokenizer_config.json").get("tokenizer_class")
    model_type = model_type or config.get("model_type")
    kind = _KIND_OF_CLASS.get(str(named)) or _KIND_OF_MODEL_TYPE.get(str(model_type))
    if kind is None:
        raise CheckpointError(
            f"Cannot tell which tokenizer {folder} needs: tokenizer_config.json has the "
            f"tokenizer_class {named!r} and the model type is {model_type!r}. Known classes are "
            f"{', '.join(_KIND_OF_CLASS)}, known types {', '.join(_KIND_OF_MODEL_TYPE)}; fetch "
            "tokenizer_config.json and config.json from the model's repository."
        )
    has_small100_shape = all(config.get(key) == size for key, size in _SMALL100_SHAPE.items())
    if kind == "m2m100" and (has_small100_shape or (folder / _SMALL100_CODE_FILE).exists()):
        return "small100"
    return kind


def published_language_codes(folder: Path, words: int) -> str:
    """Return the name of the list of languages of an M2M100 checkpoint.

    Args:
        folder: The checkpoint's folder.
        words: How many entries its vocab.json has.

    Returns:
        What ``language_codes`` in tokenizer_config.json says; where that says nothing, ``"wmt21"``
        if the list of special tokens or a size is WMT21's, else ``"m2m100"``.
    """
    settings = _read_object(folder / "tokenizer_config.json")
    named = settings.get("language_codes")
    if named is not None:
        return named
    key = "additional_special_tokens"
    listed = settings.get(key) or _read_object(folder / "special_tokens_map.json").get(key)
    declared = {_content(token) for token in listed or ()}
    rows = _read_object(folder / "config.json").get("vocab_size")
    # WMT21's languages are the last rows of its model; M2M100's are followed by eight others.
    ends_with_eight = isinstance(rows, int) and rows - words == len(_WMT21_TOKENS)
    is_wmt21 = declared == _WMT21_TOKENS or ends_with_eight or words == _WMT21_WORDS
    return "wmt21" if is_wmt21 else "m2m100"


def read_word_ids(path: Path) -> dict[str, int]:
    """Read a ``vocab.json``.

    Args:
        path: The file.

    Returns:
        The id of every token.

    Raises:
        CheckpointError: If the file cannot be read or is not an object of whole numbers.
    """
    word_ids = _read_object(_require(path.parent, path.name))
    for word, word_id in word_ids.items():
        if type(word_id) is not int:
            raise CheckpointError(
                f"{path} must give every token a whole number and gives {word!r} {word_id!r}. "
                "Fetch it again from the model's repository."
            )
    return word_ids


def _check_rows(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise if the tokenizer gives ids that the model has no embedding for."""
    rows = _read_object(folder / "config.json").get("vocab_size")
    if isinstance(rows, int) and rows < tokenizer.vocab_size:
        raise CheckpointError(
            f"The tokenizer files in {folder} need {tokenizer.vocab_size:,} embedding rows and "
            f"config.json has vocab_size {rows:,}: they belong to different models. Fetch both "
            "from the same repository."
        )


def _check_language_ids(folder: Path, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    """Raise if the folder's own files number a language otherwise than its model's family does."""
    declared = _read_object(folder / "added_tokens.json")
    for token_id, token in (settings.get("added_tokens_decoder") or {}).items():
        declared[_content(token)] = int(token_id)
    for code in tokenizer.languages:
        language_id = tokenizer.language_id(code)
        token = tokenizer.token(language_id)
        if declared.get(token, language_id) != language_id:
            raise CheckpointError(
                f"The tokenizer files in {folder} give {token} the id {declared[token]}, and the "
                f"published layout {language_id}. They were written by a program that moved the "
                "languages, as transformers does where it finds no tokenizer.json: use the files "
                "of the model's original repository."
            )


def _content(token: object) -> str:
    """Return a token that JSON files spell as a string or as an object with a `content`."""
    return str(token.get("content")) if isinstance(token, dict) else str(token)


def _require(folder: Path, name: str) -> Path:
    path = folder / name
    if path.is_file():
        return path
    hint = ""
    if name == _VOCABULARY_FILE:
        hint = (
            " If this is an NLLB model, which has no such file, its tokenizer_config.json is "
            'missing or lacks "tokenizer_class": "NllbTokenizer".'
        )
    elif (folder / "tokenizer.json").exists():
        hint = " tokenizer.json is there but cannot replace it."
    raise CheckpointError(
        f"The tokenizer needs {name} and there is none in {folder}. Fetch it into that folder "
        f"from the repository the weights come from.{hint}"
    )


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; a file that is not there has nothing to say."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is no readable JSON: {error}. Fetch it again from the model's repository."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} must hold a JSON object and holds a {type(content).__name__}. "
            "Fetch it again from the model's repository."
        )
    return content
