"""Bytes, operations and floors of the 54B's layer, and how the ceilings are measured."""

import pytest
import torch

from benchmarks import floors
from benchmarks.floors import (
    Ceilings,
    Work,
    attention_backward,
    attention_forward,
    decoder_step,
    generation,
    layer_backward,
    layer_forward,
    measure_ceilings,
    measure_reading,
)
from benchmarks.generation.shapes import MODELS, TOY_DENSE, TOY_MOE
from benchmarks.generation.shapes import NLLB_MOE_54B as MODEL_54B
from benchmarks.shapes import NLLB_MOE_54B, AttentionShape, LayerShape
from moe_mt.models import Seq2SeqTransformer

H200 = Ceilings(bytes_per_s=4.3e12, flops_per_s=790e12)
BFLOAT16 = 2


def distinct(tokens):
    """Return how many of 128 experts ``tokens`` tokens hit that choose two at random."""
    return 128 * (1 - (1 - 1 / 64) ** tokens)


@pytest.mark.parametrize(
    ("tokens", "experts", "weight_gb", "rows_mb", "gflop", "microseconds"),
    [
        # The table that the targets of the project were derived from.
        (1, 2.00, 0.134, 0.09, 0.13, 31.2),
        (8, 15.15, 1.017, 0.72, 1.07, 237),
        (32, 50.67, 3.400, 2.88, 4.29, 792),
        (128, 110.95, 7.446, 11.5, 17.2, 1734),
        (1024, 128, 8.590, 92, 137, 2019),
        (4096, 128, 8.590, 369, 550, 2083),
        (16384, 128, 8.590, 1476, 2199, 2784),  # the only one that arithmetic bounds
    ],
)
def test_forward_floors_are_those_of_the_design(
    tokens, experts, weight_gb, rows_mb, gflop, microseconds
):
    hit = distinct(tokens)
    assert hit == pytest.approx(experts, abs=0.01)
    work = layer_forward(NLLB_MOE_54B, tokens, hit, BFLOAT16)
    weights = layer_forward(NLLB_MOE_54B, 0, hit, BFLOAT16)
    assert weights.bytes / 1e9 == pytest.approx(weight_gb, abs=0.002)
    assert (work.bytes - weights.bytes) / 1e6 == pytest.approx(rows_mb, rel=0.01)
    assert work.flops / 1e9 == pytest.approx(gflop, rel=0.04)
    assert 1e6 * H200.floor_s(work) == pytest.approx(microseconds, rel=0.002)


@pytest.mark.parametrize(
    ("tokens", "milliseconds"),
    [(1024, 4.04), (4096, 4.175), (16384, 5.567)],  # bytes, bytes, arithmetic
)
def test_backward_floors_are_those_of_the_design(tokens, milliseconds):
    work = layer_backward(NLLB_MOE_54B, tokens, 128, BFLOAT16)
    assert 1e3 * H200.floor_s(work) == pytest.approx(milliseconds, abs=0.001)


def test_backward_writes_the_gradient_of_experts_that_nobody_hit():
    shape = LayerShape(name="x", d_model=8, ffn_dim=16, num_experts=4)
    none, all_hit = (layer_backward(shape, 0, hit, BFLOAT16) for hit in (0, 4))
    assert none.bytes == 4 * shape.expert_weights * BFLOAT16
    assert all_hit.bytes == 2 * none.bytes


# The tables that the targets of attention were derived from, 16 heads of 128.
@pytest.mark.parametrize(
    ("sentences", "beams", "keys", "microseconds"),
    [(8, 4, 64, 1.04), (32, 4, 64, 4.15), (32, 4, 512, 31.5), (32, 5, 1024, 62.7)],
)
def test_decoding_reads_a_memory_once_for_all_beams(sentences, beams, keys, microseconds):
    shape = AttentionShape(sentences=sentences, beams=beams, keys=keys)
    work = attention_forward(shape, sentences * keys, BFLOAT16)
    assert 1e6 * H200.floor_s(work) == pytest.approx(microseconds, rel=0.005)


@pytest.mark.parametrize(
    ("sentences", "length", "keys", "gflop", "bytes_us", "flops_us"),
    [
        (32, 128, 128, 4.3, 15.6, 5.4),
        (32, 512, 512, 68.7, 62.4, 87),
        (64, 64, 512, 17.2, 70.2, 21.7),
    ],
)
def test_floors_of_attention_in_training_are_those_of_the_design(
    sentences, length, keys, gflop, bytes_us, flops_us
):
    shape = AttentionShape(sentences=sentences, length=length, keys=keys)
    work = attention_forward(shape, sentences * keys, BFLOAT16)
    assert work.flops / 1e9 == pytest.approx(gflop, rel=0.01)
    assert 1e6 * work.bytes / H200.bytes_per_s == pytest.approx(bytes_us, rel=0.005)
    assert 1e6 * work.flops / H200.flops_per_s == pytest.approx(flops_us, rel=0.01)


