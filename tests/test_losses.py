"""What training minimises, against values worked out by hand."""

import math

import pytest
import torch
from torch.nn import functional

from moe_mt.losses import (
    IGNORED_LABEL,
    label_smoothed_cross_entropy,
    load_balancing_loss,
    router_z_loss,
)
from moe_mt.moe import Routing
from moe_mt.ops.backend import use_backend
from tests.closeness import assert_near


def routing(logits, padding=None) -> Routing:
    logits = torch.as_tensor(logits, dtype=torch.float32)
    rows = logits.shape[0]
    return Routing(
        expert_ids=torch.zeros(rows, 2, dtype=torch.int32),
        gates=torch.zeros(rows, 2),
        router_logits=logits,
        padding=None if padding is None else torch.tensor(padding),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_cross_entropy_by_hand(smoothing):
    logits = torch.tensor([[[2.0, 0.0, -1.0, 0.5], [0.0, 1.0, 0.0, 3.0]]])
    labels = torch.tensor([[0, 2]])
    losses = []
    for row, label in zip(logits[0].tolist(), labels[0].tolist(), strict=True):
        total = sum(math.exp(value) for value in row)
        log_probs = [value - math.log(total) for value in row]
        # One minus epsilon on the label, epsilon spread over all four, the label among them.
        losses.append(-(1 - smoothing) * log_probs[label] - smoothing * sum(log_probs) / 4)
    found = label_smoothed_cross_entropy(logits, labels, smoothing)
    assert found.item() == pytest.approx(sum(losses) / 2, rel=1e-6)


def test_ignored_labels_count_neither_above_nor_below():
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, IGNORED_LABEL], [3, IGNORED_LABEL, IGNORED_LABEL]])
    kept = labels != IGNORED_LABEL
    expected = label_smoothed_cross_entropy(logits[kept][None], labels[kept][None], 0.1)
    assert label_smoothed_cross_entropy(logits, labels, 0.1).item() == pytest.approx(
        expected.item()
    )


def test_padding_is_no_ignored_label():
    # Published helpers count the pad token's id as a label like any other; only -100 is ignored.
    logits = torch.zeros(1, 2, 4)
    logits[0, 1, 1] = 5.0
    both = label_smoothed_cross_entropy(logits, torch.tensor([[0, 1]]))
    first = label_smoothed_cross_entropy(logits, torch.tensor([[0, IGNORED_LABEL]]))
    assert both < first


