"""Draws meanings of the tiny domain and decides which are held out."""

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from datetime import date, timedelta
from decimal import Decimal
from typing import Literal

from recipes.tiny.domain import (
    LANGUAGES,
    Listing,
    Meaning,
    Money,
    Name,
    NumberWords,
    Quantity,
    Sentence,
    render,
)
from recipes.tiny.inventory import (
    COUNTRIES,
    CURRENCIES,
    LANGUAGE_NAMES,
    UNITS,
    WHOLE_CURRENCIES,
)
from recipes.tiny.times import TIME_UNITS, Date, DateRange, MonthRange, RelativeTime

Draw = Callable[[random.Random], Meaning]
Style = Literal["standard", "or"]
_FIRST_DAY = date(1950, 1, 1)
_DAYS = (date(2050, 1, 1) - _FIRST_DAY).days
_HELD_OUT_SHARE = 0.04


def is_held_out(meaning: Meaning, seed: int) -> bool:
    """Tell whether the meaning, or a structure within it, is kept out of training."""
    return any(_share(key, seed) < _HELD_OUT_SHARE for key in meaning.keys)


def _share(key: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _country(rng: random.Random) -> Meaning:
    return Name("country", rng.choice(COUNTRIES))


def _language(rng: random.Random) -> Meaning:
    return Name("language", rng.choice(LANGUAGE_NAMES))


def _currency(rng: random.Random) -> Meaning:
    return Name("currency", rng.choice(CURRENCIES))


def _day(rng: random.Random) -> date:
    return _FIRST_DAY + timedelta(days=rng.randrange(_DAYS))


def _date(rng: random.Random) -> Meaning:
    return Date(_day(rng))


def _weekday_date(rng: random.Random) -> Meaning:
    return Date(_day(rng), weekday=True)


def _date_range(rng: random.Random) -> Meaning:
    first = _day(rng)
    if rng.random() < 0.6:
        last = first.replace(day=1) + timedelta(days=rng.randrange(27))
        first, last = min(first, last), max(first, last)
    else:
        last = first + timedelta(days=rng.randrange(1, 400))
    return DateRange(first, last) if first < last else _date_range(rng)


def _month_range(rng: random.Random) -> Meaning:
    year = rng.randrange(1950, 2050)
    first, last = sorted(rng.sample(range(1, 13), 2))
    later = year if rng.random() < 0.7 else year + rng.randrange(1, 10)
    return MonthRange(date(year, first, 1), date(later, last, 1))


def _number(rng: random.Random, decimals: tuple[int, ...]) -> Decimal:
    """Draw a number of 1 to 5 digits, with as many decimals as one of ``decimals``."""
    whole = rng.randrange(10 ** rng.choice((1, 2, 2, 3, 3, 4, 5)))
    places = rng.choice(decimals)
    if not places:
        return Decimal(whole)
    return Decimal(whole) + Decimal(rng.randrange(1, 10**places)).scaleb(-places)


def _quantity(rng: random.Random) -> Meaning:
    number = _number(rng, (0, 0, 0, 1, 2))
    if number != number.to_integral_value():
        number = number.normalize()  # CLDR's decimal format prints no trailing zero.
    return Quantity(number, rng.choice(UNITS))


def _money(rng: random.Random) -> Meaning:
    currency = rng.choice(CURRENCIES)
    return Money(_number(rng, (0,) if currency in WHOLE_CURRENCIES else (0, 2)), currency)


def _relative(rng: random.Random) -> Meaning:
    count = rng.randrange(1, rng.choice((10, 100, 1000)))
    return RelativeTime(count, rng.choice(TIME_UNITS), rng.random() < 0.5)


def _small_number_words(rng: random.Random) -> Meaning:
    return NumberWords(rng.randrange(rng.choice((100, 1000))))


def _number_words(rng: random.Random) -> Meaning:
    return NumberWords(rng.randrange(10000)) if rng.random() < 0.25 else _small_number_words(rng)


def _listing(draw: Draw, sizes: tuple[int, ...], styles: tuple[Style, ...]) -> Draw:
    def draw_list(rng: random.Random) -> Meaning:
        size = rng.choice(sizes)
        items: dict[str, Meaning] = {}
        while len(items) < size:
            item = draw(rng)
            items[item.key] = item
        return Listing(tuple(items.values()), rng.choice(styles))

    return draw_list


_EITHER: tuple[Style, ...] = ("standard", "or")
_SOME = (2, 2, 2, 3, 3, 3, 4)
# Numbers are joined by "or" alone: "three hundred and five" would be one number or two.
DRAWS: dict[str, tuple[Draw, float]] = {
    "country": (_country, 4),
    "language": (_language, 2),
    "currency": (_currency, 2),
    "date": (_date, 8),
    "weekday date": (_weekday_date, 8),
    "date range": (_date_range, 9),
    "month range": (_month_range, 5),
    "quantity": (_quantity, 11),
    "money": (_money, 10),
    "relative time": (_relative, 6),
    "number in words": (_number_words, 8),
    "country list": (_listing(_country, _SOME, _EITHER), 12),
    "language list": (_listing(_language, _SOME, _EITHER), 6),
    "currency list": (_listing(_currency, _SOME, _EITHER), 5),
    "date list": (_listing(_date, (2,), _EITHER), 2),
    "quantity list": (_listing(_quantity, (2, 2, 3), _EITHER), 4),
    "money list": (_listing(_money, (2,), _EITHER), 2),
    "relative time list": (_listing(_relative, (2, 2, 3), _EITHER), 2),
    "number in words list": (_listing(_small_number_words, (2, 3), ("or",)), 4),
}
# German and Chinese cannot be split before a digit, Russian cannot after its year's "г.":
# only kinds made of words alone are written as sentences.
SENTENCE_KINDS = frozenset(
    kind for kind in DRAWS if kind.split()[0] in ("country", "language", "currency", "number")
)
_WEIGHTS = [weight for _, weight in DRAWS.values()]


def draw(rng: random.Random, kind: str | None = None) -> Meaning:
    """Draw a meaning of a kind, by default one drawn by weight; half can be a Sentence."""
    kind = kind or rng.choices(tuple(DRAWS), _WEIGHTS)[0]
    meaning = DRAWS[kind][0](rng)
    return Sentence(meaning) if kind in SENTENCE_KINDS and rng.random() < 0.5 else meaning


def training_meanings(count: int, seed: int) -> Iterator[tuple[str, str, Meaning]]:
    """Yield source language, target language and meaning, all directions equally likely."""
    rng = random.Random(f"train {seed}")
    directions = [(a, b) for a in LANGUAGES for b in LANGUAGES if a != b]
    for _ in range(count):
        source, target = rng.choice(directions)
        meaning = draw(rng)
        while is_held_out(meaning, seed) or not all(render(meaning, it) for it in (source, target)):
            meaning = draw(rng)
        yield source, target, meaning


def training_pairs(count: int, seed: int) -> Iterator[tuple[str, str, str, str]]:
    """Yield source language, target language, source text and target text."""
    for source, target, meaning in training_meanings(count, seed):
        yield source, target, str(render(meaning, source)), str(render(meaning, target))


def held_out_meanings(count: int, words_count: int, seed: int) -> list[Meaning]:
    """Return held-out meanings with distinct keys, their kinds in turn.

    ``count`` of them have a surface in every language; ``words_count`` more hold numbers in words.
    """
    rng = random.Random(f"held out {seed}")
    composite = [kind for kind in DRAWS if kind not in ("country", "language", "currency")]
    everywhere = [kind for kind in composite if not kind.startswith("number")]
    words = [kind for kind in composite if kind.startswith("number")]
    found: dict[str, Meaning] = {}
    for kinds, total in ((everywhere, count), (words, count + words_count)):
        while len(found) < total:
            meaning = draw(rng, kinds[len(found) % len(kinds)])
            if is_held_out(meaning, seed):
                found.setdefault(meaning.key, meaning)
    return list(found.values())


def ambiguities(meanings: Iterable[Meaning]) -> list[tuple[str, str, str]]:
    """Return (language, surface, other language) where one surface has two translations."""
    found = []
    distinct = list(dict.fromkeys(meanings))
    for language in LANGUAGES:
        readings: dict[str, list[Meaning]] = {}
        for meaning in distinct:
            if surface := render(meaning, language):
                readings.setdefault(surface, []).append(meaning)
        for surface, group in readings.items():
            for other in LANGUAGES if len(group) > 1 else ():
                if len({render(meaning, other) for meaning in group}) > 1:
                    found.append((language, surface, other))
    return found
