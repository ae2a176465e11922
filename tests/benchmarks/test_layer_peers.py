"""The same layer by other means, and the routing that it is measured under."""

import pytest
import torch

from benchmarks.agreement import check_close
from benchmarks.graphs import PeerUnavailable
from benchmarks.moe import peers
from benchmarks.moe.peers import PEERS, TRAINABLE
from benchmarks.moe.skew import router_weight, zipf_bias
from moe_mt.moe import Experts, MoELayer, Top2Router
from moe_mt.ops import route

COMPUTED = ("grouped_mm", "batched_mm", "expert loop")


def build_layer(*, bias):
    experts = Experts(6, 16, 24)
    router = Top2Router(16, 6, bias=bias)
    for weight in (*experts.parameters(), *router.parameters()):
        torch.nn.init.normal_(weight)
    return MoELayer(router, experts, token_dropout=0.2).eval()


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 20])
def test_a_peer_computes_the_layer(name, bias, tokens):
    layer, (x, residual) = build_layer(bias=bias), torch.randn(2, tokens, 16)
    with torch.inference_mode():
        check_close(PEERS[name](layer)(x, residual), layer(x, residual=residual)[0], 1e-5, name)


@pytest.mark.parametrize("name", [name for name in TRAINABLE if name in COMPUTED])
def test_a_trainable_peer_reaches_every_weight_and_the_tokens(name):
    layer, (x, residual) = build_layer(bias=True), torch.randn(2, 20, 16)
    inputs = [x.requires_grad_(), residual.requires_grad_(), *layer.parameters()]
    grad = torch.randn(20, 16)
    expected = torch.autograd.grad(layer(x, residual=residual)[0], inputs, grad)
    found = torch.autograd.grad(PEERS[name](layer)(x, residual), inputs, grad)
    for got, right in zip(found, expected, strict=True):
        check_close(got, right, 1e-5, name)


def test_weights_are_not_gathered_for_many_tokens():
    layer, many = build_layer(bias=False), torch.zeros(33, 16)
    with pytest.raises(PeerUnavailable, match="T = 32"):
        PEERS["batched_mm"](layer)(many, many)


@pytest.mark.parametrize("version", ["4.56.2", "5.17.0"])
def test_other_versions_of_transformers_are_no_peer(monkeypatch, version):
    monkeypatch.setattr(peers.importlib.metadata, "version", lambda _: version)
    with pytest.raises(PeerUnavailable, match=version):
        peers.transformers_layer(build_layer(bias=False))


def test_a_peer_that_is_not_installed_says_so(monkeypatch):
    def missing(name):
        raise peers.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(peers.importlib.metadata, "version", missing)
    with pytest.raises(PeerUnavailable, match="not installed"):
        PEERS["transformers 4.57"](build_layer(bias=False))


def first_choices(*, skewed):
    generator = torch.Generator().manual_seed(0)
    weight = router_weight(16, 256, generator)
    bias = zipf_bias(16, generator) if skewed else torch.zeros(16)
    logits = torch.randn(20_000, 256, generator=generator) @ weight.T + bias
    expert_ids, _ = route(logits)
    counts = torch.zeros(16).index_add_(0, expert_ids[:, 0].long(), torch.ones(20_000))
    return counts[bias.argsort(descending=True)] / 20_000


def test_skewed_routers_choose_the_expert_of_rank_r_in_proportion_to_one_over_r():
    wanted = 1 / torch.arange(1, 17)
    # Normal noise stands for Gumbel's, so that ranks and not the last digits are right.
    assert (first_choices(skewed=True) - wanted / wanted.sum()).abs().max() < 0.1
    assert first_choices(skewed=True)[0] > 4 * first_choices(skewed=True)[-1]


def test_other_routers_choose_evenly():
    assert (first_choices(skewed=False) - 1 / 16).abs().max() < 0.02


def test_ranks_are_in_random_order():
    biases = [zipf_bias(16, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    assert biases[0].argmax() != biases[1].argmax()
    assert biases[0].exp().sum() == pytest.approx(1.0)
