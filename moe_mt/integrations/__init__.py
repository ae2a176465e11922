"""Other people's models: the only room that knows transformers, which it imports when asked to."""

from moe_mt.integrations.experts_implementation import register_experts_implementation
from moe_mt.integrations.patch import PatchReport, patch, unpatch
from moe_mt.integrations.verdict import check_transformers
from moe_mt.integrations.versions import TESTED_VERSIONS

__all__ = [
    "TESTED_VERSIONS",
    "PatchReport",
    "check_transformers",
    "patch",
    "register_experts_implementation",
    "unpatch",
]
