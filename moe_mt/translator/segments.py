"""Cut a text into sentences that a model can take, and keep what stands between them."""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from moe_mt.errors import ConfigError
from moe_mt.tokenizers import sentence_rules_code

__all__ = ["Segment", "Split", "join_segments", "split_text"]

Split = Literal["auto", "off"] | Callable[[str, str], Iterable[str]]
"""``"auto"``: by sentence; ``"off"``: not at all; or ``(text, language) -> pieces`` that joined
give the text."""

UNSPACED_SCRIPTS = frozenset(("Hans", "Hant", "Jpan", "Thai", "Laoo", "Khmr", "Mymr", "Tibt"))
UNSPACED_LANGUAGES = frozenset(("zh", "ja", "th", "lo", "km", "my"))

CLAUSE_END = re.compile(r"[;:,\u060c\u061b\u3001\uff0c\uff1b\uff1a\u0964\u1363\u2014]\s*|\n+")
SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Segment:
    """A stretch of text that is translated on its own."""

    text: str
    """Without white space at its ends; empty where the stretch is all space."""

    before: str
    """White space before it."""

    after: str
    """White space behind it."""

    was_cut: bool = False
    """Whether it is part of a sentence that was too long for the model."""


def split_text(
    text: str, language: str, split: Split, fits: Callable[[str], bool]
) -> list[Segment]:
    """Cut ``text`` into segments that joined again are the text.

    Args:
        text: Any text.
        language: Its language's code.
        split: How to find sentences.
        fits: Whether the model takes a stretch of text; what does not fit is cut at the clause
            boundary, else the space, else the character nearest its middle, until it does.

    Raises:
        ConfigError: If ``split`` is no known way, or a callable lost part of the text.
    """
    segments: list[Segment] = []
    for sentence in _sentences(text, language, split):
        parts = list(_cut(sentence, fits))
        segments += [_segment(part, was_cut=len(parts) > 1) for part in parts]
    return segments


def join_segments(segments: list[Segment], translations: list[str], tgt_lang: str) -> str:
    """Put translations where their segments stood, with the original white space.

    Where the source needs no space between sentences and the target does, one is put in.
    """
    pieces: list[str] = []
    for segment, translation in zip(segments, translations, strict=True):
        previous = pieces[-1] if pieces else ""
        touches = previous != "" and not previous[-1].isspace() and not segment.before
        if touches and translation and not segment.was_cut and _is_spaced(tgt_lang):
            pieces.append(" ")
        pieces.append(f"{segment.before}{translation}{segment.after}")
    return "".join(pieces)


def _sentences(text: str, language: str, split: Split) -> list[str]:
    if split == "off":
        return [text]
    if split == "auto":
        # Only here: whoever splits nothing needs no splitter.
        from sentencex import segment  # pyright: ignore[reportAttributeAccessIssue]

        return list(segment(sentence_rules_code(language), text))
    if not callable(split):
        raise ConfigError(f"split is {split!r}; choose 'auto', 'off' or a callable")
    pieces = list(split(text, language))
    if "".join(pieces) != text:
        raise ConfigError(
            f"the split callable lost text: its {len(pieces)} pieces joined are not the input of "
            f"{len(text)} characters; it must return pieces that include all white space"
        )
    return pieces


def _segment(part: str, was_cut: bool) -> Segment:
    stripped = part.strip()
    if not stripped:
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
    """Return the best index near the middle; halves, so that no part is a stub."""
    middle = len(text) // 2
    low, high = len(text) // 4, len(text) - len(text) // 4
    for boundary in (CLAUSE_END, SPACE):
        ends = [found.end() for found in boundary.finditer(text, low, high)]
        ends = [end for end in ends if 0 < end < len(text)]
        if ends:
            return min(ends, key=lambda end: abs(end - middle))
    while middle < len(text) - 1 and unicodedata.combining(text[middle]):
        middle += 1
    return middle


def _is_spaced(language: str) -> bool:
    script = language.partition("_")[2]
    return script not in UNSPACED_SCRIPTS and language not in UNSPACED_LANGUAGES
