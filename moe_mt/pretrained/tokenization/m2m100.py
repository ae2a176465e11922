"""The documented tokenizers of M2M100, WMT21 and SMaLL-100."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from moe_mt.errors import InputError
from moe_mt.pretrained.tokenization.batch_encoding import BatchEncoding
from moe_mt.pretrained.tokenization.files import write_file
from moe_mt.pretrained.tokenization.tokenizer import PretrainedTokenizer
from moe_mt.tokenizers import (
    M2M100Vocabulary,
    SentencePieceModel,
    list_languages,
    published_language_codes,
    read_word_ids,
)

__all__ = ["FAIRSEQ_LANGUAGE_CODES", "M2M100Tokenizer", "SMALL100Tokenizer"]

FAIRSEQ_LANGUAGE_CODES = {
    family: [code for code, _ in list_languages(family)] for family in ("m2m100", "wmt21")
}
"""The languages' codes in id order, by ``language_codes``."""


class M2M100Tokenizer(PretrainedTokenizer):
    """The tokenizer of M2M100 and WMT21, as documented in transformers 4.34.

    Texts are ``[language] X [eos]``, source and target alike. Languages are always special tokens.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {
        "vocab_file": "vocab.json",
        "spm_file": "sentencepiece.bpe.model",
        "tokenizer_config_file": "tokenizer_config.json",
    }
    _kind = "m2m100"
    _default_source = "en"
    _seq2seq_languages = ("en", "ro")
    _new_language = re.compile(r"__(.+)__")

    def __init__(  # noqa: PLR0913
        self,
        vocab_file: str,
        spm_file: str,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        bos_token: str = "<s>",
        eos_token: str = "</s>",
        sep_token: str = "</s>",
        pad_token: str = "<pad>",
        unk_token: str = "<unk>",
        language_codes: str = "m2m100",
        sp_model_kwargs: Mapping[str, Any] | None = None,
        num_madeup_words: int = 8,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Make the tokenizer of a vocabulary.

        Args:
            vocab_file: Path of ``vocab.json``: the id of every piece.
            spm_file: Path of ``sentencepiece.bpe.model``, which cuts text into pieces.
            src_lang: The source language; English if ``None``.
            tgt_lang: The target language.
            bos_token: Begin of sentence; nothing is written with it.
            eos_token: End of sentence.
            sep_token: As ``eos_token``.
            pad_token: Padding.
            unk_token: What has no id.
            language_codes: The list of languages, ``"m2m100"`` or ``"wmt21"``.
            sp_model_kwargs: Settings of sentencepiece for subword sampling: ``enable_sampling``,
                ``alpha``, ``nbest_size``.
            num_madeup_words: Kept for files: rows of the model that have no token.
            **kwargs: ``additional_special_tokens``, ``model_max_length``, ``padding_side``,
                ``truncation_side``, ``clean_up_tokenization_spaces``, ``split_special_tokens`` and
                the like; others are kept in ``init_kwargs`` and saved.

        Raises:
            CheckpointError: If a file cannot be read or is not what it should be.
            InputError: If there is no such list of languages.
            LanguageCodeError: If the model has no such language; also a ``KeyError``.
        """
        if language_codes not in FAIRSEQ_LANGUAGE_CODES:
            raise InputError(f"language_codes is {language_codes!r}; choose 'm2m100' or 'wmt21'.")
        self.vocab_file, self.spm_file = vocab_file, spm_file
        self.language_codes = self._language_list = language_codes
        self.sp_model_kwargs = dict(sp_model_kwargs or {})
        self.num_madeup_words = num_madeup_words
        self.encoder = read_word_ids(Path(vocab_file))
        self._pieces = SentencePieceModel.load(Path(spm_file), self.sp_model_kwargs)
        codes = FAIRSEQ_LANGUAGE_CODES[language_codes]
        settings = {
            "src_lang": src_lang,
            "tgt_lang": tgt_lang,
            "bos_token": bos_token,
            "eos_token": eos_token,
            "sep_token": sep_token,
            "pad_token": pad_token,
            "unk_token": unk_token,
            "language_codes": language_codes,
            "sp_model_kwargs": self.sp_model_kwargs,
            "num_madeup_words": num_madeup_words,
            **kwargs,
        }
        super().__init__(M2M100Vocabulary(self._pieces, self.encoder, codes), {}, settings)

    @property
    def vocab_size(self) -> int:
        """How many entries ``vocab.json`` has; languages and added tokens follow them."""
        return len(self.encoder)

    @property
    def cur_lang_id(self) -> int:
        """The id of the language that texts are framed with now."""
        return self._language_id

    @property
    def lang_code_to_token(self) -> dict[str, str]:
        """The token of each language, such as ``__en__``, by its code."""
        return self._language_tokens()

    @property
    def lang_token_to_id(self) -> dict[str, int]:
        """The id of each language by its token."""
        return {token: self._tokens.ids[token] for token in self._language_tokens().values()}

    @property
    def id_to_lang_token(self) -> dict[int, str]:
        """The token of each language by its id."""
        return {language_id: token for token, language_id in self.lang_token_to_id.items()}

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Write vocab.json and sentencepiece.bpe.model; see the base class."""
        folder, prefix = Path(save_directory), f"{filename_prefix}-" if filename_prefix else ""
        words = folder / f"{prefix}{self.vocab_files_names['vocab_file']}"
        pieces = folder / f"{prefix}{self.vocab_files_names['spm_file']}"
        write_file(words, json.dumps(self.encoder, indent=2).encode())
        write_file(pieces, self._pieces.serialized)
        return str(words), str(pieces)

    @classmethod
    def _complete(cls, settings: dict[str, Any], folder: Path) -> None:
        if settings.get("language_codes") is None:
            words = len(read_word_ids(Path(settings["vocab_file"])))
            settings["language_codes"] = published_language_codes(folder, words)


class SMALL100Tokenizer(M2M100Tokenizer):
    """The tokenizer of SMaLL-100, as its repository has it.

    The encoder reads ``[target language] X [eos]`` and labels are ``X [eos]``: the source language
    does not matter, and generation needs no ``forced_bos_token_id``.
    """

    _kind = "small100"

    @property
    def tgt_lang(self) -> str | None:
        """The code of the target language; setting it takes effect at once."""
        return self._tgt_lang

    @tgt_lang.setter
    def tgt_lang(self, new_tgt_lang: str | None) -> None:
        self._tgt_lang = self._code(new_tgt_lang or self._default_source, "tgt_lang")
        self._switch_to_input_mode()

    def set_lang_special_tokens(self, src_lang: str) -> None:
        """Put the tokens of source text that is to become this language around texts."""
        self._frame_with(self.get_lang_id(src_lang))

    def set_src_lang_special_tokens(self, src_lang: str) -> None:
        """Check the language; the model does not read it."""
        self.get_lang_id(src_lang)
        self._switch_to_input_mode()

    def set_tgt_lang_special_tokens(self, tgt_lang: str) -> None:
        """Put the tokens of target text, which has no language, around texts from now on."""
        self._frame_with(self.get_lang_id(tgt_lang))
        self.prefix_tokens = []

    def _switch_to_input_mode(self) -> None:
        self.set_lang_special_tokens(self._required(self.tgt_lang, "tgt_lang"))

    def _build_translation_inputs(
        self,
        raw_inputs: Any,  # noqa: ANN401
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        **options: Any,  # noqa: ANN401
    ) -> BatchEncoding:
        self.tgt_lang = self._required(tgt_lang, "tgt_lang")
        return self(raw_inputs, **options)
