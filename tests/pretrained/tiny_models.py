"""Tiny random models of both families, and what tests compare of them."""

import torch
from torch import nn

from moe_mt import pretrained

NAMES = {"dense": "M2M100", "moe": "NllbMoe"}
FAMILIES = tuple(NAMES)

SIZES = {
    "vocab_size": 60,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    # All sizes differ, so that none can stand for another.
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 20,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "max_position_embeddings": 20,
    # Large weights, or a random model says the same whatever it reads.
    "init_std": 0.3,
}
EXPERTS = {"num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 1}
QUIET = {"dropout": 0.0, "attention_dropout": 0.0, "moe_token_dropout": 0.0}
"""Nothing random in training."""

SOURCE = torch.tensor([[5, 6, 7, 8, 2], [9, 3, 2, 1, 1]])
MASK = (SOURCE != 1).long()
TARGET = torch.tensor([[2, 10, 11, 12], [2, 12, 13, 14]])
BATCH = {"input_ids": SOURCE, "attention_mask": MASK, "decoder_input_ids": TARGET}
LABELS = torch.tensor([[10, 11, 12, 2], [12, 13, 2, -100]])
TRAINING_BATCH = {"input_ids": SOURCE, "attention_mask": MASK, "labels": LABELS}


def class_of(family, kind="ForConditionalGeneration"):
    return getattr(pretrained, NAMES[family] + kind)


def config_of(family, **changes):
    fields = SIZES | (EXPERTS if family == "moe" else {})
    return class_of(family, "Config")(**fields | changes)


def build(family, kind="ForConditionalGeneration", **changes):
    """Return a model in evaluation mode, the same for the same arguments."""
    torch.manual_seed(5)
    return class_of(family, kind)(config_of(family, **changes)).eval()


def logits(model, **more):
    """Return what a model with a head computes for the batch."""
    with torch.no_grad():
        return model(**BATCH | more).logits


def logits_of_decoding(model):
    """Return the logits behind the last target token on the fast route of generation."""
    with torch.no_grad():
        memory = model.get_encoder()(SOURCE, MASK)[0]
        cache = model.new_cache(memory, MASK.bool())
        return model.decode_step(TARGET, cache)


def gradients(model, **more):
    """Return the loss of the training batch and every parameter's gradient, by name."""
    model.zero_grad()
    loss = model(**TRAINING_BATCH | more).loss
    loss.backward()
    # An expert that is called by itself, and that no token chose, has no gradient.
    return loss.detach(), {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


class LowRank(nn.Module):
    """An adapter around a linear layer, as LoRA puts it there."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def adapt(model, path):
    """Put an adapter around the linear layer of a published path, and return it."""
    owner, _, name = path.rpartition(".")
    adapter = LowRank(model.get_submodule(path))
    setattr(model.get_submodule(owner), name, adapter)
    return adapter
