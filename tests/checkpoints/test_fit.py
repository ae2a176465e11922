"""What cannot fit is refused with the figures, before any weight is fetched or read."""

import json
import sys

import pytest
import torch

from moe_mt.checkpoints import FreeBytes, check_fits, load, model_bytes
from moe_mt.errors import CheckpointError, PlacementError
from moe_mt.models import FAMILIES
from tests.checkpoints.published import DENSE, MOE, NLLB_MOE_54B

GB = 1_000_000_000
CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


def config_of(published):
    return FAMILIES[published["model_type"]].config_from_published(published)


def check(
    published=NLLB_MOE_54B,
    *,
    device=CPU,
    dtype=torch.bfloat16,
    download_bytes=0,
    host=None,
    device_free=None,
    disk=None,
):
    check_fits(
        config_of(published),
        name="facebook/nllb-moe-54b",
        device=device,
        dtype=dtype,
        free=FreeBytes(host=host, device=device_free, disk=disk),
        download_bytes=download_bytes,
    )


@pytest.fixture
def folder_54b(tmp_path):
    """The configuration and the index of the published 54B, and not one of its weights."""
    family = FAMILIES["nllb-moe"]
    locations = family.locations(config_of(NLLB_MOE_54B))
    keys = [key for key in locations if key != "lm_head.weight"]
    assert len(keys) == 7123
    per_file = -(-len(keys) // 23)
    weight_map = {
        key: f"pytorch_model-{i // per_file + 1:05d}-of-00023.bin" for i, key in enumerate(keys)
    }
    assert len(set(weight_map.values())) == 23
    index = {"metadata": {"total_size": 218_002_276_352}, "weight_map": weight_map}
    (tmp_path / "config.json").write_text(json.dumps(NLLB_MOE_54B))
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return tmp_path


def no_reading(*_arguments, **_options):
    raise AssertionError("a weight file was opened")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_the_54b_is_refused_before_a_weight_is_read(folder_54b, monkeypatch, dtype):
    # The door's function hides the file of the same name.
    file = sys.modules["moe_mt.checkpoints.load"]
    monkeypatch.setattr(file, "open_shards", no_reading)
    monkeypatch.setattr(file, "measure_free_bytes", lambda *_: FreeBytes(host=64 * GB))
    with pytest.raises(PlacementError, match=r"64\.0 GB"):
        load(folder_54b, device="cpu", dtype=dtype)


def test_the_54b_that_would_fit_goes_on_to_its_files(folder_54b, monkeypatch):
    # The refusal above must come from the figures, and not from the files that are not there.
    file = sys.modules["moe_mt.checkpoints.load"]
    monkeypatch.setattr(file, "measure_free_bytes", lambda *_: FreeBytes(host=500 * GB))
    with pytest.raises(CheckpointError, match=r"-00001-of-00023\.bin.*23 missing files"):
        load(folder_54b, device="cpu", dtype=torch.bfloat16)


def test_bytes_of_the_54b():
    # 54,500,569,088 parameters, of which 12 routers of 128 x 2048 stay in float32 (spec 1.3).
    config = config_of(NLLB_MOE_54B)
    assert model_bytes(config, torch.float32) == 4 * 54_500_569_088
    assert model_bytes(config, torch.bfloat16) == 2 * 54_500_569_088 + 2 * 12 * 128 * 2048


def test_bytes_are_those_of_the_tied_embedding_once():
    # 40 x 8 once, not four times.
    config = config_of(DENSE)
    without = model_bytes(config_of(DENSE | {"vocab_size": 39}), torch.float32)
    assert model_bytes(config, torch.float32) - without == 8 * 4


def test_54b_on_a_host_says_the_figures_and_the_options():
    with pytest.raises(PlacementError) as caught:
        check(host=64 * GB, disk=100 * GB, download_bytes=218 * GB, dtype=torch.float32)
    message = str(caught.value)
    for figure in (
        "facebook/nllb-moe-54b",
        "float32 was asked for on cpu",
        "218.0 GB",  # to download, and the weights at float32
        "100.0 GB",  # free disk
        "220.6 GB",  # weights, the embedding that passes through, and 0.5 GB
        "64.0 GB",  # free host memory
        "109.0 GB",  # at bfloat16
        'dtype="bfloat16"',
        "cache_dir",
        "another device",
        "facebook/nllb-200-3.3B takes 13.4 GB",
    ):
        assert figure in message
    assert message.count("too little") == 2


def test_54b_on_a_gpu_says_the_figures():
    with pytest.raises(PlacementError) as caught:
        check(device=CUDA, host=500 * GB, device_free=80 * GB)
    message = str(caught.value)
    assert "memory of cuda:0" in message
    assert "111.6 GB" in message
    assert "80.0 GB" in message
    assert message.count("too little") == 1
    # bfloat16 is what was asked for: it is no option.
    assert 'dtype="bfloat16"' not in message


def test_only_the_disk_may_be_too_small():
    with pytest.raises(
        PlacementError, match=r"disk, to download +218\.0 GB +50\.0 GB   too little"
    ):
        check(host=500 * GB, disk=50 * GB, download_bytes=218 * GB)


def test_the_host_passes_tensors_on_to_a_device():
    # 2.1 GB of embedding and 0.5 GB go through host memory even where the device has room.
    check(device=CUDA, host=3 * GB, device_free=141 * GB)
    with pytest.raises(PlacementError, match=r"host memory +2\.6 GB +2\.0 GB   too little"):
        check(device=CUDA, host=2 * GB, device_free=141 * GB)


def test_the_bound_is_exact():
    # Weights, largest tensor (the embedding at float32) and 0.5 GB; not a byte more.
    needed = model_bytes(config_of(MOE), torch.bfloat16) + 40 * 8 * 4 + 500_000_000
    check(MOE, host=needed)
    with pytest.raises(PlacementError):
        check(MOE, host=needed - 1)


def test_what_is_unknown_is_not_checked():
    check(host=None, disk=None, download_bytes=218 * GB)


def test_a_model_is_named_only_where_it_fits():
    with pytest.raises(PlacementError) as caught:
        check(host=4 * GB)
    assert "nllb-200-3.3B" not in str(caught.value)
    assert "nllb-200-distilled-600M" in str(caught.value)
    with pytest.raises(PlacementError) as caught:
        check(host=GB)
    assert "a smaller model" not in str(caught.value)
