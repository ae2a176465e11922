"""Routers and layers beside the classes of transformers 4.57 (``pytest -m peers``)."""

import pytest
import torch

from moe_mt.moe import Experts, MoELayer, Top1Router, TopKRouter

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]

D_MODEL, FFN_DIM, EXPERTS = 16, 24, 6


@pytest.fixture
def models():
    return pytest.importorskip("transformers").models


def assert_same_layer(ours, theirs, x, parameters):
    """Compare outputs and the gradients of the tokens and of the router."""
    gradients = []
    for layer, classifier in zip((ours, theirs), parameters, strict=True):
        tokens = x.clone().requires_grad_()
        out = layer(tokens)[0]
        gradients.append((out, *torch.autograd.grad(out.square().sum(), [tokens, classifier])))
    assert gradients[1][2].abs().max() > 1e-4
    for mine, peer in zip(*gradients, strict=True):
        assert (mine - peer).norm() <= 1e-5 * peer.norm()


@pytest.fixture
def switch(models):
    config = models.switch_transformers.SwitchTransformersConfig(
        d_model=D_MODEL, d_ff=FFN_DIM, num_experts=EXPERTS, expert_capacity=3, dropout_rate=0.0
    )
    config.router_jitter_noise = 0.1
    return models.switch_transformers.modeling_switch_transformers.SwitchTransformersSparseMLP(
        config
    )


def top1_router(peer):
    router = Top1Router(D_MODEL, EXPERTS, capacity=3, jitter=0.1)
    router.load_state_dict(peer.router.state_dict())
    return router


@pytest.mark.parametrize("training", [False, True])
def test_switch_router(switch, training):
    peer, router = switch.router.train(training), top1_router(switch).train(training)
    x = torch.randn(4, 20, D_MODEL)
    torch.manual_seed(7)
    # A copy: in float32 the peer jitters its input in place.
    chosen, probs, logits = peer(x.clone())
    torch.manual_seed(7)
    routing = router(x)
    kept = chosen.sum(-1).flatten() == 1
    # Some were dropped, and not as if the batch were one sequence.
    assert 3 * EXPERTS < kept.sum() < 80
    assert torch.equal(routing.expert_ids[:, 0] < EXPERTS, kept)
    assert torch.equal(routing.expert_ids[kept, 0].long(), chosen.argmax(-1).flatten()[kept])
    torch.testing.assert_close(routing.router_logits, logits.flatten(0, 1))
    torch.testing.assert_close(routing.gates, probs.flatten(0, 1) * kept[:, None])


def test_switch_layer(switch):
    experts = Experts.from_modules(switch.experts, up_proj="wi", down_proj="wo")
    ours = MoELayer(top1_router(switch), experts).eval()
    parameters = ours.router.classifier.weight, switch.eval().router.classifier.weight
    assert_same_layer(ours, switch, torch.randn(4, 20, D_MODEL), parameters)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "olmoe normalised"])
def test_layers_that_drop_nothing(models, family):
    if family == "mixtral":
        config = models.mixtral.MixtralConfig(
            hidden_size=D_MODEL,
            intermediate_size=FFN_DIM,
            num_local_experts=EXPERTS,
            num_experts_per_tok=2,
        )
        peer = models.mixtral.modeling_mixtral.MixtralSparseMoeBlock(config)
        paths, normalize = {"up_proj": "w3", "down_proj": "w2", "gate_proj": "w1"}, True
    else:
        normalize = family.endswith("normalised")
        config = models.olmoe.OlmoeConfig(
            hidden_size=D_MODEL,
            intermediate_size=FFN_DIM,
            num_experts=EXPERTS,
            num_experts_per_tok=3,
            norm_topk_prob=normalize,
        )
        peer = models.olmoe.modeling_olmoe.OlmoeSparseMoeBlock(config)
        paths = {"up_proj": "up_proj", "down_proj": "down_proj", "gate_proj": "gate_proj"}
    router = TopKRouter(D_MODEL, EXPERTS, config.num_experts_per_tok, normalize=normalize)
    router.classifier.load_state_dict(peer.gate.state_dict())
    ours = MoELayer(router, Experts.from_modules(peer.experts, activation="silu", **paths))
    x = torch.randn(4, 20, D_MODEL)
    assert_same_layer(ours, peer, x, (router.classifier.weight, peer.gate.weight))
