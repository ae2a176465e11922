"""What the import linter cannot hold: rooms are entered by their door, kernels have partners."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "moe_mt"
# Files and folders; what begins with an underscore serves them all and is no operation.
KERNELS = sorted(
    path.stem for path in (PACKAGE / "kernels").glob("[!_]*") if path.suffix != ".json"
)


@pytest.mark.parametrize(
    "path",
    sorted(PACKAGE.rglob("*.py")),
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_rooms_are_entered_by_their_door(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moe_mt."):
            other = node.module.split(".")[1:]
            assert other[0] == room or len(other) == 1, f"{path}: {node.module}"


@pytest.mark.parametrize("operation", KERNELS)
def test_every_kernel_has_a_definition_a_test_and_a_benchmark(operation):
    module = importlib.import_module(f"moe_mt.ops.{operation}")
    public, eager = getattr(module, operation), getattr(module, f"{operation}_eager")
    assert inspect.signature(public) == inspect.signature(eager)
    assert (ROOT / "tests/ops" / f"test_{operation}.py").exists()
    assert (ROOT / "benchmarks/ops" / f"bench_{operation}.py").exists()


def test_importing_the_package_needs_neither_transformers_nor_triton_nor_the_splitter():
    code = (
        "import sys, moe_mt; "
        "print(*[m for m in ('transformers', 'triton', 'sentencex') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_no_room_is_a_drawer_for_everything():
    forbidden = {"utils.py", "common.py", "helpers.py", "base.py"}
    assert not [path for path in PACKAGE.rglob("*.py") if path.name in forbidden]
