"""From committed results to tables and pictures: ``python -m benchmarks.report``.

Rewrites the block between the two markers of README.md, docs/benchmarks.md, and the pictures in
docs/images. No number in them is typed by hand, and each carries its signature.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.formats import NOTHING, number
from benchmarks.generation.columns import (
    GRAPHS_COLUMNS,
    REORDER_COLUMNS,
    RESOURCE_COLUMNS,
    SPEED_COLUMNS,
    STEP_COLUMNS,
    WHOLE_COLUMNS,
)
from benchmarks.integrations.columns import PATCHED_COLUMNS
from benchmarks.plots import plot_graph, plot_layer, plot_translate
from benchmarks.record import RESULTS, RecordError, newest_rows
from benchmarks.signature import device_slug, merge_signatures, parse_signature

__all__ = ["END", "START", "ReportError", "main", "render_docs", "render_readme", "replace_block"]

Row = dict[str, Any]

ROOT = Path(__file__).parent.parent
MARK = " \\*"
"""At a time that is not what the others in its table are, for a reason given below it."""

START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"


class ReportError(ValueError):
    """A report that cannot be written, and what to do about it."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """How the rows of one benchmark are shown."""

    benchmark: str
    """Beginning of the names of its rows."""

    title: str
    sizes: tuple[str, ...]
    """Fields of the signature that tell its rows apart, in sorting order."""

    columns: dict[str, Callable[[Row], str]]
    plot: tuple[str, Callable[[Sequence[Row], Path], None]] | None = None
    in_readme: bool = False
    peers: bool = False
    """Whether every peer gets a column."""

    all_models: bool = False
    """Whether rows of several models and precisions stand under each other."""

    def groups(self, rows: Sequence[Row]) -> dict[str, list[Row]]:
        """Return the rows of this table under what they were measured on, in order of size."""
        found: dict[str, list[Row]] = {}
        for row in rows:
            if row["name"].startswith(self.benchmark):
                found.setdefault(self._setting(row), []).append(row)
        return {name: sorted(found[name], key=self._order) for name in sorted(found)}

    def render(self, rows: Sequence[Row]) -> list[str]:
        """Return one group of rows as lines of Markdown, signature last."""
        columns = self.columns | (_peer_columns(rows) if self.peers else {})
        header = [*self.sizes, *columns]
        lines = [f"| {' | '.join(header)} |", f"|{'---:|' * len(header)}"]
        for row in rows:
            fields = parse_signature(row["signature"])
            cells = [fields.get(size, NOTHING) for size in self.sizes]
            cells += [show(row) for show in columns.values()]
            lines.append(f"| {' | '.join(cells)} |")
        signature = merge_signatures(row["signature"] for row in rows)
        lines += ["", *_ceilings(rows), *_notes(rows), f"Signature: `{signature}`"]
        scores = dict.fromkeys(row["chrf_signature"] for row in rows if "chrf_signature" in row)
        return [*lines, *(f"chrF++: `{score}`" for score in scores)]

    def picture(self, setting: str) -> str:
        """Return the file name of the picture of a group; empty where there is none."""
        return f"{self.plot[0]}-{device_slug(setting)}.svg" if self.plot else ""

    def _setting(self, row: Row) -> str:
        """Return what rows of one group share."""
        fields = parse_signature(row["signature"])
        parts = [fields["device"]]
        parts += [] if self.all_models else [fields["model"], fields["dtype"]]
        if "threads" in fields:
            parts.append(f"{fields['threads']} thread{'s' * (fields['threads'] != '1')}")
        return ", ".join(parts)

    def _order(self, row: Row) -> list[tuple[int, str]]:
        fields = parse_signature(row["signature"])
        found = [fields.get(size, "") for size in self.sizes]
        return [(int(size), "") if size.isdigit() else (0, size) for size in found]


def _milliseconds(spread: dict[str, float]) -> str:
    low, middle, high = (number(1e3 * spread[key]) for key in ("q1", "median", "q3"))
    return f"{middle} ({low} – {high})"


def _microseconds(spread: dict[str, float]) -> str:
    return _milliseconds({key: 1e3 * spread[key] for key in ("q1", "median", "q3")})


def _megabytes(count: float) -> str:
    return number(count / 1e6)


def _per_second(count: float, row: Row) -> float:
    return count / row["seconds"]["median"]


LAYER_COLUMNS: dict[str, Callable[[Row], str]] = {
    "ms (quartiles)": lambda row: _milliseconds(row["seconds"]),
    "extra memory, MB": lambda row: _megabytes(row["figures"]["extra_bytes"]),
}
ROOFLINE_COLUMNS: dict[str, Callable[[Row], str]] = {
    "weights read, GB/s": lambda row: number(
        _per_second(row["figures"]["weight_bytes_read"], row) / 1e9
    ),
    "GFLOP/s": lambda row: number(_per_second(row["figures"]["flops"], row) / 1e9),
}
PEER_COLUMNS: dict[str, Callable[[Row], str]] = {
    "peer, ms (quartiles)": lambda row: _milliseconds(row["peer"]["seconds"]),
    "peer, extra MB": lambda row: _megabytes(row["peer"]["extra_bytes"]),
    "times as fast (quartiles)": lambda row: (
        f"**{row['speedup']['median']:.2f}** "
        f"({row['speedup']['q1']:.2f} – {row['speedup']['q3']:.2f})"
    ),
    "share of its memory": lambda row: (
        f"**{row['figures']['extra_bytes'] / row['peer']['extra_bytes']:.1%}**"
    ),
}
TRANSLATE_COLUMNS: dict[str, Callable[[Row], str]] = {
    "sentences/s": lambda row: number(_per_second(row["figures"]["sentences"], row)),
    "tokens/s": lambda row: number(_per_second(row["figures"]["tokens"], row)),
    "weights, MB": lambda row: _megabytes(row["figures"]["weight_bytes"]),
    "peak extra memory, MB": lambda row: _megabytes(row["figures"]["extra_bytes"]),
    "chrF++": lambda row: f"{row['figures']['chrf']:.1f}",
    "exact match": lambda row: f"{row['figures']['exact_match']:.1%}",
}


def _floor(show: Callable[[Row, float], str]) -> Callable[[Row], str]:
    """Show what follows from a floor; nothing where a device has none."""

    def column(row: Row) -> str:
        floor_s = row["figures"].get("floor_s")
        return NOTHING if floor_s is None else show(row, floor_s)

    return column


def _times_ours(row: Row, name: str) -> str:
    peer = row["peers"].get(name, {})
    if "seconds" not in peer:
        return NOTHING
    ratio = peer["seconds"]["median"] / row["seconds"]["median"]
    return number(ratio) + MARK * ("note" in peer)


def _peer_columns(rows: Sequence[Row]) -> dict[str, Callable[[Row], str]]:
    """Return a column for every peer that one of the rows timed."""
    timed = [name for row in rows for name, peer in row["peers"].items() if "seconds" in peer]
    return {
        f"{name}, times ours": lambda row, name=name: _times_ours(row, name)
        for name in dict.fromkeys(timed)
    }


def _all_peers(row: Row) -> str:
    shown = {name: _times_ours(row, name) for name in row["peers"]}
    return ", ".join(f"{name} {ratio}" for name, ratio in shown.items() if ratio != NOTHING)


def _ceilings(rows: Sequence[Row]) -> list[str]:
    """Return the measured ceilings that floors were computed from, as a line."""
    figures = [row.get("figures", {}) for row in rows]
    if reading := [one["read_bytes_per_s"] for one in figures if "read_bytes_per_s" in one]:
        shown = sorted({f"{speed / 1e9:.1f}" for speed in reading})
        return [f"Memory was read at {' and '.join(shown)} GB/s in the same run.", ""]
    found = [one for one in figures if "copy_bytes_per_s" in one]
    if not found:
        return []
    copies = sorted({f"{one['copy_bytes_per_s'] / 1e9:,.0f}" for one in found})
    products = sorted({f"{one['product_flops_per_s'] / 1e12:.0f}" for one in found})
    return [
        f"Ceilings measured in the same run: copy {' and '.join(copies)} GB/s, product "
        f"{' and '.join(products)} TFLOP/s.",
        "",
    ]


def _notes(rows: Sequence[Row]) -> list[str]:
    """Return why figures are missing, or are not of graphs."""
    notes = [f"{MARK.strip()} ours: {row['note']}" for row in rows if "note" in row]
    for row in rows:
        for name, peer in row.get("peers", {}).items():
            if "note" in peer:
                start = f"{MARK.strip()} {name}" if "seconds" in peer else f"{name} not timed"
                notes.append(f"{start}: {peer['note']}")
    return [line for note in dict.fromkeys(notes) for line in (f"{note}.", "")]


GRAPH_COLUMNS: dict[str, Callable[[Row], str]] = {
    "ms (quartiles)": lambda row: _milliseconds(row["seconds"]) + MARK * ("note" in row),
    "floor, ms": _floor(lambda _, floor_s: number(1e3 * floor_s)),
    "times the floor": _floor(lambda row, floor_s: f"**{row['seconds']['median'] / floor_s:.2f}**"),
    "GB/s": lambda row: number(_per_second(row["figures"]["bytes"], row) / 1e9),
    "TFLOP/s": lambda row: number(_per_second(row["figures"]["flops"], row) / 1e12),
    "experts hit": lambda row: number(row["figures"]["distinct_experts"]),
}
LAUNCHED_COLUMNS: dict[str, Callable[[Row], str]] = {
    "without a graph, ms": lambda row: number(1e3 * row["figures"]["launched_s"]),
    "extra memory, MB": lambda row: _megabytes(row["figures"]["extra_bytes"]),
}
FIRST_CALL_COLUMNS: dict[str, Callable[[Row], str]] = {
    "empty cache, s": lambda row: number(row["seconds"]["median"]),
    "kernels in the cache, s": lambda row: number(row["figures"]["warm_s"]),
}
OPERATION_COLUMNS: dict[str, Callable[[Row], str]] = {
    "µs (quartiles)": lambda row: _microseconds(row["seconds"]) + MARK * ("note" in row),
    "floor, µs": _floor(lambda _, floor_s: number(1e6 * floor_s)),
    "times the floor": _floor(lambda row, floor_s: f"{row['seconds']['median'] / floor_s:.2f}"),
    "GB/s": lambda row: number(_per_second(row["figures"]["bytes"], row) / 1e9),
    "GFLOP/s": lambda row: number(_per_second(row["figures"]["flops"], row) / 1e9),
    "others, times ours": _all_peers,
}

GENERATION = "generation/bench_generate.py::test_generate["
BATCHES = ("model", "dtype", "batch", "beam")

TABLES = (
    Table(
        benchmark=GENERATION,
        title="Generation beside CTranslate2 and transformers",
        sizes=BATCHES,
        columns=SPEED_COLUMNS,
        in_readme=True,
        all_models=True,
    ),
    Table(
        benchmark=GENERATION,
        title="Generation: memory and loading",
        sizes=BATCHES,
        columns=RESOURCE_COLUMNS,
        all_models=True,
    ),
    Table(
        benchmark="generation/bench_step.py::test_step[",
        title="One decoder step",
        sizes=(*BATCHES, "mode"),
        columns=STEP_COLUMNS,
        all_models=True,
    ),
    Table(
        benchmark="generation/bench_generate_54b.py::test_generate_54b[",
        title="Generation with the shape of the 54B",
        sizes=("batch", "beam"),
        columns=WHOLE_COLUMNS,
        in_readme=True,
        peers=True,
    ),
    Table(
        benchmark="generation/bench_generate_54b.py::test_graphs",
        title="Graphs after sentences of random lengths",
        sizes=("sentences", "longest"),
        columns=GRAPHS_COLUMNS,
    ),
    Table(
        benchmark="generation/bench_reorder.py::test_reorder[",
        title="Beams that change places: moving a layer's cache or masking it",
        sizes=("batch", "beam", "length"),
        columns=REORDER_COLUMNS,
    ),
    Table(
        benchmark="moe/bench_layer_graph.py::test_forward[",
        title="One mixture-of-experts layer as a CUDA graph, forward",
        sizes=("routing", "T"),
        columns=GRAPH_COLUMNS | LAUNCHED_COLUMNS,
        plot=("forward", plot_graph),
        in_readme=True,
        peers=True,
    ),
    Table(
        benchmark="moe/bench_layer_graph.py::test_backward[",
        title="The same layer backward",
        sizes=("routing", "T"),
        columns=GRAPH_COLUMNS,
        plot=("backward", plot_graph),
        in_readme=True,
        peers=True,
    ),
    Table(
        benchmark="moe/bench_layer_graph.py::test_first_call[",
        title="The first call of a process",
        sizes=("direction", "T"),
        columns=FIRST_CALL_COLUMNS,
    ),
    Table(
        benchmark="moe/bench_layer.py::test_layer_beside_transformers[",
        title="One mixture-of-experts layer beside the one of transformers 4.57",
        sizes=("T",),
        columns=LAYER_COLUMNS | PEER_COLUMNS,
        plot=("layer", plot_layer),
        in_readme=True,
    ),
    Table(
        benchmark="moe/bench_layer.py::test_layer[",
        title="One mixture-of-experts layer, alone",
        sizes=("T",),
        columns=LAYER_COLUMNS | ROOFLINE_COLUMNS,
    ),
    Table(
        benchmark="integrations/bench_patched_layer.py::test_patched_layer[",
        title="Drop-in layers",
        sizes=("model", "transformers", "T"),
        columns=PATCHED_COLUMNS,
        in_readme=True,
        all_models=True,
    ),
    Table(
        benchmark="end_to_end/bench_translate.py::test_translate[",
        title="The tiny model on its held-out sentences",
        sizes=("batch", "beam", "sentences"),
        columns=TRANSLATE_COLUMNS,
        plot=("translate", plot_translate),
        in_readme=True,
    ),
    Table(
        benchmark="ops/bench_",
        title="The operations one by one",
        sizes=("operation", "capacity", "T"),
        columns=OPERATION_COLUMNS,
    ),
)

DOCS_HEAD = """# Benchmarks

