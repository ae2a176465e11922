"""The part of a documented tokenizer that knows languages: which two are set, and the format."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from moe_mt.errors import InputError, UnsupportedLanguageError
from moe_mt.pretrained.tokenization.vocabulary import TokenVocabulary
from moe_mt.tokenizers import resolve_language

__all__ = ["LanguageCodeError", "TranslationVocabulary"]


class LanguageCodeError(UnsupportedLanguageError, KeyError):
    """A language that a documented tokenizer does not have; its code was a key there."""

    def __str__(self) -> str:
        return Exception.__str__(self)


class TranslationVocabulary(TokenVocabulary):
    """Tokens, a source and a target language, and where their tokens stand.

    A language may be set by anything ``moe_mt.translate`` accepts, such as an English name; what
    can be read back is its code.
    """

    prefix_tokens: list[int]
    suffix_tokens: list[int]
    _language_list: str = "nllb"
    _new_language = re.compile(r"([a-z]{2,8}_[A-Z][a-z]{3})")
    _in_target_mode = False
    _src_lang: str
    _language_id: int
    _tgt_lang: str | None = None

    @property
    def src_lang(self) -> str:
        """The code of the source language; setting it takes effect at once."""
        return self._src_lang

    @src_lang.setter
    def src_lang(self, new_src_lang: str) -> None:
        code = self._code(new_src_lang, "src_lang")
        self._src_lang = code
        self.set_src_lang_special_tokens(code)

    @property
    def tgt_lang(self) -> str | None:
        """The code of the target language, that of ``text_target``."""
        return self._tgt_lang

    @tgt_lang.setter
    def tgt_lang(self, new_tgt_lang: str | None) -> None:
        self._tgt_lang = None if new_tgt_lang is None else self._code(new_tgt_lang, "tgt_lang")

    @property
    def lang_code_to_id(self) -> dict[str, int]:
        """The id of each language by its code, languages that were added among them."""
        return {code: self._tokens.ids[token] for code, token in self._language_tokens().items()}

    @property
    def id_to_lang_code(self) -> dict[int, str]:
        """The code of each language by its id."""
        return {language_id: code for code, language_id in self.lang_code_to_id.items()}

    def get_lang_token(self, lang: str) -> str:
        """Return the token of a language.

        Raises:
            LanguageCodeError: If the model has no such language; also a ``KeyError``.
        """
        return self._tokens.vocabulary.language_token(self._code(lang, "lang"))

    def get_lang_id(self, lang: str) -> int:
        """Return the id of a language's token.

        Raises:
            LanguageCodeError: If the model has no such language; also a ``KeyError``.
        """
        return self._tokens.ids[self.get_lang_token(lang)]

    def set_src_lang_special_tokens(self, src_lang: str) -> None:
        """Put the tokens of source text in this language around texts from now on."""
        self._frame_with(self.get_lang_id(src_lang))

    def set_tgt_lang_special_tokens(self, tgt_lang: str) -> None:
        """Put the tokens of target text in this language around texts from now on."""
        self._frame_with(self.get_lang_id(tgt_lang))

    @contextmanager
    def as_target_tokenizer(self) -> Iterator[None]:
        """Within this, texts are target texts: ``with tokenizer.as_target_tokenizer(): ...``."""
        self._switch_to_target_mode()
        self._in_target_mode = True
        try:
            yield
        finally:
            self._in_target_mode = False
            self._switch_to_input_mode()

    def build_inputs_with_special_tokens(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """Return a text's ids, or those of two texts one after the other, as the model reads them.

        Args:
            token_ids_0: The text, without special tokens.
            token_ids_1: A second text.

        Returns:
            ``[language] X [eos]``, as the mode and the language that are set have it.
        """
        return [*self.prefix_tokens, *token_ids_0, *(token_ids_1 or ()), *self.suffix_tokens]

    def get_special_tokens_mask(
        self,
        token_ids_0: Sequence[int],
        token_ids_1: Sequence[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """Return 1 where a special token stands or will stand, 0 elsewhere.

        Args:
            token_ids_0: The text.
            token_ids_1: A second text.
            already_has_special_tokens: Whether the ids are as the model reads them; otherwise the
                mask is for what ``build_inputs_with_special_tokens`` makes of them.

        Raises:
            InputError: If two texts are given that have special tokens already.
        """
        if not already_has_special_tokens:
            texts = [0] * (len(token_ids_0) + len(token_ids_1 or ()))
            return [1] * len(self.prefix_tokens) + texts + [1] * len(self.suffix_tokens)
        if token_ids_1 is not None:
            raise InputError(
                "token_ids_1 was given with already_has_special_tokens=True; ids that have their "
                "special tokens are one sequence: give them as token_ids_0."
            )
        return [int(token_id in self._tokens.special_ids) for token_id in token_ids_0]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """Return 0 for the tokens of the first text and 1 for those of the second.

        Args:
            token_ids_0: The text, without special tokens.
            token_ids_1: A second text.

        Returns:
            As many as ``build_inputs_with_special_tokens`` returns ids. The models have no use
            for them.
        """
        first = [0] * (len(self.prefix_tokens) + len(token_ids_0))
        if token_ids_1 is None:
            return first + [0] * len(self.suffix_tokens)
        return first + [1] * (len(token_ids_1) + len(self.suffix_tokens))

    def tokenize(
        self,
        text: str,
        pair: str | None = None,
        add_special_tokens: bool = False,
        *,
        split_special_tokens: bool | None = None,
    ) -> list[str]:
        """Return the text's tokens.

        Args:
            text: The text. What looks like an added token in it becomes that token.
            pair: A text behind it.
            add_special_tokens: Whether the language and the end are put around them.
            split_special_tokens: Whether what looks like an added token is cut like other text.
        """
        tokens = super().tokenize(text, split_special_tokens=split_special_tokens)
        if pair is not None:
            tokens += super().tokenize(pair, split_special_tokens=split_special_tokens)
        if not add_special_tokens:
            return tokens
        before, after = map(self.convert_ids_to_tokens, (self.prefix_tokens, self.suffix_tokens))
        return [*before, *tokens, *after]

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Return how many special tokens are put around a text or a pair."""
        return len(self.prefix_tokens) + len(self.suffix_tokens)

    def _switch_to_input_mode(self) -> None:
        self.set_src_lang_special_tokens(self.src_lang)

    def _switch_to_target_mode(self) -> None:
        self.set_tgt_lang_special_tokens(self._required(self.tgt_lang, "tgt_lang"))

    def _frame_with(self, language_id: int) -> None:
        """Set what stands before and after a text in the language with an id."""
        self._language_id = language_id
        self.prefix_tokens = [language_id]
        self.suffix_tokens = [self.eos_token_id]

    def _language_tokens(self) -> dict[str, str]:
        """Return the token of each language by its code, languages that were added among them."""
        vocabulary = self._tokens.vocabulary
        known = {code: vocabulary.language_token(code) for code in vocabulary.language_ids}
        for token in self._tokens.special:
            match = self._new_language.fullmatch(token)
            if match and token in self._tokens.ids:
                known.setdefault(match[1], token)
        return known

    def _code(self, name: str, argument: str) -> str:
        """Return the code of a language that is known by a code, a tag or a name.

        Raises:
            LanguageCodeError: If there is none.
        """
        name = self._required(name, argument)
        tokens = self._tokens
        token = tokens.vocabulary.language_token(name)
        if token in tokens.ids and token not in map(str, tokens.named.values()):
            return name
        try:
            return resolve_language(name, self._language_list)
        except UnsupportedLanguageError as error:
            raise LanguageCodeError(f"{argument}: {error}") from error

    @staticmethod
    def _required(language: str | None, argument: str) -> str:
        if not isinstance(language, str):
            raise LanguageCodeError(
                f"{argument} is {language!r} and must be a language's code: set "
                f"tokenizer.{argument}, or give {argument}= to from_pretrained."
            )
        return language
