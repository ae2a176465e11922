"""What each operation means: one file an operation, with its contract and its eager definition.

The eager definitions are plain differentiable PyTorch: the CPU path, the oracle of the tests and
the specification that kernels are held to. Nothing here knows a module or a parameter.
"""

from moe_mt.ops.combine import combine
from moe_mt.ops.expert_ffn import ACTIVATIONS, expert_ffn
from moe_mt.ops.permute import permute
from moe_mt.ops.route import expert_capacity, route

__all__ = ["ACTIVATIONS", "combine", "expert_capacity", "expert_ffn", "permute", "route"]
