"""The command's front: help, exit codes, and a quiet end."""

import os
import subprocess
import sys

import pytest
import torch

from moe_mt.cli import main as main_function
from moe_mt.cli import translate
from moe_mt.errors import (
    BackendUnavailableError,
    CheckpointError,
    ConfigError,
    InputError,
    PlacementError,
    UnsupportedLanguageError,
)
from moe_mt.version import __version__

# Buffered, as on most machines: a write can then fail late, at the interpreter's end.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}


def fail_with(monkeypatch, error):
    def fail(options):
        raise error

    monkeypatch.setattr(translate, "run", fail)


def test_version(run):
    assert run("--version").out.decode() == f"moe-mt {__version__}\n"


def test_help_names_commands_and_exit_codes(run):
    outcome = run("--help")
    text = outcome.out.decode()
    assert outcome.code == 0
    assert all(command in text for command in ("translate", "languages", "train", "doctor"))
    assert "exit codes: 0 done; 1 unexpected; 2 usage" in " ".join(text.split())


@pytest.mark.parametrize("command", ["translate", "languages", "train", "doctor"])
def test_help_of_each_command(run, command):
    outcome = run(command, "--help")
    assert outcome.code == 0
    assert outcome.out.startswith(f"usage: moe-mt {command}".encode())


@pytest.mark.parametrize(
    "arguments", [(), ("translat",), ("translate",), ("translate", "-s", "en", "-t", "fr", "--x")]
)
def test_wrong_usage_exits_with_2(run, arguments):
    outcome = run(*arguments)
    assert outcome.code == 2
    assert outcome.out == b""
    assert "usage: moe-mt" in outcome.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(5, "Input/output error"), 1),
        (BackendUnavailableError("x"), 2),
        (ConfigError("x"), 2),
        (InputError("x"), 2),
        (UnsupportedLanguageError("x"), 2),
        (CheckpointError("x"), 3),
        (PlacementError("x"), 4),
        (MemoryError(), 4),
        (torch.OutOfMemoryError("CUDA out of memory."), 4),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_exit_codes(run, monkeypatch, error, code):
    fail_with(monkeypatch, error)
    outcome = run("translate", "-s", "en", "-t", "fr")
    assert outcome.code == code
    if isinstance(error, BrokenPipeError):
        assert outcome.err == ""
    else:
        assert outcome.err.startswith("moe-mt: ")
        assert outcome.err.count("\n") == 1
        assert len(outcome.err) > len("moe-mt: \n")


def test_an_error_nobody_foresaw_keeps_its_traceback(monkeypatch, run):
    # A bug must be reported with all there is to see; Python's own exit code is 1.
    fail_with(monkeypatch, ZeroDivisionError("bug"))
    with pytest.raises(ZeroDivisionError):
        run("translate", "-s", "en", "-t", "fr")


def test_verbose_shows_where_an_error_came_from(run, monkeypatch):
    fail_with(monkeypatch, InputError("what was found"))
    assert "Traceback" not in run("translate", "-s", "en", "-t", "fr", "-v").err
    outcome = run("translate", "-s", "en", "-t", "fr", "-vv")
    assert "Traceback" in outcome.err
    assert outcome.err.endswith("moe-mt: what was found\n")


def test_main_reads_the_command_line_by_default(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["moe-mt", "--version"])
    with pytest.raises(SystemExit) as left:
        main_function()
    assert left.value.code == 0
    assert "moe-mt" in capsys.readouterr().out


def python_m_moe_mt(command, *, stdout=None, stderr=None, capture_output=False, **environment):
    return subprocess.run(
        [sys.executable, "-m", "moe_mt", command],
        check=False,
        env=ENVIRONMENT | environment,
        timeout=60,
        stdout=stdout,
        stderr=stderr,
        capture_output=capture_output,
    )


def test_python_m_moe_mt_as_utf_8_whatever_the_locale_says():
    # One process for three facts: it runs, its exit code is passed on, and names of languages
    # beyond ASCII are printed where Python would encode standard output as ASCII.
    done = python_m_moe_mt("languages", capture_output=True, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert "Norwegian Bokmål" in done.stdout.decode("utf-8")


def test_a_reader_that_has_gone_is_left_quietly():
    # `moe-mt doctor | head -0`: all fits in a buffer, so that only the last flush fails.
    reader, writer = os.pipe()
    os.close(reader)
    done = python_m_moe_mt("doctor", stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def allocate_too_much(options):
    torch.empty(1 << 55, dtype=torch.uint8)


def test_no_room_on_the_cpu_is_a_matter_of_memory(run, monkeypatch):
    # torch raises a plain RuntimeError there; it must be told from others by what it says.
    monkeypatch.setattr("moe_mt.cli.languages.list_languages", allocate_too_much)
    outcome = run("languages")
    assert outcome.code == 4
    assert "memory" in outcome.err


def test_an_unforeseen_error_keeps_its_traceback(run, monkeypatch):
    fail_with(monkeypatch, RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        run("translate", "-s", "en", "-t", "fr")
