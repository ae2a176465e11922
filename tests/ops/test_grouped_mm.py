import pytest
import torch

from moe_mt.errors import ConfigError
from moe_mt.ops import grouped_mm
from moe_mt.ops.grouped_mm import grouped_mm_eager
from tests.closeness import assert_near

# Rows of each expert, rows beyond the last expert, in, out; every shape has its reason.
SHAPES = {
    "an expert without rows": ([3, 0, 6], 0, 24, 40),
    "rows that belong to nobody": ([5, 2], 4, 16, 16),
    "one row more than a block": ([17, 33], 0, 32, 32),
    "widths that are no multiple of a block": ([40, 10], 0, 33, 17),
    "all rows with one expert": ([0, 0, 70, 0], 0, 64, 64),
    "one expert": ([7], 0, 8, 48),
    "experts that are no power of two, most of them empty": (
        [1, 0, 0, 2, 0, 0, 0, 0, 0, 1],
        0,
        8,
        8,
    ),
    "no row at all": ([0, 0], 0, 8, 8),
    "nothing but rows of nobody": ([0, 0], 5, 8, 8),
    "fewer rows than experts": ([0, 1, 0, 0, 1], 0, 40, 70),
}


def problem(name, dtype, device="cpu", *, fused=False):
    counts, beyond, inner, outer = SHAPES[name]
    generator = torch.Generator().manual_seed(1)
    num_experts, rows = len(counts), sum(counts) + beyond
    tensors = [
        torch.randn(rows, inner, generator=generator),
        torch.randn(num_experts, 2 * outer, inner, generator=generator),
        torch.randn(num_experts, outer, generator=generator),
    ]
    x, weight, bias = (t.to(device, dtype) for t in tensors)
    # The second half of a fused weight: rows of an expert are next to each other, experts are not.
    weight = weight[:, outer:] if fused else weight[:, outer:].contiguous()
    x, weight, bias = (t.requires_grad_() for t in (x, weight, bias))
    offsets = torch.tensor([0, *counts]).cumsum(0).to(device)
    return x, weight, offsets, bias


def by_hand(x, weight, offsets, bias):
    out = torch.zeros(x.shape[0], weight.shape[1], dtype=x.dtype)
    for expert in range(weight.shape[0]):
        for row in range(int(offsets[expert]), int(offsets[expert + 1])):
            out[row] = weight[expert] @ x[row] + bias[expert]
    return out