Written by `make report` from the files in `benchmarks/results`. How to measure, what a timing
leaves out and how to read a signature: [benchmarks/README.md](../benchmarks/README.md). Figures
that nobody has measured yet: [open.md](../benchmarks/results/open.md).

Times are medians with quartiles; MB are 10^6 bytes. Extra memory is the most that a call holds
beyond what was held before it. In the comparison both layers run on the same weights in the same
process, in turns, and "times as fast" is the median of the ratios round by round.

Generation is of 32 tokens from 32, from random weights, each system in a process of its own;
tokens per second are of all sentences together. Peak GB are of the whole process without mapped
files. "Times CTranslate2" and "times transformers" say how many times as fast this package is, by
the ratios of each round. transformers computes in float32 everywhere. The bandwidth floor is what
reading the weights alone would allow.

A drop-in layer is a layer of transformers that `moe_mt.patch` was called on, in the version that
the row names. It stands beside the unpatched layers of both versions, on the same weights, round by
round; of the experts implementations of version 5 beside the fastest and the one that takes least
memory.

Elsewhere, a floor is the larger of bytes that must be moved over the speed of a copy, and
operations over the speed of a large product. "Times ours" is a peer's time over ours: above 1, this
package is faster.

"""


def render_readme(rows: Sequence[Row]) -> str:
    """Return the block of README.md: the tables that matter most."""
    chosen = [table for table in TABLES if table.in_readme]
    return _render(rows, chosen, heading="###", images="docs/images")


def render_docs(rows: Sequence[Row]) -> str:
    """Return docs/benchmarks.md."""
    return DOCS_HEAD + _render(rows, TABLES, heading="##", images="images") + "\n"


def _render(rows: Sequence[Row], tables: Sequence[Table], *, heading: str, images: str) -> str:
    lines: list[str] = []
    for table in tables:
        groups = table.groups(rows)
        lines += [f"{heading} {table.title}", ""] if groups else []
        for setting, mine in groups.items():
            lines += [f"**{setting}**", "", *table.render(mine), ""]
            if table.plot:
                lines += [f"![{table.title}]({images}/{table.picture(setting)})", ""]
    return "\n".join(lines).strip()


def replace_block(text: str, block: str) -> str:
    """Return ``text`` with what stands between the markers replaced.

    Raises:
        ReportError: If the markers are not there once each, in order.
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ReportError(
            f"the tables go between the lines {START} and {END}, once each and in this order; "
            f"found {text.count(START)} and {text.count(END)}. Put them into README.md"
        )
    before, rest = text.split(START)
    return f"{before}{START}\n\n{block.strip()}\n\n{END}{rest.split(END)[1]}"


def load_rows(results: Path) -> list[Row]:
    """Return the newest rows of every device.

    Raises:
        ReportError: If there are none.
    """
    folders = sorted(path for path in results.iterdir() if path.is_dir())
    rows = [row for folder in folders for row in newest_rows(folder)]
    if not rows:
        raise ReportError(f"no results lie in {results}; measure first: make bench")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Write README block, documentation and pictures; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results")
    options = parser.parse_args(arguments)
    readme, docs = options.root / "README.md", options.root / "docs"
    try:
        rows = load_rows(options.results)
        text = replace_block(readme.read_text(encoding="utf-8"), render_readme(rows))
    except (ReportError, RecordError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    (docs / "images").mkdir(parents=True, exist_ok=True)
    for table in TABLES:
        if table.plot:
            for setting, mine in table.groups(rows).items():
                table.plot[1](mine, docs / "images" / table.picture(setting))
    readme.write_text(text, encoding="utf-8")
    (docs / "benchmarks.md").write_text(render_docs(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
