"""``moe-mt tune``: what it lists, what it says, what it refuses."""

import json

import pytest
import torch

from moe_mt.checkpoints import fetch_small_files
from moe_mt.cli import tune as command
from moe_mt.kernels import _configurations
from moe_mt.ops import ExpertShape, TunedProblem

TUNED = TunedProblem(
    name="forward 64 x 32, 16 bits, 4 rows an expert",
    tile="16 x 64 x 32, 4 warps, 3 stages",
    tokens=(8, 16),
    seconds=(12.34e-6, 56.78e-6),
    speedup=1.234,
    failures=("16 x 256 x 32, 4 warps, 3 stages: crashes the compiler",),
)


@pytest.fixture(autouse=True)
def own_table(monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_MT_CACHE", str(tmp_path / "cache"))
    _configurations._tables.cache_clear()
    yield tmp_path / "cache/tiles.json"
    _configurations._tables.cache_clear()


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that two GPUs are here, and note what is tuned on them."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    calls = []

    def tune(*arguments, **options):
        calls.append((arguments, options))
        options["on_progress"]("compiling", 0, 3)
        options["on_progress"]("timing", 2, 3)
        yield TUNED

    monkeypatch.setattr(command, "tune", tune)
    return calls


def lines_of(outcome):
    return outcome.out.decode().splitlines()


def test_a_dry_run_lists_problems_and_tiles_without_a_gpu(run, no_gpu):
    outcome = run("tune", "--dry-run", "--tokens", 1024, 2048)
    assert outcome.code == 0
    assert outcome.err == "moe-mt: no GPU is here: listed is what would be tried on an H200\n"
    lines = lines_of(outcome)
    problems = [line for line in lines if not line.startswith(" ")]
    # Two products forward and four backward, at two numbers of tokens.
    assert len(problems) == 12
    assert "forward 8192 x 2048, 16 bits, 16 rows an expert (at 1024 tokens)" in problems
    assert "    32 x 128 x 64, 4 warps, 4 stages, weights left" in lines
    assert 10 * 12 < len(lines) < 25 * 12


@pytest.mark.parametrize(
    ("option", "kinds"),
    [
        ("--forward-only", {"gated", "forward"}),
        (
            "--backward-only",
            {"gated_saved", "hidden_grad_saved", "grad_weight", "grad_input_gated"},
        ),
    ],
)
def test_one_pass_can_be_left_out(run, no_gpu, option, kinds):
    outcome = run("tune", "--dry-run", "-q", "--gated", option)
    assert outcome.err == ""
    problems = [line for line in lines_of(outcome) if not line.startswith(" ")]
    assert {line.split()[0] for line in problems} == kinds


def test_tokens_that_share_a_problem_are_listed_with_it(run, no_gpu):
    sizes = ("--d-model", 64, "--ffn-dim", 128, "--experts", 4, "--top-k", 1, "--dtype", "float32")
    outcome = run("tune", "--dry-run", "--forward-only", *sizes, "--tokens", 4000, 500, 4)
    problems = [line for line in lines_of(outcome) if not line.startswith(" ")]
    assert problems == [
        "forward 128 x 64, 32 bits, 1 rows an expert (at 4 tokens)",
        "forward 128 x 64, 32 bits, 128 rows an expert (at 500, 4000 tokens)",
        "forward 64 x 128, 32 bits, 1 rows an expert (at 4 tokens)",
        "forward 64 x 128, 32 bits, 128 rows an expert (at 500, 4000 tokens)",
    ]


def test_the_shapes_of_a_model(run, no_gpu, tmp_path):
    outcome = run("tune", "--dry-run", "--model", "tiny", "--tokens", 64)
    assert outcome.code == 0
    config = json.loads((fetch_small_files("tiny") / "config.json").read_text())
    width, inner = config["d_model"], config["encoder_ffn_dim"]
    assert f"forward {inner} x {width}, 16 bits" in outcome.out.decode()
    # Encoder and decoder may differ.
    (tmp_path / "config.json").write_text(json.dumps({**config, "decoder_ffn_dim": 2 * inner}))
    text = run("tune", "--dry-run", "--model", tmp_path, "--tokens", 64).out.decode()
    assert f"forward {inner} x {width}," in text
    assert f"forward {2 * inner} x {width}," in text


def test_without_a_gpu_it_says_so(run, no_gpu):
    outcome = run("tune")
    assert (outcome.code, outcome.out) == (2, b"")
    assert outcome.err == (
        "moe-mt: tiles are timed on a GPU, and torch finds no cuda here; --dry-run lists what "
        "would be tried\n"
    )


def test_one_line_a_problem_and_what_was_left_out(run, gpu):
    outcome = run("tune", "--tokens", 8, 16, "--device", "cuda:1", "--jobs", 3)
    assert outcome.code == 0
    assert lines_of(outcome) == [
        "forward 64 x 32, 16 bits, 4 rows an expert: 16 x 64 x 32, 4 warps, 3 stages: 12.3 us at 8 "
        "tokens, 56.8 us at 16 tokens, 1.23 times as fast as the rule"
    ]
    # Nothing of a progress bar, which only a terminal gets.
    assert outcome.err == (
        "moe-mt: left out: 16 x 256 x 32, 4 warps, 3 stages: crashes the compiler\n"
    )
    [((shape, tokens), options)] = gpu
    assert shape == ExpertShape(d_model=2048, ffn_dim=8192, num_experts=128)
    assert tokens == [8, 16]
    assert options["device"] == torch.device("cuda", 1)
    assert (options["forward"], options["backward"]) == (True, True)
    assert (options["table"], options["jobs"]) == (None, 3)


def test_options_reach_the_tuner(run, gpu, tmp_path):
    sizes = ("--d-model", 4096, "--ffn-dim", 14336, "--experts", 8, "--top-k", 1)
    run(
        "tune", *sizes, "--gated", "--dtype", "float16", "--forward-only", "-o", tmp_path / "t.json"
    )
    [((shape, tokens), options)] = gpu
    assert shape == ExpertShape(
        d_model=4096, ffn_dim=14336, num_experts=8, top_k=1, gated=True, dtype=torch.float16
    )
    assert tuple(tokens) == command.TOKENS
    assert (options["forward"], options["backward"]) == (True, False)
    assert options["table"] == tmp_path / "t.json"
    assert 1 <= options["jobs"] <= 16


def test_an_interrupt_ends_it_quietly(run, gpu, monkeypatch):
    def tune(*arguments, **options):
        yield TUNED
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "tune", tune)
    outcome = run("tune", "-q")
    assert outcome.code == 130
    assert len(lines_of(outcome)) == 1
    assert outcome.err == "moe-mt: interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--device", "cpu"), "is no GPU"),
        (("--device", "gpu"), "is unknown"),
        (("--device", "cuda:7"), "torch finds no cuda:7"),
        (("--tokens", "0"), "each at least 1"),
        (("--top-k", "200"), "only 128 experts"),
        (("--ffn-dim", "0"), "ffn_dim is 0"),
        (("--jobs", "0"), "--jobs is 0"),
        (("--model", "tiny", "--experts", "4"), "leave out the sizes"),
        (("--model", "tiny", "--gated"), "leave out the sizes"),
        (("--dtype", "float64"), "invalid choice"),
        (("--forward-only", "--backward-only"), "not allowed with"),
        (("--tokens",), "expected at least one argument"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_is_wrong_is_said(run, monkeypatch, arguments, said):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    tail = () if said == "--jobs is 0" else ("--dry-run",)
    outcome = run("tune", *arguments, *(() if "finds no" in said else tail))
    assert outcome.code == 2
    assert outcome.out == b""
    assert said in outcome.err


def test_a_model_without_experts_has_nothing_to_tune(run, no_gpu, tmp_path):
    config = json.loads((fetch_small_files("tiny") / "config.json").read_text())
    dense = {
        name: value
        for name, value in config.items()
        if not any(word in name for word in ("sparse", "expert", "moe", "router"))
    }
    (tmp_path / "config.json").write_text(json.dumps({**dense, "model_type": "m2m_100"}))
    outcome = run("tune", "--dry-run", "--model", tmp_path)
    assert outcome.code == 2
    assert "no layer of experts" in outcome.err


def test_a_missing_model_is_a_matter_of_models(run, no_gpu, tmp_path):
    assert run("tune", "--dry-run", "--model", tmp_path).code == 3


def test_a_broken_table_is_named(run, no_gpu, own_table):
    own_table.parent.mkdir()
    own_table.write_text("[[]]")
    outcome = run("tune", "--dry-run")
    assert outcome.code == 2
    assert str(own_table) in outcome.err


def test_the_bar_counts_tiles_of_each_stage(monkeypatch, capsys):
    monkeypatch.setattr(command, "progress_hidden", lambda options: False)
    with command._progress(None) as on_progress:
        for stage, total in (("compiling", 3), ("timing", 5)):
            for done in range(total + 1):
                on_progress(stage, done, total)
    shown = capsys.readouterr().err
    assert "compiling:   0%|" in shown
    assert " 0/3 " in shown
    assert "timing" in shown.rpartition(" 0/3 ")[2]
    assert " 0/5 " in shown


def test_help(run):
    outcome = run("tune", "--help")
    assert outcome.code == 0
    assert outcome.out.startswith(b"usage: moe-mt tune")
