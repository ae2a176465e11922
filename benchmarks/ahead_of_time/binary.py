"""Read a compiled kernel: registers, spills, matrix instructions, and how wide it copies.

The numbers come from what the GPU would run, not from what the compiler meant: NVIDIA's machine
code through its own disassembler, AMD's assembly as the compiler writes it.
"""

import ast
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton import knobs

from benchmarks.ahead_of_time.specialise import Compilation, functions_of

__all__ = ["Figures", "inspect_binary"]

WEIGHT = "weight"
"""Part of the name of what a kernel loads from weights: ``up_weight = tl.load(up_ptrs)``."""

MNEMONIC = r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)"
"""An instruction's name in a line of NVIDIA's disassembler, behind address and predicate."""

LOCATION = r"\s*\.loc\s"
"""Begins a line of assembly that says where the following instructions come from."""

Place = tuple[str, int]
"""A file and a line of it."""

Instruction = tuple[str, set[Place]]
"""A mnemonic, and the lines that it comes from: its own, and those of calls around it."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one binary needs of the machine, and what it does."""

    registers: int
    """Of each thread; on AMD vector registers, accumulators among them."""

    spills: int
    """Instructions that move registers to local memory and back; on AMD registers spilled."""

    stack: int
    """Bytes of local memory of each thread."""

    shared: int
    """Bytes of shared memory of each program."""

    warps: int
    """Warps that run, with those that the compiler adds to specialise them."""

    matrix: str
    """The most frequent matrix instruction, with its shape; empty where there is none."""

    accesses: dict[str, int]
    """Instructions on global memory, by kind and by bits for each thread: ``async 128`` copies to
    shared memory, ``tma`` copies whole tiles, ``load`` and ``store`` go through registers."""

    weights: dict[str, int]
    """Those of them that read weights; on NVIDIA as the virtual assembly has them."""


def inspect_binary(compiled: Any, compilation: Compilation) -> Figures:
    """Return the figures of what ``triton.compile`` returned."""
    if compilation.target.gpu.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        registers, spills, stack = _needs_amd(assembly)
        placed = list(_instructions_amd(assembly))
        names = [name for name, _ in placed]
    else:
        assembly, usage = _disassemble(compiled.asm["cubin"])
        names = re.findall(MNEMONIC, assembly, re.MULTILINE)
        registers, stack = _needs_nvidia(usage)
        spills = sum(re.match(r"(LDL|STL)\b", name) is not None for name in names)
        placed = list(_instructions_ptx(compiled.asm["ptx"]))
    matrix = Counter(name for name in names if re.match(r"[DHIQ]G?MMA|UTC\w*MMA|v_s?mfma", name))
    of_weights = set(_weight_loads(compilation))
    return Figures(
        registers=registers,
        spills=spills,
        stack=stack,
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        matrix=matrix.most_common(1)[0][0] if matrix else "",
        accesses=_count(map(access, names)),
        weights=_count(access(name) for name, places in placed if places & of_weights),
    )


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Return a cubin's instructions and its resource usage."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return (
            _output_of(knobs.nvidia.nvdisasm.path, "-c", str(path)),
            _output_of(knobs.nvidia.cuobjdump.path, "-res-usage", str(path)),
        )


def _output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout


def _needs_nvidia(usage: str) -> tuple[int, int]:
    """Return registers and bytes of stack of each thread."""
    found = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    return max(int(registers) for registers, _ in found), max(int(stack) for _, stack in found)


def _needs_amd(assembly: str) -> tuple[int, int, int]:
    """Return vector registers, those spilled, and bytes of stack of each thread."""

    def value(name: str) -> int:
        return max(map(int, re.findall(rf"^\s*(?:- )?\.{name}:\s+(\d+)", assembly, re.MULTILINE)))

    return value("vgpr_count"), value("vgpr_spill_count"), value("private_segment_fixed_size")


def _instructions_ptx(assembly: str) -> Iterator[Instruction]:
    files = dict(re.findall(r'^\s*\.file\s+(\d+) "([^"]+)"', assembly, re.MULTILINE))
    places: set[Place] = set()
    inline = False
    for line in assembly.splitlines():
        # Inside inline assembly, which loads are, the compiler counts lines of that assembly.
        if re.match(LOCATION, line) and not inline:
            # From Triton 3.7 on, callers stand in the directive, and before in the comment.
            callers = re.findall(r"inlined_at (\d+) (\d+)", line)
            places = _places(line) | {(Path(files[n]).name, int(row)) for n, row in callers}
        elif found := re.match(r"\s*// (begin|end) inline asm", line):
            inline = found[1] == "begin"
        elif found := re.match(r"\s*(?:@!?%p\d+ )?((?:ld\.global|cp\.async).*)", line):
            yield found[1], places


