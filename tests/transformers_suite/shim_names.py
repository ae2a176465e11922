"""What transformers' tests import from transformers, by name: for ``shim``."""

import functools
import json
import logging
import os
import queue
import random
import sys
import tempfile
import threading
import types
import unittest
from pathlib import Path

import torch

import moe_mt
import moe_mt.pretrained.generation.outputs
import moe_mt.tokenizers

PACKAGE = os.environ.get("MOE_MT_TRANSFORMERS_PACKAGE", "transformers")
TESTS = Path(os.environ["MOE_MT_TRANSFORMERS_TESTS"])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# Stand-ins


class _NotHere(type):
    def __call__(cls, *args, **kwargs):
        raise NotImplementedError(f"{cls.__name__} of transformers is no part of moe_mt")

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotImplementedError(f"{cls.__name__}.{name} of transformers is no part of moe_mt")


def _stand_in(name):
    return _NotHere(name, (), {})


class _ModelNames(dict):
    """A table of model classes by model type; empty but for translation."""

    def __missing__(self, key):
        return ""


BASE_MODELS = _ModelNames({"m2m_100": "M2M100Model", "nllb-moe": "NllbMoeModel"})
TRANSLATION_MODELS = _ModelNames(
    {
        "m2m_100": "M2M100ForConditionalGeneration",
        "nllb-moe": "NllbMoeForConditionalGeneration",
    }
)


def _as_it_is(test):
    return test


def _skip(reason):
    return unittest.skip(reason)


def _missing_requirement(name):
    """Return a decorator that skips, whether it is used plainly or with arguments."""

    def decorate(*arguments, **_):
        skip = _skip(f"{name}: not here")
        return skip(arguments[0]) if len(arguments) == 1 and callable(arguments[0]) else skip

    return decorate


def _accelerator(test):
    return test if DEVICE != "cpu" else _skip("needs a GPU")(test)


# What the tests import from transformers.testing_utils and transformers.utils


def _set_seed(seed):
    random.seed(seed)
    torch.manual_seed(seed)


def _nested_simplify(value, decimals=3):
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_nested_simplify(item, decimals) for item in value]
    if isinstance(value, float):
        return round(value, decimals)
    if hasattr(value, "items"):
        return {key: _nested_simplify(item, decimals) for key, item in value.items()}
    return value


@functools.cache
def _folder_with_fixtures():
    """Return the tests' folder, or one like it with the text that some checkouts lack."""
    if (TESTS / "fixtures" / "sample_text.txt").exists():
        return TESTS
    folder = Path(tempfile.mkdtemp())
    (folder / "fixtures").mkdir()
    for file in (TESTS / "fixtures").iterdir():
        (folder / "fixtures" / file.name).symlink_to(file)
    text = "\n\n".join(["This is a test of some sentences.", "And this is another one."] * 20)
    (folder / "fixtures" / "sample_text.txt").write_text(text)
    return folder


def _get_tests_dir(append_path=None):
    folder = _folder_with_fixtures()
    return str(folder / append_path) if append_path else str(folder)


class _CaptureLogger:
    """Collects what a logger says while the block runs, in ``out``."""

    def __init__(self, logger):
        self.logger, self.lines = logger, []
        self.handler = logging.Handler()
        self.handler.emit = lambda record: self.lines.append(record.getMessage())

    @property
    def out(self):
        return "\n".join(self.lines)

    def __enter__(self):
        self.logger.addHandler(self.handler)
        return self

    def __exit__(self, *_):
        self.logger.removeHandler(self.handler)


def _check_json_file(path):
    """Fail unless a file is a JSON object with one entry a line, indented by two spaces."""
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    first, *entries, last = Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n")
    assert isinstance(content, dict)
    assert (first, last) == ("{", "}")
    assert all(line.startswith("  ") for line in entries)


def _memory_of(tensor):
    """Return what tied tensors have in common. Experts are parts of one storage and not tied."""
    return tensor.device, tensor.data_ptr(), tensor.numel()


class _ContextManagers:
    def __init__(self, managers):
        self.managers = managers

    def __enter__(self):
        for manager in self.managers:
            manager.__enter__()

    def __exit__(self, *problem):
        for manager in reversed(self.managers):
            manager.__exit__(*problem)


def _run_beside(test_case, target_func, inputs=None, timeout=None):
    """Run a function that talks by queues; theirs gives it a process, here it has a thread."""
    given, answers = queue.Queue(), queue.Queue()
    given.put(inputs)
    threading.Thread(target=target_func, args=(given, answers, 60), daemon=True).start()
    answer = answers.get(timeout=60)
    answers.task_done()
    if answer["error"] is not None:
        test_case.fail(answer["error"])


