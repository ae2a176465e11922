"""Cross-attention by other means, the data that they take, and what becomes of a wrong one."""

from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.agreement import check_same
from benchmarks.graphs import PeerUnavailable, time_peer
from benchmarks.ops import attention
from benchmarks.ops.attention import (
    Way,
    chosen_kernel,
    definition_in_float64,
    draw_key_lengths,
    draw_problems,
    flex,
    ours,
    packed,
    peers_of,
    sdpa_replicated,
    sdpa_reshaped,
    sdpa_restricted,
    varlen,
)
from benchmarks.ops.bench_cross_attention import Checked, backward_of, forward_of
from benchmarks.shapes import AttentionShape

CPU = torch.device("cpu")
DECODE = AttentionShape(sentences=3, beams=4, keys=21, heads=2, d_head=8)
TRAINING = AttentionShape(sentences=3, length=9, keys=21, heads=2, d_head=8)


def problems(shape, padding):
    return draw_problems(shape, padding, CPU, torch.float32)


def loop_over_sentences(query, key, value, query_offsets, key_offsets, longest_query, longest_key):
    """Stand for ``varlen_attn``, which runs on a GPU only."""
    queries, keys = query_offsets.diff().tolist(), key_offsets.diff().tolist()
    assert query_offsets.dtype == key_offsets.dtype == torch.int32
    assert (longest_query, longest_key) == (max(queries), max(keys))
    pieces = [
        scaled_dot_product_attention(*(tensor.transpose(0, 1) for tensor in sentence))
        for sentence in zip(query.split(queries), key.split(keys), value.split(keys), strict=True)
    ]
    return torch.cat([piece.transpose(0, 1) for piece in pieces])


WAYS = {
    "ours": ours,
    "reshaped": sdpa_reshaped,
    "replicated": sdpa_replicated,
    "packed": partial(packed, varlen_attn=loop_over_sentences),
}


@pytest.mark.parametrize("padding", [0, 0.4])
@pytest.mark.parametrize("name", [*WAYS, "flex"])
def test_a_peer_computes_the_attention_of_beams(name, padding):
    one = problems(DECODE, padding)[0]
    build = {**WAYS, "flex": partial(flex, compiler="eager")}[name]
    with torch.inference_mode():
        right = definition_in_float64(one.query, one.key, one.value, one)
        way = build(one)
        check_same(forward_of(way, one)(), way.lay_queries(right), 1e-5, name)


@pytest.mark.parametrize("padding", [0, 0.4])
@pytest.mark.parametrize("name", ["ours", "reshaped", "packed"])
def test_a_peer_has_the_gradients_of_training(name, padding):
    one = problems(TRAINING, padding)[0]
    define, way = Way(partial(definition_in_float64, problem=one)), WAYS[name](one)
    right = backward_of(define, one, CPU)()
    expected = way.lay_queries(right[0]), *map(way.lay_keys, right[1:])
    call = backward_of(way, one, CPU)
    for _ in range(2):  # it is timed more than once
        check_same(call(), expected, 1e-5, name)


def test_a_kernel_of_pytorch_can_be_asked_for():
    one = problems(DECODE, 0)[0]
    way = sdpa_restricted(one, SDPBackend.FLASH_ATTENTION)
    check_same(forward_of(way, one)(), forward_of(sdpa_reshaped(one), one)(), 1e-6, "flash")
    with pytest.raises(RuntimeError):
        forward_of(sdpa_restricted(one, SDPBackend.CUDNN_ATTENTION), one)()


def test_only_the_memory_efficient_kernel_takes_a_mask_without_padding():
    one = problems(DECODE, 0)[0]
    assert sdpa_restricted(one, SDPBackend.FLASH_ATTENTION).mask is None
    assert sdpa_restricted(one, SDPBackend.EFFICIENT_ATTENTION).mask.count_nonzero() == 0


@pytest.mark.parametrize(
    ("backend", "name"), [(SDPBackend.FLASH_ATTENTION, "flash"), (SDPBackend.MATH, "math")]
)
def test_the_kernel_that_pytorch_takes_is_named(backend, name):
    one = problems(DECODE, 0.4)[0]
    with sdpa_kernel(backend):
        assert chosen_kernel(sdpa_reshaped(one), one) == name


def test_the_kernel_that_pytorch_takes_depends_on_the_mask():
    one = problems(DECODE, 0.4)[0]
    way = sdpa_reshaped(one)
    assert chosen_kernel(way, one) == "flash"
    learnt = way._replace(mask=one.mask().requires_grad_())  # which flash does not take
    assert chosen_kernel(learnt, one) == "math"


