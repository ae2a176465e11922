"""What ``python -m benchmarks`` asks of pytest, and what it does with the answer."""

import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import record
from benchmarks.conftest import NOT_REHEARSED, ON_A_CPU, ON_A_GPU, pytest_ignore_collect
from benchmarks.shapes import (
    BACKWARD_TOKENS,
    GPU_TOKENS,
    NLLB_MOE_54B,
    decode_shapes,
    graph_shape,
    graph_tokens,
    operation_shape,
    operation_tokens,
    training_shapes,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run the command with pytest and the recorder replaced; return what they were given."""
    monkeypatch.setattr(command, "BUILD", tmp_path)
    monkeypatch.setattr(command, "RAW", tmp_path / "raw.json")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    seen = SimpleNamespace(code=0, written="{}")

    def pytest_run(arguments, *, env, **_):
        seen.arguments, seen.environment = arguments, env
        command.RAW.write_text(seen.written)
        return SimpleNamespace(returncode=seen.code)

    def record_main(arguments):
        seen.recorded = arguments
        return 0

    monkeypatch.setattr(command.subprocess, "run", pytest_run)
    monkeypatch.setattr(record, "main", record_main)

    def start(*arguments, code=0, written="{}"):
        seen.code, seen.written = code, written
        monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
        seen.exit = command.main()
        return seen

    return start


def folders(seen):
    return [part.rpartition("/")[2] for part in seen.arguments if "/benchmarks/" in part]


def test_all_parts_are_measured_where_none_is_named(run):
    assert folders(run())[:3] == ["end_to_end", "moe", "ops"]


def test_what_takes_ten_minutes_is_measured_where_it_is_named(run):
    assert folders(run("generation"))[:1] == ["generation"]
    assert {"generation", "integrations"}.isdisjoint(folders(run()))


def test_a_part_its_expression_and_its_device_reach_pytest(run):
    seen = run("--device", "cuda", "moe", "-k", "backward")  # as PART="moe -k backward" says it
    assert folders(seen)[:1] == ["moe"]
    assert seen.arguments[-2:] == ["-k", "backward"]
    assert seen.arguments[seen.arguments.index("--device") + 1] == "cuda"
    assert "--rehearse" not in seen.arguments
    assert "TRITON_INTERPRET" not in seen.environment


def test_results_go_where_they_are_wanted(run, tmp_path):
    assert run("ops").recorded[2] == str(record.RESULTS)
    assert run("ops", "--results", str(tmp_path)).recorded[2] == str(tmp_path)


def test_a_rehearsal_is_interpreted_and_recorded_apart(run, tmp_path):
    seen = run("--rehearse")
    assert folders(seen)[:4] == ["generation", "integrations", "moe", "ops"]
    assert "--rehearse" in seen.arguments
    assert seen.environment["TRITON_INTERPRET"] == "1"
    assert seen.recorded[2] == str(tmp_path / "rehearsal")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("speed",), "no part speed"),
        (("--rehearse", "--device", "cuda"), "for the CPU"),
        (("--rehearse", "end_to_end"), "generation, integrations, moe, ops"),
    ],
)
def test_what_cannot_be_run_is_refused(run, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run(*arguments)
    assert message in capsys.readouterr().err


def test_a_failed_benchmark_fails_the_command_and_the_others_are_recorded(run):
    seen = run("ops", code=1)
    assert seen.exit == 1
    assert seen.recorded


def test_nothing_is_recorded_where_nothing_was_written(run):
    seen = run("ops", code=4, written="")
    assert seen.exit == 4
    assert not hasattr(seen, "recorded")


@pytest.mark.parametrize(
    ("name", "device", "rehearse", "ignored"),
    [
        ("bench_layer_graph.py", "cpu", False, True),  # would take hours there
        ("bench_layer_graph.py", "cuda", False, False),
        ("bench_layer_graph.py", "cpu", True, False),
        ("bench_layer.py", "cpu", False, False),
        ("bench_layer.py", "cuda", False, False),
        ("bench_layer.py", "cpu", True, True),  # every line of it runs on a CPU anyway
        ("bench_generate.py", "cpu", False, False),
        ("bench_generate.py", "cuda", False, True),  # its peers are those of a processor
        ("bench_generate.py", "cpu", True, True),
        ("bench_generate_54b.py", "cpu", False, True),
        ("bench_generate_54b.py", "cuda", False, False),
        ("bench_generate_54b.py", "cpu", True, False),
        ("bench_step.py", "cuda", False, False),
        ("bench_patched_layer.py", "cpu", False, False),
        ("bench_patched_layer.py", "cuda", False, False),
        ("bench_patched_layer.py", "cpu", True, False),
        ("bench_permute.py", "cpu", False, False),
        ("bench_permute.py", "cpu", True, False),
    ],
)
def test_what_a_device_measures(tmp_path, name, device, rehearse, ignored):
    options = {"--device": device, "--rehearse": rehearse}
    config = SimpleNamespace(getoption=options.__getitem__)
    assert bool(pytest_ignore_collect(tmp_path / name, config)) is ignored


def test_the_files_that_are_left_out_exist():
    found = {path.name for path in command.HERE.glob("*/bench_*.py")}
    assert {*ON_A_GPU, *ON_A_CPU, *NOT_REHEARSED} < found


def test_a_gpu_measures_the_layer_of_the_54b_at_all_sizes():
    assert (graph_shape(rehearsal=False), graph_tokens(rehearsal=False)) == (
        NLLB_MOE_54B,
        (1, 8, 32, 128, 1024, 4096, 16384),
    )
    assert graph_tokens(rehearsal=False, backward=True) == BACKWARD_TOKENS == (1024, 4096, 16384)
    assert operation_shape(GPU, rehearsal=False) == NLLB_MOE_54B
    assert operation_tokens(GPU, rehearsal=False) == GPU_TOKENS


def test_a_gpu_measures_attention_at_the_sizes_of_its_targets():
    decode = decode_shapes(GPU, rehearsal=False)
    assert [(shape.sentences, shape.beams, shape.keys) for shape in decode] == [
        *[(32, 4, 64), (32, 1, 64), (8, 4, 64), (1, 1, 64), (1, 4, 512), (32, 5, 256)]
    ]
    training = training_shapes(GPU, rehearsal=False)
    assert [shape.sizes for shape in training] == [
        *["32x128-S128", "32x256-S256", "32x512-S512", "8x64-S1500"]
    ]
    assert {shape.name for shape in (*decode, *training[:3])} == {"16-heads-of-128"}
    assert training[3].name == "20-heads-of-64"


def test_a_cpu_and_a_rehearsal_are_spared():
    assert operation_shape(CPU, rehearsal=False).expert_weights < 2**21
    assert max(operation_tokens(CPU, rehearsal=False)) <= 512
    assert graph_shape(rehearsal=True) == operation_shape(CPU, rehearsal=True)
    assert max(graph_tokens(rehearsal=True)) <= 32
