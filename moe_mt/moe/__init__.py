"""The mixture-of-experts layer: router, dispatcher, experts, and the layer that joins them.

Usable without our models. Two seams: the dispatcher knows where tokens go, the experts know what
the weights are; the layer between them does not change with either.
"""

from moe_mt.moe.dispatcher import Dispatcher, LocalDispatcher
from moe_mt.moe.expert_slices import ExpertSlices, experts_in, hooks_of
from moe_mt.moe.experts import Experts
from moe_mt.moe.layer import MoELayer, mask_outputs
from moe_mt.moe.packed_experts import PackedExperts
from moe_mt.moe.router import Router, Top1Router, Top2Router, TopKRouter
from moe_mt.moe.routing import Routing

__all__ = [
    "Dispatcher",
    "ExpertSlices",
    "Experts",
    "LocalDispatcher",
    "MoELayer",
    "PackedExperts",
    "Router",
    "Routing",
    "Top1Router",
    "Top2Router",
    "TopKRouter",
    "experts_in",
    "hooks_of",
    "mask_outputs",
]