@pytest.mark.parametrize(
    ("shape", "padding", "names"),
    [
        # Memories are replicated only where beams share one, and a mask is left out only where
        # there is no padding.
        (DECODE, 0.4, {"SDPA reshaped (flash)", "SDPA replicated (flash)"}),
        (TRAINING, 0, {"SDPA (flash)", "SDPA flash unmasked", "SDPA cuDNN unmasked"}),
        (TRAINING, 0.4, {"SDPA (flash)"}),
    ],
)
def test_peers_are_those_that_answer_the_same_question(shape, padding, names):
    found = peers_of(problems(shape, padding)[0], shape, rehearsal=True)
    assert set(found) == names | {"SDPA mem-efficient masked", "varlen_attn", "FlexAttention"}


def test_a_cpu_has_no_choice_of_kernels():
    found = peers_of(problems(TRAINING, 0)[0], TRAINING, rehearsal=False)
    assert list(found) == ["SDPA (flash)", "varlen_attn", "FlexAttention"]


def test_what_does_not_run_on_a_cpu_says_so():
    one = problems(TRAINING, 0)[0]
    with pytest.raises(PeerUnavailable, match="GPU only"):
        varlen(one)
    with pytest.raises(PeerUnavailable, match="no backward pass"):
        flex(one, "eager")


@pytest.mark.parametrize("sentences", [1, 8, 33])
def test_lengths_are_random_and_their_mean_is_what_it_says(sentences):
    lengths = draw_key_lengths(sentences, 500, 0.4)
    assert lengths.float().mean() == pytest.approx(300, abs=0.5)
    assert lengths.min() >= 100
    assert lengths.max() <= 500
    assert sentences == 1 or lengths.tolist() != sorted(lengths.tolist())
    assert torch.equal(lengths, draw_key_lengths(sentences, 500, 0.4))


def test_data_lie_as_a_model_keeps_them():
    one, other = problems(DECODE, 0.4)
    assert one.query.shape == (3, 2, 4, 8)
    assert one.key.shape == (3, 2, 21, 8)
    for tensor in (one.query, one.key, one.value, one.grad):
        assert tensor.transpose(1, 2).is_contiguous()
    assert not torch.equal(one.key, other.key)
    assert problems(DECODE, 0)[0].key_lengths is None


def test_sets_of_data_are_as_many_as_no_cache_holds(monkeypatch):
    monkeypatch.setattr(attention, "CACHE_BYTES", 10_000)
    assert attention.sets_of(9000, torch.device("cuda")) == 6  # at least
    assert attention.sets_of(1000, torch.device("cuda")) == 10
    assert attention.sets_of(1000, CPU) == 2


@pytest.mark.parametrize("keys", [21, 24, 1500])
def test_rows_of_a_mask_are_aligned(keys):
    one = problems(AttentionShape(sentences=2, keys=keys, heads=1, d_head=8), 0.4)[0]
    mask = one.mask()
    assert mask.shape == (2, 1, 1, keys)
    assert all(stride % 8 == 0 for stride in mask.stride()[:-1])
    assert torch.equal(mask[:, 0, 0] == 0, one.valid())
    assert one.valid().sum(1).tolist() == one.key_lengths.tolist()


def checked():
    ones = problems(DECODE, 0.4)
    right = definition_in_float64(ones[0].query, ones[0].key, ones[0].value, ones[0])
    return ones[0], Checked(forward_of, lambda way: way.lay_queries(right), ones, 1e-5)


def test_a_wrong_peer_is_not_timed_and_remembered():
    _, found = checked()
    wrong = Way(scaled_dot_product_attention)  # it sees the padding
    peer = time_peer(partial(found.calls, lambda: wrong, "it"), CPU, lambda _: {"median": 1.0})
    assert "differ" in peer["note"]
    assert "seconds" not in peer
    assert found.wrong == [peer["note"]]


def test_a_peer_that_cannot_run_is_no_wrong_one():
    one, found = checked()

    def fail(*_):
        raise AssertionError("not on this device")

    peers = {"fails": lambda: Way(fail), "is missing": partial(varlen, one)}
    for name, build in peers.items():
        assert list(time_peer(partial(found.calls, build, name), CPU, lambda _: {})) == ["note"]
    assert found.wrong == []
    assert len(found.calls(partial(ours, one), "ours")) == 2
