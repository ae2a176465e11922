"""The line that says what a number was measured on."""

import os
import platform
import re

import pytest
import torch

import moe_mt
from benchmarks import signature
from benchmarks.signature import (
    build_signature,
    device_name,
    device_slug,
    format_signature,
    instruction_set,
    merge_signatures,
    parse_signature,
)

CPU = torch.device("cpu")


def test_fields_stand_in_their_order_and_read_back():
    built = build_signature(
        {"model": "tiny", "dtype": "float32", "batch": 32}, CPU, commit="1a2b3c4", peer="other-1.0"
    )
    fields = parse_signature(built)
    assert list(fields) == [
        *("model", "dtype", "batch", "device", "threads", "torch", "peer", "commit", "v")
    ]
    assert built.startswith("model:tiny|dtype:float32|batch:32|device:")
    assert built.endswith(f"|peer:other-1.0|commit:1a2b3c4|v:{moe_mt.__version__}")
    assert fields["threads"] == str(torch.get_num_threads())


def test_a_signature_names_neither_machine_nor_user_nor_folder():
    built = build_signature({"model": "tiny"}, CPU)
    for secret in (platform.node(), os.path.expanduser("~"), os.getcwd()):  # noqa: PTH109, PTH111
        assert secret not in built
    assert "/" not in built


@pytest.mark.parametrize(
    "value",
    [
        "/home/someone/model",  # a path gives a machine away
        "C:\\models\\tiny",  # so does one of another system
        "a|b",  # would end the field
        "a:b",  # would start another
        "two\nlines",  # a signature is one line
        "",  # a field without a value says nothing
    ],
)
def test_a_value_that_is_no_name_is_refused(value):
    with pytest.raises(ValueError, match="'model'"):
        format_signature({"model": value})


def test_rows_of_a_table_share_one_line():
    rows = ["model:a|T:4|v:1", "model:a|T:32|v:1", "model:a|T:4|peer:b|v:1"]
    assert merge_signatures(rows) == "model:a|T:4,32|v:1|peer:b"


def test_a_processor_is_called_what_its_maker_calls_it(tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Fast CPU @ 2.0GHz\nprocessor\t: 1\n")
    monkeypatch.setattr(signature, "CPU_INFO", info)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert device_name(CPU) == "Fast CPU @ 2.0GHz, 8 cores"


@pytest.mark.parametrize("text", [None, "processor\t: 0\n"])  # other systems; ARM says no name
def test_a_processor_without_a_name_is_called_by_its_kind(tmp_path, monkeypatch, text):
    info = tmp_path / "cpuinfo"
    if text is not None:
        info.write_text(text)
    monkeypatch.setattr(signature, "CPU_INFO", info)
    assert device_name(CPU) == f"{platform.machine()}, {os.cpu_count()} cores"


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H200", "nvidia-h200"),  # a space
        ("Intel(R) Xeon(R) CPU @ 2.20GHz, 4 cores", "intel-r-xeon-r-cpu-2-20ghz-4-cores"),  # all
    ],
)
def test_a_device_has_a_folder_name(name, slug):
    assert device_slug(name) == slug


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"rev-parse": "1a2b3c4", "status": ""}, "1a2b3c4"),  # measured what is committed
        ({"rev-parse": "1a2b3c4", "status": " M moe_mt/x.py"}, "1a2b3c4-dirty"),  # something else
        ({"rev-parse": "", "status": ""}, "none"),  # no history
    ],
)
def test_the_commit_says_whether_the_code_is_in_it(monkeypatch, answers, expected):
    monkeypatch.setattr(signature, "_git", lambda command, *_: answers[command])
    assert signature.current_commit() == expected


def test_without_git_there_is_no_commit(monkeypatch):
    def missing(*_args, **_kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(signature.subprocess, "run", missing)
    assert signature.current_commit() == "none"


def test_this_tree_has_a_commit_or_says_none():
    assert re.fullmatch(r"none|[0-9a-f]{7,}(-dirty)?", signature.current_commit())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("avx2 avx512_vnni", "+VNNI"), ("avx2 avx_vnni fma", "+VNNI"), ("avx2 avx512f", "")],
)
def test_instructions_for_int8_are_named(monkeypatch, tmp_path, flags, expected):
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    monkeypatch.setattr(signature, "CPU_INFO", tmp_path / "cpuinfo")
    assert instruction_set() == torch.backends.cpu.get_cpu_capability() + expected
