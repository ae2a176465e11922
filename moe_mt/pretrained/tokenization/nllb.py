"""The documented tokenizer of NLLB-200 and NLLB-MoE."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from moe_mt.pretrained.tokenization.files import write_file
from moe_mt.pretrained.tokenization.tokenizer import PretrainedTokenizer
from moe_mt.pretrained.tokenization.tokens import as_added_token
from moe_mt.tokenizers import (
    AddedToken,
    NllbVocabulary,
    SentencePieceModel,
    list_languages,
    resolve_language,
)

__all__ = ["FAIRSEQ_LANGUAGE_CODES", "NllbTokenizer"]

FAIRSEQ_LANGUAGE_CODES = [code for code, _ in list_languages("nllb")]
"""The 202 languages' codes in id order."""


class NllbTokenizer(PretrainedTokenizer):
    """The tokenizer of NLLB-200 and NLLB-MoE, as documented in transformers 4.36.

    Texts are ``[language] X [eos]``, source and target alike. Languages are always special tokens
    and have their published ids, whatever else is added.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": "sentencepiece.bpe.model"}
    fairseq_offset = 1
    """What a token's id is beyond the sentencepiece model's."""

    _kind = "nllb"
    _default_source = "eng_Latn"
    _seq2seq_languages = ("eng_Latn", "fra_Latn")

    def __init__(  # noqa: PLR0913
        self,
        vocab_file: str,
        bos_token: str | AddedToken = "<s>",
        eos_token: str | AddedToken = "</s>",
        sep_token: str | AddedToken = "</s>",
        cls_token: str | AddedToken = "<s>",
        unk_token: str | AddedToken = "<unk>",
        pad_token: str | AddedToken = "<pad>",
        mask_token: str | AddedToken | None = "<mask>",
        tokenizer_file: str | None = None,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        sp_model_kwargs: Mapping[str, Any] | None = None,
        additional_special_tokens: Sequence[str | AddedToken] | None = None,
        legacy_behaviour: bool = False,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Make the tokenizer of a sentencepiece model.

        Args:
            vocab_file: Path of ``sentencepiece.bpe.model``.
            bos_token: Begin of sentence; nothing is written with it.
            eos_token: End of sentence.
            sep_token: As ``eos_token``.
            cls_token: As ``bos_token``.
            unk_token: What has no id.
            pad_token: Padding.
            mask_token: A token whose row of the model had another use in training.
            tokenizer_file: Without effect: ids follow from ``vocab_file``.
            src_lang: The source language; English if ``None``.
            tgt_lang: The target language.
            sp_model_kwargs: Settings of sentencepiece for subword sampling: ``enable_sampling``,
                ``alpha``, ``nbest_size``.
            additional_special_tokens: Special tokens to add, such as new languages.
            legacy_behaviour: Whether texts are ``X [eos, language]``, as before transformers
                4.28, for models that were fine-tuned with that.
            **kwargs: ``model_max_length``, ``padding_side``, ``truncation_side``,
                ``clean_up_tokenization_spaces``, ``split_special_tokens`` and the like; others
                are kept in ``init_kwargs`` and saved.

        Raises:
            CheckpointError: If the file cannot be read or is not what it should be.
            LanguageCodeError: If the model has no such language; also a ``KeyError``.
        """
        self.vocab_file = vocab_file
        self.sp_model_kwargs = dict(sp_model_kwargs or {})
        self.legacy_behaviour = legacy_behaviour
        self._pieces = SentencePieceModel.load(Path(vocab_file), self.sp_model_kwargs)
        self.sp_model_size = len(self._pieces)
        vocabulary = NllbVocabulary(self._pieces)
        settings = {
            "bos_token": _special(bos_token),
            "eos_token": _special(eos_token),
            "unk_token": _special(unk_token),
            "sep_token": sep_token,
            "cls_token": cls_token,
            "pad_token": _special(pad_token),
            "mask_token": _special(mask_token, is_word=True),
            "tokenizer_file": tokenizer_file,
            "src_lang": src_lang,
            "tgt_lang": tgt_lang,
            "additional_special_tokens": additional_special_tokens,
            "sp_model_kwargs": self.sp_model_kwargs,
            "legacy_behaviour": legacy_behaviour,
            **kwargs,
        }
        ids = vocabulary.special_ids
        places = {
            ids["<s>"]: settings["bos_token"],
            ids["<pad>"]: settings["pad_token"],
            ids["</s>"]: settings["eos_token"],
            ids["<unk>"]: settings["unk_token"],
            ids["<mask>"]: settings["mask_token"],
        }
        layout = {i: token for i, token in places.items() if token is not None}
        super().__init__(vocabulary, layout, settings)

    @property
    def vocab_size(self) -> int:
        """Ids of the published layout: pieces, special tokens, languages and the mask."""
        return self._tokens.vocabulary.size

    @property
    def cur_lang_code(self) -> int:
        """The id of the language that texts are framed with now."""
        return self._language_id

    @property
    def fairseq_tokens_to_ids(self) -> dict[str, int]:
        """The id of every token of the published layout that is no piece."""
        ids = self._tokens.ids.items()
        return {token: token_id for token, token_id in ids if token_id < self.vocab_size}

    @property
    def fairseq_ids_to_tokens(self) -> dict[int, str]:
        """The token of every id of the published layout that is no piece's."""
        return {token_id: token for token, token_id in self.fairseq_tokens_to_ids.items()}

    def create_token_type_ids_from_sequences(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """Return zeros, as many as ``build_inputs_with_special_tokens`` returns ids."""
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Write sentencepiece.bpe.model; see the base class."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        path = Path(save_directory) / f"{prefix}{self.vocab_files_names['vocab_file']}"
        write_file(path, self._pieces.serialized)
        return (str(path),)

    def _frame_with(self, language_id: int) -> None:
        super()._frame_with(language_id)
        if self.legacy_behaviour:
            self.prefix_tokens, self.suffix_tokens = [], [self.eos_token_id, language_id]

    def _convert_token_to_id(self, token: str) -> int:
        # fairseq's own spelling of sat_Beng; transformers takes it for <unk> without a word.
        is_alias = token == "sat_Olck" and token not in self._tokens.ids
        return super()._convert_token_to_id(resolve_language(token) if is_alias else token)


def _special(token: str | AddedToken | None, is_word: bool = False) -> AddedToken | None:
    """Return a special token; one that is a word takes the space before it."""
    if not isinstance(token, str):
        return None if token is None else as_added_token(token, special=True)
    return AddedToken(token, lstrip=is_word, normalized=is_word, special=True)
