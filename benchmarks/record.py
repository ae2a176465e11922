"""From pytest-benchmark's raw output to the rows that are committed, and a word on what changed.

``python -m benchmarks.record RAW.json`` writes ``results/<device>/<version>.json`` and prints each
figure beside the last committed one of the same measurement on the same device. Instead of a raw
file it takes a result file, such as one that was written on another machine.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from benchmarks.signature import SOFTWARE, device_slug, parse_signature

__all__ = [
    "RESULTS",
    "Change",
    "RecordError",
    "compare",
    "identity",
    "last_rows",
    "main",
    "merge",
    "newest_rows",
    "read_rows",
    "trim",
    "write_rows",
]

RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]
"""One measurement: name, date, signature, seconds, figures, and a peer's where there is one."""

FIGURES = {
    "seconds": "lower",
    "extra_bytes": "lower",
    "launched_s": "lower",
    "warm_s": "lower",
    "load_s": "lower",
    "peak_anonymous_bytes": "lower",
    "chrf": "higher",
    "exact_match": "higher",
}
"""What is compared from one measurement to the next, and which way is better."""

LOSS = 0.90
"""A figure that falls below this share of its last value is flagged."""


class RecordError(ValueError):
    """A file that is not what this module reads or writes."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One figure beside its last value."""

    name: str
    figure: str
    now: float
    last: float

    @property
    def ratio(self) -> float:
        """How many times better than last: above 1 is a gain, for times and scores alike."""
        if self.now == self.last:
            return 1.0
        lower_is_better = FIGURES[self.figure] == "lower"
        better, worse = (self.last, self.now) if lower_is_better else (self.now, self.last)
        return better / worse if worse else math.inf

    @property
    def is_loss(self) -> bool:
        """Whether more than ten per cent was lost."""
        return self.ratio < LOSS

    def __str__(self) -> str:
        flag = "  LOSS over 10 %" if self.is_loss else ""
        return f"x{self.ratio:.2f}  {self.figure} {self.now:.4g} (last {self.last:.4g}){flag}"


def trim(raw: dict[str, Any]) -> list[Row]:
    """Return the rows worth keeping: no single rounds, no machine, no failed benchmark.

    A benchmark that read a clock of its own, because what it timed is a graph of many calls or
    another process, says so in ``extra_info["seconds"]``, which then counts.

    Raises:
        RecordError: If a benchmark did not sign its row.
    """
    rows: list[Row] = []
    for benchmark in raw["benchmarks"]:
        stats, extra = benchmark["stats"], benchmark["extra_info"]
        if benchmark.get("has_error"):
            continue
        if "signature" not in extra:
            raise RecordError(
                f"{benchmark['fullname']} has no signature; let it call the fixture sign(model, …)"
            )
        seconds = {key: stats[key] for key in ("median", "q1", "q3", "rounds")}
        name = benchmark["fullname"].removeprefix("benchmarks/")
        row = {"name": name, "date": raw["datetime"][:10], "seconds": seconds}
        rows.append(row | extra)
    return rows


def identity(row: Row) -> tuple[str, str]:
    """Return what makes two rows measurements of the same thing, whatever the software."""
    fields = parse_signature(row["signature"])
    kept = [f"{name}:{value}" for name, value in fields.items() if name not in SOFTWARE]
    return row["name"], "|".join(kept)


def merge(*older_to_newer: Iterable[Row]) -> list[Row]:
    """Return the newest row of every measurement, sorted."""
    newest = {identity(row): row for rows in older_to_newer for row in rows}
    return [newest[key] for key in sorted(newest)]


def compare(rows: Iterable[Row], last: Iterable[Row]) -> list[Change]:
    """Return every figure that was also measured last time."""
    known = {identity(row): _figures(row) for row in last}
    return [
        Change(name=row["name"], figure=figure, now=value, last=known[identity(row)][figure])
        for row in rows
        for figure, value in _figures(row).items()
        if figure in known.get(identity(row), {})
    ]


def _figures(row: Row) -> dict[str, float]:
    values = {**row.get("figures", {}), "seconds": row["seconds"]["median"]}
    return {figure: values[figure] for figure in FIGURES if figure in values}


