import math

import pytest
import torch

from moe_mt.errors import ConfigError
from moe_mt.ops import router_statistics
from moe_mt.ops.backend import use_backend
from moe_mt.ops.router_statistics import router_statistics_eager
from tests.closeness import assert_near

SHAPES = {
    "no token": (0, 4),
    "one token, one expert": (1, 1),
    "two experts, fewer tokens than a block": (7, 2),
    "experts that are no power of two": (33, 5),
    "the 54B's experts, one token more than a program sums": (129, 128),
    "one token more than two programs sum": (257, 8),
    "more experts than a block has scores": (2, 2500),
}


def case(shape, device="cpu", dtype=torch.float32, padded=0.3):
    tokens, experts = shape
    generator = torch.Generator().manual_seed(11)
    logits = (2 * torch.randn(tokens, experts, generator=generator)).to(device, dtype)
    padding = torch.rand(tokens, generator=generator) < padded
    return logits.requires_grad_(), padding.to(device)


def with_gradient(operation, logits, padding):
    first_choices, probs, squares = operation(logits, padding)
    weights = torch.randn(len(probs), generator=torch.Generator().manual_seed(12)).to(probs)
    (grad,) = torch.autograd.grad((probs * weights).sum() + 0.3 * squares, logits)
    return first_choices, probs, squares, grad


def test_definition_by_hand():
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0], [9.0, 9.5], [0.0, math.log(7)]])
    padding = torch.tensor([False, False, True, False])
    first_choices, probs, squares = router_statistics_eager(logits, padding)
    # Equal logits are the first expert's; the padded token is nobody's.
    assert first_choices.tolist() == [2, 1]
    assert first_choices.dtype == torch.int64
    assert probs.tolist() == pytest.approx([3 / 4 + 1 / 2 + 1 / 8, 1 / 4 + 1 / 2 + 7 / 8])
    assert squares.item() == pytest.approx(sum(math.log(n) ** 2 for n in (4, 2, 8)))


def test_definition_counts_every_token_where_none_is_padded():
    logits, _ = case((33, 5))
    nobody = torch.zeros(33, dtype=torch.bool)
    for mine, theirs in zip(
        router_statistics_eager(logits), router_statistics_eager(logits, nobody), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    first_choices, probs, _ = router_statistics_eager(logits)
    assert first_choices.sum() == 33
    assert probs.sum().item() == pytest.approx(33)


def test_definition_has_its_gradients():
    logits, padding = case((4, 3), dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda given: router_statistics_eager(given, padding)[1:], (logits,)
    )


def test_definition_sums_halves_in_float32_and_doubles_in_float64():
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        logits, padding = case((4, 3), dtype=dtype)
        _, probs, squares = router_statistics_eager(logits, padding)
        assert probs.dtype == squares.dtype == expected


@pytest.mark.parametrize("padding", [torch.zeros(4, dtype=torch.bool), torch.zeros(3)])
def test_padding_that_does_not_fit_is_named(padding):
    with pytest.raises(ConfigError, match=r"must be bool \(3,\)"):
        router_statistics(torch.zeros(3, 2), padding)


def test_a_padded_nan_counts_nowhere():
    assert_a_padded_nan_counts_nowhere(router_statistics_eager, "cpu")


def assert_a_padded_nan_counts_nowhere(operation, device):
    logits, padding = case((7, 5), device)
    padding[2] = True
    poisoned = logits.detach().clone()
    poisoned[2] = torch.nan
    found = with_gradient(operation, poisoned.requires_grad_(), padding)
    expected = with_gradient(operation, logits, padding)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)
    assert (found[3][2] == 0).all()


def assert_kernel_is_definition(logits, padding):
    with use_backend("triton"):
        found = with_gradient(router_statistics, logits, padding)
    expected = with_gradient(router_statistics_eager, logits, padding)
    assert torch.equal(found[0], expected[0])
    assert found[0].dtype == torch.int64
    assert_near(found[1], expected[1], torch.float32, "probabilities")
    assert_near(found[2], expected[2], torch.float32, "squares")
    assert found[3].dtype == logits.dtype
    assert_near(found[3], expected[3], logits.dtype, "gradient of the logits")


@pytest.mark.triton
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernel_is_its_definition(kernel_device, shape, dtype):
    logits, padding = case(SHAPES[shape], kernel_device, dtype)
    assert_kernel_is_definition(logits, padding)
    assert_kernel_is_definition(logits, None)


@pytest.mark.triton
def test_kernel_in_bfloat16(kernel_device):
    assert_kernel_is_definition(*case((33, 5), kernel_device, torch.bfloat16))


