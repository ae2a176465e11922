"""The part of a documented tokenizer that makes model inputs of token ids."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moe_mt.errors import InputError
from moe_mt.pretrained.tokenization.batch_encoding import BatchEncoding, as_lists
from moe_mt.pretrained.tokenization.batches import pad_row, padded_length, truncate
from moe_mt.pretrained.tokenization.languages import TranslationVocabulary
from moe_mt.pretrained.tokenization.options import (
    DO_NOT_PAD,
    DO_NOT_TRUNCATE,
    LONGEST_FIRST,
    UNLIMITED,
    EncodingOptions,
    LengthPlan,
    plan_lengths,
)

__all__ = ["RowTokenizer"]

_logger = logging.getLogger(__name__)


class RowTokenizer(TranslationVocabulary):
    """Ids → ids with special tokens, truncated and padded, and their masks."""

    model_input_names: list[str]
    """The names of what a call returns, that of the ids first."""

    model_max_length: int = UNLIMITED
    padding_side: str = "right"
    truncation_side: str = "right"
    verbose: bool = True
    deprecation_warnings: dict[str, bool]
    """What has been logged once; under a name that code sets to be told nothing."""

    @property
    def max_len_single_sentence(self) -> int:
        """Tokens that a text may have beside the special ones."""
        return self.model_max_length - self.num_special_tokens_to_add()

    @property
    def max_len_sentences_pair(self) -> int:
        """Tokens that a pair of texts may have beside the special ones."""
        return self.model_max_length - self.num_special_tokens_to_add(pair=True)

    def prepare_for_model(
        self,
        ids: Sequence[int],
        pair_ids: Sequence[int] | None = None,
        **options: Any,  # noqa: ANN401
    ) -> BatchEncoding:
        """Turn the ids of one text, or one pair, into model inputs.

        Args:
            ids: The text's ids without special tokens.
            pair_ids: Those of a second text.
            **options: See ``EncodingOptions``.
        """
        read = EncodingOptions.read(options)
        plan = self._plan(read)
        second = None if pair_ids is None else list(pair_ids)
        rows = self._padded([self._row(list(ids), second, read, plan)], read, plan)
        row = {name: values[0] for name, values in rows.items()}
        if read.return_length:
            row["length"] = len(row[self._ids_name])
        return BatchEncoding(row, read.return_tensors, read.prepend_batch_axis)

    def pad(
        self,
        encoded_inputs: Any,  # noqa: ANN401
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Pad model inputs that were made before.

        Args:
            encoded_inputs: What a call returned, one or a list of them, or a mapping or list of
                mappings like it; values are lists, tensors or arrays. Ids and masks are padded,
                other values are not.
            padding: This and what follows: see ``EncodingOptions``.
            max_length: See there.
            pad_to_multiple_of: See there.
            padding_side: See there.
            return_attention_mask: See there.
            return_tensors: See there; where the ids given are tensors or arrays, those.
            verbose: See there.

        Returns:
            The padded inputs, in new lists.

        Raises:
            InputError: If there are no ids, or values are of unlike numbers of rows.
        """
        options = EncodingOptions(
            padding=padding,
            truncation=False,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_attention_mask=return_attention_mask,
            verbose=verbose,
        )
        inputs, tensor_type = self._read_inputs(encoded_inputs)
        ids = inputs[self._ids_name]
        if not len(ids):
            masked = {**inputs, "attention_mask": []} if return_attention_mask else inputs
            return BatchEncoding(masked)
        is_one = not isinstance(ids[0], list)
        columns = {name: [value] for name, value in inputs.items()} if is_one else inputs
        for name, values in columns.items():
            if len(values) != len(columns[self._ids_name]):
                raise InputError(
                    f"{name!r} has {len(values)} rows and {self._ids_name!r} "
                    f"{len(columns[self._ids_name])}: all must have as many."
                )
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        padded = self._padded(rows, options, self._plan(options))
        if is_one:
            padded = {name: values[0] for name, values in padded.items()}
        return BatchEncoding(padded, return_tensors or tensor_type)

    def truncate_sequences(
        self,
        ids: list[int],
        pair_ids: list[int] | None = None,
        num_tokens_to_remove: int = 0,
        truncation_strategy: str = LONGEST_FIRST,
        stride: int = 0,
    ) -> tuple[list[int], list[int] | None, list[int]]:
        """Cut tokens off a text or a pair; see ``truncate``."""
        return truncate(
            ids,
            pair_ids,
            remove=num_tokens_to_remove,
            strategy=truncation_strategy,
            stride=stride,
            side=self.truncation_side,
        )

    @property
    def _ids_name(self) -> str:
        return self.model_input_names[0]

    def _plan(self, options: EncodingOptions) -> LengthPlan:
        plan = plan_lengths(
            options,
            model_max_length=self.model_max_length,
            padding_side=self.padding_side,
            warn=self._warn if options.verbose else _say_nothing,
        )
        if plan.padding != DO_NOT_PAD and self.pad_token is None:
            raise InputError(
                f"padding={options.padding!r} was asked for and the tokenizer has no pad_token: "
                "set one, such as tokenizer.pad_token = '<pad>'."
            )
        return plan

    def _row(
        self,
        ids: list[int],
        pair_ids: list[int] | None,
        options: EncodingOptions,
        plan: LengthPlan,
    ) -> dict[str, Any]:
        """Return everything about one text or pair but for its padding."""
        is_pair = pair_ids is not None
        if options.return_overflowing_tokens and is_pair and plan.truncation == LONGEST_FIRST:
            raise InputError(
                "return_overflowing_tokens was asked for with a pair truncated 'longest_first', "
                "where tokens are cut off both: choose truncation='only_first' or 'only_second'."
            )
        count = len(ids) + len(pair_ids or ())
        added = self.num_special_tokens_to_add() if options.add_special_tokens else 0
        may_cut = plan.truncation != DO_NOT_TRUNCATE
        remove = count + added - plan.max_length if may_cut and plan.max_length else 0
        ids, pair_ids, overflow = self.truncate_sequences(
            ids, pair_ids, remove, plan.truncation, options.stride
        )
        row: dict[str, Any] = {}
        if options.return_overflowing_tokens:
            row["overflowing_tokens"] = overflow
            row["num_truncated_tokens"] = count - len(ids) - len(pair_ids or ())
        row |= self._framed(ids, pair_ids, options)
        if options.verbose and plan.max_length is None:
            self._warn_of_length(len(row[self._ids_name]))
        return row

    def _framed(
        self, ids: list[int], pair_ids: list[int] | None, options: EncodingOptions
    ) -> dict[str, Any]:
        """Return the ids with or without special tokens, and which of them are what."""
        second = pair_ids or []
        framed, types = [*ids, *second], [0] * len(ids) + [1] * len(second)
        special = [0] * len(framed)
        if options.add_special_tokens:
            framed = self.build_inputs_with_special_tokens(ids, pair_ids)
            types = self.create_token_type_ids_from_sequences(ids, pair_ids)
            special = self.get_special_tokens_mask(ids, pair_ids)
        row = {self._ids_name: framed}
        if self._is_returned("token_type_ids", options.return_token_type_ids):
            row["token_type_ids"] = types
        if options.return_special_tokens_mask:
            row["special_tokens_mask"] = special
        return row

    def _padded(
        self, rows: Sequence[dict[str, Any]], options: EncodingOptions, plan: LengthPlan
    ) -> dict[str, list[Any]]:
        """Return the columns of rows, padded and with their masks."""
        if not rows:
            return {name: [] for name in self.model_input_names}
        length = padded_length([row[self._ids_name] for row in rows], plan)
        with_mask = self._is_returned("attention_mask", options.return_attention_mask)
        columns: dict[str, list[Any]] = {}
        for row in rows:
            masked = dict(row)
            if with_mask:
                masked.setdefault("attention_mask", [1] * len(row[self._ids_name]))
            padded = pad_row(
                masked,
                length,
                ids_name=self._ids_name,
                pad_id=self.pad_token_id,
                side=plan.padding_side,
            )
            for name, value in padded.items():
                columns.setdefault(name, []).append(value)
        return columns

    def _read_inputs(self, encoded_inputs: Any) -> tuple[dict[str, Any], str | None]:  # noqa: ANN401
        """Return model inputs as lists, and which tensors they were."""
        if isinstance(encoded_inputs, (list, tuple)) and encoded_inputs:
            first = encoded_inputs[0]
            if isinstance(first, Mapping):
                encoded_inputs = {name: [row[name] for row in encoded_inputs] for name in first}
        if not isinstance(encoded_inputs, Mapping) or self._ids_name not in encoded_inputs:
            found = list(encoded_inputs) if isinstance(encoded_inputs, Mapping) else encoded_inputs
            raise InputError(
                f"pad needs model inputs with {self._ids_name!r}, one or a list of them; it was "
                f"given {found!r}."
            )
        ids = encoded_inputs[self._ids_name]
        one = ids[0] if isinstance(ids, (list, tuple)) and ids else ids
        tensor_type = "pt" if isinstance(one, torch.Tensor) else None
        if tensor_type is None and hasattr(one, "tolist"):
            tensor_type = "np"
        return as_lists(encoded_inputs), tensor_type

    def _is_returned(self, name: str, asked: bool | None) -> bool:
        return name in self.model_input_names if asked is None else asked

    def _warn_of_length(self, length: int) -> None:
        if length > self.model_max_length:
            self._warn(
                "length",
                f"A text has {length} tokens and the model was made for {self.model_max_length}: "
                "split it into sentences, or give truncation=True to cut it.",
            )

    def _warn(self, name: str, message: str) -> None:
        """Log a message, once for each name."""
        if not self.deprecation_warnings.get(name):
            self.deprecation_warnings[name] = True
            _logger.warning("%s", message)


def _say_nothing(name: str, message: str) -> None:
    """Log nothing."""
