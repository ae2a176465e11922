"""Experts over packed weights: the same mixture, the same bits in any batch, memory never twice."""

import copy
import gc
import pickle
import weakref

import pytest
import torch

from moe_mt.errors import ConfigError, PlacementError
from moe_mt.moe import Experts, PackedExperts
from moe_mt.ops import use_backend
from tests.closeness import assert_near, relative_difference

KINDS = ["float32", "int8-dynamic"]
EXPERTS, TOKENS = 8, 33

# Widths and options of experts; every form has its reason.
FORMS = {
    "relu": ((16, 32), {}),
    "widths that are no multiple of a vector": ((7, 13), {}),
    "down projections of rows longer than oneDNN sums alike": ((16, 1100), {}),
    "without biases": ((16, 32), {"bias": False}),
    "gelu, whose last elements round otherwise": ((24, 13), {"activation": "gelu"}),
    "swiglu": ((16, 21), {"activation": "silu", "gated": True}),
    "reglu without biases": ((16, 32), {"gated": True, "bias": False}),
}
SMALL = FORMS["relu"]


def make_experts(form=SMALL):
    (d_model, ffn_dim), options = form
    experts = Experts(EXPERTS, d_model, ffn_dim, **options).eval()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts


def make_claims(d_model, tokens=TOKENS):
    """Arguments of a call; some claims are dropped, and some gates are zero."""
    ids = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(tokens)]).to(torch.int32)
    gates = torch.rand(tokens, 2) + 0.1
    dropped = torch.zeros(tokens, 2, dtype=torch.bool)
    dropped[3, 1] = dropped[5] = True
    gates = gates.masked_fill(dropped, 0)
    gates[7, 0] = 0
    x, residual = torch.randn(2, tokens, d_model)
    return x, ids.masked_fill(dropped, EXPERTS), gates, residual