def test_padding_costs_attention_nothing_but_the_zeros_of_its_gradient():
    shape = AttentionShape(sentences=4, length=10, keys=30, heads=1, d_head=1)
    forward = [attention_forward(shape, valid, BFLOAT16) for valid in (0, 120)]
    backward = [attention_backward(shape, valid, BFLOAT16) for valid in (0, 120)]
    assert [work.bytes for work in forward] == [2 * 2 * 40, 2 * (2 * 40 + 2 * 120)]
    assert [work.bytes for work in backward] == [2 * (4 * 40 + 240), 2 * (4 * 40 + 240 + 240)]
    assert [work.flops for work in forward] == [0, 2 * 2 * 10 * 120]
    assert [work.flops for work in backward] == [0, 5 * 2 * 10 * 120]


def test_the_later_of_the_two_ceilings_is_the_floor():
    ceilings = Ceilings(bytes_per_s=10, flops_per_s=100)
    assert ceilings.floor_s(Work(bytes=20, flops=100)) == 2
    assert ceilings.floor_s(Work(bytes=10, flops=300)) == 3


def test_a_copy_counts_what_it_reads_and_what_it_writes(monkeypatch):
    monkeypatch.setattr(floors, "measure", lambda *_args, **_kwargs: {"median": 0.5})
    found = measure_ceilings(torch.device("cpu"), torch.float32, copy_bytes=1000, side=10)
    assert found == Ceilings(bytes_per_s=4000, flops_per_s=4000)


def test_ceilings_can_be_measured():
    found = measure_ceilings(torch.device("cpu"), torch.float32, copy_bytes=1000, side=10, rounds=1)
    assert found.bytes_per_s > 0
    assert found.flops_per_s > 0


def matrices(model, *, without=()):
    """Return the numbers in all matrices but those whose names hold one of some words."""
    return sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if weight.dim() > 1 and not any(word in name for word in without)
    )


def test_a_step_reads_the_decoder_and_the_embedding_but_not_the_projection_of_the_memory():
    model = Seq2SeqTransformer(TOY_DENSE)
    once = ("encoder.", "cross_attention.k_proj", "cross_attention.v_proj")
    step = decoder_step(TOY_DENSE, rows=3, distinct=0, item_bytes=4)
    assert step.bytes == 4 * matrices(model, without=once)
    assert step.flops == 2 * 3 * matrices(model, without=once)
    whole = generation(
        TOY_DENSE, sentences=3, beams=1, source_tokens=32, new_tokens=8, item_bytes=4
    )
    rest = matrices(model) - matrices(model, without=once)
    assert whole.bytes == 4 * rest + 8 * step.bytes


def test_of_a_sparse_layer_only_the_experts_hit_are_read():
    model = Seq2SeqTransformer(TOY_MOE)
    once = ("encoder.", "cross_attention.k_proj", "cross_attention.v_proj", "router", "bias")
    step = decoder_step(TOY_MOE, rows=1, distinct=8, item_bytes=1)
    assert step.bytes == matrices(model, without=once)
    expert = 2 * TOY_MOE.d_model * TOY_MOE.decoder_ffn_dim
    assert step.bytes - decoder_step(TOY_MOE, rows=1, distinct=2, item_bytes=1).bytes == 6 * expert


@pytest.mark.parametrize(
    ("rows", "milliseconds"),
    [(1, 1.00), (32, 5.55), (128, 11.2)],  # the design adds keys and values: 1.00, 5.62, 11.5
)
def test_floors_of_a_step_of_the_54b_are_those_of_the_design(rows, milliseconds):
    step = decoder_step(MODEL_54B, rows, distinct(rows), BFLOAT16)
    assert 1e3 * H200.floor_s(step) == pytest.approx(milliseconds, rel=0.02)


def test_a_step_of_m2m100_reads_its_weights():
    step = decoder_step(MODELS["m2m100-418m"].config, rows=1, distinct=0, item_bytes=4)
    assert step.bytes / 1e9 == pytest.approx(1.23, abs=0.01)


def test_reading_is_the_best_of_all_rounds(monkeypatch):
    clock = iter([0.0, 4.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr(floors, "synchronized", lambda: next(clock))
    assert measure_reading(2**20, rounds=3) == 2**20
