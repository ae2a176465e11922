"""The documented tokenizers' common class: arguments and files → tokenizer, and back to files."""

import copy
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from moe_mt.checkpoints import fetch_small_files
from moe_mt.errors import CheckpointError, ConfigError, InputError
from moe_mt.pretrained.tokenization.encoding import EncodingTokenizer
from moe_mt.pretrained.tokenization.files import read_settings, require_file, write_settings
from moe_mt.pretrained.tokenization.options import UNLIMITED
from moe_mt.pretrained.tokenization.tokens import NAMED_TOKENS, TokenTable, as_added_token
from moe_mt.tokenizers import AddedToken, Vocabulary, tokenizer_kind

__all__ = ["PretrainedTokenizer"]

_logger = logging.getLogger(__name__)
_Tokenizer = TypeVar("_Tokenizer", bound="PretrainedTokenizer")

_MODEL_INPUT_NAMES = ("input_ids", "attention_mask")
# Arguments of transformers' from_pretrained that have no meaning here.
_WITHOUT_EFFECT = (
    "force_download",
    "from_slow",
    "proxies",
    "resume_download",
    "trust_remote_code",
    "use_auth_token",
    "use_fast",
    "_commit_hash",
    "_from_auto",
    "_from_pipeline",
)


class MethodNameError(ConfigError, AttributeError):
    """A setting of a tokenizer that has the name of one of its methods."""


