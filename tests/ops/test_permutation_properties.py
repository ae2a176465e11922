"""What must hold for any routing, of the definitions and of the kernels."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_mt.ops import combine, expert_order, permute, route

DEFINITION = settings(deadline=None, max_examples=100)
# Few, because the interpreter is slow. The device, the only fixture, does not change in between.
KERNEL = settings(
    deadline=None,
    max_examples=12,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
CPU = torch.device("cpu")


@st.composite
def claims(draw):
    """Expert ids (T, K) in [0, E], and E."""
    num_experts = draw(st.sampled_from([1, 2, 3, 8, 16, 33]))
    top_k = draw(st.integers(1, 3))
    token = st.lists(st.integers(0, num_experts), min_size=top_k, max_size=top_k)
    ids = draw(st.lists(token, max_size=40))
    return torch.tensor(ids, dtype=torch.int32).view(len(ids), top_k), num_experts


@st.composite
def routings(draw):
    """Router logits (T, E), a capacity and a padding mask, with many ties."""
    num_experts = draw(st.sampled_from([2, 3, 8]))
    score = st.sampled_from([-2.0, 0.0, 0.5, 3.0])
    token = st.lists(score, min_size=num_experts, max_size=num_experts)
    logits = draw(st.lists(token, min_size=1, max_size=24))
    padding = draw(st.lists(st.booleans(), min_size=len(logits), max_size=len(logits)))
    capacity = draw(st.integers(1, len(logits)))
    return torch.tensor(logits), capacity, torch.tensor(padding)


def check_the_order(expert_ids, num_experts):
    order, rows, offsets = (t.cpu() for t in expert_order(expert_ids, num_experts))
    flat = expert_ids.cpu().flatten()
    assert order.sort().values.tolist() == list(range(len(flat))), "not a permutation"
    assert order[rows.flatten()].tolist() == list(range(len(flat))), "rows do not invert it"
    in_order = flat[order]
    assert (in_order.diff() >= 0).all(), "experts do not follow each other"
    assert (order.diff()[in_order.diff() == 0] > 0).all(), "not stable"
    counts = [int((flat == expert).sum()) for expert in range(num_experts)]
    assert offsets[0] == 0
    assert offsets.diff().tolist() == counts


@given(claims())
@DEFINITION
def test_the_order(drawn):
    check_the_order(*drawn)


@pytest.mark.triton
@given(drawn=claims())
@KERNEL
def test_kernel_the_order(drawn, kernel_device):
    check_the_order(drawn[0].to(kernel_device), drawn[1])


@pytest.mark.triton
@given(drawn=claims(), block=st.sampled_from([16, 32, 64]))
@KERNEL
def test_kernel_the_order_does_not_depend_on_the_block(drawn, block, kernel_device):
    from moe_mt.kernels import expert_order as kernels

    expert_ids = drawn[0].to(kernel_device)
    expected = kernels.expert_order(expert_ids, drawn[1])
    found = kernels.expert_order(expert_ids, drawn[1], block=block)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def there_and_back(x, expert_ids, num_experts, gates):
    """A mixture of experts that only scale: each multiplies its rows by its number plus one."""
    order, rows, _ = expert_order(expert_ids, num_experts)
    scales = expert_ids.flatten()[order].to(x.dtype) + 1
    return combine(permute(x, order, rows) * scales[:, None], rows, gates)


def check_the_way_back(expert_ids, num_experts):
    tokens, top_k = expert_ids.shape
    x = torch.randn(tokens, 6, device=expert_ids.device)
    order, rows, _ = expert_order(expert_ids, num_experts)
    out = combine(permute(x, order, rows), rows, torch.ones(rows.shape, device=x.device))
    torch.testing.assert_close(out, top_k * x)


@given(claims())
@DEFINITION
def test_the_way_back_sums_every_copy(drawn):
    check_the_way_back(*drawn)


@pytest.mark.triton
@given(drawn=claims())
@KERNEL
def test_kernel_the_way_back_sums_every_copy(drawn, kernel_device):
    check_the_way_back(drawn[0].to(kernel_device), drawn[1])


def check_tokens_stay_apart(expert_ids, num_experts, seed):
    """Another order of the tokens gives the same rows; a NaN stays where it was; so do bits."""
    generator = torch.Generator().manual_seed(seed)
    tokens, top_k = expert_ids.shape
    x = torch.randn(tokens, 6, generator=generator).to(expert_ids.device)
    gates = torch.rand(tokens, top_k, generator=generator).to(x.device)
    gates = gates.masked_fill(expert_ids == num_experts, 0)
    out = there_and_back(x, expert_ids, num_experts, gates)
    assert out.isfinite().all(), "something was not written"
    assert torch.equal(there_and_back(x, expert_ids, num_experts, gates), out)
    shuffled = torch.randperm(tokens, generator=generator).to(x.device)
    again = there_and_back(x[shuffled], expert_ids[shuffled], num_experts, gates[shuffled])
    assert torch.equal(again, out[shuffled])
    if tokens == 0:
        return
    x[seed % tokens] = torch.nan
    others = torch.arange(tokens, device=x.device) != seed % tokens
    poisoned = there_and_back(x, expert_ids, num_experts, gates)
    assert torch.equal(poisoned[others], out[others])
    assert poisoned[~others].isnan().all() == (gates[~others] != 0).any()


@given(claims(), st.integers(0, 1000))
@DEFINITION
def test_tokens_stay_apart(drawn, seed):
    check_tokens_stay_apart(*drawn, seed)


@pytest.mark.triton
@given(drawn=claims(), seed=st.integers(0, 1000))
@KERNEL
def test_kernel_tokens_stay_apart(drawn, seed, kernel_device):
    check_tokens_stay_apart(drawn[0].to(kernel_device), drawn[1], seed)


def check_gradients_reach_everything(expert_ids, num_experts):
    """The gradients of a sum: known without computing them, and nowhere unwritten."""
    tokens, top_k = expert_ids.shape
    x = torch.ones(tokens, 6, device=expert_ids.device, requires_grad=True)
    gates = torch.rand(tokens, top_k).to(x.device) + 0.5
    gates = gates.masked_fill(expert_ids == num_experts, 0).requires_grad_()
    out = there_and_back(x, expert_ids, num_experts, gates)
    grad_x, grad_gates = torch.autograd.grad(out.sum(), (x, gates))
    scales = (expert_ids + 1) * (gates != 0)
    torch.testing.assert_close(grad_x, (scales * gates).sum(1)[:, None].expand_as(x))
    torch.testing.assert_close(grad_gates, 6.0 * scales)


@given(claims())
@DEFINITION
def test_gradients_reach_everything(drawn):
    check_gradients_reach_everything(*drawn)


@pytest.mark.triton
@given(drawn=claims())
@KERNEL
def test_kernel_gradients_reach_everything(drawn, kernel_device):
    check_gradients_reach_everything(drawn[0].to(kernel_device), drawn[1])


def check_capacity(router_logits, capacity, padding):
    num_experts = router_logits.shape[1]
    wanted, _ = route(router_logits)
    expert_ids, gates = route(router_logits, capacity=capacity, padding=padding)
    _, _, offsets = expert_order(expert_ids, num_experts)
    assert (offsets.diff() <= capacity).all()
    kept = expert_ids < num_experts
    assert not kept[padding].any()
    assert torch.equal(expert_ids[kept], wanted[kept])
    assert not gates[~kept].any()
    totals = gates.sum(1)
    torch.testing.assert_close(totals, kept.any(1).to(totals))
    # In the order of claiming, nobody is kept after somebody was dropped.
    wanted = wanted.masked_fill(padding[:, None], num_experts)
    for expert in range(num_experts):
        chosen = kept.T[wanted.T == expert].cpu().long()
        assert (chosen.diff() <= 0).all(), "a later claim was kept instead of an earlier one"
        assert chosen.sum() == min(capacity, len(chosen))


@given(routings())
@DEFINITION
def test_capacity(drawn):
    check_capacity(*drawn)


@pytest.mark.triton
@given(drawn=routings())
@KERNEL
def test_kernel_capacity(drawn, kernel_device):
    router_logits, capacity, padding = drawn
    check_capacity(router_logits.to(kernel_device), capacity, padding.to(kernel_device))
