"""How much room there is: on the host, on a device, on a disk."""

import ctypes
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from moe_mt.errors import BackendUnavailableError

__all__ = ["free_device_bytes", "free_disk_bytes", "free_host_bytes", "give_back_freed_bytes"]

CGROUP_FILES = {
    "": ("memory.max", "memory.current", ("inactive_file", "active_file")),
    "memory": (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
}
"""Controller as ``/proc/self/cgroup`` names it (version 2 has none) → its limit, its use, and the
parts of the use that are file cache, which the kernel gives back when memory is short."""

logger = logging.getLogger(__name__)


def free_disk_bytes(folder: Path) -> int:
    """Return the bytes that can be written below a folder, which need not exist yet."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def free_device_bytes(device: torch.device) -> int | None:
    """Return the free bytes of a device with memory of its own, or ``None`` if it has none.

    Raises:
        BackendUnavailableError: If there is no such device.
    """
    if device.type != "cuda":
        return None
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise BackendUnavailableError(
            f"device {str(device)!r} was asked for and PyTorch sees {count} such devices; choose "
            'device="cpu" or "auto", or install a PyTorch that matches this machine\'s driver'
        )
    return torch.cuda.mem_get_info(device)[0]


def free_host_bytes(root: Path = Path("/")) -> int | None:
    """Return the bytes this process can still take, or ``None`` where the system does not say.

    On Linux that is what the kernel calls available, or what the control groups of a container
    leave, whichever is less.

    Args:
        root: Where the system's ``proc`` and ``sys`` are.
    """
    figures = [*_available(root / "proc/meminfo"), *_left_by_cgroups(root)]
    if not figures and root == Path("/"):
        figures = [*_left_by_sysconf()]
    if not figures:
        logger.debug("free host memory is unknown on this system and is not checked")
        return None
    return max(min(figures), 0)


def _available(meminfo: Path) -> Iterator[int]:
    for line in _lines(meminfo):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _left_by_sysconf() -> Iterator[int]:
    # Absent on Windows; without the second name on macOS.
    names = getattr(os, "sysconf_names", {})
    if {"SC_PAGE_SIZE", "SC_AVPHYS_PAGES"} <= set(names):
        yield os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _left_by_cgroups(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        controller = "memory" if "memory" in controllers.split(",") else controllers
        if controller in CGROUP_FILES:
            top = root / "sys/fs/cgroup" / controller
            # A group's limit holds for all groups in it, so every one up to the top counts.
            group = top / path.lstrip("/")
            while group.is_relative_to(top):
                yield from _left_in_group(group, *CGROUP_FILES[controller])
                group = group.parent


def _left_in_group(group: Path, limit: str, use: str, caches: tuple[str, ...]) -> Iterator[int]:
    limits, uses = _lines(group / limit), _lines(group / use)
    if limits and uses and limits[0] != "max":
        fields = (line.split() for line in _lines(group / "memory.stat"))
        cached = sum(int(field[1]) for field in fields if field[0] in caches)
        yield int(limits[0]) - int(uses[0]) + cached


def _lines(path: Path) -> list[str]:
    """Return a file's lines; none where the system has no such file."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def give_back_freed_bytes() -> None:
    """Have the C library return memory that was freed between blocks still in use.

    It keeps such memory for later, which would count until the process ends. Where the library
    cannot be asked (only glibc can), nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
