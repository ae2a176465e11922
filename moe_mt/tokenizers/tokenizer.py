"""What the rest of the package may ask of a tokenizer."""

from collections.abc import Mapping, Sequence
from typing import Protocol

__all__ = ["Tokenizer"]


class Tokenizer(Protocol):
    """Text to token ids and back.

    A tokenizer has no state: languages are arguments of every call, so that one object serves any
    mixture of languages and any number of threads. Wherever a language is an argument, anything
    `resolve_language` accepts will do, and what it refuses raises ``UnsupportedLanguageError``.

    Text is text by default: ``</s>`` or ``fra_Latn`` within it is spelled out in ordinary pieces
    and cannot end the sentence or change its language. With ``special_tokens_in_text`` such
    strings become the special tokens they look like, as transformers does. Text with a lone
    surrogate raises ``InputError``.
    """

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages' codes, in id order."""
        ...

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Every special token's id, languages among them."""
        ...

    @property
    def bos_id(self) -> int:
        """The id of ``<s>``."""
        ...

    @property
    def pad_id(self) -> int:
        """The id of ``<pad>``."""
        ...

    @property
    def eos_id(self) -> int:
        """The id of ``</s>``, which also starts the decoder."""
        ...

    @property
    def unk_id(self) -> int:
        """The id of ``<unk>``."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; a model may have further rows, which mean nothing."""
        ...

    def resolve_language(self, name: str) -> str:
        """Return the code that a code, tag or English name of a language stands for."""
        ...

    def language_name(self, name: str) -> str:
        """Return the English name of a language."""
        ...

    def language_id(self, name: str) -> int:
        """Return the id of a language's token."""
        ...

    def encode_source(
        self, text: str, src_lang: str, tgt_lang: str, *, special_tokens_in_text: bool = False
    ) -> list[int]:
        """Return what the encoder reads, special tokens included."""
        ...

    def encode_target(
        self, text: str, tgt_lang: str, *, special_tokens_in_text: bool = False
    ) -> list[int]:
        """Return the labels that teach the decoder this text."""
        ...

    def encode_text(self, text: str, *, special_tokens_in_text: bool = False) -> list[int]:
        """Return the text's ids with nothing before or after."""
        ...

    def tokenize(self, text: str, *, special_tokens_in_text: bool = False) -> list[str]:
        """Return the text's tokens with nothing before or after."""
        ...

    def forced_tokens(self, tgt_lang: str) -> list[int]:
        """Return the ids that generation must begin with, after the decoder's start token."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; an id that means nothing counts as ``<unk>``."""
        ...

    def token(self, token_id: int) -> str:
        """Return the token with an id; ``<unk>`` if the id means nothing."""
        ...

    def token_id(self, token: str) -> int:
        """Return a token's id; that of ``<unk>`` if there is no such token."""
        ...
