"""Loading never holds two copies: the peak of anonymous memory, measured on 3 GB of weights."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from moe_mt.checkpoints import model_bytes, read_config
from moe_mt.checkpoints.fit import largest_tensor_bytes
from moe_mt.checkpoints.free_bytes import free_host_bytes
from tests.checkpoints.published import tensor_shapes, write_tensors

# An embedding as wide as NLLB's vocabulary (1.05 GB, the largest tensor), and two stacks of 16
# experts (2.15 GB), so that both a large tensor and a large stacked parameter are on the way.
CONFIG = {
    "model_type": "nllb-moe",
    "vocab_size": 256206,
    "d_model": 1024,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 8192,
    "decoder_ffn_dim": 8192,
    "encoder_sparse_step": 1,
    "decoder_sparse_step": 1,
    "num_experts": 16,
}
HEADROOM = 500_000_000

LOADING = """
import json, re, sys, threading, time
from pathlib import Path
import torch
from moe_mt.checkpoints import load

STATUS = Path("/proc/self/status")

def anonymous_bytes():
    return int(re.search(r"RssAnon:\\s+(\\d+)", STATUS.read_text())[1]) * 1024

def watch():
    while not done.wait(0.005):
        readings.append(anonymous_bytes())

baseline = anonymous_bytes()
readings, done = [], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
start = time.perf_counter()
model = load(sys.argv[1], device="cpu", dtype=getattr(torch, sys.argv[2]))
seconds = time.perf_counter() - start
done.set()
watcher.join()
readings.append(anonymous_bytes())
experts = model.decoder.layers[0].feed_forward.experts
print(json.dumps({
    "peak": max(readings) - baseline,
    "readings": len(readings),
    "seconds": seconds,
    "embedding": model.embedding.weight[[0, -1], :3].tolist(),
    "expert": experts.down_proj[-1, -1, -3:].tolist(),
}))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/proc/self/status").exists(), reason="RssAnon is a figure of Linux"
    ),
]


def random_shards(folder: Path, suffix: str) -> None:
    """Write 3.2 GB of random float32 weights as four shards; a block of them is repeated."""
    block = torch.rand(1 << 22, generator=torch.Generator().manual_seed(0)) - 0.5
    shapes = tensor_shapes(CONFIG)
    weight_map, part = {}, {}
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    for key, shape in shapes.items():
        part[key] = torch.empty(shape)
        for chunk in part[key].view(-1).split(block.numel()):
            chunk.copy_(block[: chunk.numel()])
        last = key == list(shapes)[-1]
        if last or sum(tensor.nbytes for tensor in part.values()) > 800_000_000:
            name = f"{stem}-{len(set(weight_map.values())) + 1:05d}-of-00004.{suffix}"
            write_tensors(folder / name, part)
            weight_map |= dict.fromkeys(part, name)
            part = {}
    assert len(set(weight_map.values())) == 4
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))


@pytest.fixture(scope="module", params=["safetensors", "bin"])
def folder(request, tmp_path_factory):
    """A sharded checkpoint of 3.2 GB, removed afterwards; in memory where there is much of it."""
    path = tmp_path_factory.mktemp("large")
    shared = Path("/dev/shm")
    if shared.is_dir() and min(shutil.disk_usage(shared).free, free_host_bytes()) > 12_000_000_000:
        path = Path(tempfile.mkdtemp(dir=shared))
    elif shutil.disk_usage(path).free < 8_000_000_000:
        pytest.skip("needs 8 GB of disk")
    try:
        random_shards(path, request.param)
        yield path
    finally:
        shutil.rmtree(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_peak_memory_is_the_model_and_one_tensor(folder, dtype):
    name = str(dtype).removeprefix("torch.")
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(folder), name],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    _, config = read_config(folder)
    size, largest = model_bytes(config, dtype), largest_tensor_bytes(config)
    assert size > (3_000_000_000 if dtype == torch.float32 else 1_500_000_000)
    assert largest == 256206 * 1024 * 4
    # The watcher must have looked often, or a short peak would pass unseen.
    assert found["readings"] > 20 * found["seconds"]
    # Less than the model would mean that the weights are not in memory at all.
    assert size * 0.99 < found["peak"] <= size + largest + HEADROOM
    block = torch.rand(1 << 22, generator=torch.Generator().manual_seed(0)) - 0.5
    assert found["embedding"][0] == block[:3].to(dtype).tolist()
    assert found["expert"] == block[-3:].to(dtype).tolist()
