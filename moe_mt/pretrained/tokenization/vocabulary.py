"""The part of a documented tokenizer that knows tokens: text → tokens → ids, and back."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast, overload

from moe_mt.errors import InputError
from moe_mt.pretrained.tokenization.batch_encoding import as_lists
from moe_mt.pretrained.tokenization.tokens import (
    NAMED_TOKENS,
    AnyToken,
    TokenTable,
    as_added_token,
)
from moe_mt.tokenizers import AddedToken

__all__ = ["TokenVocabulary"]

_ADDITIONAL = "additional_special_tokens"
# English spelling that tokenizers for English text take apart; in this order.
_SPACED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class NamedToken:
    """A special token by its name, such as ``tokenizer.eos_token``; ``None`` if there is none."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, tokenizer: "TokenVocabulary", owner: type | None = None) -> Any:  # noqa: ANN401
        token = tokenizer._tokens.named[self._name]
        return None if token is None else token.content

    def __set__(self, tokenizer: "TokenVocabulary", token: AnyToken | None) -> None:
        tokenizer._tokens.set_named(self._name, token)


class NamedTokenId:
    """The id of a special token by its name, such as ``tokenizer.eos_token_id``."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name.removesuffix("_id")

    def __get__(self, tokenizer: "TokenVocabulary", owner: type | None = None) -> Any:  # noqa: ANN401
        return tokenizer.convert_tokens_to_ids(getattr(tokenizer, self._name))

    def __set__(self, tokenizer: "TokenVocabulary", token_id: int | None) -> None:
        token = None if token_id is None else tokenizer.convert_ids_to_tokens(token_id)
        setattr(tokenizer, self._name, token)


class TokenVocabulary:
    """Tokens and ids; the base of the documented tokenizers."""

    bos_token, bos_token_id = NamedToken(), NamedTokenId()
    eos_token, eos_token_id = NamedToken(), NamedTokenId()
    unk_token, unk_token_id = NamedToken(), NamedTokenId()
    sep_token, sep_token_id = NamedToken(), NamedTokenId()
    pad_token, pad_token_id = NamedToken(), NamedTokenId()
    cls_token, cls_token_id = NamedToken(), NamedTokenId()
    mask_token, mask_token_id = NamedToken(), NamedTokenId()

    SPECIAL_TOKENS_ATTRIBUTES = (*NAMED_TOKENS, _ADDITIONAL)
    is_fast = False
    pad_token_type_id = 0
    clean_up_tokenization_spaces = False
    split_special_tokens = False

    def __init__(self, tokens: TokenTable) -> None:
        """Stand over a table of tokens."""
        self._tokens = tokens

    def __len__(self) -> int:
        """Return how many tokens there are, added ones among them."""
        return self._tokens.size

    @property
    def vocab_size(self) -> int:
        """How many tokens there are without those that were added."""
        raise NotImplementedError

    def get_vocab(self) -> dict[str, int]:
        """Return the id of every token: pieces, then added tokens."""
        pieces = {self._tokens.content(i): i for i in range(self._tokens.first_id)}
        return pieces | self.added_tokens_encoder

    def get_added_vocab(self) -> dict[str, int]:
        """Return the id of every token that is matched as a whole, special ones among them."""
        return self.added_tokens_encoder

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """The id of every token that is matched as a whole, in id order."""
        return {token.content: token_id for token_id, token in self.added_tokens_decoder.items()}

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The tokens that are matched as a whole, by id."""
        return dict(sorted(self._tokens.by_id.items()))

    @property
    def additional_special_tokens(self) -> list[str]:
        """The special tokens that have no name; the constructor lists the languages among them."""
        additional = self._tokens.additional
        return cast("list[str]", None) if additional is None else [str(t) for t in additional]

    @additional_special_tokens.setter
    def additional_special_tokens(self, tokens: Sequence[AnyToken] | None) -> None:
        self._tokens.set_additional(tokens)

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        """The ids of ``additional_special_tokens``."""
        return self.convert_tokens_to_ids(self.additional_special_tokens)

    @additional_special_tokens_ids.setter
    def additional_special_tokens_ids(self, ids: Sequence[int]) -> None:
        self._tokens.set_additional(self.convert_ids_to_tokens(ids))

    @property
    def special_tokens_map(self) -> dict[str, str | list[str]]:
        """The special tokens by name, those without a name as a list."""
        names = {name: getattr(self, name) for name in self.SPECIAL_TOKENS_ATTRIBUTES}
        return {name: tokens for name, tokens in names.items() if tokens}

    @property
    def special_tokens_map_extended(self) -> dict[str, AddedToken | list[AddedToken]]:
        """As ``special_tokens_map``, with how each is matched."""
        tokens = {**self._tokens.named, _ADDITIONAL: self._tokens.additional}
        return {name: token for name, token in tokens.items() if token}

    @property
    def all_special_tokens(self) -> list[str]:
        """Every special token once, languages among them in any case."""
        return list(self._tokens.special)

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of ``all_special_tokens``."""
        return list(self._tokens.special.values())

    def add_tokens(
        self, new_tokens: AnyToken | Sequence[AnyToken], special_tokens: bool = False
    ) -> int:
        """Add tokens that text is split at, with ids after the last.

        The model's embeddings need a row for each: ``model.resize_token_embeddings``.

        Args:
            new_tokens: One or more tokens. A new language is its code for NLLB (``"myv_Cyrl"``)
                and ``"__code__"`` for M2M100; after that it can be the source or the target.
            special_tokens: Whether ``skip_special_tokens`` leaves them out.

        Returns:
            How many of them are new.
        """
        if isinstance(new_tokens, (str, Mapping)) or not isinstance(new_tokens, Iterable):
            new_tokens = [new_tokens]
        return self._tokens.add(new_tokens, special_tokens)

    def add_special_tokens(
        self,
        special_tokens_dict: Mapping[str, Any],
        replace_additional_special_tokens: bool = True,
    ) -> int:
        """Let names stand for tokens, and add those that have no id.

        Args:
            special_tokens_dict: Tokens by name, such as ``{"pad_token": "[PAD]"}``; under
                ``"additional_special_tokens"`` a list.
            replace_additional_special_tokens: Whether that list takes the place of the present
                one. Tokens keep their ids, and languages stay special, in either case.

        Returns:
            How many tokens are new.

        Raises:
            InputError: If there is no such name, or the list is none.
        """
        added: list[AddedToken] = []
        for name, value in special_tokens_dict.items():
            if name == _ADDITIONAL:
                added += self._list_special_tokens(value, replace_additional_special_tokens)
            elif name in NAMED_TOKENS:
                added.append(as_added_token(value, special=True))
                self._tokens.set_named(name, added[-1])
            else:
                raise InputError(
                    f"No special token is called {name!r}; the names are "
                    f"{', '.join(self.SPECIAL_TOKENS_ATTRIBUTES)}."
                )
        return self._tokens.add(added, special=True)

    def tokenize(self, text: str, *, split_special_tokens: bool | None = None) -> list[str]:
        """Return the text's tokens with nothing before or after.

        Args:
            text: The text. What looks like an added token in it becomes that token.
            split_special_tokens: Whether it is cut like other text instead.
        """
        if self.split_special_tokens if split_special_tokens is None else split_special_tokens:
            return self._tokens.vocabulary.encode(text)
        return self._tokens.in_text.tokenize(text, self._tokens.vocabulary.encode)

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int: ...
    @overload
    def convert_tokens_to_ids(self, tokens: list[str] | tuple[str, ...]) -> list[int]: ...
    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Return the id of a token, or of each; that of ``<unk>`` for what is none."""
        if tokens is None or isinstance(tokens, str):
            return None if tokens is None else self._convert_token_to_id(tokens)
        return [self._convert_token_to_id(token) for token in tokens]

    @overload
    def convert_ids_to_tokens(self, ids: int, skip_special_tokens: bool = False) -> str: ...
    @overload
    def convert_ids_to_tokens(
        self, ids: Iterable[int], skip_special_tokens: bool = False
    ) -> list[str]: ...
    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Return the token of an id, or of each.

        Args:
            ids: One id, or a list, tensor or array of them. One that means nothing is ``<unk>``.
            skip_special_tokens: Whether special tokens are left out of a list.
        """
        ids = as_lists(ids)
        if isinstance(ids, int):
            return self._convert_id_to_token(ids)
        left_out = self._tokens.special_ids if skip_special_tokens else ()
        return [self._convert_id_to_token(int(i)) for i in ids if i not in left_out]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Join tokens into text."""
        return self._tokens.vocabulary.join(tokens, self._tokens.special)

    def decode(
        self,
        token_ids: Any,  # noqa: ANN401
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """Return the text of token ids.

        Args:
            token_ids: One id, or a list, tensor or array of them.
            skip_special_tokens: Whether special tokens are left out.
            clean_up_tokenization_spaces: Whether spaces before punctuation and English
                contractions are taken out; the tokenizer's own setting if ``None``.
            spaces_between_special_tokens: Whether languages and added tokens stand between spaces.
        """
        ids = as_lists(token_ids)
        tokens = self.convert_ids_to_tokens([ids] if isinstance(ids, int) else ids)
        separator = " " if spaces_between_special_tokens else ""
        text = self._tokens.in_text.join(
            tokens, skip_special_tokens, self.convert_tokens_to_string, separator
        )
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    def batch_decode(
        self,
        sequences: Any,  # noqa: ANN401
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = True,
    ) -> list[str]:
        """Return the text of each row of token ids; see ``decode``."""
        return [
            self.decode(
                row,
                skip_special_tokens,
                clean_up_tokenization_spaces,
                spaces_between_special_tokens,
            )
            for row in sequences
        ]

    @staticmethod
    def clean_up_tokenization(out_string: str) -> str:
        """Take out spaces before punctuation and English contractions."""
        for spaced in _SPACED:
            out_string = out_string.replace(spaced, spaced.strip())
        return out_string

    def _list_special_tokens(self, tokens: Any, replace: bool) -> list[AddedToken]:  # noqa: ANN401
        """Replace or lengthen the list of special tokens; return what is new in it."""
        if not isinstance(tokens, (list, tuple)):
            raise InputError(f"{_ADDITIONAL} is {tokens!r}; it must be a list of tokens.")
        listed = list(self._tokens.additional or ())
        added = [as_added_token(token, special=True) for token in tokens]
        if not replace:
            added = [token for token in added if token.content not in map(str, listed)]
        if added:
            self.additional_special_tokens = added if replace else [*listed, *added]
        return added

    def _convert_token_to_id(self, token: str) -> int:
        return self._tokens.id_of(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._tokens.content(index)

    def _text_ids(self, text: str, split_special_tokens: bool | None) -> list[int]:
        tokens = self.tokenize(text, split_special_tokens=split_special_tokens)
        if self.split_special_tokens if split_special_tokens is None else split_special_tokens:
            return [self._tokens.piece_id(token) for token in tokens]
        return self.convert_tokens_to_ids(tokens)
