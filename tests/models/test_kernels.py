"""Whole models through the kernels: against the published class, and against the eager path."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import moe_mt
from moe_mt.checkpoints import load
from moe_mt.generation import GenerationConfig, generate
from moe_mt.moe import Top2Router
from moe_mt.ops import use_backend
from tests.closeness import assert_near, relative_difference

pytestmark = pytest.mark.triton

GOLDENS = Path(__file__).parents[1] / "golden" / "models"
MODELS = sorted(path.parent.name for path in GOLDENS.glob("*/model.safetensors"))
# One of each kind, small; what is special about them is said in make_model_goldens.py.
DENSE, SPARSE = "dense_3_1", "moe_2_experts"
INPUTS = ("source_tokens", "target_tokens", "source_mask", "target_mask")


@pytest.fixture(scope="module")
def tiny():
    return moe_mt.from_pretrained("tiny", device="cpu", dtype="float32", prepack=False)


def load_golden(name, device, dtype=torch.float32):
    """Return a model, and a padded batch with what the published class makes of it."""
    return (
        load(GOLDENS / name, device=str(device), dtype=dtype),
        load_file(GOLDENS / name / "forward.safetensors", device=str(device)),
    )


@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_the_published_class(name, kernel_device):
    model, golden = load_golden(name, kernel_device)
    with torch.no_grad(), use_backend("triton"):
        output = model(*(golden[key] for key in INPUTS))
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


@pytest.mark.parametrize("beams", [1, 4], ids=["greedy", "4 beams"])
@pytest.mark.parametrize("name", [DENSE, SPARSE])
def test_generates_the_tokens_of_the_eager_path(name, beams, kernel_device):
    model, golden = load_golden(name, kernel_device)
    source, mask = golden["source_tokens"], golden["source_mask"]
    found = {}
    for backend in ("eager", "triton"):
        with use_backend(backend):
            sentences = generate(
                model,
                source,
                mask,
                GenerationConfig(num_beams=beams),
                forced_tokens=[[]] * len(source),
                max_new_tokens=[5] * len(source),
            )
        found[backend] = [[h.tokens for h in hypotheses] for hypotheses in sentences]
    assert found["triton"] == found["eager"]


class Calls(TorchDispatchMode):
    """Count how often each operator runs."""

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.of[operator] += 1
        return operator(*args, **kwargs or {})


@pytest.mark.parametrize("name", [DENSE, SPARSE])
def test_every_decoder_layer_attends_to_the_memory_by_the_kernel(name, kernel_device):
    attention = torch.ops.moe_mt.cross_attention.default
    backward = torch.ops.moe_mt.cross_attention_backward.default
    model, golden = load_golden(name, kernel_device)
    source, _, mask, _ = inputs = [golden[key] for key in INPUTS]
    layers = len(model.decoder.layers)
    model.decoder.layerdrop = 0.0
    with use_backend("triton"):
        with Calls() as calls:
            model.train()(*inputs).logits.sum().backward()
        assert calls.of[attention] == calls.of[backward] == layers
        model.eval()
        with torch.no_grad():
            cache = model.new_cache(model.encode(source, mask)[0], mask, beams=2)
            tokens = torch.full((2 * len(source), 1), 5, device=kernel_device)
            for step in (1, 2):
                with Calls() as calls:
                    model.decode_step(tokens, cache)
                assert calls.of[attention] == layers, f"step {step}"
    with use_backend("eager"), Calls() as calls:
        model(*inputs)
    assert not calls.of[attention]


@pytest.mark.parametrize("name", ["dense_2_2", "moe_2_experts", "moe_priority_capacity"])
def test_every_parameter_gets_its_gradient(name, kernel_device):
    # Rounding grows from layer to layer, so float64 is the judge, and the eager path's own
    # rounding in float32 the measure.
    gradients = {}
    for label, backend, dtype in (
        ("exact", "eager", torch.float64),
        ("eager", "eager", torch.float32),
        ("kernels", "triton", torch.float32),
    ):
        model, golden = load_golden(name, kernel_device, dtype)
        for module in model.modules():
            if isinstance(module, Top2Router):
                module.router_dtype = dtype
        with use_backend(backend):
            output = model(*(golden[key] for key in INPUTS))
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
