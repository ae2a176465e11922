"""The documented options of a tokenizer call and what they mean for lengths."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from moe_mt.errors import InputError

__all__ = [
    "DO_NOT_PAD",
    "DO_NOT_TRUNCATE",
    "LONGEST",
    "LONGEST_FIRST",
    "MAX_LENGTH",
    "ONLY_FIRST",
    "ONLY_SECOND",
    "UNLIMITED",
    "EncodingOptions",
    "LengthPlan",
    "plan_lengths",
]

LONGEST, MAX_LENGTH, DO_NOT_PAD = "longest", "max_length", "do_not_pad"
LONGEST_FIRST, ONLY_FIRST, ONLY_SECOND = "longest_first", "only_first", "only_second"
DO_NOT_TRUNCATE = "do_not_truncate"
_PADDINGS = (LONGEST, MAX_LENGTH, DO_NOT_PAD)
_TRUNCATIONS = (LONGEST_FIRST, ONLY_FIRST, ONLY_SECOND, DO_NOT_TRUNCATE)

UNLIMITED = int(1e30)
"""The ``model_max_length`` of a tokenizer whose files name none."""
_LARGEST_LIMIT = int(1e20)


@dataclass(frozen=True, kw_only=True)
class EncodingOptions:
    """The keyword arguments that every encoding method of a tokenizer takes."""

    add_special_tokens: bool = True
    """Whether the language and the end of sentence are put around the text."""

    padding: bool | str = False
    """``True`` or ``"longest"``: to the longest row; ``"max_length"``: to ``max_length``, or to
    the tokenizer's ``model_max_length``; ``False`` or ``"do_not_pad"``: not."""

    truncation: bool | str | None = None
    """``True`` or ``"longest_first"``: token by token from the longer text of a pair;
    ``"only_first"``, ``"only_second"``: from that text; ``False``, ``None`` or
    ``"do_not_truncate"``: not, but that ``max_length`` alone means ``"longest_first"``."""

    max_length: int | None = None
    """Tokens per row, special tokens among them, that padding and truncation work towards."""

    stride: int = 0
    """How many of the tokens that were kept ``overflowing_tokens`` repeats."""

    is_split_into_words: bool = False
    """Whether a list of strings is one text, cut into words already."""

    pad_to_multiple_of: int | None = None
    """What the padded length shall be a multiple of."""

    padding_side: str | None = None
    """``"right"`` or ``"left"``; the tokenizer's own if ``None``."""

    return_tensors: str | None = None
    """``"pt"``: torch tensors of int64; ``"np"``: NumPy arrays; ``None``: lists."""

    return_token_type_ids: bool | None = None
    """Whether to return ``token_type_ids``: 0 for the first text of a pair, 1 for the second."""

    return_attention_mask: bool | None = None
    """Whether to return ``attention_mask``: 1 for tokens, 0 for padding; default yes."""

    return_overflowing_tokens: bool = False
    """Whether to return ``overflowing_tokens`` and ``num_truncated_tokens``."""

    return_special_tokens_mask: bool = False
    """Whether to return ``special_tokens_mask``: 1 for special tokens and padding."""

    return_offsets_mapping: bool = False
    """Only tokenizers in Rust can; ``True`` raises ``NotImplementedError``."""

    return_length: bool = False
    """Whether to return ``length``, the number of tokens."""

    verbose: bool = True
    """Whether questionable settings are logged."""

    split_special_tokens: bool | None = None
    """Whether what looks like a special token in text is cut like text; the tokenizer's own
    setting if ``None``."""

    pad_to_max_length: bool = False
    """Older spelling of ``padding="max_length"``."""

    prepend_batch_axis: bool = False
    """Whether tensors of one text get a first axis of one row."""

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> "EncodingOptions":
        """Return the options with these values.

        Raises:
            InputError: If there is no option of a name; ``NotImplementedError`` for
                ``return_offsets_mapping``.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise InputError(f"A tokenizer call has no argument {name!r}.{hint}")
        if options.get("return_offsets_mapping"):
            raise NotImplementedError(
                "return_offsets_mapping needs a tokenizer in Rust; this one keeps no offsets."
            )
        return cls(**options)


@dataclass(frozen=True, kw_only=True)
class LengthPlan:
    """What is to be padded and truncated, and to which length."""

    padding: str
    truncation: str
    max_length: int | None
    pad_to_multiple_of: int | None
    padding_side: str


def plan_lengths(
    options: EncodingOptions,
    *,
    model_max_length: int,
    padding_side: str,
    warn: Callable[[str, str], None],
) -> LengthPlan:
    """Settle the padding, the truncation and the length they work towards.

    Args:
        options: What the caller asked for.
        model_max_length: The length where the caller gives none.
        padding_side: The side where the caller gives none.
        warn: Called with a name and a message for each questionable setting.

    Raises:
        InputError: If a value is unknown, or values exclude each other.
    """
    padding, truncation = _padding(options), _truncation(options)
    if options.max_length is not None and options.padding is False and options.truncation is None:
        warn(
            "truncation",
            "max_length was given without truncation: texts are cut to it, as by "
            "truncation=True. Say so, or give truncation=False to cut nothing.",
        )
        truncation = LONGEST_FIRST
    if options.padding is True and options.max_length is not None and truncation == DO_NOT_TRUNCATE:
        warn(
            "padding",
            "max_length has no effect with padding=True and no truncation: rows are padded to "
            'the longest of them. To pad to max_length, give padding="max_length".',
        )
    max_length = options.max_length
    if max_length is None and (padding == MAX_LENGTH or truncation != DO_NOT_TRUNCATE):
        if model_max_length > _LARGEST_LIMIT:
            warn(
                "no max_length",
                f"padding={options.padding!r}, truncation={options.truncation!r}: no max_length "
                "was given and the tokenizer has no model_max_length, so that rows are neither "
                "truncated nor padded to one.",
            )
            padding = DO_NOT_PAD if padding == MAX_LENGTH else padding
            truncation = DO_NOT_TRUNCATE
        else:
            max_length = model_max_length
    plan = LengthPlan(
        padding=padding,
        truncation=truncation,
        max_length=max_length,
        pad_to_multiple_of=options.pad_to_multiple_of,
        padding_side=options.padding_side or padding_side,
    )
    _check(plan)
    return plan


def _padding(options: EncodingOptions) -> str:
    padding = options.padding
    if options.pad_to_max_length and padding is False:
        padding = LONGEST if options.max_length is None else MAX_LENGTH
    if isinstance(padding, bool):
        return LONGEST if padding else DO_NOT_PAD
    return _one_of("padding", padding, _PADDINGS)


def _truncation(options: EncodingOptions) -> str:
    truncation = options.truncation
    if truncation is None or isinstance(truncation, bool):
        return LONGEST_FIRST if truncation else DO_NOT_TRUNCATE
    return _one_of("truncation", truncation, _TRUNCATIONS)


def _check(plan: LengthPlan) -> None:
    _one_of("padding_side", plan.padding_side, ("right", "left"))
    multiple, length = plan.pad_to_multiple_of, plan.max_length
    both = plan.padding != DO_NOT_PAD and plan.truncation != DO_NOT_TRUNCATE
    if both and multiple is not None and length is not None and length % multiple:
        raise InputError(
            f"max_length {length} is to truncate and pad_to_multiple_of {multiple} to pad, and the "
            f"first is no multiple of the second: make it {length - length % multiple}."
        )


def _one_of(name: str, value: object, known: tuple[str, ...]) -> str:
    for choice in known:
        if value == choice:
            return choice
    choices = ", ".join(map(repr, known))
    raise InputError(f"{name} is {value!r}; choose one of {choices}, True or False.")
