"""Hooks on documented modules: what the user listens to is what computes."""

import pytest
import torch
from torch import nn

from tests.pretrained.tiny_models import (
    QUIET,
    build,
    gradients,
    logits,
    logits_of_decoding,
)

HOOKED = [
    ("dense", "model.encoder.layers.1", True),
    ("dense", "model.decoder.layers.0.encoder_attn.q_proj", True),
    ("dense", "model.decoder.layers.0.self_attn", True),
    ("dense", "model.encoder.layers.0.fc1", True),
    ("dense", "model.decoder", True),
    ("dense", "lm_head", True),
    ("moe", "model.decoder.layers.1", True),
    ("moe", "model.decoder.layers.1.ffn.experts", True),
    # Some expert is chosen by some token; which one is not known, so all are listened to.
    ("moe", "model.decoder.layers.1.ffn.experts.expert_*", False),
    ("moe", "model.encoder.layers.1.ffn.experts.expert_*.fc2", False),
]


@pytest.mark.parametrize(("family", "path", "every"), HOOKED)
def test_forward_hooks_see_what_passes(family, path, every):
    model = build(family)
    before = logits(model)
    seen = []
    paths = [path] if every else [path.replace("*", str(index)) for index in range(4)]
    handles = []
    for one in paths:
        module = model.get_submodule(one)
        handles += [
            module.register_forward_pre_hook(lambda module, given: seen.append("before")),
            module.register_forward_hook(lambda module, given, output: seen.append("after")),
        ]
    torch.testing.assert_close(logits(model), before)
    assert seen
    assert seen == ["before", "after"] * (len(seen) // 2)
    seen.clear()
    for handle in handles:
        handle.remove()
    assert torch.equal(logits(model), before)
    assert not seen


@pytest.mark.parametrize("part", ["", "fc1"])
def test_backward_hooks_of_experts_see_gradients(part):
    model = build("moe", **QUIET).train()
    loss, expected = gradients(model)
    seen = []
    for expert in model.model.decoder.layers[0].ffn.experts.values():
        expert.get_submodule(part).register_full_backward_hook(
            lambda module, given, output: seen.append(output[0].norm())
        )
    found_loss, found = gradients(model)
    assert seen
    assert max(seen) > 0
    torch.testing.assert_close(found_loss, loss)
    torch.testing.assert_close(found, expected)


def test_a_hook_can_change_what_an_expert_says():
    model = build("moe")
    before = logits(model)
    experts = model.model.decoder.layers[1].ffn.experts
    for expert in experts.values():
        expert.register_forward_hook(lambda module, given, output: output * 0)
    silenced = logits(model)
    assert not torch.allclose(silenced, before, atol=1e-2)
    expected = build("moe")
    for expert in expected.model.decoder.layers[1].ffn.experts.values():
        nn.init.zeros_(expert.fc2.weight)
        nn.init.zeros_(expert.fc2.bias)
    torch.testing.assert_close(silenced, logits(expected))
    torch.testing.assert_close(logits_of_decoding(model), silenced[:, -1])
