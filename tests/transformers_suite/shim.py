"""A pytest plugin that gives transformers' own tests ``moe_mt`` under the name of transformers.

Loaded with ``-p shim`` in a process of its own (``test_suite.py`` starts it). Modules of the
package named by ``MOE_MT_TRANSFORMERS_PACKAGE`` are made up as they are imported: what ``moe_mt``
has is found there, helpers of the tests are in ``shim_names``, and every other name is a stand-in
that says what is missing when it is used. Nothing here is of transformers.
"""

import ast
import functools
import importlib.abc
import importlib.machinery
import json
import logging
import os
import sys
import types
import unittest
from pathlib import Path

import pytest
from shim_names import PACKAGE, TESTS, resolve

import moe_mt

WANTED = os.environ.get("MOE_MT_TRANSFORMERS_WANTED")
REPORT = os.environ.get("MOE_MT_TRANSFORMERS_REPORT")
FILES = Path(os.environ.get("MOE_MT_TRANSFORMERS_FILES", "nowhere"))

# Flags of the implementation that their tests ask for; none says anything about behaviour.
FLAGS = {
    "_supports_cache_class": False,
    "_supports_static_cache": False,
    "_supports_quantized_cache": False,
    "_supports_sdpa": True,
    "_supports_flash_attn_2": False,
    "_supports_flex_attn": False,
    "_is_stateful": False,
}


class _Forward(logging.Handler):
    """Says again, under the name of transformers, what moe_mt logs."""

    def emit(self, record):
        logging.getLogger(PACKAGE).handle(record)


class _Module(types.ModuleType):
    def __init__(self, name, content=None):
        super().__init__(name)
        self.__path__ = []
        self.__dict__.update(content or {})

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        found = resolve(name)
        setattr(self, name, found)
        return found


class _Parameterized:
    """``parameterized.expand``: one test per tuple of arguments."""

    @staticmethod
    def expand(cases, **_):
        # Called in the body of a class, whose names the frame above holds.
        names = sys._getframe(1).f_locals

        def decorate(test):
            for number, case in enumerate(cases() if callable(cases) else cases):
                arguments = case if isinstance(case, list | tuple) else (case,)

                @functools.wraps(test)
                def one(self, *more, _arguments=tuple(arguments)):
                    return test(self, *_arguments, *more)

                # pytest would take the names of the test's own arguments for fixtures.
                del one.__wrapped__
                one.expanded_from, one.__test__ = test.__name__, True
                one.__name__ = f"{test.__name__}_{number}"
                names[one.__name__] = one
            # What is left under the name is decorated further, and no test.
            test.__test__ = False
            return test

        return decorate


def _common_config_arguments():
    """Return a constant of a test file without the imports of that file."""
    file = TESTS / "utils" / "test_configuration_utils.py"
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "config_common_kwargs":
            return ast.literal_eval(node.value)
    raise LookupError(f"{file} has no config_common_kwargs")


class _Anything:
    """Equal to every value of the given types."""

    def __init__(self, *kinds):
        self.kinds = kinds

    def __eq__(self, other):
        return isinstance(other, self.kinds)

    __hash__ = None


REPLACED = {
    # Files of the suite that are all about other models, and libraries that only they need.
    "tests.test_pipeline_mixin": lambda: {
        "PipelineTesterMixin": type("PipelineTesterMixin", (), {})
    },
    "tests.pipelines.test_pipelines_common": lambda: {"ANY": _Anything},
    "tests.utils.test_configuration_utils": lambda: {
        "config_common_kwargs": _common_config_arguments()
    },
    "parameterized": lambda: {"parameterized": _Parameterized},
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name in REPLACED or name == PACKAGE or name.startswith(f"{PACKAGE}."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Module(spec.name, REPLACED.get(spec.name, dict)())

    def exec_module(self, module):
        """Leave the module as it was made."""


sys.meta_path.insert(0, _Finder())
logging.getLogger("moe_mt").addHandler(_Forward())
for _model in (
    moe_mt.M2M100Model,
    moe_mt.M2M100ForConditionalGeneration,
    moe_mt.NllbMoeModel,
    moe_mt.NllbMoeForConditionalGeneration,
):
    for _flag, _value in FLAGS.items():
        if not hasattr(_model, _flag):
            setattr(_model, _flag, _value)


def _look_here_first(tokenizer_class):
    """Let hub ids name folders below ``MOE_MT_TRANSFORMERS_FILES``, where there are such."""
    inherited = tokenizer_class.from_pretrained.__func__

    def from_pretrained(cls, name, *more, **options):
        folder = FILES / str(name)
        return inherited(cls, str(folder) if folder.is_dir() else name, *more, **options)

    tokenizer_class.from_pretrained = classmethod(from_pretrained)


for _tokenizer in (moe_mt.M2M100Tokenizer, moe_mt.NllbTokenizer):
    _look_here_first(_tokenizer)


# The plugin

_outcomes = {}


def _name_of(item):
    test = getattr(item.function, "expanded_from", item.function.__name__)
    return f"{item.cls.__name__}::{test}"


def pytest_collection_modifyitems(config, items):
    """Keep the tests that were asked for."""
    if WANTED:
        wanted = set(Path(WANTED).read_text().split())
        dropped = [item for item in items if item.cls is None or _name_of(item) not in wanted]
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(obj):
    """Let ours stand for the fast tokenizer too, whose tests then check one after the other."""
    is_test = isinstance(obj, type) and issubclass(obj, unittest.TestCase)
    if is_test and getattr(obj, "tokenizer_class", None) is not None:
        _have_one_kind(obj)


def _have_one_kind(tests):
    prepare = tests.setUpClass.__func__

    def prepare_class(cls):
        prepare(cls)
        cls.tokenizers_list = [(cls.tokenizer_class, cls.tmpdirname, {})]

    tests.test_rust_tokenizer = False
    tests.rust_tokenizer_class = tests.tokenizer_class
    tests.setUpClass = classmethod(prepare_class)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """Keep the worst outcome of each test: of its phases, and of the cases it was expanded to."""
    report = yield
    ranks = ["passed", "skipped", "failed"]
    known = _outcomes.setdefault(_name_of(item), {"outcome": "passed", "why": ""})
    if ranks.index(report.outcome) > ranks.index(known["outcome"]):
        why = report.longrepr[2] if report.skipped else str(report.longrepr)[-3000:]
        known.update(outcome=report.outcome, why=why)
    return report


def pytest_sessionfinish():
    """Write the outcomes where the caller reads them."""
    if REPORT:
        Path(REPORT).write_text(json.dumps(_outcomes))
