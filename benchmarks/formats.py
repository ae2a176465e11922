"""Numbers as tables show them."""

__all__ = ["NOTHING", "number"]

NOTHING = "–"


def number(value: float) -> str:
    """Return three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
