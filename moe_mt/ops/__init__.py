"""What each operation means: one file an operation, with its contract and its eager definition.

The eager definitions are plain differentiable PyTorch: the CPU path, the oracle of the tests and
the specification that kernels are held to. Nothing here knows a module or a parameter.
"""

from moe_mt.ops.backend import backend_for, use_backend
from moe_mt.ops.combine import combine
from moe_mt.ops.cross_attention import (
    cross_attention,
    cross_attention_weights,
    cross_attention_with_lse,
)
from moe_mt.ops.expert_ffn import ACTIVATIONS, expert_ffn
from moe_mt.ops.expert_order import expert_order
from moe_mt.ops.grouped_mm import grouped_mm
from moe_mt.ops.packed_expert_ffn import PackedExpertWeights, packed_expert_ffn
from moe_mt.ops.packed_linear import (
    PACKED_KINDS,
    PackedWeight,
    pack_weight,
    packed_linear,
    packing_obstacle,
    quantize_rows,
)
from moe_mt.ops.permute import permute
from moe_mt.ops.route import expert_capacity, route
from moe_mt.ops.router_logits import router_logits
from moe_mt.ops.router_statistics import router_statistics
from moe_mt.ops.tuning import ExpertShape, TunedProblem, tile_tables, tune, tuning_problems

__all__ = [
    "ACTIVATIONS",
    "PACKED_KINDS",
    "ExpertShape",
    "PackedExpertWeights",
    "PackedWeight",
    "TunedProblem",
    "backend_for",
    "combine",
    "cross_attention",
    "cross_attention_weights",
    "cross_attention_with_lse",
    "expert_capacity",
    "expert_ffn",
    "expert_order",
    "grouped_mm",
    "pack_weight",
    "packed_expert_ffn",
    "packed_linear",
    "packing_obstacle",
    "permute",
    "quantize_rows",
    "route",
    "router_logits",
    "router_statistics",
    "tile_tables",
    "tune",
    "tuning_problems",
    "use_backend",
]
