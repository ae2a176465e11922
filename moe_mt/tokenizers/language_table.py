"""From what people call a language to the code a model knows it by."""

import difflib
import re
import unicodedata
from collections.abc import Iterable

from moe_mt.errors import InputError, UnsupportedLanguageError
from moe_mt.tokenizers.languages import (
    LANGUAGE_NAME_ALIASES,
    LANGUAGE_SUBTAGS,
    M2M100_LANGUAGES,
    NLLB_LANGUAGES,
    TAG_ALIASES,
    WMT21_CODES,
)

__all__ = [
    "NLLB_TABLE",
    "TABLES",
    "LanguageTable",
    "list_languages",
    "resolve_language",
    "sentence_rules_code",
]

_TAG = re.compile(r"([a-z]{2,3})(?:_([a-z]{4}))?(?:_([a-z]{2}|[0-9]{3}))?")
_SUBTAGS = {code: tag[:3] for code, (tag, _) in M2M100_LANGUAGES.items()} | LANGUAGE_SUBTAGS
# The first of several wins: M2M100's codes are current where others have been retired.
_SHORT_CODES = {
    tags.split()[0]: code for code, tags in reversed(_SUBTAGS.items()) if len(code) == 2
} | {"nso": "nso"}  # M2M100's `ns` is not ISO's
_MOST_SUGGESTIONS = 4


class LanguageTable:
    """The languages of one model family, in id order, and every way to name them."""

    def __init__(self, family: str, languages: Iterable[tuple[str, str, str]]) -> None:
        """Index the languages.

        Args:
            family: What messages call the family.
            languages: Code, tag and English name of each language, in id order.
        """
        entries = list(languages)
        self.family = family
        self.codes = tuple(code for code, _, _ in entries)
        self._names = {code: name for code, _, name in entries}
        self._code_of_spelling = {_fold_code(code): code for code in self.codes}
        self._code_of_tag = {_fold_code(tag): code for code, tag, _ in entries}
        self._codes_of_name: dict[str, tuple[str, ...]] = {}
        for code, _, name in entries:
            # "Kashmiri (Arabic script)" also answers to "Kashmiri", which may then be ambiguous.
            for spelling in {_fold_name(name), _fold_name(name.partition("(")[0])}:
                self._codes_of_name[spelling] = (*self._codes_of_name.get(spelling, ()), code)

    def name(self, code: str) -> str:
        """Return the English name of a code of this table."""
        return self._names[code]

    def resolve(self, name: str) -> str:
        """Return the one code that a code, tag or English name stands for.

        Accepted, without regard to case: the table's own codes (also as ``__fr__``), ISO 639-1,
        639-2 and 639-3 codes, tags with a script or a region (``zh-Hans``, ``pt_BR``, another
        family's ``fra_Latn``) and English names.

        Args:
            name: What the user calls the language.

        Returns:
            The code, as this table spells it.

        Raises:
            UnsupportedLanguageError: If no language or more than one answers to the name; the
                message suggests those that may be meant.
        """
        if name in self._names:
            return name
        candidates = self._candidates(name)
        if len(candidates) == 1:
            return candidates[0]
        raise UnsupportedLanguageError(self._complaint(name, candidates))

    def _candidates(self, name: str) -> tuple[str, ...]:
        code = self._code_of_spelling.get(_fold_code(name))
        if code is not None:
            return (code,)
        folded = _fold_name(name)
        if folded in self._codes_of_name:
            return self._codes_of_name[folded]
        return self._codes_of_tags(LANGUAGE_NAME_ALIASES.get(folded) or _tags_of(name))

    def _codes_of_tags(self, tags: str) -> tuple[str, ...]:
        """Return the codes that match tags separated by spaces; a tag without script is wide."""
        wanted = [_fold_code(tag) for tag in tags.split()]
        return tuple(
            code
            for tag, code in self._code_of_tag.items()
            if any(tag == want or tag.startswith(want + "_") for want in wanted)
        )

    def _complaint(self, name: str, candidates: tuple[str, ...]) -> str:
        suggestions = candidates or self._suggestions(name)
        meant = " or ".join(f"{code!r} ({self._names[code]})" for code in suggestions)
        if candidates:
            return (
                f"Language {name!r} is ambiguous for {self.family}: choose {meant}. "
                "All languages: `moe-mt languages`."
            )
        return (
            f"Language {name!r} is not among the {len(self.codes)} languages of {self.family}"
            + (f": did you mean {meant}?" if meant else ".")
            + " See `moe-mt languages`."
        )

    def _suggestions(self, name: str) -> list[str]:
        # The right language in a script or region the model lacks is a better guess than spelling.
        same_language = self._codes_of_tags(" ".join(t[:3] for t in _tags_of(name).split()))
        if same_language:
            return list(same_language[:_MOST_SUGGESTIONS])
        spellings = {code: (code,) for code in self.codes} | self._codes_of_name
        by_folded = {_fold_name(spelling): codes for spelling, codes in spellings.items()}
        close = difflib.get_close_matches(_fold_name(name), by_folded, n=_MOST_SUGGESTIONS)
        codes = dict.fromkeys(code for spelling in close for code in by_folded[spelling])
        return list(codes)[:_MOST_SUGGESTIONS]


