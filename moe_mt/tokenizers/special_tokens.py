"""Tokens that are no text: end of sentence, padding, languages."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import groupby

__all__ = ["BOS", "EOS", "MASK", "PAD", "UNK", "SpecialTokens"]

BOS, PAD, EOS, UNK, MASK = "<s>", "<pad>", "</s>", "<unk>", "<mask>"


class SpecialTokens:
    """The special tokens of one tokenizer and how transformers' slow tokenizers treat them.

    Source: transformers 4.57.1, tokenization_utils.py; agreement is held by
    ``tests/tokenizers/test_goldens.py``.
    """

    def __init__(self, ids: Mapping[str, int], language_tokens: Collection[str]) -> None:
        """Index the tokens.

        Args:
            ids: Every special token's id.
            language_tokens: Those among them that name a language.
        """
        self.ids = dict(ids)
        self.tokens = {token_id: token for token, token_id in self.ids.items()}
        self._language_tokens = frozenset(language_tokens)
        # No special token begins another, so the order of the alternatives does not matter.
        self._pattern = re.compile(f"({'|'.join(map(re.escape, self.ids))})")

    def tokenize(self, text: str, encode: Callable[[str], list[str]]) -> list[str]:
        """Split text at special tokens and encode what lies between."""
        # Splitting at a group puts the matches at the odd places.
        parts = self._pattern.split(text)
        for place in range(1, len(parts), 2):
            if parts[place] == MASK:
                parts[place - 1] = parts[place - 1].rstrip()
        tokens: list[str] = []
        for place, part in enumerate(parts):
            if part:
                tokens += [part] if place % 2 else encode(part)
        return tokens

    def join(
        self, tokens: Sequence[str], skip: bool, join_run: Callable[[Sequence[str]], str]
    ) -> str:
        """Join tokens into text: language tokens stand between spaces, runs of others are joined.

        Args:
            tokens: The tokens.
            skip: Whether special tokens are left out.
            join_run: How tokens that are no language become text.

        Returns:
            The text.
        """
        if skip:
            return join_run([token for token in tokens if token not in self.ids])
        texts: list[str] = []
        for is_language, run in groupby(tokens, key=self._language_tokens.__contains__):
            run_tokens = list(run)
            texts += run_tokens if is_language else [join_run(run_tokens)]
        # An empty text is kept at the very end only, as the reference does.
        return " ".join([text for text in texts[:-1] if text] + texts[-1:])
