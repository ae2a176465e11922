"""The part of a documented tokenizer that makes model inputs of texts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from moe_mt.errors import InputError
from moe_mt.pretrained.tokenization.batch_encoding import BatchEncoding
from moe_mt.pretrained.tokenization.options import EncodingOptions
from moe_mt.pretrained.tokenization.rows import RowTokenizer

__all__ = ["EncodingTokenizer"]


class EncodingTokenizer(RowTokenizer):
    """Texts → ids and masks.

    Every method that encodes takes the keyword arguments of ``EncodingOptions``.
    """

    _seq2seq_languages = ("", "")

    def __call__(  # noqa: PLR0913
        self,
        text: Any = None,  # noqa: ANN401
        text_pair: Any = None,  # noqa: ANN401
        text_target: Any = None,  # noqa: ANN401
        text_pair_target: Any = None,  # noqa: ANN401
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        *,
        return_tensors: str | None = None,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        **options: Any,  # noqa: ANN401
    ) -> BatchEncoding:
        """Turn texts into model inputs.

        Args:
            text: Source text: one string, a list of them, or a list of pairs. With
                ``is_split_into_words`` a text is a list of words.
            text_pair: Second text, or one per text of the list.
            text_target: Target text. Given with ``text`` it becomes ``labels``; given alone,
                ``input_ids``.
            text_pair_target: Second target text.
            add_special_tokens: This and what follows: see ``EncodingOptions``.
            padding: See there.
            truncation: See there.
            max_length: See there.
            return_tensors: See there.
            src_lang: The source language of this call; the tokenizer's own if ``None``.
            tgt_lang: The target language of this call; the tokenizer's own if ``None``.
            **options: See there.

        Returns:
            ``input_ids`` and ``attention_mask``, and what else was asked for: one row for a
            string, a list of rows, or with ``return_tensors`` int64 tensors (rows, length).

        Raises:
            InputError: If text is no text, or an option is unknown or makes no sense.
            LanguageCodeError: If a language that is needed is unknown or not set.
        """
        if text is None and text_target is None:
            raise InputError("A tokenizer call needs text or text_target.")
        options |= {
            "add_special_tokens": add_special_tokens,
            "padding": padding,
            "truncation": truncation,
            "max_length": max_length,
            "return_tensors": return_tensors,
        }
        with self._languages(src_lang, tgt_lang):
            if text is None:
                return self._encode_target(text_target, text_pair_target, options)
            self._switch_to_usual_mode()
            encoding = self._encode(text, text_pair, options)
            if text_target is not None:
                labels = self._encode_target(text_target, text_pair_target, options)
                encoding["labels"] = labels["input_ids"]
        return encoding

    def encode(self, text: Any, text_pair: Any = None, **options: Any) -> Any:  # noqa: ANN401
        """Return the ids of a text or a pair; see ``encode_plus``."""
        return self.encode_plus(text, text_pair, **options)["input_ids"]

    def encode_plus(
        self,
        text: Any,  # noqa: ANN401
        text_pair: Any = None,  # noqa: ANN401
        **options: Any,  # noqa: ANN401
    ) -> BatchEncoding:
        """Turn one text, or one pair, into model inputs, in the mode and language that are set.

        Args:
            text: A string; also a list of tokens or of ids, or with ``is_split_into_words`` words.
            text_pair: A second one.
            **options: See ``EncodingOptions``.
        """
        read = EncodingOptions.read(options)
        ids = self._ids(text, read)
        pair_ids = None if text_pair is None else self._ids(text_pair, read)
        return self.prepare_for_model(ids, pair_ids, **{**options, "prepend_batch_axis": True})

    def batch_encode_plus(
        self,
        batch_text_or_text_pairs: Sequence[Any],
        **options: Any,  # noqa: ANN401
    ) -> BatchEncoding:
        """Turn texts, or pairs, into model inputs, in the mode and language that are set.

        Args:
            batch_text_or_text_pairs: Strings, or pairs of them; also lists of words.
            **options: See ``EncodingOptions``.
        """
        read = EncodingOptions.read(options)
        plan = self._plan(read)
        rows: list[dict[str, Any]] = []
        for item in batch_text_or_text_pairs:
            text, pair = self._pair(item, read)
            pair_ids = None if pair is None else self._ids(pair, read)
            rows.append(self._row(self._ids(text, read), pair_ids, read, plan))
            if read.return_length:
                rows[-1]["length"] = len(rows[-1][self._ids_name])
        return BatchEncoding(self._padded(rows, read, plan), read.return_tensors)

    def prepare_seq2seq_batch(
        self,
        src_texts: Sequence[str],
        src_lang: str | None = None,
        tgt_texts: Sequence[str] | None = None,
        tgt_lang: str | None = None,
        max_length: int | None = None,
        max_target_length: int | None = None,
        padding: bool | str = "longest",
        **options: Any,  # noqa: ANN401
    ) -> BatchEncoding:
        """Set both languages and turn source texts, and target texts as labels, into model inputs.

        Args:
            src_texts: The source texts.
            src_lang: The source language; the documented default of the class if ``None``.
            tgt_texts: The target texts.
            tgt_lang: The target language; the documented default of the class if ``None``.
            max_length: Tokens per source text.
            max_target_length: Tokens per target text; ``max_length`` if ``None``.
            padding: See ``EncodingOptions``.
            **options: See there; ``truncation`` is on by default.
        """
        default_source, default_target = self._seq2seq_languages
        self.src_lang = src_lang or default_source
        self.tgt_lang = tgt_lang or default_target
        options = {"truncation": True, "padding": padding, **options}
        source_length = self.model_max_length if max_length is None else max_length
        inputs = self(src_texts, max_length=source_length, **options)
        if tgt_texts is not None:
            options["max_length"] = max_target_length or source_length
            inputs["labels"] = self(text_target=tgt_texts, **options)["input_ids"]
        return inputs

    def _build_translation_inputs(
        self,
        raw_inputs: Any,  # noqa: ANN401
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        **options: Any,  # noqa: ANN401
    ) -> BatchEncoding:
        """Return what ``generate`` needs to translate texts from one language into another."""
        self.src_lang = self._required(src_lang, "src_lang")
        language_id = self.get_lang_id(self._required(tgt_lang, "tgt_lang"))
        inputs = self(raw_inputs, **options)
        inputs["forced_bos_token_id"] = language_id
        return inputs

    @contextmanager
    def _languages(self, src_lang: str | None, tgt_lang: str | None) -> Iterator[None]:
        """Have other languages set within, and the usual ones and mode after, come what may."""
        usual = self._src_lang, self._tgt_lang
        try:
            if src_lang is not None:
                self._src_lang = self._code(src_lang, "src_lang")
            if tgt_lang is not None:
                self._tgt_lang = self._code(tgt_lang, "tgt_lang")
            yield
        finally:
            self._src_lang, self._tgt_lang = usual
            self._switch_to_usual_mode()

    def _switch_to_usual_mode(self) -> None:
        if self._in_target_mode:
            self._switch_to_target_mode()
        else:
            self._switch_to_input_mode()

    def _encode_target(self, text: Any, pair: Any, options: Mapping[str, Any]) -> BatchEncoding:  # noqa: ANN401
        self._switch_to_target_mode()
        return self._encode(text, pair, options)

    def _encode(self, text: Any, pair: Any, options: Mapping[str, Any]) -> BatchEncoding:  # noqa: ANN401
        """Encode one text or a list of them, whichever it is."""
        is_list = isinstance(text, (list, tuple))
        if options.get("is_split_into_words"):
            is_list = is_list and bool(text) and isinstance(text[0], (list, tuple))
        if not is_list:
            return self.encode_plus(text, pair, **options)
        if pair is None:
            return self.batch_encode_plus(text, **options)
        if isinstance(pair, str) or len(pair) != len(text):
            found = "one string" if isinstance(pair, str) else f"a list of {len(pair)}"
            raise InputError(
                f"text is a list of {len(text)} and the second text is {found}: give as many."
            )
        return self.batch_encode_plus(list(zip(text, pair, strict=True)), **options)

    def _pair(self, item: Any, options: EncodingOptions) -> tuple[Any, Any]:  # noqa: ANN401
        """Return the two texts of a row of a batch; the second is ``None`` if it is one text."""
        if not isinstance(item, (list, tuple)):
            return item, None
        if options.is_split_into_words and not (item and isinstance(item[0], (list, tuple))):
            return item, None
        if len(item) != 2:
            raise InputError(
                f"A row of the batch is a list of {len(item)}: a row is a text, or a pair of "
                "them; a list of words needs is_split_into_words=True."
            )
        return item[0], item[1]

    def _ids(self, text: Any, options: EncodingOptions) -> list[int]:  # noqa: ANN401
        """Return the ids of a text: of a string, words, tokens, or of ids themselves."""
        if isinstance(text, str):
            return self._text_ids(text, options.split_special_tokens)
        if isinstance(text, (list, tuple)):
            if all(isinstance(word, str) for word in text):
                if not options.is_split_into_words:
                    return self.convert_tokens_to_ids(list(text))
                split = options.split_special_tokens
                return [i for word in text for i in self._text_ids(word, split)]
            if all(isinstance(token_id, int) for token_id in text):
                return list(text)
        raise InputError(
            f"A text is {text!r}, of type {type(text).__name__}; it must be a string, or a list "
            "of strings or of token ids."
        )
