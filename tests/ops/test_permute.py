import pytest
import torch
from torch.autograd import gradcheck

from moe_mt.errors import ConfigError
from moe_mt.ops import expert_order, permute
from moe_mt.ops.permute import permute_eager
from tests.closeness import assert_near

# Tokens, experts, choices, d_model; some claims of each are dropped.
SHAPES = {
    "no token": (0, 4, 2, 8),
    "one token": (1, 4, 2, 8),
    "one choice": (6, 4, 1, 8),
    "four choices": (7, 8, 4, 16),
    "more tokens than a block of rows, and a part of one": (33, 8, 2, 20),
    "wider than a block of columns, and a part of one": (3, 4, 2, 1030),
}


def problem(tokens, num_experts, top_k, d_model, dtype=torch.float64, device="cpu"):
    expert_ids = torch.randint(0, num_experts + 1, (tokens, top_k), dtype=torch.int32)
    order, rows, _ = expert_order(expert_ids, num_experts)
    x = torch.randn(tokens, d_model).to(device, dtype).requires_grad_()
    return x, order.to(device), rows.to(device)


def gradient(out, x):
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    return torch.autograd.grad(out, x, weights.to(out))[0]


@pytest.mark.parametrize("name", SHAPES)
def test_definition(name):
    x, order, rows = problem(*SHAPES[name])
    out = permute(x, order, rows)
    assert out.shape == (rows.numel(), x.shape[1])
    for row, claim in enumerate(order.tolist()):
        assert torch.equal(out[row], x[claim // rows.shape[1]])


def test_gradient_is_that_of_finite_differences():
    x, order, rows = problem(3, 4, 2, 4)
    assert gradcheck(lambda x: permute(x, order, rows), x)


def rounded_once(device):
    """The gradient of a token whose three rows' gradients are 1, 2^-11 and 2^-11."""
    x = torch.zeros(1, 1, dtype=torch.float16, device=device, requires_grad=True)
    order = torch.tensor([0, 1, 2], device=device)
    out = permute(x, order, order[None])
    grad = torch.tensor([[1.0], [2.0**-11], [2.0**-11]], dtype=torch.float16, device=device)
    return torch.autograd.grad(out, x, grad)[0]


def test_the_gradient_is_summed_in_float32():
    assert rounded_once("cpu").item() == 1 + 2.0**-10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(4, 8)}, r"x is \(4, 8\) and rows \(3, 2\)"),
        ({"order": torch.arange(5)}, r"order is \(5,\).*\(6,\)"),
    ],
    ids=["another number of tokens", "another number of claims"],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    arguments = dict(zip(("x", "order", "rows"), problem(3, 4, 2, 8), strict=True))
    with pytest.raises(ConfigError, match=message):
        permute(**arguments | change)


def check_kernel(x, order, rows):
    ours, theirs = permute(x, order, rows), permute_eager(x, order, rows)
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)
    found = gradient(ours, x)
    assert found.dtype == x.dtype
    assert_near(found, gradient(theirs, x), x.dtype)
    return ours, found


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("name", SHAPES)
def test_kernel(name, dtype, kernel_device):
    check_kernel(*problem(*SHAPES[name], dtype, kernel_device))


@pytest.mark.triton
def test_kernel_in_bfloat16(kernel_device):
    check_kernel(*problem(5, 4, 2, 16, torch.bfloat16, kernel_device))


@pytest.mark.triton
def test_kernel_sums_the_gradient_in_float32(kernel_device):
    assert rounded_once(kernel_device).item() == 1 + 2.0**-10


@pytest.mark.triton
def test_kernel_repeats_its_bits(kernel_device):
    arguments = problem(33, 8, 4, 20, torch.float32, kernel_device)
    for first, second in zip(check_kernel(*arguments), check_kernel(*arguments), strict=True):
        assert torch.equal(first, second)


@pytest.mark.triton
def test_kernel_takes_any_strides(kernel_device):
    x, order, rows = problem(9, 4, 2, 8, torch.float32, kernel_device)
    spread = torch.stack([x.detach(), torch.full_like(x, torch.nan)], -1)[..., 0].requires_grad_()
    strided_order = torch.stack([order, order], -1)[:, 0]
    strided_rows = rows.T.contiguous().T
    assert not any(t.is_contiguous() for t in (spread, strided_order, strided_rows))
    strided = check_kernel(spread, strided_order, strided_rows)
    for ours, theirs in zip(strided, check_kernel(x, order, rows), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.triton
def test_kernel_takes_a_gradient_of_stride_zero(kernel_device):
    x, order, rows = problem(9, 4, 2, 8, torch.float32, kernel_device)
    permute(x, order, rows).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))


@pytest.mark.triton
def test_kernel_keeps_a_nan_in_its_token(kernel_device):
    x, order, rows = problem(33, 8, 2, 20, torch.float32, kernel_device)
    with torch.no_grad():
        x[7, 3] = torch.nan
    out = permute(x, order, rows)
    assert out.isnan().nonzero().tolist() == [[row, 3] for row in sorted(rows[7].tolist())]
    grad = torch.randn_like(out)
    grad[rows[11, 1]] = torch.nan
    found = torch.autograd.grad(out, x, grad)[0]
    assert found.isnan().any(1).nonzero().flatten().tolist() == [11]


@pytest.mark.triton
@pytest.mark.parametrize("tokens", [0, 5])
def test_kernel_as_an_operator(tokens, kernel_device):
    x, order, rows = problem(tokens, 4, 2, 8, torch.float32, kernel_device)
    torch.library.opcheck(torch.ops.moe_mt.permute.default, (x, order, rows))
    grad = torch.randn(tokens * 2, 8, device=kernel_device)
    torch.library.opcheck(torch.ops.moe_mt.permute_backward.default, (grad, rows))
    with torch.inference_mode():
        assert torch.equal(permute(x, order, rows), permute_eager(x, order, rows))
    on_meta = [t.detach().to("meta") for t in (x, order, rows)]
    assert permute(*on_meta).shape == (tokens * 2, 8)


@pytest.mark.triton
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_kernel_compiles_without_a_break(dynamic, kernel_device):
    compiled = torch.compile(permute, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (5, 9):
        x, order, rows = problem(tokens, 4, 2, 8, torch.float32, kernel_device)
        ours, theirs = compiled(x, order, rows), permute_eager(x, order, rows)
        assert torch.equal(ours, theirs)
        assert_near(gradient(ours, x), gradient(theirs, x), torch.float32)
