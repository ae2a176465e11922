"""What the table of patched layers says about a row and the systems beside it."""

from collections.abc import Callable
from typing import Any

from benchmarks.formats import NOTHING, number

__all__ = ["PATCHED_COLUMNS"]

Row = dict[str, Any]


def _peers(row: Row, major: int) -> dict[str, dict[str, Any]]:
    """Return the systems of a version that were timed, by their experts implementation."""
    program = f"transformers {major}"
    return {
        name.removeprefix(program).strip(): peer
        for name, peer in row["peers"].items()
        if name.startswith(program) and "seconds" in peer
    }


def _fastest(major: int) -> Callable[[Row], str]:
    """Show the ratio to the fastest system of a version, and which one that is."""

    def column(row: Row) -> str:
        peers = _peers(row, major)
        if not peers:
            return NOTHING
        name = min(peers, key=lambda name: peers[name]["speedup"]["median"])
        ratio = peers[name]["speedup"]
        shown = f"**{ratio['median']:.2f}** ({ratio['q1']:.2f} – {ratio['q3']:.2f})"
        return f"{shown} {name}".strip()

    return column


def _least_memory(major: int) -> Callable[[Row], str]:
    """Show the extra memory of the system of a version that takes least."""

    def column(row: Row) -> str:
        peers = _peers(row, major).values()
        return number(min(peer["extra_bytes"] for peer in peers) / 1e6) if peers else NOTHING

    return column


def _milliseconds(row: Row) -> str:
    low, middle, high = (number(1e3 * row["seconds"][key]) for key in ("q1", "median", "q3"))
    return f"{middle} ({low} – {high})"


PATCHED_COLUMNS: dict[str, Callable[[Row], str]] = {
    "patched, ms (quartiles)": _milliseconds,
    "times transformers 4 (quartiles)": _fastest(4),
    "times transformers 5, its fastest (quartiles)": _fastest(5),
    "extra memory, MB": lambda row: number(row["figures"]["extra_bytes"] / 1e6),
    "transformers 4, MB": _least_memory(4),
    "transformers 5, its least, MB": _least_memory(5),
}
