"""A short supervised loop over sentence pairs.

It fine-tunes, and trains the small model that ships with the package; it is not a framework. What
it trains is a model object: reading and writing checkpoint folders is the caller's business.
"""

from moe_mt.training.batches import TokenBatch, plan_batches
from moe_mt.training.pairs import TokenPairs, read_pairs
from moe_mt.training.trainer import Trainer, TrainingConfig, TrainingProgress

__all__ = [
    "TokenBatch",
    "TokenPairs",
    "Trainer",
    "TrainingConfig",
    "TrainingProgress",
    "plan_batches",
    "read_pairs",
]
