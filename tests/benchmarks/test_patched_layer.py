"""Weights that all versions of transformers share, their definition, and systems in turns."""

import sys
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch

from benchmarks.formats import NOTHING
from benchmarks.integrations import turns
from benchmarks.integrations.columns import PATCHED_COLUMNS
from benchmarks.integrations.layers import (
    OURS,
    REHEARSED,
    define,
    draw_expert,
    draw_input,
    draw_router,
    layers,
)
from benchmarks.integrations.turns import (
    LayerProcess,
    Measured,
    beside,
    environments,
    measure_in_turns,
    start_processes,
)
from moe_mt.ops import expert_ffn

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FP32 = torch.float32
NLLB_MOE, MIXTRAL = REHEARSED
TOKENS = 6


def test_the_layers_have_the_shapes_of_the_targets():
    nllb, mixtral = layers(CPU, rehearsal=False)
    assert (nllb.num_experts, nllb.d_model, nllb.ffn_dim, nllb.top_k) == (128, 1024, 4096, 2)
    assert (mixtral.num_experts, mixtral.d_model, mixtral.ffn_dim, mixtral.top_k) == (
        *(8, 1024, 3584, 2),
    )
    nllb, mixtral = layers(GPU, rehearsal=False)
    assert (nllb.d_model, nllb.ffn_dim) == (2048, 8192)
    assert (mixtral.d_model, mixtral.ffn_dim) == (4096, 14336)


@pytest.mark.parametrize("layer", REHEARSED, ids=lambda layer: layer.family)
def test_the_definition_is_the_gated_mixture_of_the_drawn_experts(layer):
    x = draw_input(layer, TOKENS, 0, CPU, FP32)[0]
    experts = [draw_expert(layer, index, CPU, FP32) for index in range(layer.num_experts)]
    stacked = {key: torch.stack([one[key] for one in experts]).double() for key in experts[0]}
    gates, ids = (x @ draw_router(layer, CPU, FP32).T).double().softmax(-1).topk(2)
    expected = expert_ffn(
        x.double(),
        ids.int(),
        gates / gates.sum(-1, keepdim=True),
        stacked["up"],
        stacked["down"],
        gate_proj=stacked.get("gate"),
        up_bias=stacked.get("up_bias"),
        down_bias=stacked.get("down_bias"),
        activation="silu" if layer is MIXTRAL else "relu",
    )
    expected = expected if layer is MIXTRAL else 0.8 * expected
    torch.testing.assert_close(define(layer, x), expected, rtol=1e-6, atol=1e-7)


def test_an_expert_is_drawn_from_its_number_alone():
    one, again = (draw_expert(MIXTRAL, 1, CPU, FP32) for _ in range(2))
    other = draw_expert(MIXTRAL, 2, CPU, FP32)
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not torch.equal(one["up"], other["up"])
    assert not torch.equal(one["up"], one["gate"])


def test_inputs_differ_from_round_to_round():
    first, second = (draw_input(MIXTRAL, 4, index, CPU, FP32) for index in range(2))
    assert first.shape == second.shape == (1, 4, MIXTRAL.d_model)
    assert not torch.equal(first, second)


class FakeProcess:
    """Answers at once, and writes down what it was asked."""

    def __init__(self, log, major, seconds, *, wrong=()):
        self.log, self.major, self.taken, self.wrong = log, major, seconds, wrong
        self.saved = []
        self.version, self.systems, self.first_patch_s = f"{major}.0.0", list(seconds), 1.5

    def ask(self, request):
        tokens = request["tokens"]
        if "save" in request:
            self.saved.append((tokens, *request["systems"]))
            right = define(MIXTRAL, draw_input(MIXTRAL, tokens, 0, CPU, FP32)[0]).float()[None]
            outputs = {name: right + (name in self.wrong) for name in request["systems"]}
            notes = {name: "it fails" for name in outputs if self.taken[name] is None}
            torch.save(
                {name: outputs[name] for name in outputs if name not in notes}, request["save"]
            )
            return {"notes": notes}
        if "memory" in request:
            return dict.fromkeys(request["memory"], 1000 * self.major)
        self.log.append((request["index"], self.major, *request["order"]))
        return {name: self.taken[name] for name in request["order"]}


def measure(*processes, rounds=2):
    return measure_in_turns(
        MIXTRAL,
        TOKENS,
        {process.major: process for process in processes},
        CPU,
        FP32,
        pause=0,
        rounds=lambda _: rounds,
    )


def test_processes_and_systems_go_the_other_way_round_in_every_round():
    log = []
    four = FakeProcess(log, 4, {"": 3.0, OURS: 1.0})
    five = FakeProcess(log, 5, {"eager": 2.0, "grouped_mm": 1.5, OURS: 1.0})
    found = measure(four, five)
    assert log == [
        (0, 4, "", OURS),
        (0, 5, "eager", "grouped_mm", OURS),
        (1, 5, OURS, "grouped_mm", "eager"),
        (1, 4, OURS, ""),
    ]
    assert found[4, ""] == Measured(seconds=[3.0, 3.0], extra_bytes=4000)
    assert beside(found[5, OURS], found[5, "grouped_mm"])["speedup"]["median"] == 1.5
    assert beside(found[5, OURS], found[4, ""])["extra_bytes"] == 4000


