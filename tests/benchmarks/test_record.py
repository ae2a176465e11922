"""From raw output to committed rows, and what is said about a change."""

import json
import math
import os
import subprocess

import pytest

from benchmarks import record
from benchmarks.record import Change, RecordError, compare, last_rows, merge, trim, write_rows

SIGNATURE = "model:tiny|dtype:float32|batch:{batch}|device:Fast CPU, 2 cores|torch:{torch}|v:{v}"


def signed(batch=1, torch="2.13", v="0.1.0"):
    return SIGNATURE.format(batch=batch, torch=torch, v=v)


def row(seconds=1.0, *, signature=None, **figures):
    spread = {"median": seconds, "q1": seconds, "q3": seconds, "rounds": 3}
    return {
        "name": "part/bench_thing.py::test_thing[x]",
        "date": "2026-11-21",
        "seconds": spread,
        "signature": signature or signed(),
        "figures": figures,
    }


def raw(*, name="part/bench_thing.py::test_thing[x]", extra=None, **more):
    return {
        "fullname": f"benchmarks/{name}",
        "stats": {
            **{"min": 1, "max": 9, "mean": 4, "iqr": 2, "outliers": "1;0"},
            **{"median": 3.0, "q1": 2.0, "q3": 4.0, "rounds": 5, "data": [1, 2, 3, 4, 9]},
        },
        "extra_info": {"signature": signed(), "figures": {"tokens": 9}} if extra is None else extra,
        **more,
    }


def raw_file(*benchmarks):
    return {
        "machine_info": {"node": "a-host-name", "cpu": {"brand_raw": "Fast CPU"}},
        "commit_info": {"author_time": "2026-11-21"},
        "datetime": "2026-11-21T20:00:00+00:00",
        "benchmarks": list(benchmarks),
    }


def test_a_row_keeps_what_is_worth_keeping_and_nothing_of_the_machine():
    rows = trim(raw_file(raw()))
    assert rows == [
        {
            "name": "part/bench_thing.py::test_thing[x]",
            "date": "2026-11-21",
            "seconds": {"median": 3.0, "q1": 2.0, "q3": 4.0, "rounds": 5},
            "signature": signed(),
            "figures": {"tokens": 9},
        }
    ]
    assert "a-host-name" not in json.dumps(rows)


def test_a_clock_of_its_own_counts_more_than_that_of_pytest():
    mine = {"median": 0.1, "q1": 0.1, "q3": 0.1, "rounds": 7}
    [found] = trim(raw_file(raw(extra={"signature": signed(), "seconds": mine})))
    assert found["seconds"] == mine


def test_a_benchmark_that_failed_leaves_no_row():
    assert trim(raw_file(raw(has_error=True, extra={}))) == []


def test_a_row_without_a_signature_is_refused():
    with pytest.raises(RecordError, match=r"test_thing.*sign"):
        trim(raw_file(raw(extra={})))


@pytest.mark.parametrize(
    ("figure", "now", "last", "ratio", "is_loss"),
    [
        ("seconds", 1.0, 2.0, 2.0, False),  # half the time is twice as good
        ("seconds", 2.0, 1.0, 0.5, True),  # twice the time is a loss
        ("seconds", 1.0, 0.9, 0.9, False),  # ten per cent exactly is not over ten per cent
        ("seconds", 1.0, 0.89, 0.89, True),  # a little more is
        ("extra_bytes", 100, 50, 0.5, True),  # memory counts like time
        ("extra_bytes", 0, 0, 1.0, False),  # nothing before and after: no division
        ("extra_bytes", 0, 5, math.inf, False),  # all of it saved
        ("extra_bytes", 5, 0, 0.0, True),  # from nothing to something
        ("chrf", 98.0, 49.0, 2.0, False),  # scores count the other way round
        ("exact_match", 0.5, 1.0, 0.5, True),
    ],
)
def test_above_one_is_better(figure, now, last, ratio, is_loss):
    change = Change(name="x", figure=figure, now=now, last=last)
    assert change.ratio == pytest.approx(ratio)
    assert change.is_loss is is_loss
    assert ("LOSS" in str(change)) is is_loss


