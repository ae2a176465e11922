"""The command line in process: arguments and bytes in, exit code and bytes out."""

import io
import logging
import sys
from dataclasses import dataclass

import pytest

import moe_mt.cli.model
from moe_mt.cli import main
from tests.translators import scripted


@dataclass(frozen=True)
class Outcome:
    code: int
    out: bytes
    err: str


@pytest.fixture
def run(monkeypatch, capsysbinary):
    """Run ``moe-mt`` with arguments and standard input."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def run(*arguments: object, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsysbinary.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as left:  # argparse's way out
            code = left.code or 0
        captured = capsysbinary.readouterr()
        return Outcome(code, captured.out, captured.err.decode())

    yield run
    # The command sets up logging for a process of its own.
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def use(monkeypatch):
    """Let the command line find a given translator instead of the model it names."""

    def use(translator) -> None:
        monkeypatch.setattr(moe_mt.cli.model, "from_pretrained", lambda *_, **__: translator)

    return use


@pytest.fixture
def echo(use):
    """Let every translation be its source."""
    translator = scripted()
    use(translator)
    return translator