def test_who_is_wrong_or_fails_is_not_timed_and_leaves_a_reason():
    log = []
    systems = {"eager": 2.0, "grouped_mm": None, OURS: 1.0}
    process = FakeProcess(log, 5, systems, wrong=("eager",))
    found = measure(process)
    assert process.saved == [(4, "eager", "grouped_mm", OURS), (TOKENS, OURS)]
    assert {name for _, _, *order in log for name in order} == {OURS}
    peer = beside(found[5, OURS], found[5, "eager"])
    assert set(peer) == {"note"}
    assert "its results and the definition differ by" in peer["note"]
    assert found[5, "grouped_mm"].note == "it fails"


def test_nothing_is_measured_where_this_package_is_wrong():
    log = []
    with pytest.raises(AssertionError, match=r"moe_mt in transformers 4\.0\.0, its definition"):
        measure(FakeProcess(log, 4, {"": 1.0, OURS: 1.0}, wrong=(OURS,)))
    assert not log


@pytest.fixture
def alone(monkeypatch):
    """Run where no transformers is installed."""

    def missing():
        raise turns.PeerUnavailable("transformers is not installed here")

    monkeypatch.setattr(turns, "transformers_major", missing)


def environment(root, name):
    python = root / name / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    return str(python)


def test_versions_are_looked_for_where_make_puts_them(tmp_path, alone, monkeypatch):
    assert environments(tmp_path) == {}
    four, five = (environment(tmp_path, name) for name in (".venv-peers", ".venv-transformers-5"))
    assert environments(tmp_path) == {4: four, 5: five}
    monkeypatch.setattr(sys, "prefix", "/somewhere/.venv-peers-python3.13")
    assert environments(tmp_path) == {}
    five = environment(tmp_path, ".venv-transformers-5-python3.13")
    assert environments(tmp_path) == {5: five}


def test_the_version_that_runs_counts_before_one_that_make_built(tmp_path, monkeypatch):
    environment(tmp_path, ".venv-transformers-5")
    monkeypatch.setattr(turns, "transformers_major", lambda: 5)
    assert environments(tmp_path) == {5: sys.executable}


def test_a_version_that_is_not_here_or_does_not_start_leaves_its_reason(monkeypatch):
    def refuse(*_):
        raise turns.PeerUnavailable("it ended")

    monkeypatch.setattr(turns, "environments", lambda: {5: "python"})
    monkeypatch.setattr(turns, "LayerProcess", refuse)
    with ExitStack() as stack:
        processes, missing = start_processes(MIXTRAL, CPU, FP32, 1, stack)
    assert not processes
    assert missing[5] == "it ended"
    assert "transformers 4 is not installed here; make" in missing[4]


def test_the_fastest_and_the_thriftiest_of_a_version_are_shown():
    def peer(ratio, extra_bytes):
        times = {"median": ratio, "q1": ratio - 0.1, "q3": ratio + 0.1}
        return {"seconds": times, "speedup": times, "extra_bytes": extra_bytes}

    row = {
        "seconds": {"median": 0.02, "q1": 0.019, "q3": 0.022},
        "figures": {"extra_bytes": 500_000},
        "peers": {
            "transformers 4": {"note": "it is not here"},
            "transformers 5 eager": peer(1.4, 2_000_000),
            "transformers 5 grouped_mm": peer(1.2, 3_000_000),
            "transformers 5 batched_mm": {"note": "it copies weights"},
        },
    }
    assert [show(row) for show in PATCHED_COLUMNS.values()] == [
        *["20.0 (19.0 – 22.0)", NOTHING, "**1.20** (1.10 – 1.30) grouped_mm"],
        *["0.50", NOTHING, "2.00"],
    ]


@pytest.mark.transformers
@pytest.mark.parametrize("layer", REHEARSED, ids=lambda layer: layer.family)
def test_a_layer_of_the_installed_version_is_right_once_it_is_patched(layer):
    major = turns.transformers_major()
    with LayerProcess(layer, sys.executable, CPU, FP32, 1) as process:
        found = measure_in_turns(
            layer, TOKENS, {major: process}, CPU, FP32, pause=0, rounds=lambda _: 1
        )
    assert set(found) == {(major, name) for name in (*layer.implementations(major), OURS)}
    for (_, name), measured in found.items():
        if layer is NLLB_MOE and major == 5 and name != OURS:
            assert "differ by" in measured.note  # it computes with experts 0 and 1
        else:
            assert not measured.note
            assert len(measured.seconds) == 1
            assert measured.extra_bytes > 0


def test_a_worker_that_does_not_know_its_layer_says_so():
    unknown = SimpleNamespace(name="no-such-layer")
    with pytest.raises(turns.PeerUnavailable, match=r"no-such-layer in .* ended with 1: KeyError"):
        LayerProcess(unknown, sys.executable, CPU, FP32, 1)
