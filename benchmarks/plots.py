"""Pictures of result rows, as SVG that is the same byte for byte for the same rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.signature import parse_signature

__all__ = ["plot_graph", "plot_layer", "plot_translate"]

Row = dict[str, Any]

OURS, PEER = "#1f6feb", "#9a6700"
STABLE = {"svg.hashsalt": "moe-mt", "svg.fonttype": "none", "font.size": 10}


def plot_layer(rows: Sequence[Row], path: Path) -> None:
    """Draw time and extra memory over tokens, ours and the peer's, both axes logarithmic."""
    tokens = [int(parse_signature(row["signature"])["T"]) for row in rows]
    peers = [row["peer"] for row in rows]
    with mpl.rc_context(STABLE):
        figure = Figure(figsize=(8.4, 3.4), layout="constrained")
        times, memory = figure.subplots(1, 2)
        _draw_times(times, tokens, [row["seconds"] for row in rows], "moe_mt", OURS)
        _draw_times(times, tokens, [p["seconds"] for p in peers], peers[0]["name"], PEER)
        ours = [row["figures"]["extra_bytes"] / 1e6 for row in rows]
        memory.plot(tokens, ours, "o-", color=OURS, label="moe_mt")
        theirs = [peer["extra_bytes"] / 1e6 for peer in peers]
        memory.plot(tokens, theirs, "s--", color=PEER, label=peers[0]["name"])
        for axes, title in (
            (times, "median time, ms, with quartiles"),
            (memory, "extra memory, MB"),
        ):
            axes.set(xscale="log", yscale="log", xlabel="tokens", title=title)
            axes.set_xticks(tokens, [str(count) for count in tokens])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
        _save(figure, path)


def _draw_times(
    axes: Axes, tokens: list[int], seconds: list[dict[str, float]], label: str, color: str
) -> None:
    middle = [1e3 * found["median"] for found in seconds]
    below = [1e3 * (found["median"] - found["q1"]) for found in seconds]
    above = [1e3 * (found["q3"] - found["median"]) for found in seconds]
    style = "o-" if color == OURS else "s--"
    axes.errorbar(tokens, middle, (below, above), fmt=style, color=color, label=label, capsize=3)


def plot_graph(rows: Sequence[Row], path: Path) -> None:
    """Draw time over tokens beside floor and peers, a panel a routing, both axes logarithmic."""
    routings = list(dict.fromkeys(parse_signature(row["signature"])["routing"] for row in rows))
    with mpl.rc_context(STABLE):
        figure = Figure(figsize=(8.4, 3.8), layout="constrained")
        panels = figure.subplots(1, len(routings), sharey=True, squeeze=False)[0]
        for axes, routing in zip(panels, routings, strict=True):
            mine = [r for r in rows if parse_signature(r["signature"])["routing"] == routing]
            tokens = [int(parse_signature(row["signature"])["T"]) for row in mine]
            floors = [1e3 * row["figures"]["floor_s"] for row in mine]
            axes.plot(tokens, floors, ":", color="black", label="floor")
            _draw_times(axes, tokens, [row["seconds"] for row in mine], "moe_mt", OURS)
            _draw_peers(axes, tokens, [row["peers"] for row in mine])
            axes.set(xscale="log", yscale="log", xlabel="tokens", title=f"{routing} routing, ms")
            axes.set_xticks(tokens, [str(count) for count in tokens], rotation=45)
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        panels[0].legend(frameon=False, fontsize=8)
        _save(figure, path)


def _draw_peers(axes: Axes, tokens: list[int], peers: Sequence[dict[str, Any]]) -> None:
    """Draw a line for each peer through the sizes at which it was timed."""
    for name in dict.fromkeys(name for found in peers for name in found):
        times = [found.get(name, {}).get("seconds") for found in peers]
        points = [(t, 1e3 * s["median"]) for t, s in zip(tokens, times, strict=True) if s]
        if points:
            axes.plot(*zip(*points, strict=True), "s--", markersize=3, linewidth=1, label=name)


def plot_translate(rows: Sequence[Row], path: Path) -> None:
    """Draw sentences per second, with the quality reached at that speed beside each bar."""
    fields = [parse_signature(row["signature"]) for row in rows]
    labels = [f"batch {found['batch']}, beam {found['beam']}" for found in fields]
    speeds = [row["figures"]["sentences"] / row["seconds"]["median"] for row in rows]
    with mpl.rc_context(STABLE):
        figure = Figure(figsize=(8.4, 0.8 + 0.5 * len(rows)), layout="constrained")
        axes = figure.subplots()
        bars = axes.barh(labels, speeds, color=OURS, height=0.6)
        axes.bar_label(bars, [f"chrF++ {row['figures']['chrf']:.1f}" for row in rows], padding=4)
        axes.set(title="sentences per second", xlim=(0, 1.25 * max(speeds)))
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    # Without date and version of the drawing library, so that a new picture means new numbers.
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