@pytest.mark.triton
def test_kernel_with_every_token_padded(kernel_device):
    logits, padding = case((33, 5), kernel_device, padded=1.0)
    for found in with_gradient(router_statistics, logits, padding):
        assert (found == 0).all()


@pytest.mark.triton
def test_kernel_keeps_a_padded_nan_out(kernel_device):
    assert_a_padded_nan_counts_nowhere(router_statistics, kernel_device)


ODD_LOGITS = {
    "all equal": [0.0] * 5,
    "all negative": [-3.0, -1.0, -1.5, -9.0, -1.0],
    # Without equals: PyTorch's own gradient of logsumexp gives each of two huge equals all of it.
    "huge": [1e18, 3e18, -3e18, 2e18, 0.0],
    "hugely negative": [-3e18, -1e18, -2e18, -4e18, -3e18],
    "a NaN is the largest": [1.0, 2.0, float("nan"), 5.0, 0.0],
}


@pytest.mark.triton
@pytest.mark.parametrize("row", ODD_LOGITS)
def test_kernel_with_odd_logits(kernel_device, row):
    logits = torch.randn(7, 5)
    logits[[1, 4]] = torch.tensor(ODD_LOGITS[row])
    logits = logits.to(kernel_device).requires_grad_()
    found = with_gradient(router_statistics, logits, None)
    expected = with_gradient(router_statistics_eager, logits, None)
    assert torch.equal(found[0], expected[0])
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.triton
def test_kernel_takes_strided_inputs(kernel_device):
    logits, padding = case((33, 5), kernel_device)
    wide = torch.zeros(33, 9, device=kernel_device)[:, 2:7].copy_(logits.detach())
    columns = logits.detach().T.contiguous().T
    every_second = padding.repeat_interleave(2)[::2]
    expected = with_gradient(router_statistics_eager, logits, padding)
    for strided in (wide, columns):
        assert not strided.is_contiguous()
        found = with_gradient(router_statistics, strided.requires_grad_(), every_second)
        assert torch.equal(found[0], expected[0])
        for mine, theirs in zip(found[1:], expected[1:], strict=True):
            assert_near(mine, theirs, torch.float32)


@pytest.mark.triton
def test_kernel_has_the_gradient_of_each_output_alone(kernel_device):
    logits, padding = case((33, 5), kernel_device)
    for pick in (lambda found: found[1][1], lambda found: found[2]):
        (mine,) = torch.autograd.grad(pick(router_statistics(logits, padding)), logits)
        (theirs,) = torch.autograd.grad(pick(router_statistics_eager(logits, padding)), logits)
        assert_near(mine, theirs, torch.float32)


@pytest.mark.triton
def test_kernel_gives_the_same_bits_every_time(kernel_device):
    logits, padding = case((257, 8), kernel_device)
    first = with_gradient(router_statistics, logits, padding)
    for mine, again in zip(first, with_gradient(router_statistics, logits, padding), strict=True):
        assert torch.equal(mine, again)


@pytest.mark.triton
@pytest.mark.parametrize("padded", [False, True])
def test_kernel_is_an_operator(kernel_device, padded):
    logits, padding = case((7, 5), kernel_device)
    given = (logits, padding if padded else None)
    torch.library.opcheck(torch.ops.moe_mt.router_statistics.default, given)
    probs, squares, _ = torch.ops.moe_mt.router_statistics(*given)
    torch.library.opcheck(
        torch.ops.moe_mt.router_statistics_backward.default,
        (logits.detach(), given[1], probs.detach(), squares.detach()),
    )


@pytest.mark.triton
@pytest.mark.parametrize("dynamic", [None, True])
def test_kernel_compiles_whole(kernel_device, dynamic):
    compiled = torch.compile(
        router_statistics, fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for tokens in (7, 33):
        logits, padding = case((tokens, 5), kernel_device)
        found = with_gradient(compiled, logits, padding)
        expected = with_gradient(router_statistics, logits, padding)
        for mine, theirs in zip(found, expected, strict=True):
            assert_near(mine, theirs, torch.float32)


@pytest.mark.triton
def test_kernel_in_inference_mode_and_on_the_meta_device(kernel_device):
    logits, padding = case((33, 5), kernel_device)
    expected = router_statistics_eager(logits, padding)
    with torch.inference_mode():
        found = router_statistics(logits, padding)
    shapes = router_statistics(logits.detach().to("meta"), padding.to("meta"))
    for mine, theirs, shape in zip(found, expected, shapes, strict=True):
        assert_near(mine, theirs, torch.float32)
        assert shape.is_meta
        assert (shape.shape, shape.dtype) == (theirs.shape, theirs.dtype)
