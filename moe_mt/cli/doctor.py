"""``moe-mt doctor``: what is installed, what it can do, and whether it computes right."""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

import torch

from moe_mt.errors import MoeMtError
from moe_mt.integrations import check_transformers
from moe_mt.ops import backend_for, tile_tables
from moe_mt.version import __version__

__all__ = ["add_parser"]

PACKAGES = ("triton", "sentencepiece", "safetensors", "huggingface_hub", "sentencex")


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:  # noqa: ANN401
    """Add the command to the parser's sub-commands."""
    parser = commands.add_parser(
        "doctor",
        parents=[common],
        help="versions, devices, and whether transformers computes NLLB-MoE right",
        description="Report versions and devices, and test the installed transformers, if any, on "
        "a small NLLB-MoE.",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the report and return the exit code: 0 whatever it finds."""
    del options
    print(f"moe_mt {__version__}, Python {platform.python_version()}, {platform.platform()}")
    # Its own word names the build too: 2.13.0+cpu.
    print(f"torch {torch.__version__}")
    for package in PACKAGES:
        print(f"{package} {_version(package)}")
    print(f"CPU: {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    devices = [torch.device("cpu")]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        print(f"cuda:{index}: {name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
        devices.append(torch.device("cuda", index))
    if not torch.cuda.is_available():
        print("GPU: none that torch can use")
    for device in devices:
        print(f"backend on {device}: {backend_for(device)}")
    _report_tiles()
    print(f"transformers {_version('transformers')}{_verdict_on_transformers()}")
    return 0


def _report_tiles() -> None:
    """Print which tables say how kernels cut their work, in the order in which they are asked."""
    try:
        for path, number in tile_tables().items():
            print(f"tiles: {number} in {path}" if path.exists() else f"tiles: no table {path}")
    except MoeMtError as error:
        print(f"tiles: {error}")
    except ImportError as error:  # a Triton that is there and does not work
        print(f"tiles: cannot be read ({type(error).__name__}: {error})")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _verdict_on_transformers() -> str:
    if importlib.util.find_spec("transformers") is None:
        return ""
    try:
        return f": {check_transformers()}"
    except Exception as error:  # the report says whatever is wrong with another's library
        return f": cannot be tested ({type(error).__name__}: {error})"