def _save_json(content, path):
    Path(path).write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def _logging_module():
    module = types.ModuleType(f"{PACKAGE}.utils.logging")
    module.get_logger = logging.getLogger
    module.set_verbosity_error = lambda: None
    module.set_verbosity = lambda level: None
    return module


def _pipeline(*arguments, **options):
    return moe_mt.pipeline(*arguments, **options)


AVAILABLE = {"torch", "torch_sdpa", "sentencepiece", "safetensors"}
IMMEDIATE = {
    "require_torch": _as_it_is,
    "require_torch_sdpa": _as_it_is,
    "require_torch_fp16": _as_it_is,
    "require_torch_or_tf": _as_it_is,
    "require_torch_greater_or_equal": lambda version: _as_it_is,
    "require_sentencepiece": _as_it_is,
    # A decorator of every test of these tokenizers, few of which need the library of that name.
    "require_tokenizers": _as_it_is,
    "require_safetensors": _as_it_is,
    "require_non_xpu": _as_it_is,
    "require_torch_gpu": _accelerator,
    "require_torch_accelerator": _accelerator,
    # Which tests run is decided by their names.
    "slow": _as_it_is,
    "is_pipeline_test": _as_it_is,
    "is_flaky": lambda **_: _as_it_is,
    "hub_retry": lambda **_: _as_it_is,
    "run_test_using_subprocess": _as_it_is,
    "torch_device": DEVICE,
    "set_seed": _set_seed,
    "nested_simplify": _nested_simplify,
    "get_tests_dir": _get_tests_dir,
    "CaptureLogger": _CaptureLogger,
    "check_json_file_has_correct_format": _check_json_file,
    # Those of transformers make models smaller and their norms coarser; these leave them alone.
    "set_model_tester_for_less_flaky_test": _as_it_is,
    "set_config_for_less_flaky_test": _as_it_is,
    "set_model_for_less_flaky_test": _as_it_is,
    "run_test_in_subprocess": _run_beside,
    "AddedToken": moe_mt.tokenizers.AddedToken,
    "cached_property": functools.cached_property,
    "ContextManagers": _ContextManagers,
    "id_tensor_storage": _memory_of,
    "load_state_dict": lambda path: torch.load(path, weights_only=True),
    "get_values": lambda table: list(table.values()),
    "CONFIG_NAME": "config.json",
    "GENERATION_CONFIG_NAME": "generation_config.json",
    "SAFE_WEIGHTS_NAME": "model.safetensors",
    "SPIECE_UNDERLINE": "\u2581",
    "VOCAB_FILES_NAMES": {"vocab_file": "vocab.json", "spm_file": "sentencepiece.bpe.model"},
    "save_json": _save_json,
    "FAIRSEQ_LANGUAGE_CODES": [code for code, _ in moe_mt.tokenizers.list_languages("nllb")],
    "MODEL_MAPPING_NAMES": BASE_MODELS,
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": TRANSLATION_MODELS,
    "MODEL_MAPPING": {
        moe_mt.M2M100Config: moe_mt.M2M100Model,
        moe_mt.NllbMoeConfig: moe_mt.NllbMoeModel,
    },
    "PretrainedConfig": moe_mt.pretrained.PublishedConfig,
    "logging": _logging_module(),
    "pipeline": _pipeline,
    "is_deepspeed_zero3_enabled": lambda: False,
    "is_torch_fp16_available_on_device": lambda device: True,
    "is_torch_bf16_available_on_device": lambda device: True,
    "direct_transformers_import": lambda path: sys.modules[PACKAGE],
}


def resolve(name):
    """Return what a module of the fake package holds under a name."""
    if name in IMMEDIATE:
        return IMMEDIATE[name]
    for room in (moe_mt, moe_mt.pretrained, moe_mt.pretrained.generation.outputs):
        if hasattr(room, name):
            return getattr(room, name)
    if name.startswith("is_") and name.endswith("_available"):
        return lambda *_: name.removeprefix("is_").removesuffix("_available") in AVAILABLE
    if name.startswith("require_"):
        return _missing_requirement(name)
    if name.endswith("_MAPPING_NAMES") or name.endswith("_MAPPING"):
        return _ModelNames()
    if name.startswith("is_"):
        return lambda *_: False
    return _stand_in(name)
