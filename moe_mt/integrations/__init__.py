"""Other people's models: the only room that imports transformers."""

from moe_mt.integrations.transformers import check_transformers

__all__ = ["check_transformers"]
