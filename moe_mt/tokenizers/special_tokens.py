"""Tokens matched in text as they stand: end of sentence, padding, languages, words users add."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

__all__ = ["BOS", "EOS", "MASK", "PAD", "UNK", "AddedToken", "AddedTokens"]

BOS, PAD, EOS, UNK, MASK = "<s>", "<pad>", "</s>", "<unk>", "<mask>"


@dataclass(frozen=True)
class AddedToken:
    """A token that stands beside the pieces: text is split at it and it is never cut."""

    content: str = ""
    """What it is in text."""

    single_word: bool = False
    """Whether it is none where it is part of a longer word."""

    lstrip: bool = False
    """Whether spaces before it belong to it."""

    rstrip: bool = False
    """Whether spaces after it belong to it."""

    normalized: bool | None = None
    """Kept for files alone: matching is always exact. ``None`` is: unless it is special."""

    special: bool = False
    """Whether it is no text, and left out where decoding leaves special tokens out."""

    def __post_init__(self) -> None:
        """Settle what was left open."""
        if self.normalized is None:
            object.__setattr__(self, "normalized", not self.special)

    def __str__(self) -> str:
        return self.content

    def __getstate__(self) -> dict[str, object]:
        return dict(vars(self))


class AddedTokens:
    """The added tokens of one tokenizer and how transformers' slow tokenizers treat them.

    Source: transformers 4.57.1, tokenization_utils.py; agreement is held by
    ``tests/tokenizers/test_goldens.py``.
    """

    def __init__(
        self,
        tokens: Mapping[int, AddedToken],
        *,
        spaced: Collection[str],
        skipped: Collection[str] | None = None,
    ) -> None:
        """Index the tokens.

        Args:
            tokens: Every added token, by id.
            spaced: Those that stand between spaces in decoded text, such as languages.
            skipped: Those left out where special tokens are; all of them if ``None``.
        """
        self.tokens = {token_id: token.content for token_id, token in tokens.items()}
        self.ids = {content: token_id for token_id, content in self.tokens.items()}
        self._by_content = {token.content: token for token in tokens.values()}
        self._spaced = frozenset(spaced)
        self._skipped = frozenset(self.ids if skipped is None else skipped)
        # The first alternative that fits is taken: of two that begin alike, the longer.
        longest_first = sorted(filter(None, self.ids), key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def tokenize(self, text: str, encode: Callable[[str], list[str]]) -> list[str]:
        """Split text at the added tokens and encode what lies between."""
        parts = [part for part in self._pattern.split(text) if part]
        for place in range(len(parts)):
            token = self._by_content.get(parts[place])
            if token is not None:
                _give_way(parts, place, token)
        tokens: list[str] = []
        for part in filter(None, parts):
            tokens += [part] if part in self.ids else encode(part)
        return tokens

    def join(
        self,
        tokens: Sequence[str],
        skip: bool,
        join_run: Callable[[Sequence[str]], str],
        separator: str = " ",
    ) -> str:
        """Join tokens into text: spaced ones stand alone, runs of the others are joined.

        Args:
            tokens: The tokens.
            skip: Whether special tokens are left out.
            join_run: How tokens that are not spaced become text.
            separator: What stands between a spaced token and its neighbours.

        Returns:
            The text.
        """
        kept = [token for token in tokens if token not in self._skipped] if skip else tokens
        texts: list[str] = []
        for is_spaced, run in groupby(kept, key=self._spaced.__contains__):
            run_tokens = list(run)
            texts += run_tokens if is_spaced else [join_run(run_tokens)]
        # An empty text is kept at the very end only, as the reference does.
        return separator.join([text for text in texts[:-1] if text] + texts[-1:])


def _give_way(parts: list[str], place: int, token: AddedToken) -> None:
    """Let an added token take spaces from its neighbours, or become part of one's word."""
    left, right = parts[place - 1] if place else "", "".join(parts[place + 1 : place + 2])
    if token.rstrip and right:
        parts[place + 1] = right.lstrip()
    if token.lstrip and left:
        parts[place - 1] = left.rstrip()
    if not token.single_word:
        return
    if left and not left.endswith(" "):
        parts[place - 1 : place + 1] = [parts[place - 1] + token.content, ""]
    elif right and not right.startswith(" "):
        parts[place : place + 2] = ["", token.content + parts[place + 1]]
