"""NLLB-200 and NLLB-MoE: ids from the sentencepiece file, languages as ``eng_Latn``."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from moe_mt.errors import CheckpointError
from moe_mt.tokenizers.language_table import NLLB_TABLE
from moe_mt.tokenizers.piece_tokenizer import PieceTokenizer
from moe_mt.tokenizers.sentencepiece import SentencePieceModel
from moe_mt.tokenizers.special_tokens import BOS, EOS, MASK, PAD, UNK

__all__ = ["NllbIdLayout", "NllbTokenizer", "NllbVocabulary"]

# fairseq numbers <s> <pad> </s> <unk> and then the pieces; sentencepiece <unk> <s> </s> and then
# the pieces. Past these, ids differ by one.
_FAIRSEQ_OFFSET = 1
_FAIRSEQ_SPECIALS = {BOS: 0, PAD: 1, EOS: 2, UNK: 3}
_SENTENCEPIECE_RESERVED = (0, 1, 2)


@dataclass(frozen=True)
class NllbIdLayout:
    """Which ids stand for what, given the size of the sentencepiece model (256,000 published).

    Source: the published models, whose embedding rows are in this order; fairseq branch nllb.
    """

    piece_count: int
    """Pieces of the sentencepiece model, its three reserved ones included."""

    @property
    def first_language_id(self) -> int:
        """The id of the first language; below it are specials and pieces."""
        return self.piece_count + _FAIRSEQ_OFFSET

    @property
    def language_ids(self) -> dict[str, int]:
        """The id of each language, by code."""
        return {code: self.first_language_id + i for i, code in enumerate(NLLB_TABLE.codes)}

    @property
    def special_ids(self) -> dict[str, int]:
        """The ids of the special tokens that name no language."""
        return _FAIRSEQ_SPECIALS | {MASK: self.first_language_id + len(NLLB_TABLE.codes)}

    @property
    def vocab_size(self) -> int:
        """Ids that have a token."""
        return self.special_ids[MASK] + 1

    @property
    def model_rows(self) -> int:
        """Rows of the model's embedding: two data-source tags of the training follow the mask."""
        return self.vocab_size + 2

    def id_of_piece(self, piece_id: int) -> int | None:
        """Return the id for a piece of the sentencepiece model; None for its reserved ones."""
        return piece_id + _FAIRSEQ_OFFSET if piece_id > max(_SENTENCEPIECE_RESERVED) else None

    def piece_of_id(self, token_id: int) -> int | None:
        """Return the sentencepiece model's id for a token id; None if that is no piece."""
        is_piece = max(_FAIRSEQ_SPECIALS.values()) < token_id < self.first_language_id
        return token_id - _FAIRSEQ_OFFSET if is_piece else None


class NllbVocabulary:
    """NLLB's numbering of the pieces of a sentencepiece model."""

    def __init__(self, pieces: SentencePieceModel) -> None:
        """Lay the ids out after the model's size.

        Raises:
            CheckpointError: If the model does not reserve the ids NLLB's numbering rests on.
        """
        if pieces.reserved_ids != _SENTENCEPIECE_RESERVED:
            raise CheckpointError(
                "NLLB's token ids need a sentencepiece model with <unk>, <s> and </s> at ids "
                f"0, 1 and 2; this one has them at {pieces.reserved_ids} (-1: not at all). "
                "Fetch sentencepiece.bpe.model from the model's own repository."
            )
        layout = NllbIdLayout(len(pieces))
        self._pieces = pieces
        self._layout = layout
        self.special_ids = layout.special_ids
        self.language_ids = layout.language_ids
        self.size = layout.vocab_size

    def language_token(self, code: str) -> str:
        """Return the token of a language: its code."""
        return code

    def encode(self, text: str) -> list[str]:
        """Cut text into pieces."""
        return self._pieces.encode(text)

    def piece_id(self, piece: str) -> int | None:
        """Return an ordinary piece's id, if it has one."""
        return self._layout.id_of_piece(self._pieces.piece_id(piece))

    def piece(self, token_id: int) -> str | None:
        """Return the ordinary piece with an id, if there is one."""
        piece_id = self._layout.piece_of_id(token_id)
        return None if piece_id is None else self._pieces.piece(piece_id)

    def join(self, tokens: Sequence[str], special: Collection[str]) -> str:
        """Join tokens: "▁" is a space, and none is kept at the ends."""
        return "".join(tokens).replace("▁", " ").strip()


class NllbTokenizer(PieceTokenizer):
    """The tokenizer of NLLB-200 and NLLB-MoE; see ``Tokenizer``.

    Agrees token for token with transformers 4.57.1's slow NllbTokenizer
    (``tests/tokenizers/test_goldens.py``).
    """

    def __init__(self, pieces: SentencePieceModel, *, legacy_behaviour: bool = False) -> None:
        """Make the tokenizer of a sentencepiece model.

        Args:
            pieces: The content of ``sentencepiece.bpe.model``.
            legacy_behaviour: Whether sentences are ``X [eos, language]``, as transformers had it
                before 4.28, for models fine-tuned with that; default ``[language] X [eos]``.
        """
        super().__init__(NllbVocabulary(pieces), NLLB_TABLE)
        self.legacy_behaviour = legacy_behaviour
        self.mask_id = self.special_tokens[MASK]

    def _sentence(self, language: str, ids: list[int]) -> list[int]:
        if self.legacy_behaviour:
            return [*ids, self.eos_id, self.language_id(language)]
        return super()._sentence(language, ids)
