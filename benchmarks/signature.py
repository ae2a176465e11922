"""What a number was measured on, in one line, after sacreBLEU.

``model:tiny|dtype:float32|batch:32|beam:4|device:AMD EPYC, 2 cores|threads:2|torch:2.13.0|commit:
1a2b3c4|v:0.3.0``. Everything that is needed to measure again, and nothing that names a machine,
its user or its folders.
"""

import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from moe_mt import __version__

__all__ = [
    "SOFTWARE",
    "build_signature",
    "current_commit",
    "device_name",
    "device_slug",
    "format_signature",
    "instruction_set",
    "merge_signatures",
    "parse_signature",
]

ROOT = Path(__file__).parent.parent
CPU_INFO = Path("/proc/cpuinfo")

SOFTWARE = ("torch", "triton", "peer", "commit", "v")
"""Fields that may differ between two measurements of the same thing."""

FORBIDDEN = re.compile(r"[|:/\\\n]")
"""Characters that separate fields, or that only a path has."""


def build_signature(
    fields: Mapping[str, object],
    device: torch.device,
    *,
    commit: str | None = None,
    peer: str | None = None,
) -> str:
    """Return the signature of a measurement made in this process.

    Args:
        fields: What was measured, most general first: ``model``, ``dtype``, sizes.
        device: Where it ran.
        commit: The commit measured, for a copy without its history; asked of git where ``None``.
        peer: Name and version of what it was compared with, if it was.
    """
    where: dict[str, object] = {"device": device_name(device)}
    if device.type == "cpu":
        where["threads"] = torch.get_num_threads()
    software: dict[str, object] = {"torch": torch.__version__}
    if device.type == "cuda":
        software["triton"] = _installed("triton")
    if peer is not None:
        software["peer"] = peer
    software |= {"commit": commit or current_commit(), "v": __version__}
    return format_signature({**fields, **where, **software})


def format_signature(fields: Mapping[str, object]) -> str:
    """Join fields to ``name:value|name:value``.

    Raises:
        ValueError: If a value holds a separator, or a slash, which only a path would bring.
    """
    for name, value in fields.items():
        if FORBIDDEN.search(f"{name}{value}") or not str(value):
            raise ValueError(
                f"signature field {name!r} is {value!r}; it must not be empty nor hold '|', ':', "
                "a slash or a line end. Name the thing, not where it lies"
            )
    return "|".join(f"{name}:{value}" for name, value in fields.items())


def parse_signature(signature: str) -> dict[str, str]:
    """Return the fields of a signature."""
    return dict(field.split(":", 1) for field in signature.split("|"))


def merge_signatures(signatures: Iterable[str]) -> str:
    """Return one line for several rows: where they differ, their values stand side by side."""
    merged: dict[str, dict[str, None]] = {}
    for signature in signatures:
        for name, value in parse_signature(signature).items():
            merged.setdefault(name, {})[value] = None
    return format_signature({name: ",".join(values) for name, values in merged.items()})


def device_name(device: torch.device) -> str:
    """Return what the device is called by its maker; for a processor, with its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor_name()}, {os.cpu_count()} cores"


def instruction_set() -> str:
    """Return the widest vectors that PyTorch computes with here, and whether int8 has its own."""
    widest = torch.backends.cpu.get_cpu_capability()
    flags = CPU_INFO.read_text(encoding="utf-8") if CPU_INFO.exists() else ""
    return widest + ("+VNNI" if re.search(r"\bavx(512)?_vnni\b", flags) else "")


def device_slug(name: str) -> str:
    """Return a device's name as a folder's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def current_commit() -> str:
    """Return the short commit of this tree; ``-dirty`` where measured code differs from it."""
    commit = _git("rev-parse", "--short=7", "HEAD")
    if not commit:
        return "none"
    code = (":(glob)moe_mt/**", ":(glob)benchmarks/**/*.py")
    return commit + ("-dirty" if _git("status", "--porcelain", "--", *code) else "")


def _processor_name() -> str:
    if CPU_INFO.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", CPU_INFO.read_text(), re.MULTILINE)
        if found:
            return FORBIDDEN.sub(" ", found.group(1)).strip()
    return platform.machine()


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _git(*arguments: str) -> str:
    """Return what git answers, or nothing where there is no git or no history."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""
