"""``moe-mt doctor`` reports, with and without transformers."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from moe_mt.cli import doctor
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
        if check is not None:
            module = ModuleType("moe_mt.integrations")
            module.check_transformers = check
            monkeypatch.setitem(sys.modules, "moe_mt.integrations", module)

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
    text = run("doctor").out.decode()
    assert "cuda:0: Great GPU, 10.0 of 80.0 GiB free\n" in text
    assert "GPU: none" not in text


def test_a_missing_package_is_said_to_be_missing(run, monkeypatch, transformers):
    transformers(None)
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
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
