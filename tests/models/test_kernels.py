"""Whole models through the kernels: against the published class, and against the eager path."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import moe_mt
from moe_mt.checkpoints import load
from moe_mt.moe import Top2Router
from moe_mt.ops import use_backend
from tests.closeness import assert_near, relative_difference

pytestmark = pytest.mark.triton

GOLDENS = Path(__file__).parents[1] / "golden" / "models"
SPARSE = sorted(path.name for path in GOLDENS.glob("moe_*"))


@pytest.fixture(scope="module")
def tiny():
    return moe_mt.from_pretrained("tiny", device="cpu", dtype="float32")


@pytest.mark.parametrize("name", SPARSE)
def test_agrees_with_the_published_class(name, kernel_device):
    model = load(GOLDENS / name, device=str(kernel_device), dtype=torch.float32)
    golden = load_file(GOLDENS / name / "forward.safetensors", device=str(kernel_device))
    keys = ("source_tokens", "target_tokens", "source_mask", "target_mask")
    with torch.no_grad(), use_backend("triton"):
        output = model(*(golden[key] for key in keys))
    real = golden["target_mask"]
    assert_near(output.memory, golden["memory"], torch.float32, "memory")
    assert_near(output.logits[real], golden["logits"][real], torch.float32, "logits")


def batch(translator, device):
    """Two sentences of different lengths: source tokens (2, S) and their mask."""
    texts = ["August 12, 1981", "Namibia, Canada, Uganda, or Kenya"]
    encode = translator.tokenizer.encode_source
    rows = [encode(text, "eng_Latn", "fra_Latn") for text in texts]
    source = torch.ones(2, max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros_like(source, dtype=torch.bool)
    for i, row in enumerate(rows):
        source[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    return source.to(device), mask.to(device)


def test_the_tiny_model_encodes_and_decodes_as_the_eager_path_does(tiny, kernel_device):
    model = tiny.model.to(kernel_device)
    source, mask = batch(tiny, kernel_device)
    start = torch.tensor([[2, 4000]] * 4, device=kernel_device)
    results = {}
    for backend in ("eager", "triton"):
        with torch.inference_mode(), use_backend(backend):
            memory, routings = model.encode(source, mask)
            cache = model.new_cache(memory, mask, beams=2)
            first = model.decode_step(start, cache)
            second = model.decode_step(first.argmax(-1, keepdim=True), cache)
        results[backend] = memory[mask], first, second, *(r.gates for r in routings)
        assert routings
    for found, expected in zip(results["triton"], results["eager"], strict=True):
        assert_near(found, expected, torch.float32)


@pytest.mark.parametrize("name", ["moe_2_experts", "moe_priority_capacity"])
def test_every_parameter_gets_its_gradient(name, kernel_device):
    # Rounding grows from layer to layer, so float64 is the judge, and the eager path's own
    # rounding in float32 the measure.
    golden = load_file(GOLDENS / name / "forward.safetensors", device=str(kernel_device))
    keys = ("source_tokens", "target_tokens", "source_mask", "target_mask")
    gradients = {}
    for label, backend, dtype in (
        ("exact", "eager", torch.float64),
        ("eager", "eager", torch.float32),
        ("kernels", "triton", torch.float32),
    ):
        model = load(GOLDENS / name, device=str(kernel_device), dtype=dtype)
        for module in model.modules():
            if isinstance(module, Top2Router):
                module.router_dtype = dtype
        with use_backend(backend):
            output = model(*(golden[key] for key in keys))
        logits = output.logits[golden["target_mask"]]
        (logits.logsumexp(-1).mean() + logits[:, 5].square().mean()).backward()
        gradients[label] = {key: p.grad for key, p in model.named_parameters()}
    largest = max(exact.norm() for exact in gradients["exact"].values())
    for key, exact in gradients["exact"].items():
        if exact.norm() < 1e-12 * largest:
            assert key.endswith("k_proj.bias")  # it moves all scores alike, which changes nothing
            continue
        eager = relative_difference(gradients["eager"][key], exact)
        kernels = relative_difference(gradients["kernels"][key], exact)
        assert kernels <= max(3 * eager, 1e-6), f"{key}: {kernels:.1e} beside {eager:.1e}"
