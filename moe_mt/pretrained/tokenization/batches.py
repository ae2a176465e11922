"""Rows of token ids → rows of one length: truncation and padding, on plain lists."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from moe_mt.pretrained.tokenization.options import (
    DO_NOT_PAD,
    LONGEST,
    LONGEST_FIRST,
    ONLY_FIRST,
    ONLY_SECOND,
    LengthPlan,
)

__all__ = ["pad_row", "padded_length", "truncate"]

_logger = logging.getLogger(__name__)

_PADDING_OF = {"attention_mask": 0, "token_type_ids": 0, "special_tokens_mask": 1}


def truncate(
    ids: list[int],
    pair_ids: list[int] | None = None,
    *,
    remove: int,
    strategy: str = LONGEST_FIRST,
    stride: int = 0,
    side: str = "right",
) -> tuple[list[int], list[int] | None, list[int]]:
    """Cut tokens off a text or a pair of texts.

    A text that would not keep a single token is left as it is, and that is logged.

    Args:
        ids: The first text.
        pair_ids: The second text.
        remove: How many tokens are too many.
        strategy: From which text; see ``EncodingOptions.truncation``.
        stride: How many of the tokens kept are given back with those cut off.
        side: ``"right"`` or ``"left"``, the end they are cut off from.

    Returns:
        The first text, the second text, and the tokens cut off with ``stride`` of those next to
        them; none of these for a pair cut ``"longest_first"``.
    """
    if remove <= 0:
        return ids, pair_ids, []
    if strategy == LONGEST_FIRST and pair_ids is not None:
        from_first, from_second = _shares(len(ids), len(pair_ids), remove)
        return _cut(ids, from_first, side), _cut(pair_ids, from_second, side), []
    if strategy == ONLY_SECOND:
        if pair_ids is None or not _fits("second", pair_ids, remove):
            return ids, pair_ids, []
        return ids, _cut(pair_ids, remove, side), _end(pair_ids, remove + stride, side)
    if strategy in (ONLY_FIRST, LONGEST_FIRST) and _fits("first", ids, remove):
        return _cut(ids, remove, side), pair_ids, _end(ids, remove + stride, side)
    return ids, pair_ids, []


def padded_length(rows: Sequence[Sequence[int]], plan: LengthPlan) -> int | None:
    """Return the length that rows are to be padded to; ``None`` if they are not.

    Args:
        rows: The rows' ids.
        plan: What was asked for.
    """
    if plan.padding == DO_NOT_PAD:
        return None
    length = max(map(len, rows)) if plan.padding == LONGEST else plan.max_length
    multiple = plan.pad_to_multiple_of
    if length is not None and multiple is not None:
        return -(-length // multiple) * multiple
    return length


def pad_row(
    row: Mapping[str, Any], length: int | None, *, ids_name: str, pad_id: int, side: str
) -> dict[str, Any]:
    """Pad the ids and the masks of one text; what else there is stays as it is.

    Args:
        row: Ids and masks by name.
        length: What to pad to; a row that is longer stays as it is.
        ids_name: The name of the ids.
        pad_id: What ids are padded with.
        side: ``"right"`` or ``"left"``, where the padding goes.

    Returns:
        The padded row.
    """
    missing = 0 if length is None else length - len(row[ids_name])
    padded = dict(row)
    if missing <= 0:
        return padded
    for name, value in {**_PADDING_OF, ids_name: pad_id}.items():
        if name in padded:
            padding, values = [value] * missing, list(padded[name])
            padded[name] = padding + values if side == "left" else values + padding
    return padded


def _shares(first: int, second: int, remove: int) -> tuple[int, int]:
    """Return how many tokens each of two texts loses: the longer until both are alike."""
    unequal = min(abs(first - second), remove)
    common = remove - unequal
    if first > second:
        return unequal + common // 2, common - common // 2
    return common // 2, unequal + common - common // 2


def _fits(which: str, ids: list[int], remove: int) -> bool:
    if len(ids) > remove:
        return True
    _logger.error(
        "%d tokens are too many and the %s text has %d, so that none of it would be left: it is "
        "not truncated. Give a larger max_length, or let another text of the pair be cut.",
        remove,
        which,
        len(ids),
    )
    return False


def _cut(ids: list[int], count: int, side: str) -> list[int]:
    return ids[count:] if side == "left" else ids[: max(len(ids) - count, 0)]


def _end(ids: list[int], count: int, side: str) -> list[int]:
    return ids[:count] if side == "left" else ids[max(len(ids) - count, 0) :]
