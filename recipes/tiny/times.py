"""Dates, ranges of dates and relative times of the tiny domain."""

from dataclasses import dataclass
from datetime import date, timedelta
from functools import lru_cache
from typing import Literal

from babel.dates import format_date, format_interval, format_timedelta

from recipes.tiny.domain import LOCALES, Meaning, normalise

TimeUnit = Literal["year", "month", "week", "day", "hour", "minute", "second"]
_SECONDS: dict[TimeUnit, int] = {
    "year": 365 * 86400,
    "month": 30 * 86400,
    "week": 7 * 86400,
    "day": 86400,
    "hour": 3600,
    "minute": 60,
    "second": 1,
}
TIME_UNITS: tuple[TimeUnit, ...] = tuple(_SECONDS)


@dataclass(frozen=True)
class Date(Meaning):
    """One day, with or without its weekday."""

    day: date
    weekday: bool = False

    @property
    def kind(self) -> str:
        """Tell the two styles apart."""
        return "weekday date" if self.weekday else "date"

    @property
    def key(self) -> str:
        """Name the day, whatever the style."""
        return f"date:{self.day.isoformat()}"

    def render(self, language: str) -> str:
        """Return the long date, or the full one with its weekday."""
        return _date(self.day, "full" if self.weekday else "long", language)


@dataclass(frozen=True)
class DateRange(Meaning):
    """Days from a first to a last one: in one month, or across months."""

    first: date
    last: date

    @property
    def kind(self) -> str:
        """Name the kind."""
        return "date range"

    @property
    def key(self) -> str:
        """Name both ends."""
        return f"range:{self.first.isoformat()}:{self.last.isoformat()}"

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the range and both of its days."""
        return (self.key, *Date(self.first).keys, *Date(self.last).keys)

    def render(self, language: str) -> str:
        """Return the short interval within a month, else two long dates joined.

        CLDR's Swahili interval across months drops the first month, so it is not used.
        """
        locale = LOCALES[language]
        if (self.first.year, self.first.month) == (self.last.year, self.last.month):
            return normalise(format_interval(self.first, self.last, "yMMMd", locale=locale))
        pattern: str = locale.interval_formats[None]
        ends = (Date(day).render(language) for day in (self.first, self.last))
        return normalise(pattern.format(*ends))


@dataclass(frozen=True)
class MonthRange(Meaning):
    """Months from a first to a last one, each given by its first day."""

    first: date
    last: date

    @property
    def kind(self) -> str:
        """Name the kind."""
        return "month range"

    @property
    def key(self) -> str:
        """Name both months."""
        return f"months:{self.first:%Y-%m}:{self.last:%Y-%m}"

    def render(self, language: str) -> str:
        """Return the interval with full month names."""
        return normalise(format_interval(self.first, self.last, "yMMMM", locale=LOCALES[language]))


@dataclass(frozen=True)
class RelativeTime(Meaning):
    """A span of time from now, ahead or in the past."""

    count: int
    unit: TimeUnit
    past: bool

    @property
    def kind(self) -> str:
        """Name the kind."""
        return "relative time"

    @property
    def key(self) -> str:
        """Name the span and its side."""
        return f"relative:{'-' if self.past else '+'}{self.count}:{self.unit}"

    def render(self, language: str) -> str:
        """Return the span in exactly this unit."""
        seconds = self.count * _SECONDS[self.unit] * (-1 if self.past else 1)
        surface = format_timedelta(
            timedelta(seconds=seconds),
            granularity=self.unit,
            threshold=float("inf"),
            add_direction=True,
            locale=LOCALES[language],
        )
        return normalise(surface)


@lru_cache(maxsize=1 << 17)
def _date(day: date, style: Literal["long", "full"], language: str) -> str:
    return normalise(format_date(day, style, locale=LOCALES[language]))
