"""``moe-mt doctor`` reports, with and without transformers."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from moe_mt.cli import doctor
from moe_mt.kernels import _configurations
from moe_mt.ops import use_backend
from moe_mt.version import __version__


@pytest.fixture
def transformers(monkeypatch):
    """Pretend that transformers is there, or is not, with a verdict on it."""

    def pretend(check) -> None:
        genuine = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name: (check and SimpleNamespace()) if name == "transformers" else genuine(name),
        )
        monkeypatch.setattr(doctor, "check_transformers", check)

    return pretend


def test_versions_and_devices(run, transformers):
    transformers(None)
    outcome = run("doctor")
    assert outcome.code == 0
    lines = outcome.out.decode().splitlines()
    assert lines[0].startswith(f"moe_mt {__version__}, Python 3.")
    assert f"torch {torch.__version__}" in lines
    assert any(line.startswith("CPU: ") for line in lines)
    assert lines[-1].startswith("transformers ")
    # Without it there is nothing to say about it.
    assert "NLLB-MoE" not in lines[-1]


def test_gpus_and_their_memory(run, monkeypatch, transformers):
    transformers(None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Great GPU")
    monkeypatch.setattr(doctor, "backend_for", lambda device: f"what {device.type} takes")
    text = run("doctor").out.decode()
    assert "backend on cpu: what cpu takes\nbackend on cuda:0: what cuda takes\n" in text
    assert "cuda:0: Great GPU, 10.0 of 80.0 GiB free\n" in text
    assert "GPU: none" not in text


def test_the_backend_is_the_one_that_computes(run, monkeypatch, transformers):
    transformers(None)
    with use_backend("eager"):
        assert "backend on cpu: eager PyTorch\n" in run("doctor").out.decode()
    monkeypatch.setattr("moe_mt.ops.backend._HAS_TRITON", False)
    with use_backend("triton"):
        text = run("doctor").out.decode()
    assert "backend on cpu: none: backend 'triton' was asked for, but the package" in text


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_MT_CACHE", str(tmp_path))
    return tmp_path / "tiles.json"


def test_tables_of_tiles(run, cache, transformers):
    transformers(None)
    shipped = _configurations.SHIPPED_TABLE
    number = len(_configurations.read_table(shipped))
    assert f"tiles: no table {cache}\ntiles: {number} in {shipped}\n" in run("doctor").out.decode()
    problem = _configurations.Problem(
        arch="sm_90", kind="forward", dtype_bytes=2, outer=8, inner=8, rows_per_expert=1
    )
    choice = _configurations.Choice(tile=_configurations.rule(problem), why="measured")
    _configurations.write_table(cache, {problem: choice})
    assert f"tiles: 1 in {cache}\n" in run("doctor").out.decode()


def test_a_broken_table_is_reported_too(run, cache, transformers):
    transformers(None)
    cache.write_text("broken")
    outcome = run("doctor")
    assert outcome.code == 0
    assert f"tiles: {cache} is not a table of tiles (JSONDecodeError" in outcome.out.decode()


def test_a_triton_that_does_not_work_is_reported_too(run, monkeypatch, transformers):
    def broken():
        raise ImportError("libtriton.so: cannot open shared object file")

    transformers(None)
    monkeypatch.setattr(doctor, "tile_tables", broken)
    outcome = run("doctor")
    assert outcome.code == 0
    assert "tiles: cannot be read (ImportError: libtriton.so" in outcome.out.decode()


def test_a_missing_package_is_said_to_be_missing(run, monkeypatch, transformers):
    transformers(None)
    monkeypatch.setattr(doctor, "PACKAGES", ("no-such-package",))
    assert "no-such-package not installed\n" in run("doctor").out.decode()


def test_the_verdict_on_transformers(run, transformers):
    transformers(lambda: "computes NLLB-MoE WRONG")
    outcome = run("doctor")
    assert outcome.out.decode().splitlines()[-1].endswith(": computes NLLB-MoE WRONG")
    # A report is not a failure, whatever it says.
    assert outcome.code == 0


def test_a_transformers_that_cannot_be_tested_is_reported_too(run, transformers):
    def broken():
        raise ImportError("cannot import name 'NllbMoeSparseMLP'")

    transformers(broken)
    outcome = run("doctor")
    assert outcome.code == 0
    assert "cannot be tested (ImportError: cannot import name" in outcome.out.decode()
