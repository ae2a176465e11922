"""The versions that ``make test-lowest`` installs are the lowest that ``pyproject.toml`` admits."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def pins(file):
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return dict(line.partition(";")[0].split("==") for line in lines)


def as_numbers(version):
    """Return a version with the zeros that need not be written: 1.0 is 1.0.0."""
    numbers = [int(part) for part in version.split(".")]
    return (*numbers, 0, 0)[:3]


def test_the_lowest_versions_are_those_that_are_declared():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    dependencies = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    declared = dict(re.findall(r'"([a-z_]+)>=([0-9.]+)', dependencies))
    lowest = pins("constraints-lowest.txt")
    # Of torch the tested version is taken, unless TORCH names another.
    assert declared.pop("torch")
    assert {name: as_numbers(lowest[name]) for name in declared} == {
        name: as_numbers(version) for name, version in declared.items()
    }
