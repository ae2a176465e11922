"""What the tables of generation say about a row and the systems beside it."""

from collections.abc import Callable
from typing import Any

from benchmarks.formats import NOTHING, number

__all__ = [
    "GRAPHS_COLUMNS",
    "MASK",
    "REORDER_COLUMNS",
    "RESOURCE_COLUMNS",
    "SPEED_COLUMNS",
    "STEP_COLUMNS",
    "WHOLE_COLUMNS",
]

Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]

MASK = "ancestry mask"
"""What ``bench_reorder.py`` compares with moving caches."""


def _tokens_per_s(row: Row, seconds: float) -> str:
    return number(row["figures"]["tokens"] / seconds)


def _peer(row: Row, program: str) -> dict[str, Any]:
    """Return what is known of a peer, in whichever precision; nothing where it was not timed."""
    for name, peer in row["peers"].items():
        if name.partition(" ")[0] == program and "seconds" in peer:
            return peer
    return {}


def _beside(program: str, show: Callable[[Row, dict[str, Any]], str]) -> Callable[[Row], str]:
    def column(row: Row) -> str:
        peer = _peer(row, program)
        return show(row, peer) if peer else NOTHING

    return column


def _speed(row: Row, peer: dict[str, Any]) -> str:
    return _tokens_per_s(row, peer["seconds"]["median"])


def _ratio(_: Row, peer: dict[str, Any]) -> str:
    ratio = peer["speedup"]
    return f"**{ratio['median']:.2f}** ({ratio['q1']:.2f} – {ratio['q3']:.2f})"


def _gigabytes(figures: dict[str, float]) -> str:
    return number(figures["peak_anonymous_bytes"] / 1e9)


def _load(figures: dict[str, float]) -> str:
    return number(figures["load_s"])


SPEED_COLUMNS: Columns = {
    "moe_mt, tokens/s": lambda row: _tokens_per_s(row, row["seconds"]["median"]),
    "CTranslate2": _beside("ctranslate2", _speed),
    "transformers": _beside("transformers", _speed),
    "times CTranslate2 (quartiles)": _beside("ctranslate2", _ratio),
    "times transformers (quartiles)": _beside("transformers", _ratio),
    "bandwidth floor, tokens/s": lambda row: _tokens_per_s(row, row["figures"]["floor_s"]),
}
RESOURCE_COLUMNS: Columns = {
    "peak, GB": lambda row: _gigabytes(row["figures"]),
    "CTranslate2": _beside("ctranslate2", lambda _, peer: _gigabytes(peer)),
    "transformers": _beside("transformers", lambda _, peer: _gigabytes(peer)),
    "loading, s": lambda row: _load(row["figures"]),
    "CTranslate2, s": _beside("ctranslate2", lambda _, peer: _load(peer)),
    "transformers, s": _beside("transformers", lambda _, peer: _load(peer)),
    "first call, s": lambda row: number(row["figures"]["first_s"]),
    "later calls, s (quartiles)": lambda row: _seconds(row["seconds"]),
    "same translations as CTranslate2": _beside("ctranslate2", lambda _, peer: _same(peer)),
}
STEP_COLUMNS: Columns = {
    "ms (quartiles)": lambda row: _milliseconds(row["seconds"]),
    "floor, ms": lambda row: number(1e3 * row["figures"]["floor_s"]),
    "times the floor": lambda row: (
        f"**{row['seconds']['median'] / row['figures']['floor_s']:.2f}**"
    ),
}
WHOLE_COLUMNS: Columns = {
    "tokens/s": lambda row: _tokens_per_s(row, row["seconds"]["median"]),
    **STEP_COLUMNS,
}
GRAPHS_COLUMNS: Columns = {
    name: lambda row, name=name: f"{row['figures'][name]:.0f}"
    for name in ("graphs", "buckets", "breaks")
}
REORDER_COLUMNS: Columns = {
    "gather, µs": lambda row: number(1e6 * row["seconds"]["median"]),
    "mask, µs": lambda row: number(1e6 * row["peers"][MASK]["seconds"]["median"]),
    "gather over mask": lambda row: _over_mask(row),
}


def _over_mask(row: Row) -> str:
    ratio = row["seconds"]["median"] / row["peers"][MASK]["seconds"]["median"]
    return f"**{number(ratio)}**"


def _milliseconds(spread: dict[str, float]) -> str:
    return _seconds({key: 1e3 * spread[key] for key in ("q1", "median", "q3")})


def _seconds(spread: dict[str, float]) -> str:
    low, middle, high = (number(spread[key]) for key in ("q1", "median", "q3"))
    return f"{middle} ({low} – {high})"


def _same(peer: dict[str, Any]) -> str:
    return f"{peer['same_translations']:.0%}"