def test_half_precision_logits_are_summed_in_float32():
    logits = torch.randn(4, 8, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.arange(32).view(4, 8)
    found = label_smoothed_cross_entropy(logits, labels)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(
        functional.cross_entropy(logits.double().flatten(0, 1), labels.flatten()).item(), rel=1e-6
    )
    assert label_smoothed_cross_entropy(logits.double(), labels).dtype == torch.float64


def test_balance_by_hand():
    # Three tokens, two experts: probabilities 3/4, 3/4 and 1/4 for the first.
    up = math.log(3)
    loss = load_balancing_loss(routing([[up, 0.0], [up, 0.0], [0.0, up]]))
    share, mean = (2 / 3, 1 / 3), (7 / 12, 5 / 12)
    assert loss.item() == pytest.approx(2 * sum(f * p for f, p in zip(share, mean, strict=True)))


@pytest.mark.parametrize("experts", [2, 8])
def test_balance_is_one_where_the_load_is_even(experts):
    # Every expert is somebody's clear first choice.
    assert load_balancing_loss(routing(torch.eye(experts) * 9)).item() == pytest.approx(1)


def test_balance_is_the_number_of_experts_where_one_takes_all():
    assert load_balancing_loss(routing([[50.0, 0, 0, 0]] * 5)).item() == pytest.approx(4)


def test_z_loss_by_hand():
    # logsumexp of two zeros is ln 2; of ln 3 and 0 it is ln 4.
    loss = router_z_loss(routing([[0.0, 0.0], [math.log(3), 0.0]]))
    assert loss.item() == pytest.approx((math.log(2) ** 2 + math.log(4) ** 2) / 2)


@pytest.mark.parametrize("loss", [load_balancing_loss, router_z_loss])
def test_padding_does_not_count(loss):
    real = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    padded = torch.cat([real, torch.full((3, 4), 7.0)])
    padding = [False] * 5 + [True] * 3
    assert loss(routing(padded, padding)).item() == pytest.approx(loss(routing(real)).item())
    assert loss(routing(padded)).item() != pytest.approx(loss(routing(real)).item())


@pytest.mark.parametrize("loss", [load_balancing_loss, router_z_loss])
def test_gradients_reach_the_router(loss):
    # Shares are counts and have no gradient; probabilities must carry it.
    logits = torch.tensor([[2.0, 0.0, 1.0], [1.0, 0.5, 0.0]], requires_grad=True)
    loss(
        Routing(
            expert_ids=torch.zeros(2, 2, dtype=torch.int32),
            gates=torch.zeros(2, 2),
            router_logits=logits,
            padding=None,
        )
    ).backward()
    assert logits.grad is not None
    # The way down leads away from the expert that is everybody's first choice.
    assert logits.grad[:, 0].sum() > 0


def test_half_precision_routers_are_summed_in_float32():
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    for loss in (load_balancing_loss, router_z_loss):
        found = loss(
            Routing(
                expert_ids=torch.zeros(64, 2, dtype=torch.int32),
                gates=torch.zeros(64, 2),
                router_logits=logits,
                padding=None,
            )
        )
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(loss(routing(logits.float())).item())


@pytest.mark.parametrize("loss", [load_balancing_loss, router_z_loss])
def test_a_batch_of_padding_alone_costs_nothing(loss):
    routing = Routing(
        expert_ids=torch.full((3, 2), 4, dtype=torch.int32),
        gates=torch.zeros(3, 2),
        router_logits=torch.randn(3, 4),
        padding=torch.ones(3, dtype=torch.bool),
    )
    assert loss(routing).item() == 0


@pytest.mark.parametrize("loss", [load_balancing_loss, router_z_loss])
def test_a_padded_nan_reaches_neither_the_loss_nor_its_gradient(loss):
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(3))
    padding = [False, True, False, False]
    expected = loss(routing(logits[[0, 2, 3]]))
    logits[1] = torch.nan
    logits.requires_grad_()
    found = loss(routing(logits, padding))
    assert found.item() == pytest.approx(expected.item())
    found.backward()
    assert (logits.grad[1] == 0).all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("loss", [load_balancing_loss, router_z_loss])
def test_losses_compile_whole(loss):
    # To select the real tokens would take their number, and waiting for the device to know it.
    def of(logits, padding):
        return loss(
            Routing(
                expert_ids=torch.zeros(len(logits), 2, dtype=torch.int32),
                gates=torch.zeros(len(logits), 2),
                router_logits=logits,
                padding=padding,
            )
        )

    logits, padding = torch.randn(6, 4), torch.arange(6) > 3
    compiled = torch.compile(of, fullgraph=True, backend="aot_eager")
    assert compiled(logits, padding).item() == pytest.approx(of(logits, padding).item())


@pytest.mark.triton
@pytest.mark.parametrize("loss", [load_balancing_loss, router_z_loss])
@pytest.mark.parametrize("padded", [False, True])
def test_kernels_give_the_losses_of_the_definition(kernel_device, loss, padded):
    logits = torch.randn(33, 5).to(kernel_device).requires_grad_()
    tokens = Routing(
        expert_ids=torch.zeros(33, 2, dtype=torch.int32, device=kernel_device),
        gates=torch.zeros(33, 2, device=kernel_device),
        router_logits=logits,
        padding=torch.arange(33, device=kernel_device) > 20 if padded else None,
    )
    found = {}
    for backend in ("triton", "eager"):
        with use_backend(backend):
            value = loss(tokens)
            found[backend] = value, *torch.autograd.grad(value, logits)
    for mine, theirs in zip(found["triton"], found["eager"], strict=True):
        assert_near(mine, theirs, torch.float32)