def list_languages(family: str = "nllb") -> list[tuple[str, str]]:
    """Return the languages of a family in id order.

    Args:
        family: ``"nllb"``, ``"m2m100"`` (also SMaLL-100's languages) or ``"wmt21"``.

    Returns:
        Code and English name of each language.

    Raises:
        InputError: If there is no such family.
    """
    table = _table(family)
    return [(code, table.name(code)) for code in table.codes]


def resolve_language(name: str, family: str = "nllb") -> str:
    """Return the code that a code, tag or English name of a language stands for.

    Args:
        name: What the user calls the language; see ``LanguageTable.resolve``.
        family: As for ``list_languages``.

    Returns:
        The code, as the family spells it.

    Raises:
        InputError: If there is no such family.
        UnsupportedLanguageError: If no language or more than one answers to the name.
    """
    return _table(family).resolve(name)


def sentence_rules_code(code: str) -> str:
    """Return the code that sentence splitters have their rules under.

    Args:
        code: A language's code in any family's list.

    Returns:
        Its ISO 639-1 code, of its macro-language if that is the commoner; else ISO 639-3.
    """
    tag, _ = M2M100_LANGUAGES.get(code, (code, code))
    language = tag.partition("_")[0]
    return _SHORT_CODES.get(language, language)


def _table(family: str) -> LanguageTable:
    if family not in TABLES:
        known = ", ".join(TABLES)
        raise InputError(f"No list of languages is called {family!r}: choose one of {known}.")
    return TABLES[family]


def _fold_code(code: str) -> str:
    return code.strip().strip("_").replace("-", "_").casefold()


def _fold_name(name: str) -> str:
    """Drop case, marks and punctuation: "Norwegian Bokmål" and "norwegian-bokmal" are one."""
    decomposed = unicodedata.normalize("NFKD", name.casefold())
    letters = "".join(c for c in decomposed if not unicodedata.combining(c))
    return " ".join(re.findall(r"\w+", letters.replace("_", " ")))


def _tags_of(name: str) -> str:
    """Return the tags a language tag stands for, separated by spaces; none if it is no tag."""
    tag = _fold_code(name)
    if tag in TAG_ALIASES:
        return TAG_ALIASES[tag]
    match = _TAG.fullmatch(tag)
    if match is None:
        return ""
    language, script, _region = match.groups()
    tags = _SUBTAGS.get(language, language)
    return " ".join(f"{tag}_{script}" for tag in tags.split()) if script else tags


NLLB_TABLE = LanguageTable(
    "NLLB-200", ((code, code, name) for code, name in NLLB_LANGUAGES.items())
)
TABLES = {
    "nllb": NLLB_TABLE,
    "m2m100": LanguageTable("M2M100", ((c, *M2M100_LANGUAGES[c]) for c in M2M100_LANGUAGES)),
    "wmt21": LanguageTable("WMT21", ((c, *M2M100_LANGUAGES[c]) for c in WMT21_CODES)),
}
