"""Every benchmark of a GPU, run on the CPU at toy size: no typing error waits for a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.record import main as record_main
from benchmarks.report import END, START
from benchmarks.report import main as report_main
from benchmarks.signature import parse_signature

ROOT = Path(__file__).parents[2]
OPERATIONS = sorted(
    path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks" / "ops").glob("bench_*.py")
)
CHOSEN = (
    "(T20 and not (backward and zipf) and not patched) or (first_call and forward and not T1024)"
    " or cross_attention or test_step or test_reorder or test_generate_54b or test_graphs"
)
"""All code once; the rest differs in numbers only. Patched layers need transformers, and are tried
in test_patched_layer.py where it is."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "benchmarks", "--rehearse", "--results", str(results)]
    done = subprocess.run(
        [*command, "-k", CHOSEN],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = results.rglob("*.json")
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def named(rows, part):
    found = [row for row in rows if part in row["name"]]
    assert found, part
    return found


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "cross_attention"])
def test_every_operation_is_timed_beside_its_definition_with_its_roofline(rows, operation):
    for row in named(rows, f"::test_{operation}["):
        assert f"|operation:{operation}|" in row["signature"]
        assert row["figures"]["bytes"] > 0
        assert row["figures"]["floor_s"] > 0
        assert "definition" in row["peers"]
        assert not [peer for peer in row["peers"].values() if "note" in peer]


@pytest.mark.parametrize("padding", [0, 40])
@pytest.mark.parametrize("direction", ["decode", "forward", "backward"])
def test_attention_is_timed_beside_its_floor_and_every_peer_that_is_here(rows, direction, padding):
    [row] = [
        row
        for row in named(rows, "bench_cross_attention.py::")
        if f"|operation:cross_attention {direction} " in row["signature"]
        and f" padding {padding}%|" in row["signature"]
    ]
    peers = row["peers"]
    assert row["figures"]["floor_s"] > 0
    timed = {name for name, peer in peers.items() if "seconds" in peer}
    shared = direction == "decode"  # beams share a memory
    assert timed == {
        *(["SDPA reshaped (flash)", "SDPA replicated (flash)"] if shared else ["SDPA (flash)"]),
        *(["SDPA flash unmasked"] if padding == 0 else []),
        *(["FlexAttention"] if direction != "backward" else []),
    }
    assert not [name for name in timed if "note" in peers[name]]
    # What is not timed does not run on a CPU.
    missing = {"SDPA mem-efficient masked", "SDPA cuDNN unmasked", "varlen_attn", "FlexAttention"}
    assert set(peers) - timed <= missing


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_layer_is_timed_beside_its_floor_and_every_peer_that_is_here(rows, direction):
    found = named(rows, f"::test_{direction}[")
    routings = {parse_signature(row["signature"])["routing"] for row in found}
    assert routings == ({"uniform", "zipf"} if direction == "forward" else {"uniform"})
    for row in found:
        peers = row["peers"]
        assert f"|direction:{direction}|" in row["signature"]
        assert row["figures"]["floor_s"] > 0
        assert 1 < row["figures"]["distinct_experts"] <= 4
        timed = {name for name, peer in peers.items() if "seconds" in peer}
        assert {"grouped_mm", "expert loop"} <= timed
        # What is not timed is not here; nothing is wrong, and nothing failed.
        assert set(peers) - timed <= {"ScatterMoE", "transformers 4.57"}
        assert not [name for name in timed if "note" in peers[name]]


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_a_step_is_timed_beside_its_floor(rows, mode):
    [row] = [row for row in named(rows, "::test_step[") if f"|mode:{mode}|" in row["signature"]]
    assert row["figures"]["floor_s"] > 0
    assert 2 <= row["figures"]["distinct_experts"] <= 4  # two beams


def test_generation_is_timed_beside_its_floor_and_transformers_if_it_is_here(rows):
    [row] = named(rows, "::test_generate_54b[")
    assert row["figures"]["tokens"] == 2
    assert row["figures"]["floor_s"] > 0
    [peer] = row["peers"].values()
    assert "seconds" in peer or "transformers" in peer["note"]


def test_graphs_are_counted(rows):
    [row] = named(rows, "::test_graphs")
    assert 1 <= row["figures"]["graphs"] <= 2 * row["figures"]["buckets"]
    assert row["figures"]["breaks"] == 0


def test_both_ways_to_reorder_beams_are_timed(rows):
    [row] = named(rows, "::test_reorder[")
    assert row["peers"]["ancestry mask"]["seconds"]["median"] > 0


def test_the_first_call_is_timed_twice(rows):
    [row] = named(rows, "::test_first_call[")
    assert row["seconds"]["median"] > 0
    assert row["figures"]["warm_s"] > 0


def test_the_report_is_drawn_from_these_rows(rows, tmp_path):
    (tmp_path / "README.md").write_text(f"{START}\n{END}\n")
    elsewhere = tmp_path / "copied.json"
    elsewhere.write_text(json.dumps({"rows": rows}))
    assert record_main([str(elsewhere), "--results", str(tmp_path / "results")]) == 0
    assert report_main(["--root", str(tmp_path), "--results", str(tmp_path / "results")]) == 0
    text = (tmp_path / "docs" / "benchmarks.md").read_text()
    for part in ("forward", "backward", "first call", "one by one", "cross_attention decode"):
        assert part in text
    assert len(list((tmp_path / "docs" / "images").iterdir())) == 2
