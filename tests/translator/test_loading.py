"""What names of devices and dtypes mean, and what of a checkpoint's defaults is taken."""

import json

import pytest
import torch

from moe_mt.errors import ConfigError
from moe_mt.models import is_packed
from moe_mt.ops import PACKED_KINDS, packing_obstacle
from moe_mt.translator import from_pretrained, loading
from moe_mt.translator.loading import resolve_device, resolve_dtype, resolve_packing
from tests.translators import random_checkpoint

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def pretend_gpus(monkeypatch, number: int, *, bfloat16: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        # Emulated bfloat16 is slower than float32: only native counts.
        lambda including_emulation=True: including_emulation or bfloat16,
    )


@pytest.mark.parametrize(("gpus", "expected"), [(0, "cpu"), (1, "cuda"), (4, "cuda")])
def test_auto_is_the_first_gpu_else_the_cpu(monkeypatch, gpus, expected):
    pretend_gpus(monkeypatch, gpus)
    assert resolve_device("auto") == torch.device(expected)


def test_named_devices(monkeypatch):
    pretend_gpus(monkeypatch, 2)
    assert resolve_device("cpu") == CPU
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    assert resolve_device(torch.device("cuda")) == CUDA


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "device 'gpu' is unknown; choose"),  # not torch's word
        ("cuda:2", "'cuda:2' was asked for and 2 CUDA devices are here"),
        ("cuda:-1", "unknown"),
    ],
)
def test_a_device_that_is_not_there(monkeypatch, device, message):
    pretend_gpus(monkeypatch, 2)
    with pytest.raises(ConfigError, match=message):
        resolve_device(device)


def test_no_gpu_at_all(monkeypatch):
    pretend_gpus(monkeypatch, 0)
    with pytest.raises(ConfigError, match="0 CUDA devices are here; choose 'cpu', or 'auto'"):
        resolve_device("cuda")


@pytest.mark.parametrize(
    ("device", "native", "expected"),
    [(CPU, True, torch.float32), (CUDA, True, torch.bfloat16), (CUDA, False, torch.float16)],
)
def test_auto_dtype_is_what_the_device_computes_natively(monkeypatch, device, native, expected):
    pretend_gpus(monkeypatch, 1, bfloat16=native)
    assert resolve_dtype("auto", device) == expected


@pytest.mark.parametrize("dtype", ["float16", "torch.float16", torch.float16])
def test_dtypes_by_name_and_by_themselves(dtype):
    assert resolve_dtype(dtype, CPU) is torch.float16


@pytest.mark.parametrize("dtype", ["int8", "fp16", "", torch.int64])
def test_a_dtype_no_model_runs_in(dtype):
    with pytest.raises(ConfigError, match=r"dtype .* is unknown; choose 'auto' or one of float32"):
        resolve_dtype(dtype, CPU)


packable = pytest.mark.skipif(
    any(packing_obstacle(kind, CPU) for kind in PACKED_KINDS),
    reason="weights cannot be packed on this machine",
)


@packable
@pytest.mark.parametrize(
    ("quantization", "prepack", "device", "dtype", "expected"),
    [
        (None, "auto", CPU, torch.float32, "float32"),
        (None, True, CPU, torch.float32, "float32"),
        (None, False, CPU, torch.float32, None),
        # Only float32 is packed, and only for the CPU.
        (None, "auto", CPU, torch.bfloat16, None),
        (None, "auto", CUDA, torch.float32, None),
        ("int8-dynamic", "auto", CPU, torch.float32, "int8-dynamic"),
        ("int8-dynamic", True, CPU, torch.float32, "int8-dynamic"),
    ],
)
def test_what_is_packed(quantization, prepack, device, dtype, expected):
    assert resolve_packing(quantization, prepack, device, dtype) == expected


@pytest.mark.parametrize(
    ("quantization", "prepack", "device", "dtype", "message"),
    [
        ("int8", "auto", CPU, torch.float32, "'int8' is unknown; choose None or int8-dynamic"),
        (None, "yes", CPU, torch.float32, "prepack 'yes' is unknown; choose 'auto', True or False"),
        (None, 1, CPU, torch.float32, "prepack 1 is unknown"),
        ("int8-dynamic", False, CPU, torch.float32, "packs weights and prepack is False"),
        ("int8-dynamic", "auto", CUDA, torch.float32, "the device is 'cuda'; leave it out"),
        ("int8-dynamic", "auto", CPU, torch.float16, "the dtype is torch.float16; leave it out"),
        (None, True, CUDA, torch.bfloat16, "prepack=True cannot be had here: .*device is 'cuda'"),
    ],
)
def test_packing_that_cannot_be_had(quantization, prepack, device, dtype, message):
    with pytest.raises(ConfigError, match=message):
        resolve_packing(quantization, prepack, device, dtype)


def test_a_torch_without_the_operators_packs_nothing_unasked(monkeypatch):
    monkeypatch.setattr(loading, "packing_obstacle", lambda *_: "there is no FBGEMM")
    assert resolve_packing(None, "auto", CPU, torch.float32) is None
    with pytest.raises(ConfigError, match="cannot be had here: there is no FBGEMM; leave it out"):
        resolve_packing("int8-dynamic", "auto", CPU, torch.float32)


@packable
def test_models_are_packed_unless_they_are_to_be_trained(tmp_path):
    folder = random_checkpoint(tmp_path)
    assert is_packed(from_pretrained(folder, device="cpu").model)
    assert is_packed(from_pretrained(folder, device="cpu", quantization="int8-dynamic").model)
    assert not is_packed(from_pretrained(folder, device="cpu", prepack=False).model)
    assert not is_packed(from_pretrained(folder, device="cpu", dtype="bfloat16").model)


@pytest.mark.parametrize(
    ("generation_config", "num_beams"),
    # Older checkpoints have no such file; then config.json says it.
    [({"num_beams": 3, "max_length": 200, "max_new_tokens": 200}, 3), (None, 2)],
)
def test_the_checkpoint_s_defaults_but_for_its_length_limit(tmp_path, generation_config, num_beams):
    folder = random_checkpoint(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_beams": 2, "max_length": 200}
    (folder / "config.json").write_text(json.dumps(config))
    if generation_config is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation_config))
    found = from_pretrained(folder, device="cpu").generation_config
    assert found.num_beams == num_beams
    assert found.new_token_limit is None


def test_a_checkpoint_s_own_languages_are_all_it_knows(tmp_path):
    folder = random_checkpoint(tmp_path)
    assert len(from_pretrained(folder, device="cpu").languages) == 202
    config = json.loads((folder / "config.json").read_text())
    config["moe_mt"] = {"languages": ["eng_Latn", "fra_Latn"]}
    (folder / "config.json").write_text(json.dumps(config))
    assert from_pretrained(folder, device="cpu").languages == ("eng_Latn", "fra_Latn")
