"""What the tokenizers of both families share; the families bring their numbering and format."""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from moe_mt.tokenizers.language_table import LanguageTable
from moe_mt.tokenizers.special_tokens import (
    BOS,
    EOS,
    MASK,
    PAD,
    UNK,
    AddedToken,
    AddedTokens,
)

__all__ = ["PieceTokenizer", "Vocabulary"]


class Vocabulary(Protocol):
    """How a family numbers its tokens, cuts text into pieces and joins them."""

    @property
    def special_ids(self) -> Mapping[str, int]:
        """The ids of the special tokens that name no language."""
        ...

    @property
    def language_ids(self) -> Mapping[str, int]:
        """The id of each language's token, by code."""
        ...

    @property
    def size(self) -> int:
        """One more than the largest id."""
        ...

    def language_token(self, code: str) -> str:
        """Return the token of a language."""
        ...

    def encode(self, text: str) -> list[str]:
        """Cut text into pieces."""
        ...

    def piece_id(self, piece: str) -> int | None:
        """Return an ordinary piece's id, if it has one."""
        ...

    def piece(self, token_id: int) -> str | None:
        """Return the ordinary piece with an id, if there is one."""
        ...

    def join(self, tokens: Sequence[str], special: Collection[str]) -> str:
        """Join tokens into text; those that are special stand as they are."""
        ...


class PieceTokenizer:
    """Text to token ids and back, in the format ``[language] X [eos]``; see ``Tokenizer``."""

    def __init__(self, vocabulary: Vocabulary, table: LanguageTable) -> None:
        """Join a numbering with the languages it numbers."""
        self._vocabulary = vocabulary
        self._table = table
        tokens = {
            vocabulary.language_token(code): language_id
            for code, language_id in vocabulary.language_ids.items()
        }
        self._special = AddedTokens(
            {
                token_id: AddedToken(content, lstrip=content == MASK, special=True)
                for content, token_id in {**vocabulary.special_ids, **tokens}.items()
            },
            spaced=tokens,
        )
        self.languages: tuple[str, ...] = table.codes
        self.special_tokens: Mapping[str, int] = self._special.ids
        self.bos_id = self.special_tokens[BOS]
        self.pad_id = self.special_tokens[PAD]
        self.eos_id = self.special_tokens[EOS]
        self.unk_id = self.special_tokens[UNK]
        self.vocab_size = vocabulary.size

    def resolve_language(self, name: str) -> str:
        """Return the code that a code, tag or English name of a language stands for."""
        return self._table.resolve(name)

    def language_name(self, name: str) -> str:
        """Return the English name of a language."""
        return self._table.name(self.resolve_language(name))

    def language_id(self, name: str) -> int:
        """Return the id of a language's token."""
        return self._vocabulary.language_ids[self.resolve_language(name)]

    def encode_source(
        self, text: str, src_lang: str, tgt_lang: str, *, special_tokens_in_text: bool = False
    ) -> list[int]:
        """Return what the encoder reads: the text with the source language and the end."""
        ids = self.encode_text(text, special_tokens_in_text=special_tokens_in_text)
        return self._sentence(src_lang, ids)

    def encode_target(
        self, text: str, tgt_lang: str, *, special_tokens_in_text: bool = False
    ) -> list[int]:
        """Return the labels: the text with the target language and the end."""
        ids = self.encode_text(text, special_tokens_in_text=special_tokens_in_text)
        return self._sentence(tgt_lang, ids)

    def encode_text(self, text: str, *, special_tokens_in_text: bool = False) -> list[int]:
        """Return the text's ids with nothing before or after."""
        tokens = self.tokenize(text, special_tokens_in_text=special_tokens_in_text)
        if special_tokens_in_text:
            return [self.token_id(token) for token in tokens]
        return [self._piece_id(token) for token in tokens]

    def tokenize(self, text: str, *, special_tokens_in_text: bool = False) -> list[str]:
        """Return the text's tokens with nothing before or after."""
        if special_tokens_in_text:
            return self._special.tokenize(text, self._vocabulary.encode)
        return self._vocabulary.encode(text)

    def forced_tokens(self, tgt_lang: str) -> list[int]:
        """Return the ids that generation must begin with: the target language."""
        return [self.language_id(tgt_lang)]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; an id that means nothing counts as ``<unk>``."""
        tokens = [self.token(token_id) for token_id in token_ids]
        return self._special.join(tokens, skip_special_tokens, self._join_run)

    def token(self, token_id: int) -> str:
        """Return the token with an id; ``<unk>`` if the id means nothing."""
        return self._special.tokens.get(token_id) or self._vocabulary.piece(token_id) or UNK

    def token_id(self, token: str) -> int:
        """Return a token's id; that of ``<unk>`` if there is no such token."""
        special_id = self.special_tokens.get(token)
        return self._piece_id(token) if special_id is None else special_id

    def _sentence(self, language: str, ids: list[int]) -> list[int]:
        return [self.language_id(language), *ids, self.eos_id]

    def _join_run(self, tokens: Sequence[str]) -> str:
        return self._vocabulary.join(tokens, self._vocabulary.special_ids)

    def _piece_id(self, piece: str) -> int:
        # Sentencepiece gives a run of unknown characters as it stands, so that a piece can look
        # like a special token; read as text, it must not become one.
        if piece in self.special_tokens:
            return self.unk_id
        piece_id = self._vocabulary.piece_id(piece)
        return self.unk_id if piece_id is None else piece_id
