"""transformers' own tests of these models and tokenizers, run against ``moe_mt``.

They are not kept here. ``MOE_MT_TRANSFORMERS_TESTS`` names the ``tests`` folder of a checkout of
transformers before 5.0; what became of each of their tests says ``verdicts.txt``, written for 4.52.
Where the tests import transformers under another name, it is found out, or
``MOE_MT_TRANSFORMERS_PACKAGE`` says it.
"""

import ast
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.transformers_suite import stand_ins

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
VARIABLE = "MOE_MT_TRANSFORMERS_TESTS"
MINUTES = 15

# The files that define their test classes, and the mixins those inherit from.
FILES = {
    "M2M100ModelTest": "models/m2m_100/test_modeling_m2m_100.py",
    "M2M100ModelIntegrationTests": "models/m2m_100/test_modeling_m2m_100.py",
    "NllbMoeModelTest": "models/nllb_moe/test_modeling_nllb_moe.py",
    "NllbMoeModelIntegrationTests": "models/nllb_moe/test_modeling_nllb_moe.py",
    "NllbMoeRouterTest": "models/nllb_moe/test_modeling_nllb_moe.py",
    "M2M100TokenizationTest": "models/m2m_100/test_tokenization_m2m_100.py",
    "M2M100TokenizerIntegrationTest": "models/m2m_100/test_tokenization_m2m_100.py",
    "NllbTokenizationTest": "models/nllb/test_tokenization_nllb.py",
    "NllbDistilledIntegrationTest": "models/nllb/test_tokenization_nllb.py",
    "TranslationPipelineTests": "pipelines/test_pipelines_translation.py",
    "TranslationNewFormatPipelineTests": "pipelines/test_pipelines_translation.py",
    "ModelTesterMixin": "test_modeling_common.py",
    "GenerationTesterMixin": "generation/test_utils.py",
    "TokenizerTesterMixin": "test_tokenization_common.py",
    "GenerationIntegrationTests": "generation/test_utils.py",
}
MIXINS = {
    "ModelTesterMixin": ["M2M100ModelTest", "NllbMoeModelTest"],
    "GenerationTesterMixin": ["M2M100ModelTest", "NllbMoeModelTest"],
    "TokenizerTesterMixin": ["M2M100TokenizationTest", "NllbTokenizationTest"],
}
LINE = re.compile(
    r"(?P<name>\w+)(?: in (?P<only>\w+))?: (?P<verdict>runs|ours|not here)(?: (?P<what>.+))?"
)


@cache
def verdicts():
    """Return (verdict, what) by class and test; those of mixins for each class that has them."""
    found, section = {}, None
    own = set()
    for line in (HERE / "verdicts.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            section = line.strip("[]")
            continue
        match = LINE.fullmatch(line)
        assert match, f"verdicts.txt: {line!r} says nothing"
        classes = [match["only"]] if match["only"] else MIXINS.get(section, [section])
        for name in classes:
            key = f"{name}::{match['name']}"
            if section in MIXINS and not match["only"] and key in own:
                continue
            assert key not in found or match["only"] or section not in MIXINS, f"{key} twice"
            found[key] = match["verdict"], match["what"]
            if section not in MIXINS:
                own.add(key)
    return found


def with_running_tests():
    """Return the classes of which some tests run, in the order of ``FILES``."""
    found = {key.split("::")[0] for key, (verdict, _) in verdicts().items() if verdict == "runs"}
    return [name for name in FILES if name in found]


def suite():
    """Return the folder of transformers' tests, or skip."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"not run: set {VARIABLE} to the tests folder of a transformers checkout")
    return Path(folder)


def package_of(folder):
    """Return the name under which these tests import transformers."""
    given = os.environ.get("MOE_MT_TRANSFORMERS_PACKAGE")
    text = (folder / "test_configuration_common.py").read_text()
    found = re.search(r"^from (\w+) import is_torch_available", text, re.MULTILINE)
    assert given or found, f"{folder} does not look like the tests of transformers"
    return given or found[1]


def defined_tests(file, class_name):
    """Return the names of the tests that a class of a file defines."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return {
                part.name
                for part in node.body
                if isinstance(part, ast.FunctionDef) and part.name.startswith("test_")
            }
    raise LookupError(f"{file} has no {class_name}")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Run every test that ``verdicts.txt`` calls a running one, in a process of its own."""
    folder = suite()
    work = tmp_path_factory.mktemp("suite")
    wanted, report = work / "wanted.txt", work / "report.json"
    running = [name for name, (verdict, _) in verdicts().items() if verdict == "runs"]
    wanted.write_text("\n".join(running))
    (work / "pytest.ini").write_text("[pytest]\n")
    stand_ins.write(work / "files")
    environment = os.environ | {
        VARIABLE: str(folder),
        "MOE_MT_TRANSFORMERS_PACKAGE": package_of(folder),
        "MOE_MT_TRANSFORMERS_WANTED": str(wanted),
        "MOE_MT_TRANSFORMERS_REPORT": str(report),
        "MOE_MT_TRANSFORMERS_FILES": str(work / "files"),
        "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    files = sorted({str(folder / FILES[name]) for name in with_running_tests()})
    command = ["-m", "pytest", "-p", "shim", "-c", str(work / "pytest.ini"), "-q"]
    command += ["--rootdir", str(folder.parent), "-p", "no:cacheprovider", "-p", "no:benchmark"]
    command += ["--disable-warnings"]
    finished = subprocess.run(
        [sys.executable, *command, *files],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60 * MINUTES,
    )
    ran = report.exists() and finished.returncode in (
        pytest.ExitCode.OK,
        pytest.ExitCode.TESTS_FAILED,
    )
    assert ran, f"{finished.stdout[-3000:]}\n{finished.stderr[-3000:]}"
    return json.loads(report.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("class_name", with_running_tests())
def test_their_portable_tests_pass(class_name, outcomes):
    expected = [
        name
        for name, (verdict, _) in verdicts().items()
        if verdict == "runs" and name.startswith(f"{class_name}::")
    ]
    problems = []
    for name in expected:
        found = outcomes.get(name, {"outcome": "not collected", "why": ""})
        if found["outcome"] != "passed":
            problems.append(f"{name} {found['outcome']}: {found['why']}")
    assert not problems, f"{len(problems)} of {len(expected)}:\n" + "\n\n".join(problems)


@pytest.mark.parametrize("class_name", FILES)
def test_every_test_of_theirs_has_a_verdict(class_name):
    tests = defined_tests(suite() / FILES[class_name], class_name)
    for name in MIXINS.get(class_name, [class_name]):
        known = {key.split("::")[1] for key in verdicts() if key.startswith(f"{name}::")}
        assert tests - known == set()


def test_every_test_of_ours_that_stands_for_one_of_theirs_exists():
    missing = []
    for name, (verdict, what) in verdicts().items():
        if verdict != "ours":
            continue
        for test in what.split(", "):
            file, function = test.split("::")
            path = ROOT / "tests" / file
            text = path.read_text() if path.exists() else ""
            if not re.search(rf"^def {function}\(", text, re.MULTILINE):
                missing.append(f"{name}: {test}")
    assert not missing


def test_every_verdict_says_why():
    for name, (verdict, what) in verdicts().items():
        assert verdict in ("runs", "ours", "not here"), name
        assert (what is None) == (verdict == "runs"), name