@pytest.mark.parametrize("name", SHAPES)
def test_definition_and_every_gradient(name):
    x, weight, offsets, bias = problem(name, torch.float64)
    ours = grouped_mm(x, weight, offsets, bias=bias)
    expected = by_hand(x, weight, offsets, bias)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    if not expected.requires_grad:
        return
    seed = torch.randn_like(ours)
    for mine, theirs in zip(
        torch.autograd.grad((ours * seed).sum(), (x, weight, bias)),
        torch.autograd.grad((expected * seed).sum(), (x, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_kernel_and_every_gradient(name, dtype, kernel_device):
    x, weight, offsets, bias = problem(name, dtype, kernel_device)
    ours = grouped_mm(x, weight, offsets, bias=bias)
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected = grouped_mm_eager(wide[0], wide[1], offsets, bias=wide[2])
    assert_near(ours, expected, dtype)
    seed = torch.randn_like(ours)
    mine = torch.autograd.grad(ours, (x, weight, bias), seed)
    if not expected.requires_grad:
        assert not any(gradient.any() for gradient in mine)
        return
    theirs = torch.autograd.grad(expected, wide, seed.double())
    for what, got, wanted in zip(("x", "weight", "bias"), mine, theirs, strict=True):
        assert_near(got, wanted, dtype, f"gradient of {what}")


@pytest.mark.triton
def test_half_of_a_fused_weight_equals_a_weight_of_its_own(kernel_device):
    x, weight, offsets, bias = problem("an expert without rows", torch.float32, kernel_device)
    half = problem("an expert without rows", torch.float32, kernel_device, fused=True)[1]
    assert not half.is_contiguous()
    own, fused = (grouped_mm(x, w, offsets, bias=bias) for w in (weight, half))
    assert torch.equal(own, fused)
    seed = torch.randn_like(own)
    for mine, theirs in zip(
        torch.autograd.grad(own, (x, weight), seed),
        torch.autograd.grad(fused, (x, half), seed),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.triton
def test_operands_in_another_layout_are_taken(kernel_device):
    # Every operand turned, and the gradient too: kernels read rows whose elements are neighbours.
    own = problem("rows that belong to nobody", torch.float32, kernel_device)
    offsets = own[2]

    def turn(tensor):
        turned = tensor.detach().transpose(-1, -2).contiguous().transpose(-1, -2)
        assert not turned.is_contiguous()
        return turned.requires_grad_()

    seed = torch.randn(own[0].shape[0], own[1].shape[1], device=kernel_device)
    runs = []
    for (x, weight, _, bias), grad in (
        (own, seed),
        ([*map(turn, own[:2]), None, turn(own[3])], turn(seed)),
    ):
        out = grouped_mm(x, weight, offsets, bias=bias)
        runs.append([out, *torch.autograd.grad(out, (x, weight, bias), grad)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.triton
def test_a_row_of_nan_reaches_no_other_row(kernel_device):
    x, weight, offsets, bias = problem("one row more than a block", torch.float32, kernel_device)
    clean = grouped_mm(x, weight, offsets, bias=bias)
    poisoned = x.detach().clone()
    poisoned[3] = torch.nan
    found = grouped_mm(poisoned, weight, offsets, bias=bias)
    others = torch.arange(len(x)) != 3
    assert torch.equal(found[others], clean[others])
    assert found[3].isnan().all()


@pytest.mark.triton
@pytest.mark.parametrize("poisoned", ["x", "gradient"])
def test_a_row_of_nan_reaches_no_other_experts_weight(poisoned, kernel_device):
    # The second expert's first row lies in the last block of the first one's rows: zero times
    # NaN is NaN, so both operands of the product must hold it back, and so must the bias's sum.
    x, weight, offsets, bias = problem("one row more than a block", torch.float32, kernel_device)
    seed = torch.randn(x.shape[0], weight.shape[1], device=kernel_device)
    with torch.no_grad():
        (x if poisoned == "x" else seed)[int(offsets[1])] = torch.nan
    out = grouped_mm(x, weight, offsets, bias=bias)
    grad_weight, grad_bias = torch.autograd.grad(out, (weight, bias), seed)
    assert grad_weight[0].isfinite().all()
    assert grad_bias[0].isfinite().all()
    assert grad_weight[1].isnan().any()


@pytest.mark.triton
def test_experts_without_rows_are_not_read_and_their_gradient_is_zero(kernel_device):
    x, weight, offsets, _ = problem("an expert without rows", torch.float32, kernel_device)
    poisoned = weight.detach().clone()
    poisoned[1] = torch.nan
    poisoned.requires_grad_()
    out = grouped_mm(x, poisoned, offsets)
    assert out.isfinite().all()
    grad_x, grad_weight = torch.autograd.grad(out.sum(), (x, poisoned))
    assert grad_x.isfinite().all()
    assert not grad_weight[1].any()


@pytest.mark.triton
def test_three_runs_give_the_same_bits(kernel_device):
    x, weight, offsets, bias = problem("one row more than a block", torch.float16, kernel_device)
    runs = []
    for _ in range(3):
        out = grouped_mm(x, weight, offsets, bias=bias)
        runs.append((out, *torch.autograd.grad(out, (x, weight, bias), torch.ones_like(out))))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.triton
def test_a_bfloat16_product(kernel_device):
    x, weight, offsets, bias = problem("one row more than a block", torch.bfloat16, kernel_device)
    expected = grouped_mm_eager(x.double(), weight.double(), offsets, bias=bias.double())
    assert_near(grouped_mm(x, weight, offsets, bias=bias), expected, torch.bfloat16)


@pytest.mark.triton
def test_operator_contract(kernel_device):
    x, weight, offsets, bias = problem("widths that are no multiple of a block", torch.float32)
    arguments = [t.to(kernel_device) for t in (x, weight, offsets, bias)]
    torch.library.opcheck(torch.ops.moe_mt.grouped_mm.default, tuple(arguments))
    torch.library.opcheck(torch.ops.moe_mt.grouped_mm.default, (*arguments[:3], None))
    x, weight, offsets, bias = (t.detach() for t in arguments)
    grad = x.new_ones(x.shape[0], weight.shape[1])
    for has_bias in (True, False):
        torch.library.opcheck(
            torch.ops.moe_mt.grouped_mm_backward.default,
            (grad, x, weight, offsets, has_bias),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, o, b: (x[:, 1:], w, o, b), r"x is \(9, 23\).*\(N, in\)"),
        (lambda x, w, o, b: (x, w, o[1:], b), "offsets are"),
        (lambda x, w, o, b: (x, w, o, b[:, 1:]), r"bias is \(3, 39\); it must be \(3, 40\)"),
        (lambda x, w, o, b: (x, w.half(), o, b), "one dtype"),
    ],
    ids=["widths", "offsets", "bias", "dtypes"],
)
def test_what_does_not_fit_is_named(change, message):
    x, weight, offsets, bias = change(*problem("an expert without rows", torch.float32))
    with pytest.raises(ConfigError, match=message):
        grouped_mm(x, weight, offsets, bias=bias)
