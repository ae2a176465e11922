"""M2M100, WMT21 and SMaLL-100: ids from ``vocab.json``, languages as ``__en__``."""

from collections.abc import Collection, Mapping, Sequence

from moe_mt.errors import CheckpointError
from moe_mt.tokenizers.language_table import TABLES
from moe_mt.tokenizers.piece_tokenizer import PieceTokenizer
from moe_mt.tokenizers.sentencepiece import SentencePieceModel
from moe_mt.tokenizers.special_tokens import BOS, EOS, PAD, UNK

__all__ = ["M2M100Tokenizer", "M2M100Vocabulary", "Small100Tokenizer"]

_NEEDED = (EOS, PAD, UNK)
_LANGUAGE_CODES = ("m2m100", "wmt21")


class M2M100Vocabulary:
    """The numbering of ``vocab.json``, followed by the languages.

    Pieces are looked up as strings: the sentencepiece model's own numbers mean nothing here.
    """

    def __init__(
        self, pieces: SentencePieceModel, word_ids: Mapping[str, int], codes: Sequence[str]
    ) -> None:
        """Lay the ids out after the size of the vocabulary.

        Args:
            pieces: The content of ``sentencepiece.bpe.model``.
            word_ids: The content of ``vocab.json``.
            codes: The languages' codes, in id order.

        Raises:
            CheckpointError: If the ids are not 0, 1, 2 ... once each, or a special token that
                every sentence needs has none.
        """
        if sorted(word_ids.values()) != list(range(len(word_ids))):
            raise CheckpointError(
                f"The ids of vocab.json must be 0 to {len(word_ids) - 1}, once each, because the "
                "languages' ids follow them. Fetch vocab.json from the model's own repository."
            )
        missing = [token for token in _NEEDED if token not in word_ids]
        if missing:
            raise CheckpointError(
                f"vocab.json has no {' '.join(missing)}, which every sentence needs. "
                "Fetch vocab.json from the model's own repository."
            )
        self._pieces = pieces
        self._word_ids = dict(word_ids)
        self._words = {word_id: word for word, word_id in word_ids.items()}
        self.language_ids = {code: len(word_ids) + i for i, code in enumerate(codes)}
        # Nothing is ever written with <s>: a vocabulary without it gets an id for it at the end.
        after_languages = len(word_ids) + len(codes)
        self.special_ids = {BOS: word_ids.get(BOS, after_languages)}
        self.special_ids |= {token: word_ids[token] for token in _NEEDED}
        self.size = after_languages + (BOS not in word_ids)

    def language_token(self, code: str) -> str:
        """Return the token of a language: its code between double underscores."""
        return f"__{code}__"

    def encode(self, text: str) -> list[str]:
        """Cut text into pieces."""
        return self._pieces.encode(text)

    def piece_id(self, piece: str) -> int | None:
        """Return an ordinary piece's id, if it has one."""
        return self._word_ids.get(piece)

    def piece(self, token_id: int) -> str | None:
        """Return the ordinary piece with an id, if there is one."""
        return self._words.get(token_id)

    def join(self, tokens: Sequence[str], special: Collection[str]) -> str:
        """Join tokens: special tokens as they stand, the pieces between them by sentencepiece."""
        texts: list[str] = []
        run: list[str] = []
        for token in tokens:
            if token in special:
                texts += [self._pieces.decode(run), token]
                run = []
            else:
                run.append(token)
        return "".join([*texts, self._pieces.decode(run)]).strip()


class M2M100Tokenizer(PieceTokenizer):
    """The tokenizer of M2M100 and WMT21; see ``Tokenizer``.

    Agrees token for token with transformers 4.57.1's M2M100Tokenizer as the published
    repositories set it up, with every language a special token
    (``tests/tokenizers/test_goldens.py``).
    """

    def __init__(
        self,
        pieces: SentencePieceModel,
        word_ids: Mapping[str, int],
        language_codes: str = "m2m100",
    ) -> None:
        """Make the tokenizer of a sentencepiece model and a vocabulary.

        Args:
            pieces: The content of ``sentencepiece.bpe.model``.
            word_ids: The content of ``vocab.json``.
            language_codes: The list of languages, ``"m2m100"`` or ``"wmt21"``.

        Raises:
            CheckpointError: If there is no such list, or the vocabulary is unusable.
        """
        if language_codes not in _LANGUAGE_CODES:
            raise CheckpointError(
                f"The tokenizer's language_codes is {language_codes!r}; known are "
                f"{' and '.join(_LANGUAGE_CODES)}. Correct tokenizer_config.json."
            )
        table = TABLES[language_codes]
        super().__init__(M2M100Vocabulary(pieces, word_ids, table.codes), table)


class Small100Tokenizer(M2M100Tokenizer):
    """The tokenizer of SMaLL-100; see ``Tokenizer``.

    Same ids as M2M100, but the encoder is told the target language and the decoder nothing.
    """

    def encode_source(
        self, text: str, src_lang: str, tgt_lang: str, *, special_tokens_in_text: bool = False
    ) -> list[int]:
        """Return what the encoder reads: the target language, the text, the end."""
        # The model never sees the source language; a wrong name is an error all the same.
        self.resolve_language(src_lang)
        ids = self.encode_text(text, special_tokens_in_text=special_tokens_in_text)
        return self._sentence(tgt_lang, ids)

    def encode_target(
        self, text: str, tgt_lang: str, *, special_tokens_in_text: bool = False
    ) -> list[int]:
        """Return the labels: the text and the end."""
        self.resolve_language(tgt_lang)
        return [
            *self.encode_text(text, special_tokens_in_text=special_tokens_in_text),
            self.eos_id,
        ]

    def forced_tokens(self, tgt_lang: str) -> list[int]:
        """Return the ids that generation must begin with: none."""
        self.resolve_language(tgt_lang)
        return []
