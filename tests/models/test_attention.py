"""Attention to a memory as a module of its own, and what decoding keeps for it."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from moe_mt import CrossAttention
from moe_mt.errors import ConfigError
from moe_mt.models import Seq2SeqTransformer, TransformerConfig
from moe_mt.ops import use_backend
from tests.closeness import assert_near

HEADS, D_MODEL = 2, 128  # heads of 64, as in BART and Whisper


@pytest.fixture(params=["eager", pytest.param("triton", marks=pytest.mark.triton)])
def device(request):
    """The device of a backend, on which that backend computes."""
    with use_backend(request.param):
        if request.param == "eager":
            yield torch.device("cpu")
        else:
            yield request.getfixturevalue("kernel_device")


def attention_on(device, dropout=0.0):
    torch.manual_seed(1)
    return CrossAttention(D_MODEL, HEADS, dropout).to(device).eval()


def inputs_on(device, *, rows=2, length=3, keys=7):
    """Return decoder rows (rows, L, d_model) and a memory of two sentences (2, S, d_model)."""
    generator = torch.Generator().manual_seed(2)
    x, memory = (
        torch.randn(*shape, D_MODEL, generator=generator).to(device)
        for shape in ((rows, length), (2, keys))
    )
    return x, memory


def key_mask_on(device, lengths, keys=7):
    return torch.arange(keys, device=device) < torch.tensor(lengths, device=device)[:, None]


def of_pytorch(attention, x, memory, key_mask):
    """``nn.MultiheadAttention`` with the same weights."""
    theirs = nn.MultiheadAttention(D_MODEL, HEADS, batch_first=True, device=x.device)
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    weights = {
        "in_proj_weight": torch.cat([projection.weight for projection in projections]),
        "in_proj_bias": torch.cat([projection.bias for projection in projections]),
        "out_proj.weight": attention.out_proj.weight,
        "out_proj.bias": attention.out_proj.bias,
    }
    inputs, mask = (x, memory, memory), {"key_padding_mask": ~key_mask}
    return torch.func.functional_call(theirs, weights, inputs, mask)[0]


def of_bart(attention, x, memory, key_mask):
    """As BART and Whisper compute it: scaled queries, an additive mask, heads in the batch."""
    rows, length, _ = x.shape

    def split(projected):
        return projected.view(rows, -1, HEADS, D_MODEL // HEADS).transpose(1, 2).flatten(0, 1)

    query = split(attention.q_proj(x) * (D_MODEL // HEADS) ** -0.5)
    key, value = split(attention.k_proj(memory)), split(attention.v_proj(memory))
    bias = torch.zeros_like(key_mask, dtype=x.dtype).masked_fill(
        ~key_mask, torch.finfo(x.dtype).min
    )
    scores = torch.bmm(query, key.mT) + bias.repeat_interleave(HEADS, 0)[:, None]
    context = torch.bmm(functional.softmax(scores, -1), value)
    context = context.unflatten(0, (rows, HEADS)).transpose(1, 2)
    return attention.out_proj(context.reshape(rows, length, D_MODEL))


def ours(attention, x, memory, key_mask):
    return attention(x, *attention.project_key_value(memory), key_mask)


def with_gradients(function, attention, x, memory, key_mask):
    """Return the result and all gradients but that of the keys' bias."""
    wanted = {"x": x, "memory": memory, **dict(attention.named_parameters())}
    del wanted["k_proj.bias"]  # It moves all scores of a query alike: its gradient is rounding.
    out = function(attention, x, memory, key_mask)
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(x.shape, generator=generator).to(x.device)
    gradients = torch.autograd.grad(out, list(wanted.values()), grad)
    return dict(zip(("result", *wanted), (out, *gradients), strict=True))


# BART reads padded sentences; Whisper frames, here a sixteenth of them, by keys without a bias.
@pytest.mark.parametrize(
    ("length", "lengths", "key_bias"),
    [(18, [20, 33], True), (5, [94, 94], False)],
    ids=["BART", "Whisper"],
)
def test_agrees_with_the_attention_of_other_models(length, lengths, key_bias, device):
    attention, keys = attention_on(device), max(lengths)
    if not key_bias:
        nn.init.zeros_(attention.k_proj.bias)
    x, memory = (t.requires_grad_() for t in inputs_on(device, length=length, keys=keys))
    inputs = attention, x, memory, key_mask_on(device, lengths, keys)
    found = with_gradients(ours, *inputs)
    for other in (of_pytorch, of_bart):
        for name, expected in with_gradients(other, *inputs).items():
            assert_near(found[name], expected, torch.float32, f"{name} beside {other.__name__}")


def test_beams_share_a_memory_that_others_replicate(device):
    attention = attention_on(device)
    x, memory = inputs_on(device, rows=10)
    key_mask = key_mask_on(device, [4, 7])
    key, value = attention.project_key_value(memory)
    shared = attention(x, key, value, key_mask, beams=5)
    replicated = [t.repeat_interleave(5, 0) for t in (key, value, key_mask)]
    assert_near(shared, attention(x, *replicated), torch.float32)


def test_lengths_are_a_mask_that_says_the_same(device):
    attention = attention_on(device)
    x, memory = inputs_on(device)
    key_value = attention.project_key_value(memory)
    by_mask = attention(x, *key_value, key_mask_on(device, [4, 6]))
    by_lengths = attention(x, *key_value, key_lengths=torch.tensor([4, 6], device=device))
    assert torch.equal(by_mask, by_lengths)