@pytest.mark.parametrize("form", FORMS)
def test_float32_is_the_mixture_of_the_unpacked_experts(form):
    experts = make_experts(FORMS[form])
    claims = make_claims(FORMS[form][0][0])
    with torch.no_grad():
        expected = experts(*claims), experts(*claims[:3])
        packed = PackedExperts.pack(experts, "float32")
        assert_near(packed(*claims), expected[0], torch.float32)
        assert_near(packed(*claims[:3]), expected[1], torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_int8_is_near_the_mixture_of_the_unpacked_experts(form):
    experts = make_experts(FORMS[form])
    claims = make_claims(FORMS[form][0][0])[:3]
    with torch.no_grad():
        expected = experts(*claims)
        found = PackedExperts.pack(experts, "int8-dynamic")(*claims)
    # Two products of 7-bit inputs: about one part in 64 each, twice that as the room.
    assert 0 < relative_difference(found, expected) < 4 / 64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_a_token_has_the_same_bits_alone_and_in_any_batch(form, kind):
    packed = PackedExperts.pack(make_experts(FORMS[form]), kind)
    claims = make_claims(FORMS[form][0][0])
    whole = packed(*claims)
    for size in (1, 2, 3, 8, 17):
        for start in range(0, TOKENS - size + 1, max(1, size // 2)):
            part = slice(start, start + size)
            assert torch.equal(packed(*(claim[part] for claim in claims)), whole[part]), (
                size,
                start,
            )
    shuffled = torch.randperm(TOKENS)
    assert torch.equal(packed(*(claim[shuffled] for claim in claims)), whole[shuffled])


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_has_the_same_bits_on_two_threads(kind):
    # As many elements as PyTorch divides among threads, and a width that it cuts inside a row.
    packed = PackedExperts.pack(make_experts(((67, 21), {"activation": "gelu"})), kind)
    claims = make_claims(67, tokens=501)
    one = packed(*claims)
    torch.set_num_threads(2)
    try:
        assert torch.equal(packed(*claims), one)
    finally:
        torch.set_num_threads(1)


def test_no_token_and_no_claim():
    packed = PackedExperts.pack(make_experts(), "float32")
    x, ids, gates, residual = make_claims(16, tokens=9)
    assert packed(x[:0], ids[:0], gates[:0]).shape == (0, 16)
    for count in (1, 9):
        nothing = torch.full_like(ids[:count], EXPERTS)
        silent = torch.zeros_like(gates[:count])
        found = packed(x[:count], nothing, silent, residual[:count])
        assert torch.equal(found, residual[:count])
        assert found.data_ptr() != residual.data_ptr()
        assert not packed(x[:count], nothing, silent).any()


def test_packing_frees_one_stack_before_it_takes_the_next():
    experts = make_experts()
    up = weakref.ref(experts.up_proj.untyped_storage())
    alive = []

    class Watching(PackedExperts):
        def set(self, expert, **tensors):
            if "down_proj" in tensors:
                alive.append(up() is not None)
            super().set(expert, **tensors)

    packed = Watching.pack(experts, "float32")
    assert alive == [False] * EXPERTS
    assert experts.down_proj.is_meta
    assert [name for name, _ in packed.named_parameters()] == ["up_bias", "down_bias"]
    assert packed.up_bias.data_ptr() == experts.up_bias.data_ptr()


@pytest.mark.parametrize("form", ["relu", "swiglu", "without biases"])
def test_experts_filled_one_by_one_from_a_form_on_the_meta_device(form):
    experts = make_experts(FORMS[form])
    claims = make_claims(FORMS[form][0][0])
    packed = PackedExperts.empty_like(copy.deepcopy(experts).to("meta"), "int8-dynamic")
    for index in reversed(range(EXPERTS)):
        for name, stacked in experts.named_parameters():
            packed.set(index, **{name: stacked[index]})
    expected = PackedExperts.pack(experts, "int8-dynamic")
    assert torch.equal(packed(*claims), expected(*claims))


def test_bfloat16_weights_are_widened():
    experts = make_experts().bfloat16()
    claims = make_claims(16)
    expected = copy.deepcopy(experts).float()
    packed = PackedExperts.pack(experts, "float32")
    with torch.no_grad():
        assert_near(packed(*claims), expected(*claims), torch.float32)


def test_what_experts_do_not_have_is_refused():
    packed = PackedExperts(EXPERTS, 16, 32, kind="float32")
    with pytest.raises(ConfigError, match=r"no gate_proj; they have up_proj, down_proj, up_bias"):
        packed.set(0, gate_proj=torch.ones(32, 16))
    with pytest.raises(ConfigError, match=r"up_proj of one expert is \(16, 32\).* be \(32, 16\)"):
        packed.set(0, up_proj=torch.ones(16, 32))
    with pytest.raises(ConfigError, match=r"down_bias of one expert is \(32,\).* be \(16,\)"):
        packed.set(0, down_bias=torch.ones(32))
    with pytest.raises(ConfigError, match="kind 'int4' is unknown"):
        PackedExperts.pack(make_experts(), "int4")


def test_an_expert_without_weights_is_named_when_it_is_called():
    packed = PackedExperts(EXPERTS, 16, 32, kind="float32", bias=False)
    packed.set(2, up_proj=torch.ones(32, 16), down_proj=torch.ones(16, 32))
    x, gates = torch.ones(1, 16), torch.ones(1, 1)
    assert packed(x, torch.tensor([[2]]), gates)[0, 0] == 16 * 32
    with pytest.raises(ConfigError, match="expert 3 has no up_proj yet"):
        packed(x, torch.tensor([[3]]), gates)


def test_inference_only_on_the_cpu_in_float32():
    packed = PackedExperts.pack(make_experts(), "float32")
    x, ids, gates, _ = make_claims(16)
    with pytest.raises(NotImplementedError, match="packed experts have no gradient"):
        packed(x.requires_grad_(), ids, gates).sum().backward()
    with pytest.raises(ConfigError, match="inference only; call eval"):
        packed.train()(x, ids, gates)
    packed.eval()
    with pytest.raises(ConfigError, match=r"x is torch\.bfloat16"):
        packed(x.bfloat16(), ids, gates)
    for move in (packed.double, packed.bfloat16, lambda: packed.to("meta")):
        with pytest.raises(PlacementError, match="they stay float32 on the CPU"):
            move()
    assert packed.float().to("cpu") is packed


def test_copies_share_what_is_packed_and_files_are_refused():
    packed = PackedExperts.pack(make_experts(), "float32")
    claims = make_claims(16)
    expected = packed(*claims)
    again = copy.deepcopy(packed)
    assert again.weights is packed.weights
    del packed
    gc.collect()
    assert torch.equal(again(*claims), expected)
    with pytest.raises(ConfigError, match="no state_dict"):
        again.state_dict()
    with pytest.raises(ConfigError, match="cannot be pickled"):
        pickle.dumps(again)


@pytest.mark.parametrize("form", ["relu", "swiglu"])
def test_the_operator_is_one_that_pytorch_takes_whole(form):
    packed = PackedExperts.pack(make_experts(FORMS[form]), "float32")
    x, ids, gates, residual = make_claims(16)
    biases = packed.up_bias, packed.gate_bias, packed.down_bias
    options = (packed.weights.handle, *biases, packed.activation)
    for rows in (1, TOKENS):
        torch.library.opcheck(
            torch.ops.moe_mt.packed_expert_ffn.default,
            (x[:rows], ids[:rows], gates[:rows], *options, residual[:rows]),
        )


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_meta_tensors_give_shapes(backend):
    packed = PackedExperts.empty_like(make_experts().to("meta"), "float32")
    x, ids, gates, residual = (claim.to("meta") for claim in make_claims(16))
    with use_backend(backend):
        found = packed(x, ids, gates, residual.double())
    assert found.is_meta
    assert (found.shape, found.dtype) == (x.shape, torch.float64)