class PretrainedTokenizer(EncodingTokenizer):
    """What ``M2M100Tokenizer`` and ``NllbTokenizer`` share.

    Every method that encodes takes the keyword arguments of ``EncodingOptions``.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {}
    """The files of the vocabulary, by the constructor's argument."""

    _kind = ""
    _default_source = ""

    def __init__(
        self, vocabulary: Vocabulary, layout: Mapping[int, AddedToken], settings: dict[str, Any]
    ) -> None:
        """Set up tokens, languages and defaults.

        Args:
            vocabulary: Pieces and languages.
            layout: Tokens beside the languages whose ids the published layout fixes.
            settings: The constructor's arguments, but for the vocabulary's files.

        Raises:
            ConfigError: If an argument is unknown in a way that matters, or out of range.
        """
        for name in settings:
            if callable(getattr(type(self), name, None)):
                raise MethodNameError(
                    f"{name} is a method of {type(self).__name__} and conflicts with the argument "
                    f"{name}={settings[name]!r}: that is no setting of a tokenizer."
                )
        super().__init__(TokenTable(vocabulary, layout))
        self.init_inputs = ()
        self.init_kwargs = copy.deepcopy(settings)
        self.deprecation_warnings = {}
        self._set_tokens(settings)
        self.name_or_path: str = settings.get("name_or_path", "")
        limit = settings.get("model_max_length", settings.get("max_len"))
        self.model_max_length: int = UNLIMITED if limit is None else limit
        self.padding_side = self._side("padding_side", settings)
        self.truncation_side = self._side("truncation_side", settings)
        self.model_input_names = list(settings.get("model_input_names", _MODEL_INPUT_NAMES))
        self.clean_up_tokenization_spaces = settings.get("clean_up_tokenization_spaces", False)
        self.split_special_tokens = settings.get("split_special_tokens", False)
        self.verbose = settings.get("verbose", True)
        self.tgt_lang = settings.get("tgt_lang")
        self.src_lang = settings.get("src_lang") or self._default_source

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(name_or_path={self.name_or_path!r}, "
            f"vocab_size={self.vocab_size}, src_lang={self.src_lang!r}, "
            f"tgt_lang={self.tgt_lang!r}, model_max_length={self.model_max_length}, "
            f"padding_side={self.padding_side!r}, truncation_side={self.truncation_side!r})"
        )

    @classmethod
    def from_pretrained(
        cls: type[_Tokenizer],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str | None = None,
        subfolder: str = "",
        **kwargs: Any,  # noqa: ANN401
    ) -> _Tokenizer:
        """Make the tokenizer of a checkpoint.

        Args:
            pretrained_model_name_or_path: A hub id, or the folder of a checkpoint.
            cache_dir: Where downloads are kept; where ``HF_HOME`` says if ``None``.
            local_files_only: Whether to take what has been downloaded and never ask the hub.
            token: Access token for the hub.
            revision: Branch, tag or commit on the hub.
            subfolder: Where in a local folder the files lie.
            **kwargs: Arguments of the constructor, such as ``src_lang``; they take the place of
                the files'. Those that only concern transformers have no effect.

        Returns:
            The tokenizer.

        Raises:
            CheckpointError: If the files cannot be had or are not what they should be; also an
                ``OSError``.
            LanguageCodeError: If the model has no such language; also a ``KeyError``.
        """
        root = fetch_small_files(
            pretrained_model_name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        folder = root / subfolder
        cls._warn_of_another_kind(folder)
        chosen = {name: value for name, value in kwargs.items() if name not in _WITHOUT_EFFECT}
        settings = read_settings(folder, chosen)
        for argument in cls._vocabulary_arguments():
            if argument not in chosen:
                settings[argument] = str(require_file(folder, cls.vocab_files_names[argument]))
        cls._complete(settings, folder)
        name = os.fspath(pretrained_model_name_or_path)
        return cls(**{**settings, "name_or_path": name})

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[str, ...]:
        """Write the files that ``from_pretrained`` reads, here and in transformers 4.57.

        Args:
            save_directory: Where to; the folder is made if need be.
            legacy_format: Of effect on tokenizers in Rust alone; ``False`` is refused.
            filename_prefix: What the files' names begin with, followed by ``-``.
            push_to_hub: Refused: upload the folder with ``hf upload``.
            **kwargs: Without effect.

        Returns:
            The files' paths.

        Raises:
            InputError: If what is asked for is not to be had.
            CheckpointError: If ``save_directory`` is a file; also an ``OSError``.
        """
        if push_to_hub or legacy_format is False:
            raise InputError(
                f"push_to_hub={push_to_hub}, legacy_format={legacy_format}: a tokenizer is saved "
                "as a folder of the files that the Python tokenizers read. To publish it, run "
                "`hf upload OWNER/MODEL FOLDER`."
            )
        folder = Path(save_directory)
        if folder.is_file():
            raise CheckpointError(f"{folder} is a file; give a folder to save the tokenizer in.")
        folder.mkdir(parents=True, exist_ok=True)
        names = {*self.init_kwargs, "model_max_length", "clean_up_tokenization_spaces"}
        settings = {name: getattr(self, name, self.init_kwargs.get(name)) for name in names}
        config, special, added = write_settings(
            folder,
            f"{filename_prefix}-" if filename_prefix else "",
            tokenizer_class=type(self).__name__,
            settings=settings,
            special_tokens=self.special_tokens_map_extended,
            added_tokens=self.added_tokens_decoder,
            first_id=self._tokens.first_id,
        )
        return config, special, *self.save_vocabulary(os.fspath(folder), filename_prefix), added

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Write the vocabulary's files.

        Args:
            save_directory: A folder.
            filename_prefix: What the files' names begin with, followed by ``-``.

        Returns:
            The files' paths.

        Raises:
            CheckpointError: If there is no such folder; also an ``OSError``.
        """
        raise NotImplementedError

    @classmethod
    def _vocabulary_arguments(cls) -> list[str]:
        return [name for name in ("vocab_file", "spm_file") if name in cls.vocab_files_names]

    @classmethod
    def _complete(cls, settings: dict[str, Any], folder: Path) -> None:
        """Add what the files imply and do not say."""

    @classmethod
    def _warn_of_another_kind(cls, folder: Path) -> None:
        try:
            kind = tokenizer_kind(folder)
        except CheckpointError:
            return  # The files do not say.
        if kind != cls._kind:
            _logger.warning(
                "%s was asked for and the files in %s are those of another tokenizer (%s): ids "
                "may be wrong. AutoTokenizer takes the right one.",
                cls.__name__,
                folder,
                kind,
            )

    def _set_tokens(self, settings: Mapping[str, Any]) -> None:
        """Set the special tokens, and give ids to those that have none."""
        tokens = self._tokens
        declared = settings.get("added_tokens_decoder") or {}
        tokens.declare({int(i): as_added_token(token) for i, token in declared.items()})
        given = {name: settings.get(name) for name in NAMED_TOKENS}
        for name, token in given.items():
            tokens.set_named(name, token)
        listed = settings.get("additional_special_tokens") or ()
        contents = {as_added_token(token).content for token in listed}
        languages = [token for token in tokens.language_tokens if token not in contents]
        tokens.set_additional([*listed, *languages])
        tokens.add([t for t in (*given.values(), *listed) if t is not None], special=True)

    def _side(self, name: str, settings: Mapping[str, Any]) -> str:
        side = settings.get(name, getattr(type(self), name))
        if side not in ("right", "left"):
            raise ConfigError(f"{name} is {side!r}; choose 'right' or 'left'.")
        return side
