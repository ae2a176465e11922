"""Cut a text into sentences that a model can take, and keep what stands between them."""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

from moe_mt.errors import ConfigError
from moe_mt.tokenizers import sentence_rules_code

__all__ = ["Segment", "Split", "join_segments", "split_text"]

Split = Literal["auto", "off"] | Callable[[str, str], Iterable[str]]
"""``"auto"``: by sentence; ``"off"``: not at all; or ``(text, language) -> pieces`` that joined
give the text."""

UNSPACED_SCRIPTS = frozenset(("Hans", "Hant", "Jpan", "Thai", "Laoo", "Khmr", "Mymr", "Tibt"))
UNSPACED_LANGUAGES = frozenset(("zh", "ja", "th", "lo", "km", "my"))

CLAUSE_END = re.compile(r"[;:,]\s+|[\u060c\u061b\u3001\uff0c\uff1b\uff1a\u0964\u1363\u2014]\s*|\n+")
"""A comma within a number ends no clause, so that ASCII marks need a space behind them."""

SPACE = re.compile(r"\s+")
OTHER_SPACE = re.compile(r"[^\S ]")


@dataclass(frozen=True)
class Segment:
    """A stretch of text that is translated on its own."""

    text: str
    """Without white space at its ends; empty where there is nothing a model could read."""

    before: str
    """White space before it, or all that cannot be read."""

    after: str
    """White space behind it."""

    was_cut: bool = False
    """Whether it is part of a sentence that was too long for the model."""


def split_text(
    text: str, language: str, split: Split, count_pieces: Callable[[str], int], max_pieces: int
) -> list[Segment]:
    """Cut ``text`` into segments that joined again are the text.

    Args:
        text: Any text.
        language: Its language's code.
        split: How to find sentences.
        count_pieces: How many pieces the tokenizer makes of a stretch of text.
        max_pieces: Most pieces the model takes; what has more is cut at the clause boundary, else
            the space, else the character nearest its middle, until it has not.

    Raises:
        ConfigError: If ``split`` is no known way, or a callable lost part of the text.
    """
    segments: list[Segment] = []
    for sentence in _sentences(text, language, split):
        parts = list(_cut(sentence, lambda part: count_pieces(part) <= max_pieces))
        segments += [_segment(part, count_pieces, was_cut=len(parts) > 1) for part in parts]
    return segments


def join_segments(
    segments: list[Segment], translations: list[str], src_lang: str, tgt_lang: str
) -> str:
    """Put translations where their segments stood, with the original white space.

    Where the source needs no space between sentences and the target does, one is put in.
    """
    pieces: list[str] = []
    for segment, translation in zip(segments, translations, strict=True):
        previous = pieces[-1] if pieces else ""
        touches = previous != "" and not previous[-1].isspace() and not segment.before
        # A word of a spaced script that was cut in two stays in one.
        may_part = not segment.was_cut or not _is_spaced(src_lang)
        if touches and translation and may_part and _is_spaced(tgt_lang):
            pieces.append(" ")
        pieces.append(f"{segment.before}{translation}{segment.after}")
    return "".join(pieces)


def _sentences(text: str, language: str, split: Split) -> list[str]:
    if split == "off":
        return [text]
    if split == "auto":
        rules = sentence_rules_code(language)
        lines = text.splitlines(keepends=True)
        return [sentence for line in lines for sentence in _sentences_of_line(line, rules)]
    if not callable(split):
        raise ConfigError(f"split is {split!r}; choose 'auto', 'off' or a callable")
    pieces = list(split(text, language))
    if "".join(pieces) != text:
        raise ConfigError(
            f"the split callable lost text: its {len(pieces)} pieces joined are not the input of "
            f"{len(text)} characters; it must return pieces that include all white space"
        )
    return pieces


def _sentences_of_line(line: str, rules: str) -> list[str]:
    """Cut a line into its sentences; lines are parted before, as a line's end is a sentence's."""
    # Only here: whoever splits nothing needs no splitter.
    from sentencex import segment  # pyright: ignore[reportAttributeAccessIssue]

    # The splitter fails on white space beyond ASCII, and drops some around empty lines: it reads
    # the line with plain spaces and without its end, and what it says is taken as lengths.
    places = [0, *accumulate(len(piece) for piece in segment(rules, OTHER_SPACE.sub(" ", line)))]
    if places[-1] != len(line):
        return [line]
    return [line[start:stop] for start, stop in pairwise(places)]


def _segment(part: str, count_pieces: Callable[[str], int], *, was_cut: bool) -> Segment:
    stripped = part.strip()
    if not stripped or count_pieces(stripped) == 0:
        return Segment("", part, "", was_cut)
    start = part.index(stripped)
    return Segment(stripped, part[:start], part[start + len(stripped) :], was_cut)


def _cut(text: str, fits: Callable[[str], bool]) -> Iterator[str]:
    if len(text) <= 1 or fits(text):
        yield text
        return
    place = _place_to_cut(text)
    yield from _cut(text[:place], fits)
    yield from _cut(text[place:], fits)


def _place_to_cut(text: str) -> int:
    """Return the best index in the middle half, so that no part is a stub."""
    middle = len(text) // 2
    low, high = len(text) // 4, len(text) - len(text) // 4
    for boundary in (CLAUSE_END, SPACE):
        ends = [found.end() for found in boundary.finditer(text, low, high)]
        ends = [end for end in ends if 0 < end < len(text)]
        if ends:
            return min(ends, key=lambda end: abs(end - middle))
    # A vowel sign or an accent stays with its letter.
    letters = (i for i in range(middle, high) if not unicodedata.category(text[i]).startswith("M"))
    return next(letters, middle)


def _is_spaced(language: str) -> bool:
    script = language.partition("_")[2]
    return script not in UNSPACED_SCRIPTS and language not in UNSPACED_LANGUAGES
