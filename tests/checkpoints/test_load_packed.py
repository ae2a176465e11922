"""Loading packs tensor by tensor: any layout and order, one result, and no second copy."""

import json
import subprocess
import sys

import pytest
import torch

from moe_mt.checkpoints import load, model_bytes, read_config
from moe_mt.checkpoints.fit import largest_tensor_bytes
from moe_mt.errors import CheckpointError, ConfigError
from moe_mt.ops import PACKED_KINDS, packing_obstacle
from tests.checkpoints import test_load_memory as plain
from tests.checkpoints.published import DENSE, LAYOUTS, MOE, TIED, random_tensors, write_folder

# The same large checkpoint, and whether this system says what a process takes.
folder = plain.folder

pytestmark = pytest.mark.skipif(
    any(packing_obstacle(kind, torch.device("cpu")) for kind in PACKED_KINDS),
    reason="weights cannot be packed on this machine",
)


def load_packed(path, kind):
    return load(path, device="cpu", dtype=torch.float32, pack=kind)


def logits(model):
    tokens = torch.tensor([[5, 6, 7, 2], [9, 3, 8, 2]])
    with torch.no_grad():
        return model(tokens, tokens).logits


@pytest.mark.parametrize("kind", PACKED_KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_packed_model(tmp_path, layout, kind):
    tensors = random_tensors(MOE)
    expected = logits(load_packed(write_folder(tmp_path / "one", MOE, tensors), kind))
    shuffled = dict(reversed(tensors.items()))
    found = load_packed(write_folder(tmp_path / "other", MOE, shuffled, layout=layout), kind)
    assert torch.equal(logits(found), expected)
    assert not found.training
    assert not any(tensor.is_meta for tensor in (*found.parameters(), *found.buffers()))
    if kind == "float32":
        plain_model = load(tmp_path / "one", device="cpu", dtype=torch.float32)
        torch.testing.assert_close(expected, logits(plain_model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", PACKED_KINDS)
@pytest.mark.parametrize("name", TIED[1:])
def test_tied_weights_that_differ_are_refused(tmp_path, kind, name):
    tensors = random_tensors(DENSE)
    tensors[name] = tensors[name].clone()
    tensors[name][11, 3] += 1
    path = write_folder(tmp_path / "model", DENSE, tensors)
    with pytest.raises(CheckpointError, match="differ, and are one parameter"):
        load_packed(path, kind)


def test_one_weight_under_two_names_cannot_be_compared_once_packed(tmp_path):
    tensors = random_tensors(DENSE)
    name = "encoder.layers.0.fc1.weight"
    tensors[f"model.{name}"] = tensors[name].clone()
    path = write_folder(tmp_path / "model", DENSE, tensors)
    with pytest.raises(CheckpointError, match="packed by now and cannot be compared"):
        load_packed(path, "float32")


def test_what_cannot_be_packed_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(
        ConfigError, match=r"packing as 'int8-dynamic' was asked for, but .*float16"
    ):
        load(tmp_path, device="cpu", dtype=torch.float16, pack="int8-dynamic")
    with pytest.raises(ConfigError, match="kind 'int3' is unknown"):
        load(tmp_path, device="cpu", dtype=torch.float32, pack="int3")


LOADING = plain.LOADING.replace(
    "dtype=getattr(torch, sys.argv[2]))", "dtype=torch.float32, pack=sys.argv[2])"
).replace(
    '"embedding": model.embedding.weight[[0, -1], :3].tolist(),\n    "expert": '
    "experts.down_proj[-1, -1, -3:].tolist(),\n",
    "",
)


@pytest.mark.slow
@pytest.mark.skipif(plain.pytestmark[1].args[0], reason="RssAnon is a figure of Linux")
@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_peak_memory_is_what_is_kept_and_one_tensor(folder, kind):
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(folder), kind],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    _, config = read_config(folder)
    kept, largest = model_bytes(config, torch.float32, kind), largest_tensor_bytes(config)
    whole = model_bytes(config, torch.float32)
    assert kept == (whole + largest if kind == "float32" else pytest.approx(whole / 3, rel=0.1))
    assert found["readings"] > 20 * found["seconds"]
    assert kept * 0.99 < found["peak"] <= kept + largest + plain.HEADROOM