def test_rows_of_a_sentence_without_a_valid_key_are_the_projection_of_zero(device):
    attention = attention_on(device)
    x, memory = inputs_on(device)
    found = attention(x, *attention.project_key_value(memory), key_mask_on(device, [0, 7]))
    assert torch.equal(found[0], attention.out_proj.bias.expand_as(found[0]))
    assert not torch.equal(found[1], attention.out_proj.bias.expand_as(found[1]))


def test_dropout_acts_in_training_only_and_follows_the_seed(device):
    attention = attention_on(device, dropout=0.5)
    x, memory = inputs_on(device)
    key_value = attention.project_key_value(memory)
    evaluated = attention(x, *key_value)
    assert torch.equal(evaluated, attention_on(device)(x, *key_value))
    attention.train()
    torch.manual_seed(3)
    first, second = attention(x, *key_value), attention(x, *key_value)
    assert not torch.equal(first, second)
    assert not torch.equal(first, evaluated)
    torch.manual_seed(3)
    assert torch.equal(attention(x, *key_value), first)
    attention.dropout = 0.0
    assert torch.equal(attention(x, *key_value), evaluated)


def test_every_projection_gets_its_gradient(device):
    attention = attention_on(device)
    x, memory = inputs_on(device)
    attention(x, *attention.project_key_value(memory)).square().sum().backward()
    norms = {name: parameter.grad.norm() for name, parameter in attention.named_parameters()}
    # The bias of the keys moves all scores of a query alike, which changes nothing.
    unmoved = norms.pop("k_proj.bias")
    assert len(norms) == 7
    assert min(norms.values()) > 1e3 * unmoved


def test_float64_stays_float64(device):
    with use_backend("auto"):
        attention = attention_on(device).double()
        x, memory = (t.double() for t in inputs_on(device))
        key_mask = key_mask_on(device, [4, 7])
        found = attention(x, *attention.project_key_value(memory), key_mask)
    assert found.dtype == torch.float64
    expected = of_bart(attention, x, memory, key_mask)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_weights_have_the_names_of_published_checkpoints():
    shapes = {name: tuple(t.shape) for name, t in attention_on("cpu").state_dict().items()}
    projections = ("q_proj", "k_proj", "v_proj", "out_proj")
    assert shapes == {
        **{f"{projection}.weight": (D_MODEL, D_MODEL) for projection in projections},
        **{f"{projection}.bias": (D_MODEL,) for projection in projections},
    }


def test_no_position_and_no_beam_are_allowed():
    attention = attention_on("cpu")
    x, memory = inputs_on("cpu", rows=2)
    key_value = attention.project_key_value(memory)
    assert attention(x[:, :0], *key_value).shape == (2, 0, D_MODEL)
    assert attention(x[:0], *key_value, beams=0).shape == (0, *x.shape[1:])


def test_what_does_not_fit_is_named():
    with pytest.raises(ConfigError, match="5 heads do not divide d_model 128"):
        CrossAttention(D_MODEL, 5)
    attention = attention_on("cpu")
    x, memory = inputs_on("cpu", rows=4)
    key_value = attention.project_key_value(memory)
    with pytest.raises(ConfigError, match="x has 4 rows; 2 sentences with 1 beams each need 2"):
        attention(x, *key_value)
    with pytest.raises(ConfigError, match="x has 4 rows; 2 sentences with 3 beams each need 6"):
        attention(x, *key_value, beams=3)
    with pytest.raises(ConfigError, match=r"key_mask is \(4, 7\).*must be \(2, 7\)"):
        attention(x, *key_value, key_mask_on("cpu", [4] * 4), beams=2)


@pytest.fixture(scope="module")
def model():
    config = TransformerConfig(
        family="m2m100",
        vocab_size=64,
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_heads=2,
        decoder_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
    )
    return Seq2SeqTransformer(config).eval()


def of_memory(cache):
    return [t for layer in cache.layers for t in (layer.cross_key, layer.cross_value)]


def stored_bytes(tensors):
    """Return how much memory tensors keep alive: every storage whole, and once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def test_five_beams_keep_a_fifth_of_a_replicated_memory(model):
    memory, beams = torch.randn(3, 7, 16), 5
    shared = model.new_cache(memory, None, beams)
    replicated = model.new_cache(memory.repeat_interleave(beams, 0), None)
    assert beams * stored_bytes(of_memory(shared)) == stored_bytes(of_memory(replicated))
    # Keys and values of two layers in float32.
    assert stored_bytes(of_memory(shared)) == 2 * 2 * 4 * memory.numel()


@torch.no_grad()
def test_decoding_and_reordering_leave_the_memory_where_it_is(model):
    beams = 5
    cache = model.new_cache(torch.randn(3, 7, 16), None, beams, capacity=1)
    before = [(t, t.clone()) for t in of_memory(cache)]
    for _ in range(3):
        model.decode_step(torch.randint(4, 64, (3 * beams, 1)), cache)
        cache.reorder(torch.arange(3 * beams).view(3, beams).flip(1).flatten())
    for now, (tensor, copy) in zip(of_memory(cache), before, strict=True):
        assert now.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        assert torch.equal(now, copy)
