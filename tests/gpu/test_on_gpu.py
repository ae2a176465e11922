"""The eager path on a GPU: ``make test-gpu``."""

import pytest
import torch

import moe_mt
from moe_mt.models import Seq2SeqTransformer

pytestmark = pytest.mark.gpu

TEXTS = ["August 12, 1981", "Namibia, Canada, Uganda, or Kenya", "9 hours ago", "711.81 liters"]


@pytest.fixture(scope="module")
def on_cpu():
    return moe_mt.from_pretrained("tiny", device="cpu")


def test_float32_gives_the_tokens_of_the_cpu(on_cpu):
    on_gpu = moe_mt.from_pretrained("tiny", device="cuda", dtype="float32")
    for tgt_lang in ("fra_Latn", "zho_Hans"):
        expected = [r.tokens for r in on_cpu.translate_iter(TEXTS, "eng_Latn", tgt_lang)]
        assert [r.tokens for r in on_gpu.translate_iter(TEXTS, "eng_Latn", tgt_lang)] == expected


def test_auto_dtype_is_bfloat16_where_the_device_computes_it(on_cpu):
    translator = moe_mt.from_pretrained("tiny")
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    expected = torch.bfloat16 if native else torch.float16
    assert translator.model.embedding.weight.dtype == expected
    router = translator.model.encoder.layers[1].feed_forward.router
    assert router.classifier.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_logits_are_near_those_of_float32(on_cpu, dtype):
    # Halves carry 8 and 11 bits; experts that change on a near-tie move single tokens more.
    bound = {"bfloat16": 0.1, "float16": 0.02}[dtype]
    half = moe_mt.from_pretrained("tiny", device="cuda", dtype=dtype)
    encode = on_cpu.tokenizer.encode_source
    source = torch.tensor([encode(TEXTS[0], "eng_Latn", "fra_Latn")])
    target = torch.tensor([[2, *on_cpu.tokenizer.encode_target("12 août 1981", "fra_Latn")]])
    with torch.inference_mode():
        expected = on_cpu.model(source, target).logits
        found = half.model(source.cuda(), target.cuda()).logits.float().cpu()
    assert (found - expected).norm() / expected.norm() < bound


def test_one_training_step_reaches_every_parameter(on_cpu):
    torch.manual_seed(0)
    model = Seq2SeqTransformer(on_cpu.model.config).cuda().train()
    tokens = torch.randint(4, 4000, (4, 12), device="cuda")
    model(tokens, tokens).logits.float().logsumexp(-1).mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
