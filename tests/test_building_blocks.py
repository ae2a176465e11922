"""The building blocks for other people's code: where they stand, and what their files hold."""

import itertools

import moe_mt
from moe_mt import CrossAttention, Experts, MoELayer, Top1Router, Top2Router, TopKRouter

WEIGHTS = ["experts.up_proj", "experts.down_proj"]
GATE = "experts.gate_proj"
UP_BIAS, GATE_BIAS, DOWN_BIAS = (f"experts.{name}_bias" for name in ("up", "gate", "down"))
SCORES = ["router.classifier.weight"]


def test_the_keys_of_a_layer_are_those_that_files_have():
    routers = [
        (Top2Router(6, 4), SCORES),
        (TopKRouter(6, 4, 3), SCORES),
        (Top1Router(6, 4), SCORES),
        (Top1Router(6, 4, bias=True), [*SCORES, "router.classifier.bias"]),
    ]
    forms = [
        ({}, [*WEIGHTS, UP_BIAS, DOWN_BIAS]),
        ({"bias": False}, WEIGHTS),
        ({"gated": True}, [*WEIGHTS, GATE, UP_BIAS, GATE_BIAS, DOWN_BIAS]),
        ({"gated": True, "bias": False}, [*WEIGHTS, GATE]),
    ]
    for (router, scored), (options, stacked) in itertools.product(routers, forms):
        layer = MoELayer(router, Experts(4, 6, 10, **options))
        assert [*layer.state_dict()] == [*scored, *stacked]


def test_the_keys_of_cross_attention_are_those_that_files_have():
    layers = ("q_proj", "k_proj", "v_proj", "out_proj")
    keys = [f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")]
    assert [*CrossAttention(16, 4).state_dict()] == keys


def test_the_package_has_every_building_block():
    names = {"CrossAttention", "Experts", "MoELayer", "Top1Router", "Top2Router", "TopKRouter"}
    assert names <= set(moe_mt.__all__)