def _instructions_amd(assembly: str) -> Iterator[Instruction]:
    places: set[Place] = set()
    for line in assembly.splitlines():
        if re.match(LOCATION, line):
            places = _places(line)
        elif found := re.match(r"\s+([a-z]\w+)(.*)", line):
            to_shared = re.search(r"\blds\b", found[2]) is not None
            yield found[1] + ("_lds" if to_shared else ""), places


def _places(line: str) -> set[Place]:
    """Return the lines in the comment behind a location: ``helper.py:7:5 @[ kernel.py:9:3 ]``."""
    return {
        (Path(file).name, int(number)) for file, number in re.findall(r"(\S+\.py):(\d+):", line)
    }


def access(mnemonic: str) -> str:
    """Return in two words how an instruction uses global memory; nothing where it does not.

    For example ``load 128``: a load of 128 bits for each thread.
    """
    if mnemonic.startswith(("ld.global", "cp.async")):
        return _access_ptx(mnemonic)
    if found := re.match(r"(LDGSTS|LDG?|STG?)\b", mnemonic):
        kinds = {"LDGSTS": "async", "LDG": "load", "LD": "load", "STG": "store", "ST": "store"}
        return f"{kinds[found[1]]} {_bits(mnemonic.split('.'))}"
    if re.match(r"(ATOM|ATOMG|RED|REDG)\b|(global|buffer|flat)_atomic", mnemonic):
        return "atomic"
    if re.match(r"UTMALDG|UBLKCP", mnemonic):
        return "tma"
    if mnemonic.startswith("UTMASTG"):
        return "tma_store"
    if found := re.match(r"(?:global|buffer|flat)_(load|store)_", mnemonic):
        kind = "async" if "_lds" in mnemonic else found[1]
        return f"{kind} {_bits(mnemonic.split('_'))}"
    return ""


def _access_ptx(instruction: str) -> str:
    if instruction.startswith("cp.async.bulk"):
        return "tma" if ".shared::cluster.global" in instruction else ""
    if found := re.match(r"cp\.async\.\w+\.shared\.global.*?\], (0x[0-9a-f]+|\d+)", instruction):
        return f"async {8 * int(found[1], 0)}"
    if found := re.match(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)\s", instruction):
        return f"load {int(found[1] or 1) * int(found[2])}"
    return ""


def _bits(parts: list[str]) -> int:
    """Return how many bits an instruction moves for each thread, from the parts of its name."""
    named = {
        **{"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256},
        **{"ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "sshort": 16, "short": 16},
        **{"dwordx2": 64, "dwordx3": 96, "dwordx4": 128},
    }
    return next((named[part] for part in parts if part in named), 32)


def _count(found: Iterable[str]) -> dict[str, int]:
    """Count accesses, the widest of each kind first."""

    def order(access: str) -> tuple[str, int]:
        kind, _, bits = access.partition(" ")
        return kind, -int(bits or 0)

    counts = Counter(filter(None, found))
    return {access: counts[access] for access in sorted(counts, key=order)}


def _weight_loads(compilation: Compilation) -> Iterator[Place]:
    """Yield every line on which the kernel, or what it calls, loads weights."""
    for function in functions_of(compilation.kernel):
        file = Path(function.fn.__code__.co_filename).name
        # What is parsed begins at ``def``; the file's lines count from the first decorator.
        decorators = next(
            i for i, line in enumerate(function.raw_src) if line.lstrip().startswith("def ")
        )
        before = function.starting_line_number + decorators - 1
        for node in ast.walk(function.parse()):
            if isinstance(node, ast.Assign) and _loads_weights(node):
                for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                    yield file, before + line


def _loads_weights(assignment: ast.Assign) -> bool:
    calls = (node.func for node in ast.walk(assignment.value) if isinstance(node, ast.Call))
    return WEIGHT in ast.unparse(assignment.targets[0]) and any(
        "load" in ast.unparse(function).rpartition(".")[2] for function in calls
    )
