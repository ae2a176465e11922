"""The sentencepiece model: text to pieces and back."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from moe_mt.errors import CheckpointError, ConfigError, InputError

__all__ = ["SentencePieceModel"]


class SentencePieceModel:
    """A trained sentencepiece model; the only place that calls the sentencepiece library.

    Its normaliser is part of the model file: the published ones fold compatibility characters,
    drop control characters and collapse runs of spaces, and decoding restores none of it.
    """

    def __init__(
        self,
        serialized: bytes,
        origin: str = "<bytes>",
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        """Read a model.

        Args:
            serialized: The content of a sentencepiece model file.
            origin: Where it comes from, for messages.
            sampling: Settings of the library that make ``encode`` draw among the ways to cut a
                text, as training wants it: ``enable_sampling``, ``alpha``, ``nbest_size``.

        Raises:
            CheckpointError: If the bytes are no sentencepiece model.
            ConfigError: If the library knows no such setting.
        """
        self._origin = origin
        self._sampling = dict(sampling or {})
        try:
            self._processor = SentencePieceProcessor(**self._sampling)
        except TypeError as error:
            raise ConfigError(
                f"sentencepiece has no such settings as {self._sampling} ({error}); those for "
                "subword sampling are enable_sampling, alpha and nbest_size."
            ) from error
        try:
            self._processor.LoadFromSerializedProto(serialized)
        except RuntimeError as error:
            raise CheckpointError(
                f"{origin} is no sentencepiece model ({len(serialized):,} bytes: {error}). "
                "Fetch the file again; a few hundred bytes of text are a Git LFS pointer."
            ) from error

    @classmethod
    def load(cls, path: Path, sampling: Mapping[str, Any] | None = None) -> "SentencePieceModel":
        """Read a model file.

        Args:
            path: The file.
            sampling: See the constructor.

        Returns:
            The model.

        Raises:
            CheckpointError: If the file cannot be read or is no sentencepiece model.
            ConfigError: If the library knows no such setting.
        """
        try:
            serialized = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"Cannot read the sentencepiece model {path}: {error}") from error
        return cls(serialized, str(path), sampling)

    # The library's own pickling forgets the settings.
    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePieceModel, (self.serialized, self._origin, self._sampling)

    def __deepcopy__(self, memo: object) -> "SentencePieceModel":
        return self  # nothing about it ever changes

    def __len__(self) -> int:
        return len(self._processor)

    @property
    def serialized(self) -> bytes:
        """The content of a model file."""
        return self._processor.serialized_model_proto()

    @property
    def reserved_ids(self) -> tuple[int, int, int]:
        """The ids of the unknown, begin and end pieces; -1 for one the model does not have."""
        processor = self._processor
        return processor.unk_id(), processor.bos_id(), processor.eos_id()

    def encode(self, text: str) -> list[str]:
        """Split text into pieces; a run of unknown characters is one piece, its own surface."""
        _refuse_surrogates(text)
        return self._processor.encode(text, out_type=str)

    def decode(self, pieces: Sequence[str]) -> str:
        """Join pieces into text."""
        return self._processor.decode(list(pieces)) if pieces else ""

    def piece(self, piece_id: int) -> str:
        """Return the piece with an id of this model."""
        return self._processor.id_to_piece(piece_id)

    def piece_id(self, piece: str) -> int:
        """Return a piece's id, or the unknown piece's."""
        return self._processor.piece_to_id(piece)


def _refuse_surrogates(text: str) -> None:
    """Raise if text holds half a surrogate pair, which no UTF-8 text can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"Character {error.start} of the text is the lone surrogate "
            f"U+{ord(text[error.start]):04X}, which is no character: decode the text's bytes with "
            'the right encoding, or repair it with text.encode(errors="replace").decode().'
        ) from error
