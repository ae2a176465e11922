"""The tokens of a documented tokenizer beside its pieces, and the names of the special ones."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from moe_mt.errors import CheckpointError
from moe_mt.tokenizers import AddedToken, AddedTokens, Vocabulary

__all__ = ["NAMED_TOKENS", "TokenTable", "as_added_token", "special_token"]

NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
"""The special tokens that have a name, in the order in which they get ids."""

AnyToken = str | AddedToken | Mapping[str, Any]


class TokenTable:
    """Which token has which id, beside the pieces of the vocabulary.

    Ids are in this order: pieces; the languages and what else the published layout fixes; whatever
    is added. An added token that is a piece too keeps the piece's id.
    """

    def __init__(self, vocabulary: Vocabulary, layout: Mapping[int, AddedToken]) -> None:
        """Begin with what the published layout fixes.

        Args:
            vocabulary: The pieces and the languages.
            layout: Further tokens whose ids the layout fixes.
        """
        self.vocabulary = vocabulary
        self.language_tokens = {
            vocabulary.language_token(code): token_id
            for code, token_id in vocabulary.language_ids.items()
        }
        self.first_id = min(self.language_tokens.values())
        """The id after the last piece."""
        languages = {i: special_token(token) for token, i in self.language_tokens.items()}
        self.by_id = {**layout, **languages}
        self.named: dict[str, AddedToken | None] = dict.fromkeys(NAMED_TOKENS)
        self.additional: list[AddedToken] | None = []

    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of every token that is no piece, in id order."""
        return {token.content: token_id for token_id, token in sorted(self.by_id.items())}

    @cached_property
    def special(self) -> dict[str, int]:
        """The id of every special token: named, additional, and in any case the languages."""
        tokens = [*filter(None, self.named.values()), *(self.additional or ())]
        contents = [*map(str, tokens), *self.language_tokens]
        return {content: self.id_of(content) for content in contents}

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of the special tokens."""
        return frozenset(self.special.values())

    @cached_property
    def in_text(self) -> AddedTokens:
        """How text is split at these tokens and joined from them."""
        spaced = set(self.ids) - set(self.special) | set(self.language_tokens)
        spaced |= {str(t) for t in self.additional or () if self.id_of(str(t)) >= self.first_id}
        return AddedTokens(self.by_id, spaced=spaced, skipped=self.special)

    @property
    def size(self) -> int:
        """How many tokens there are, pieces among them."""
        return self.first_id + sum(token_id >= self.first_id for token_id in self.by_id)

    @property
    def unknown_id(self) -> int:
        """The id of what has no other."""
        unknown = self.named["unk_token"]
        token_id = self._known_id(unknown.content) if unknown else None
        return self.vocabulary.special_ids["<unk>"] if token_id is None else token_id

    def id_of(self, content: str) -> int:
        """Return a token's id; that of the unknown token if there is no such token."""
        token_id = self._known_id(content)
        return self.unknown_id if token_id is None else token_id

    def piece_id(self, piece: str) -> int:
        """Return the id of a piece read as text, which is never one of the tokens here."""
        token_id = None if piece in self.ids else self.vocabulary.piece_id(piece)
        return self.unknown_id if token_id is None else token_id

    def content(self, token_id: int) -> str:
        """Return the token with an id; the unknown token if the id means nothing."""
        token = self.by_id.get(token_id)
        if token is not None:
            return token.content
        return self.vocabulary.piece(token_id) or str(self.named["unk_token"] or "<unk>")

    def add(self, tokens: Iterable[AnyToken], special: bool = False) -> int:
        """Give tokens ids, or take over how known ones are matched.

        Args:
            tokens: The tokens; those that are empty do not count.
            special: Whether they are special, even if they do not say so themselves.

        Returns:
            How many of them are new.
        """
        specials, additional = set(self.special), list(self.additional or ())
        # What is new follows the last: the ids of pieces and of the layout are settled.
        next_id = first_new = max(self.first_id, max(self.by_id) + 1)
        for token in tokens:
            added = as_added_token(token, special or (isinstance(token, str) and token in specials))
            if not added.content or (isinstance(token, str) and self._is_settled(added)):
                continue
            token_id = self._known_id(added.content)
            if token_id is None:
                token_id, next_id = next_id, next_id + 1
            self.by_id[token_id] = added
            self.ids[added.content] = token_id
            if added.special and added.content not in specials:
                specials.add(added.content)
                additional.append(added)
        self.additional = additional if additional else self.additional
        self.forget()
        return next_id - first_new

    def declare(self, tokens: Mapping[int, AddedToken]) -> None:
        """Take over the ids that a checkpoint's files give tokens.

        Raises:
            CheckpointError: If they move a language of the published layout.
        """
        languages = {token_id: token for token, token_id in self.language_tokens.items()}
        for token_id, token in tokens.items():
            usual = self.language_tokens.get(token.content, token_id)
            language = languages.get(token_id, token.content)
            if usual != token_id or language != token.content:
                raise CheckpointError(
                    f"The tokenizer files give {token.content} the id {token_id}; in the "
                    f"published layout {self._place(token.content, usual, language, token_id)}. A "
                    "program wrote them that moved the languages, as transformers does where it "
                    "finds no tokenizer.json: use the files of the model's original repository."
                )
        self.by_id |= tokens
        self.forget()

    def set_named(self, name: str, token: AnyToken | None) -> None:
        """Let a name stand for a token; it gets no id by this."""
        self.named[name] = None if token is None else as_added_token(token, special=True)
        self.forget()

    def set_additional(self, tokens: Iterable[AnyToken] | None) -> None:
        """Replace the list of special tokens that have no name; they get no ids by this."""
        self.additional = None if tokens is None else [self._as_special(t) for t in tokens]
        self.forget()

    def forget(self) -> None:
        """Drop what was derived from the tokens: they have changed."""
        for name in ("ids", "special", "special_ids", "in_text"):
            self.__dict__.pop(name, None)

    def _as_special(self, token: AnyToken) -> AddedToken:
        """Return a special token; one given as a string is matched as it was before."""
        known_id = self.ids.get(token) if isinstance(token, str) else None
        return as_added_token(token if known_id is None else self.by_id[known_id], special=True)

    def _is_settled(self, added: AddedToken) -> bool:
        """Whether a token given as a string, which does not say how it is matched, is known."""
        known_id = self.ids.get(added.content)
        return known_id is not None and self.by_id[known_id].special >= added.special

    def _known_id(self, content: str) -> int | None:
        token_id = self.ids.get(content)
        return self.vocabulary.piece_id(content) if token_id is None else token_id

    @staticmethod
    def _place(content: str, usual: int, language: str, token_id: int) -> str:
        if usual != token_id:
            return f"{content} has {usual}"
        return f"{token_id} is {language}"


def as_added_token(token: Any, special: bool = False) -> AddedToken:  # noqa: ANN401
    """Return a token that may be spelled as a string, as in a JSON file, or as another library's.

    Args:
        token: The token.
        special: Whether it is special, even if it does not say so itself.

    Raises:
        TypeError: If it is none of these.
    """
    if isinstance(token, str):
        return AddedToken(token, special=special)
    names = AddedToken.__dataclass_fields__
    values = token if isinstance(token, Mapping) else {n: getattr(token, n, None) for n in names}
    values = {name: values[name] for name in names if values.get(name) is not None}
    if not isinstance(values.get("content"), str):
        raise TypeError(f"A token is a string or an AddedToken, not {token!r}.")
    # Making a token special does not change how it was said to be normalized.
    return AddedToken(**{**values, "special": bool(values.get("special")) or special})


def special_token(content: str) -> AddedToken:
    """Return a special token that takes no spaces from its neighbours."""
    return AddedToken(content, special=True)
