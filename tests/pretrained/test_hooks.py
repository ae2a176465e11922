"""Hooks on documented modules: what the user listens to is what computes."""

import pytest
import torch
from torch import nn

from tests.pretrained.tiny_models import (
    FAMILIES,
    QUIET,
    SOURCE,
    build,
    class_of,
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


class Favouring(class_of("dense")):
    """A subclass whose forward pass wants token 7."""

    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        output.logits[..., 7] = 1e3
        return output


def test_generation_goes_through_a_forward_pass_of_ones_own():
    model = build("dense")
    own = Favouring(model.config).eval()
    own.load_state_dict(model.state_dict())
    assert own.generate(SOURCE, max_new_tokens=4).tolist() == [[2, 7, 7, 7, 7]] * 2
    assert model.generate(SOURCE, max_new_tokens=4).tolist() != [[2, 7, 7, 7, 7]] * 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("path", ["model.decoder", "model.decoder.layers.0"])
def test_generation_calls_the_hooks_of_what_it_would_else_pass_by(family, path):
    model, seen = build(family), []
    handle = model.get_submodule(path).register_forward_hook(lambda *_: seen.append(path))
    with_hook = model.generate(SOURCE, max_new_tokens=3, min_new_tokens=3)
    assert len(seen) == 3
    handle.remove()
    assert torch.equal(model.generate(SOURCE, max_new_tokens=3, min_new_tokens=3), with_hook)
    assert len(seen) == 3