def read_rows(text: str, where: str) -> list[Row]:
    """Return the rows of a result file.

    Raises:
        RecordError: If the text is not one.
    """
    try:
        return json.loads(text)["rows"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise RecordError(f"{where} is not a result file of python -m benchmarks") from error


def write_rows(rows: Sequence[Row], results: Path) -> Path:
    """Put rows into the file of their device and version, over older rows of the same.

    Raises:
        RecordError: If the rows are from several devices or versions.
    """
    fields = [parse_signature(row["signature"]) for row in rows]
    origins = {(found["device"], found["v"]) for found in fields}
    if len(origins) != 1:
        raise RecordError(f"rows of one run are from {sorted(origins)}; measure one at a time")
    [(device, version)] = origins
    path = results / device_slug(device) / f"{version}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    older = read_rows(path.read_text(encoding="utf-8"), str(path)) if path.exists() else []
    content = {"device": device, "version": version, "rows": merge(older, rows)}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def last_rows(slug: str, results: Path = RESULTS) -> tuple[list[Row], str]:
    """Return a device's last committed rows, and where they were found.

    Where there is no git or nothing committed, what lies in the folder counts.
    """
    committed = _committed(results / slug)
    if committed is not None:
        return merge(*_by_version(committed)), "as committed"
    return newest_rows(results / slug), "as they lie in the folder (nothing is committed)"


def newest_rows(folder: Path) -> list[Row]:
    """Return the newest row of every measurement in a device's folder."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.json")}
    return merge(*_by_version(texts))


def _by_version(texts: dict[str, str]) -> list[list[Row]]:
    def version(name: str) -> Version:
        try:
            return Version(name.removesuffix(".json"))
        except InvalidVersion as error:
            raise RecordError(f"result file {name} is not named after a version") from error

    return [read_rows(texts[name], name) for name in sorted(texts, key=version)]


def _committed(folder: Path) -> dict[str, str] | None:
    """Return name and text of the folder's result files in HEAD; ``None`` if there are none."""

    def git(*arguments: str) -> str:
        where = next(parent for parent in folder.parents if parent.exists())
        answer = subprocess.run(
            ["git", "-C", str(where), *arguments], capture_output=True, encoding="utf-8", check=True
        )
        return answer.stdout

    try:
        # Paths are relative to the folder's parent, where git runs.
        names = git("ls-tree", "--name-only", "HEAD", f"{folder.name}/").splitlines()
        texts = {Path(name).name: git("show", f"HEAD:./{name}") for name in names}
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return {name: text for name, text in texts.items() if name.endswith(".json")} or None


def main(arguments: Sequence[str] | None = None) -> int:
    """Record one raw file; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record", description=__doc__)
    parser.add_argument(
        "raw", type=Path, help="the file of pytest --benchmark-json, or a result file"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if something was lost")
    options = parser.parse_args(arguments)
    try:
        return _record(options.raw, options.results, strict=options.strict)
    except RecordError as error:
        sys.stderr.write(f"{error}\n")
        return 1


def _record(raw: Path, results: Path, *, strict: bool) -> int:
    try:
        content = json.loads(raw.read_text(encoding="utf-8"))
        rows = content["rows"] if "rows" in content else trim(content)
    except (OSError, json.JSONDecodeError) as error:
        raise RecordError(f"{raw} is not the output of pytest --benchmark-json: {error}") from error
    if not rows:
        raise RecordError(f"{raw} holds no finished benchmark; nothing was recorded")
    slug = device_slug(parse_signature(rows[0]["signature"])["device"])
    last, where = last_rows(slug)  # before the file is written over
    changes = compare(rows, last)
    path = write_rows(rows, results)
    sys.stdout.write(describe(rows, changes, f"results of {slug}, {where}") + f"\nwrote {path}\n")
    return 1 if strict and any(change.is_loss for change in changes) else 0


def describe(rows: Sequence[Row], changes: Sequence[Change], last: str) -> str:
    """Return every row's figures beside their last values, as lines of text."""
    lines = [f"Beside the last {last}; above x1 is better:" if changes else f"First {last}:"]
    for row in rows:
        seconds = row["seconds"]
        lines.append(
            f"{row['name']}: {seconds['median'] * 1e3:.4g} ms "
            f"({seconds['q1'] * 1e3:.4g} to {seconds['q3'] * 1e3:.4g}, {seconds['rounds']} rounds)"
        )
        if "peer" in row:
            ratio = row["speedup"]
            share = row["figures"]["extra_bytes"] / row["peer"]["extra_bytes"]
            lines.append(
                f"    {ratio['median']:.2f} times as fast as {row['peer']['name']} "
                f"({ratio['q1']:.2f} to {ratio['q3']:.2f}), with {share:.1%} of its extra memory"
            )
        lines += [f"    {line}" for line in _describe_roofline(row)]
        figures = row.get("figures", {})
        if "peak_anonymous_bytes" in figures:
            lines.append(
                f"    {figures['tokens'] / seconds['median']:.4g} tokens/s, loaded in "
                f"{figures['load_s']:.3g} s, {figures['peak_anonymous_bytes'] / 1e9:.3g} GB at most"
            )
        if "chrf" in figures:
            lines.append(
                f"    {figures['sentences'] / seconds['median']:.4g} sentences/s, "
                f"chrF++ {figures['chrf']:.1f}, exact match {figures['exact_match']:.1%}"
            )
        mine = [change for change in changes if change.name == row["name"]]
        lines += [f"    {change}" for change in mine]
    return "\n".join(lines)


def _describe_roofline(row: Row) -> list[str]:
    """Return how far a row is from its floor and from its peers."""
    figures, seconds = row.get("figures", {}), row["seconds"]["median"]
    lines: list[str] = [f"note: {row['note']}"] if "note" in row else []
    if "floor_s" in figures:
        lines.append(
            f"{seconds / figures['floor_s']:.2f} times the floor of {figures['floor_s'] * 1e3:.4g} "
            f"ms; {figures['bytes'] / seconds / 1e9:.4g} GB/s, "
            f"{figures['flops'] / seconds / 1e12:.4g} TFLOP/s"
        )
    if "warm_s" in figures:
        lines.append(f"{figures['warm_s'] * 1e3:.4g} ms where compiled kernels are found")
    if "peers" in row and "extra_bytes" in figures:
        lines.append(f"{figures['extra_bytes'] / 1e6:.3g} MB extra")
    for name, peer in row.get("peers", {}).items():
        note = f" ({peer['note']})" if "note" in peer else ""
        if "seconds" in peer:
            taken = peer["seconds"]["median"]
            held = peer.get("peak_anonymous_bytes")
            memory = f", {held / 1e9:.3g} GB, loaded in {peer['load_s']:.3g} s" if held else ""
            if "extra_bytes" in peer:
                memory = f", {peer['extra_bytes'] / 1e6:.3g} MB extra"
            lines.append(
                f"{name}: {taken * 1e3:.4g} ms, {taken / seconds:.2f} times ours{memory}{note}"
            )
        else:
            lines.append(f"{name}: not timed{note}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
