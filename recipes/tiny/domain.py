"""Meanings of the tiny model's domain and how Unicode CLDR renders them in each language.

A meaning is language-free. Its ``key`` names what it says (this date, this set of items),
whatever the punctuation, the weekday or the order; the hold-out is decided on keys.
"""

import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal
from functools import cache, lru_cache
from typing import Literal

from babel import Locale
from babel.lists import format_list
from babel.numbers import format_currency, format_decimal, get_currency_name
from num2words import num2words

LOCALES = {
    "eng_Latn": Locale.parse("en"),
    "fra_Latn": Locale.parse("fr"),
    "deu_Latn": Locale.parse("de"),
    "spa_Latn": Locale.parse("es"),
    "rus_Cyrl": Locale.parse("ru"),
    "hin_Deva": Locale.parse("hi"),
    "zho_Hans": Locale.parse("zh_Hans"),
    "swh_Latn": Locale.parse("sw"),
    "por_Latn": Locale.parse("pt"),
    "ell_Grek": Locale.parse("el"),
}
LANGUAGES = tuple(LOCALES)
# num2words has no Hindi, Chinese, Swahili or Greek.
NUMBER_WORD_LANGUAGES = frozenset(
    ("eng_Latn", "fra_Latn", "deu_Latn", "spa_Latn", "rus_Cyrl", "por_Latn")
)
_FULL_STOPS = {"hin_Deva": "।", "zho_Hans": "。"}
_INVISIBLE = re.compile("[\u00ad\u061c\u200b-\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")


class Meaning:
    """Something that can be said in several languages; frozen, so it can be remembered."""

    @property
    def kind(self) -> str:
        """Name the kind of meaning, as the held-out table prints it."""
        raise NotImplementedError

    @property
    def key(self) -> str:
        """Name what is said, without punctuation, order or style."""
        raise NotImplementedError

    @property
    def keys(self) -> tuple[str, ...]:
        """List the keys of every composite structure within, itself included."""
        return (self.key,)

    def render(self, language: str) -> str | None:
        """Return the surface in a language, or None where it has none."""
        raise NotImplementedError


def normalise(text: str) -> str:
    """Return text as the sentencepiece normaliser leaves it: NFKC, plain single spaces."""
    text = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text))
    return " ".join(text.split())


@dataclass(frozen=True)
class Name(Meaning):
    """The name of a country, a language or a currency."""

    table: str
    code: str

    @property
    def kind(self) -> str:
        """Name the table."""
        return self.table

    @property
    def key(self) -> str:
        """Name the table and the code."""
        return f"{self.table}:{self.code}"

    @property
    def keys(self) -> tuple[str, ...]:
        """Return nothing: a name cannot be learned from other names, so it is never held out."""
        return ()

    def render(self, language: str) -> str:
        """Return the CLDR name."""
        return _name(self.table, self.code, language)


@dataclass(frozen=True)
class Quantity(Meaning):
    """A number of units of measure."""

    value: Decimal
    unit: str

    @property
    def kind(self) -> str:
        """Name the kind."""
        return "quantity"

    @property
    def key(self) -> str:
        """Name the value and the unit."""
        return f"quantity:{self.value}:{self.unit}"

    def render(self, language: str) -> str:
        """Return the number with the unit's long name in the right plural form."""
        locale = LOCALES[language]
        form = locale.plural_form(self.value)
        number = format_decimal(self.value, locale=locale)
        return normalise(_unit_pattern(self.unit, form, language).format(number))


@dataclass(frozen=True)
class Money(Meaning):
    """An amount of a currency, whole or with two decimals."""

    amount: Decimal
    currency: str

    @property
    def kind(self) -> str:
        """Name the kind."""
        return "money"

    @property
    def key(self) -> str:
        """Name the amount and the currency."""
        return f"money:{self.amount}:{self.currency}"

    def render(self, language: str) -> str:
        """Return the amount with the currency's name in the right plural form."""
        whole = self.amount == self.amount.to_integral_value()
        surface = format_currency(
            self.amount,
            self.currency,
            locale=LOCALES[language],
            currency_digits=not whole,
            format_type="name",
        )
        return normalise(surface)


@dataclass(frozen=True)
class NumberWords(Meaning):
    """A whole number in words."""

    number: int

    @property
    def kind(self) -> str:
        """Name the kind."""
        return "number in words"

    @property
    def key(self) -> str:
        """Name the number."""
        return f"number:{self.number}"

    def render(self, language: str) -> str | None:
        """Return the words, or None where num2words lacks the language."""
        if language not in NUMBER_WORD_LANGUAGES:
            return None
        return normalise(num2words(self.number, lang=LOCALES[language].language))


@dataclass(frozen=True)
class Listing(Meaning):
    """Two or more items joined by "and" or "or"."""

    items: tuple[Meaning, ...]
    style: Literal["standard", "or"]

    @property
    def kind(self) -> str:
        """Name the kind of the items."""
        return f"{self.items[0].kind} list"

    @property
    def key(self) -> str:
        """Name the set of items, whatever their order and the conjunction."""
        return "list:" + "|".join(sorted(item.key for item in self.items))

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the key of the set and those of its items."""
        return (self.key, *(key for item in self.items for key in item.keys))

    def render(self, language: str) -> str | None:
        """Return the list, or None where an item has no surface."""
        surfaces = [render(item, language) for item in self.items]
        said = [surface for surface in surfaces if surface]
        if len(said) < len(surfaces):
            return None
        return normalise(format_list(said, self.style, locale=LOCALES[language]))


@dataclass(frozen=True)
class Sentence(Meaning):
    """A meaning written as a sentence: capital letter, full stop."""

    content: Meaning

    @property
    def kind(self) -> str:
        """Name the kind of the content."""
        return self.content.kind

    @property
    def key(self) -> str:
        """Name the content: punctuation is no part of the key."""
        return self.content.key

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the keys of the content."""
        return self.content.keys

    def render(self, language: str) -> str | None:
        """Return the content with a capital and the language's full stop."""
        surface = render(self.content, language)
        if surface is None:
            return None
        return surface[:1].upper() + surface[1:] + _FULL_STOPS.get(language, ".")


@lru_cache(maxsize=1 << 17)
def render(meaning: Meaning, language: str) -> str | None:
    """Return ``meaning.render(language)``, remembered."""
    return meaning.render(language)


@cache
def _name(table: str, code: str, language: str) -> str:
    locale = LOCALES[language]
    if table == "country":
        return normalise(locale.territories[code])
    if table == "language":
        return normalise(locale.languages[code])
    return normalise(get_currency_name(code, locale=locale))


@cache
def _unit_pattern(unit: str, form: str, language: str) -> str:
    """Return the long pattern; where a locale has none, CLDR's fallback is the short one.

    Babel's ``format_unit`` lacks that fallback and prints the code ("5 length-meter" in Chinese).
    """
    lengths = LOCALES[language]._data["unit_patterns"][unit]
    long = lengths.get("long", {})
    patterns = long if "other" in long else lengths["short"]
    return patterns[form] if form in patterns else patterns["other"]