def test_every_figure_is_compared_with_its_last_value():
    changes = compare([row(2.0, chrf=50.0, tokens=7)], [row(1.0, chrf=100.0, tokens=9)])
    assert {(c.figure, c.now, c.last) for c in changes} == {
        ("seconds", 2.0, 1.0),
        ("chrf", 50.0, 100.0),  # a count such as tokens is no figure of merit
    }


@pytest.mark.parametrize(
    ("signature", "compared"),
    [
        (signed(torch="2.14", v="0.2.0"), True),  # newer software is what a comparison is for
        (signed(batch=2), False),  # another batch is another measurement
        (signed().replace("float32", "bfloat16"), False),  # so is another precision
        (signed().replace("2 cores", "4 cores"), False),  # so is another device
    ],
)
def test_only_like_is_compared_with_like(signature, compared):
    assert bool(compare([row(signature=signature)], [row()])) is compared


def test_a_new_figure_has_nothing_to_be_compared_with():
    assert [c.figure for c in compare([row(chrf=1.0)], [row()])] == ["seconds"]


def test_the_newest_row_of_a_measurement_wins():
    merged = merge([row(1.0), row(9.0, signature=signed(batch=2))], [row(2.0)])
    assert [found["seconds"]["median"] for found in merged] == [2.0, 9.0]


def test_writing_replaces_what_was_measured_again_and_keeps_the_rest(tmp_path):
    write_rows([row(1.0), row(9.0, signature=signed(batch=2))], tmp_path)
    path = write_rows([row(2.0)], tmp_path)
    assert path == tmp_path / "fast-cpu-2-cores" / "0.1.0.json"
    content = json.loads(path.read_text())
    assert (content["device"], content["version"]) == ("Fast CPU, 2 cores", "0.1.0")
    assert [found["seconds"]["median"] for found in content["rows"]] == [2.0, 9.0]


def test_rows_of_two_devices_are_refused(tmp_path):
    rows = [row(), row(signature=signed().replace("Fast", "Slow"))]
    with pytest.raises(RecordError, match="Slow CPU"):
        write_rows(rows, tmp_path)


def test_versions_are_ordered_as_versions(tmp_path):
    write_rows([row(10.0, signature=signed(v="0.10.0"))], tmp_path)
    write_rows([row(9.0, signature=signed(v="0.9.0"))], tmp_path)  # later as text, older
    rows, _ = last_rows("fast-cpu-2-cores", tmp_path)
    assert [found["seconds"]["median"] for found in rows] == [10.0]


def git(folder, *arguments):
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    hooks = ("-c", "core.hooksPath=/dev/null")
    subprocess.run(
        ["git", "-C", str(folder), *identity, *hooks, *arguments], check=True, capture_output=True
    )


def test_last_means_last_committed(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)  # set where a hook runs the tests; git would use that repository
    results = tmp_path / "benchmarks" / "results"
    git(tmp_path, "init", "-q")
    write_rows([row(1.0)], results)
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "results")
    write_rows([row(5.0)], results)  # measured since, and not committed
    rows, where = last_rows("fast-cpu-2-cores", results)
    assert [found["seconds"]["median"] for found in rows] == [1.0]
    assert "as committed" in where


def test_without_a_commit_what_lies_there_counts(tmp_path):
    write_rows([row(5.0)], tmp_path)
    rows, where = last_rows("fast-cpu-2-cores", tmp_path)
    assert [found["seconds"]["median"] for found in rows] == [5.0]
    assert "nothing is committed" in where


