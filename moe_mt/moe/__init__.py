"""The mixture-of-experts layer: router, dispatcher, experts, and the layer that joins them.

Usable without our models. Two seams: the dispatcher knows where tokens go, the experts know what
the weights are; the layer between them does not change with either.
"""

from moe_mt.moe.dispatcher import Dispatcher, LocalDispatcher
from moe_mt.moe.experts import Experts
from moe_mt.moe.layer import MoELayer
from moe_mt.moe.packed_experts import PackedExperts
from moe_mt.moe.router import Top2Router
from moe_mt.moe.routing import Routing

__all__ = [
    "Dispatcher",
    "Experts",
    "LocalDispatcher",
    "MoELayer",
    "PackedExperts",
    "Routing",
    "Top2Router",
]
