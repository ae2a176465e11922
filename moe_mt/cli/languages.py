"""``moe-mt languages``: codes and names."""

import argparse
from typing import Any

from moe_mt.cli.output import StandardOutput
from moe_mt.tokenizers import list_languages

__all__ = ["add_parser"]


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:  # noqa: ANN401
    """Add the command to the parser's sub-commands."""
    parser = commands.add_parser(
        "languages",
        parents=[common],
        help="list language codes and names",
        description="List the languages of a family of models: code, tab, name.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--family",
        choices=("nllb", "m2m100", "wmt21"),
        default="nllb",
        help="nllb is also NLLB-MoE, m2m100 also SMaLL-100 (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """Print the list and return the exit code."""
    output = StandardOutput()
    for code, name in list_languages(options.family):
        output.write_line(f"{code}\t{name}")
    return 0