def test_a_device_without_results_has_none(tmp_path):
    assert last_rows("unknown", tmp_path / "missing")[0] == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("0.1.0.json", "{"),  # cut off
        ("0.1.0.json", "[]"),  # something else
        ("latest.json", '{"rows": []}'),  # which version?
    ],
)
def test_a_file_that_is_no_result_is_named(tmp_path, name, text):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / name).write_text(text)
    with pytest.raises(RecordError, match=name):
        last_rows("cpu", tmp_path)


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A results folder that holds one row of one second; returns a runner of ``main``."""
    write_rows([row(1.0)], tmp_path)
    monkeypatch.setattr(record, "last_rows", lambda slug: last_rows(slug, tmp_path))

    def run(benchmark, *options):
        path = tmp_path / "raw.json"
        path.write_text(json.dumps(raw_file(benchmark)))
        return record.main([str(path), "--results", str(tmp_path), *options])

    return run


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ((), 0),  # a noisy machine must not fail a build
        (("--strict",), 1),  # unless it is asked to
    ],
)
def test_a_loss_is_flagged_and_fails_only_when_strict(recorded, capsys, options, code):
    assert recorded(raw(), *options) == code  # three seconds, one before
    printed = capsys.readouterr().out
    assert "x0.33  seconds 3 (last 1)  LOSS over 10 %" in printed
    assert "0.1.0.json" in printed


def test_a_peer_is_part_of_the_word(recorded, capsys):
    extra = {
        "signature": signed(batch=8),
        "figures": {"extra_bytes": 5},
        "peer": {"name": "other-1.0", "seconds": {}, "extra_bytes": 100},
        "speedup": {"median": 2.0, "q1": 1.5, "q3": 2.5},
    }
    recorded(raw(extra=extra))
    assert "2.00 times as fast as other-1.0 (1.50 to 2.50), with 5.0% of its extra memory" in (
        capsys.readouterr().out
    )


def test_quality_is_part_of_the_word(recorded, capsys):
    figures = {"sentences": 30, "chrf": 98.76, "exact_match": 0.955}
    recorded(raw(extra={"signature": signed(batch=8), "figures": figures}))  # in three seconds
    assert "10 sentences/s, chrF++ 98.8, exact match 95.5%" in capsys.readouterr().out


def test_floor_and_peers_are_part_of_the_word(recorded, capsys):
    figures = {"floor_s": 2.0, "bytes": 6e9, "flops": 9e12, "warm_s": 0.5}  # in three seconds
    peers = {
        "fast": {"seconds": {"median": 1.5}},
        "eager": {"seconds": {"median": 6.0}, "note": "no graph"},
        "absent": {"note": "not installed"},
    }
    extra = {"signature": signed(batch=8), "figures": figures, "peers": peers, "note": "launched"}
    recorded(raw(extra=extra))
    printed = capsys.readouterr().out
    for line in (
        "1.50 times the floor of 2000 ms; 2 GB/s, 3 TFLOP/s",
        "500 ms where compiled kernels are found",
        "fast: 1500 ms, 0.50 times ours",
        "eager: 6000 ms, 2.00 times ours (no graph)",
        "absent: not timed (not installed)",
        "note: launched",
    ):
        assert f"    {line}\n" in printed


def test_speed_memory_and_loading_of_generation_are_part_of_the_word(recorded, capsys):
    figures = {"tokens": 96, "load_s": 1.25, "peak_anonymous_bytes": 2_100_000_000}
    peer = {"seconds": {"median": 4.5}, "load_s": 0.5, "peak_anonymous_bytes": 1_900_000_000}
    recorded(raw(extra={"signature": signed(), "figures": figures, "peers": {"other": peer}}))
    printed = capsys.readouterr().out
    assert "    32 tokens/s, loaded in 1.25 s, 2.1 GB at most\n" in printed
    assert "    other: 4500 ms, 1.50 times ours, 1.9 GB, loaded in 0.5 s\n" in printed


def test_a_result_file_of_another_machine_is_taken_too(recorded, tmp_path, capsys):
    copied = tmp_path / "copied.json"
    copied.write_text(json.dumps({"device": "x", "version": "y", "rows": [row(2.0)]}))
    assert record.main([str(copied), "--results", str(tmp_path)]) == 0
    assert "x0.50  seconds 2 (last 1)" in capsys.readouterr().out
    rows, _ = last_rows("fast-cpu-2-cores", tmp_path)
    assert [found["seconds"]["median"] for found in rows] == [2.0]


@pytest.mark.parametrize("text", [None, "{"])  # pytest never got there; it was cut off
def test_raw_output_that_cannot_be_read_is_named(tmp_path, capsys, text):
    path = tmp_path / "raw.json"
    if text is not None:
        path.write_text(text)
    assert record.main([str(path), "--results", str(tmp_path)]) == 1
    assert "raw.json is not the output of pytest" in capsys.readouterr().err


def test_a_run_without_a_finished_benchmark_records_nothing(recorded, capsys):
    assert recorded(raw(has_error=True)) == 1
    assert "nothing was recorded" in capsys.readouterr().err
