"""A packed model: what the plain one computes, and nothing of what it can no longer do."""

import copy
import io
from functools import cache

import pytest
import torch

from benchmarks.end_to_end.bench_translate import DIRECTIONS_PER_SENTENCE, HELD_OUT, read_pairs
from moe_mt import from_pretrained
from moe_mt.checkpoints import load, save
from moe_mt.errors import CheckpointError, ConfigError, PlacementError
from moe_mt.models import (
    PackedLinear,
    is_packed,
    pack_model,
    packed_bytes,
)
from moe_mt.moe import Experts, PackedExperts
from moe_mt.ops import PACKED_KINDS, packing_obstacle
from moe_mt.training import Trainer, TrainingConfig
from moe_mt.training import read_pairs as read_training_pairs
from tests.models.test_transformer import DENSE, FREE_OF_DROPPING, GOLDENS, golden, run
from tests.translators import TINY, tiny_tokenizer

CPU = torch.device("cpu")
FLOAT32 = 1e-5
"""Of the norm, as of the plain model against the published one."""

pytestmark = pytest.mark.skipif(
    any(packing_obstacle(kind, CPU) for kind in PACKED_KINDS),
    reason="weights cannot be packed on this machine",
)


def load_golden(name, pack=None):
    return load(GOLDENS / name, device="cpu", dtype=torch.float32, pack=pack)


@cache
def tiny(kind):
    return load(TINY, device="cpu", dtype=torch.float32, pack=kind)


def batch(rows=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 4000, (rows, 9), generator=generator)


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", DENSE + FREE_OF_DROPPING)
def test_float32_agrees_with_the_published_class(name):
    tensors = golden(name)
    output = run(load_golden(name, "float32"), tensors)
    assert relative_error(output.memory, tensors["memory"]) <= FLOAT32
    real = tensors["target_mask"]
    assert relative_error(output.logits[real], tensors["logits"][real]) <= FLOAT32


@pytest.mark.parametrize("kind", PACKED_KINDS)
@pytest.mark.parametrize("name", ["dense_odd_unscaled_gelu", "dense_3_1", "moe_8_experts"])
def test_packing_in_memory_is_packing_while_loading(name, kind):
    tensors = golden(name)
    model = load_golden(name)
    pack_model(model, kind)
    assert torch.equal(run(model, tensors).logits, run(load_golden(name, kind), tensors).logits)


def test_everything_but_routers_norms_and_biases_is_packed():
    model = tiny("int8-dynamic")
    routers = [path for path, m in model.named_modules() if type(m) is torch.nn.Linear]
    assert routers
    assert all(path.endswith("router.classifier") for path in routers)
    assert not any(isinstance(module, Experts) for module in model.modules())
    assert any(isinstance(module, PackedExperts) for module in model.modules())
    assert all(p.dim() < 2 or "bias" in n or "router" in n for n, p in model.named_parameters())
    relu = [m for _, m in model.named_modules() if isinstance(m, PackedLinear) and m.relu]
    assert len(relu) == sum(path.endswith("up_proj") for path, _ in model.named_modules()) > 0
    # A gelu stays where it was.
    gelu = load_golden("dense_odd_unscaled_gelu", "float32")
    assert not any(module.relu for module in gelu.modules() if isinstance(module, PackedLinear))


def test_int8_embedding_holds_the_rows_to_half_a_step():
    plain, packed = tiny(None), tiny("int8-dynamic")
    tokens = torch.arange(plain.config.vocab_size)
    expected = plain.embedding.weight.detach()
    found = packed.embedding(tokens)
    assert found.dtype == torch.float32
    step = expected.abs().amax(1, keepdim=True) / 127
    assert ((found - expected).abs() <= 0.5001 * step).all()


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_rows_of_logits_do_not_depend_on_their_batch(kind):
    embedding = tiny(kind).embedding
    hidden = torch.randn(40, 160, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = embedding.project(hidden)
        assert torch.equal(torch.cat([embedding.project(row) for row in hidden.split(1)]), whole)
        assert torch.equal(torch.cat([embedding.project(r) for r in hidden.split(7)]), whole)


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_a_dense_layer_compiles_whole_and_once(kind):
    model = load_golden("dense_2_2", kind)
    layer = model.decoder.layers[0].feed_forward
    head = model.embedding.project
    graphs = 0

    def counting(module, inputs):
        nonlocal graphs
        graphs += 1
        return module.forward

    def step(tokens):
        return head(layer(model.embedding(tokens)))

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=counting, dynamic=True)
    with torch.inference_mode():
        for rows in (6, 2, 9):
            tokens = torch.arange(4, 4 + 3 * rows).view(rows, 3)
            assert torch.equal(compiled(tokens), step(tokens))
    assert graphs == 1
    torch.compiler.reset()


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_what_a_packed_model_cannot_do_is_said(kind, tmp_path):
    model = load_golden("dense_2_2", kind)
    assert is_packed(model)
    assert not is_packed(load_golden("dense_2_2"))
    with pytest.raises(ConfigError, match=r"has no state_dict; load it with prepack=False"):
        model.state_dict()
    with pytest.raises(CheckpointError, match=r"cannot be saved; load it with prepack=False"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="cannot be pickled"):
        torch.save(model, io.BytesIO())
    with pytest.raises(PlacementError, match=r"asked to become torch\.bfloat16 on cpu"):
        model.bfloat16()


def test_a_packed_model_is_not_trained(tmp_path):
    (tmp_path / "pairs.tsv").write_text("in 14 minutes\tdans 14 minutes\n")
    pairs = read_training_pairs(
        tmp_path / "pairs.tsv", tiny_tokenizer(), src_lang="eng_Latn", tgt_lang="fra_Latn"
    )
    model = load(TINY, device="cpu", dtype=torch.float32, pack="float32")
    with pytest.raises(ConfigError, match="load it with prepack=False to train it"):
        Trainer(model, pairs, TrainingConfig(steps=1)).run()
    assert not model.training


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_a_copy_shares_what_is_packed(kind):
    model = tiny(kind)
    with torch.inference_mode():
        tokens = batch()
        assert torch.equal(
            copy.deepcopy(model)(tokens, tokens).logits, model(tokens, tokens).logits
        )


def test_bytes_that_packing_keeps():
    plain = tiny(None)
    parameters = sum(p.numel() for p in plain.parameters())
    embedding = plain.embedding.weight.numel()
    assert packed_bytes(plain, "float32") == 4 * (parameters + embedding)
    assert parameters + embedding < packed_bytes(plain, "int8-dynamic")
    assert packed_bytes(plain, "int8-dynamic") < 1.4 * (parameters + embedding)


def test_translations_in_int8_are_those_of_float32_within_a_point():
    pairs = read_pairs(HELD_OUT, DIRECTIONS_PER_SENTENCE)
    exact = {}
    for quantization in (None, "int8-dynamic"):
        translator = from_pretrained("tiny", device="cpu", quantization=quantization)
        texts = translator.translate(
            [pair.source for pair in pairs],
            [pair.src_lang for pair in pairs],
            [pair.tgt_lang for pair in pairs],
            split="off",
            num_beams=1,
        )
        hits = sum(t == p.reference for t, p in zip(texts, pairs, strict=True))
        exact[quantization] = 100 * hits / len(pairs)
    assert exact[None] > 85
    assert abs(exact["int8-dynamic"] - exact[None]) <= 1
