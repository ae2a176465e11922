import pytest
import torch
from torch.autograd import gradcheck

from moe_mt.errors import ConfigError
from moe_mt.ops import combine, expert_order
from moe_mt.ops.combine import combine_eager
from tests.closeness import assert_near

# Tokens, experts, choices, d_model.
SHAPES = {
    "one token": (1, 4, 2, 8),
    "one choice": (6, 4, 1, 8),
    "every expert": (5, 3, 3, 8),
    "an odd width": (7, 4, 2, 5),
    "no token": (0, 4, 2, 8),
}

KERNEL_SHAPES = {
    **SHAPES,
    "four choices": (7, 8, 4, 16),
    "more tokens than a block of rows, and a part of one": (33, 8, 2, 20),
    "wider than a block of columns, and a part of one": (3, 4, 2, 1030),
}


def problem(tokens, num_experts, top_k, d_model, dtype=torch.float64, device="cpu"):
    expert_ids = torch.rand(tokens, num_experts).argsort(1)[:, :top_k].to(torch.int32)
    _, rows, _ = expert_order(expert_ids, num_experts)
    wide = dtype if dtype == torch.float64 else torch.float32
    expert_rows = torch.randn(tokens * top_k, d_model).to(dtype)
    gates = torch.rand(tokens, top_k, dtype=wide) + 0.1
    residual = torch.randn(tokens, d_model).to(dtype)
    floats = [t.to(device).requires_grad_() for t in (expert_rows, gates, residual)]
    return floats[0], rows.to(device), floats[1], floats[2]


def gradients(out, *inputs):
    """The gradients of a sum of the outputs that weighs each of them differently."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    return torch.autograd.grad(out, inputs, weights.to(out))


@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "with a residual"])
@pytest.mark.parametrize("name", SHAPES)
def test_definition_and_gradients(name, with_residual):
    expert_rows, rows, gates, residual = problem(*SHAPES[name])
    ours = combine(expert_rows, rows, gates, residual if with_residual else None)
    by_hand = residual.clone() if with_residual else torch.zeros_like(ours)
    for t in range(rows.shape[0]):
        for k in range(rows.shape[1]):
            by_hand[t] = by_hand[t] + gates[t, k] * expert_rows[rows[t, k]]
    torch.testing.assert_close(ours, by_hand, rtol=1e-12, atol=1e-12)
    if rows.numel() == 0:
        return
    inputs = (expert_rows, gates, residual) if with_residual else (expert_rows, gates)
    for got, expected in zip(gradients(ours, *inputs), gradients(by_hand, *inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_gradients_are_those_of_finite_differences():
    expert_rows, rows, gates, residual = problem(3, 4, 2, 4)
    assert gradcheck(lambda *t: combine(t[0], rows, *t[1:]), (expert_rows, gates, residual))


def test_bfloat16_rows_are_summed_in_float32():
    # 1 + 2^-8 + 2^-8 is 1 after each bfloat16 rounding and 1 + 2^-7 when rounded once.
    expert_rows = torch.tensor([[1.0], [2.0**-8], [2.0**-8]], dtype=torch.bfloat16)
    out = combine(expert_rows, torch.tensor([[0, 1, 2]]), torch.ones(1, 3))
    assert out.dtype == torch.bfloat16
    assert out.item() == 1 + 2.0**-7


def test_gates_keep_their_precision():
    # In bfloat16 the first gate would be 1 and the rows would cancel.
    expert_rows = torch.tensor([[1.0], [-1.0]], dtype=torch.bfloat16)
    out = combine(expert_rows, torch.tensor([[0, 1]]), torch.tensor([[1 + 2.0**-9, 1.0]]))
    assert out.item() == 2.0**-9


def rounded_once(device):
    # 1 + 2^-11 + 2^-11 is 1 after each float16 rounding and 1 + 2^-10 when rounded once.
    expert_rows = torch.full((2, 1), 2.0**-11, dtype=torch.float16, device=device)
    rows = torch.tensor([[0, 1]], device=device)
    residual = torch.ones(1, 1, dtype=torch.float16, device=device)
    return combine(expert_rows, rows, torch.ones(1, 2, device=device), residual)


def test_the_residual_is_added_before_rounding():
    assert rounded_once("cpu").item() == 1 + 2.0**-10


def summed_in_order(device):
    # In float32 both 1 + 1e8 and 0.5 + 1e8 are 1e8: in any other order something is lost.
    expert_rows = torch.tensor([[1e8], [-1e8], [0.5]], device=device)
    rows = torch.tensor([[0, 1, 2]], device=device)
    residual = torch.ones(1, 1, device=device)
    return combine(expert_rows, rows, torch.ones(1, 3, device=device), residual)


def test_choices_are_summed_in_order_and_the_residual_last():
    assert summed_in_order("cpu").item() == 1.5


def test_the_result_has_the_wider_dtype():
    expert_rows, rows, gates, residual = problem(3, 4, 2, 8, torch.float16)
    assert combine(expert_rows, rows, gates).dtype == torch.float16
    assert combine(expert_rows, rows, gates, residual.float()).dtype == torch.float32


def test_a_token_does_not_depend_on_the_rest_of_the_batch():
    expert_rows, rows, gates, _ = problem(50, 4, 2, 16)
    whole = combine(expert_rows.float(), rows, gates.float())
    alone = combine(expert_rows.float(), rows[13:14], gates[13:14].float())
    assert torch.equal(whole[13:14], alone)


def poisoned_where_the_gate_is_zero(device, dtype=torch.float32):
    expert_rows, rows, gates, residual = problem(6, 4, 2, 8, dtype, device)
    with torch.no_grad():
        gates[1] = 0
        gates[4, 0] = 0
        expert_rows[rows[gates == 0]] = torch.nan
    return expert_rows, rows, gates, residual


def check_rows_of_zero_gates_are_not_read(device):
    expert_rows, rows, gates, residual = poisoned_where_the_gate_is_zero(device)
    out = combine(expert_rows, rows, gates, residual)
    clean = expert_rows.detach().nan_to_num(0).requires_grad_()
    expected = combine_eager(clean, rows, gates, residual)
    assert_near(out, expected, torch.float32)
    assert torch.equal(out[1], residual[1])
    found = gradients(out, expert_rows, gates)
    assert not found[0][rows[gates == 0]].any()
    assert not found[1][gates == 0].any()
    for ours, theirs in zip(found, gradients(expected, clean, gates), strict=True):
        assert_near(ours, theirs, torch.float32)


def test_rows_of_zero_gates_are_not_read():
    check_rows_of_zero_gates_are_not_read("cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gates": torch.ones(3, 1)}, r"gates \(3, 1\)"),
        ({"expert_rows": torch.ones(6)}, r"expert rows are \(6,\)"),
        ({"residual": torch.ones(3, 7)}, r"residual is \(3, 7\).*\(3, 8\)"),
    ],
    ids=["gates", "expert rows", "residual"],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    names = ("expert_rows", "rows", "gates", "residual")
    arguments = dict(zip(names, problem(3, 4, 2, 8), strict=True))
    with pytest.raises(ConfigError, match=message):
        combine(**arguments | change)


def check_kernel(expert_rows, rows, gates, residual):
    """Compare with the definition; return what the kernel gave."""
    inputs = [t for t in (expert_rows, gates, residual) if t is not None]
    ours = combine(expert_rows, rows, gates, residual)
    theirs = combine_eager(expert_rows, rows, gates, residual)
    assert ours.dtype == theirs.dtype
    assert_near(ours, theirs, expert_rows.dtype)
    found = gradients(ours, *inputs)
    expected = gradients(theirs, *inputs)
    for what, mine, other in zip(("rows", "gates", "residual"), found, expected, strict=False):
        assert mine.dtype == other.dtype
        assert_near(mine, other, expert_rows.dtype, f"gradient of the {what}")
    return ours, *found


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("name", KERNEL_SHAPES)
def test_kernel(name, dtype, kernel_device):
    expert_rows, rows, gates, residual = problem(*KERNEL_SHAPES[name], dtype, kernel_device)
    check_kernel(expert_rows, rows, gates, residual)
    check_kernel(expert_rows, rows, gates, None)


@pytest.mark.triton
def test_kernel_in_bfloat16(kernel_device):
    check_kernel(*problem(5, 4, 2, 16, torch.bfloat16, kernel_device))


@pytest.mark.triton
def test_kernel_with_gates_in_the_dtype_of_the_rows(kernel_device):
    expert_rows, rows, gates, residual = problem(5, 4, 2, 16, torch.float16, kernel_device)
    gates = gates.detach().half().requires_grad_()
    assert check_kernel(expert_rows, rows, gates, residual)[2].dtype == torch.float16


@pytest.mark.triton
def test_kernel_with_a_residual_of_another_dtype(kernel_device):
    expert_rows, rows, gates, residual = problem(5, 4, 2, 16, torch.float16, kernel_device)
    residual = residual.detach().float().requires_grad_()
    out, *_, residual_grad = check_kernel(expert_rows, rows, gates, residual)
    assert out.dtype == residual_grad.dtype == torch.float32


@pytest.mark.triton
def test_kernel_repeats_its_bits(kernel_device):
    arguments = problem(33, 8, 4, 20, torch.float32, kernel_device)
    for first, second in zip(check_kernel(*arguments), check_kernel(*arguments), strict=True):
        assert torch.equal(first, second)


@pytest.mark.triton
def test_kernel_sums_in_order_and_rounds_once(kernel_device):
    assert rounded_once(kernel_device).item() == 1 + 2.0**-10
    assert summed_in_order(kernel_device).item() == 1.5


@pytest.mark.triton
def test_kernel_never_reads_rows_of_zero_gates(kernel_device):
    check_rows_of_zero_gates_are_not_read(kernel_device)


@pytest.mark.triton
def test_kernel_keeps_a_nan_in_its_token(kernel_device):
    expert_rows, rows, gates, residual = problem(33, 8, 2, 20, torch.float32, kernel_device)
    with torch.no_grad():
        expert_rows[rows[7, 1]] = torch.nan
    out = combine(expert_rows, rows, gates, residual)
    touched = out.isnan().any(1).nonzero().flatten().tolist()
    assert touched == [7]


@pytest.mark.triton
def test_kernel_takes_any_strides(kernel_device):
    expert_rows, rows, gates, residual = problem(9, 4, 2, 8, torch.float32, kernel_device)
    contiguous = check_kernel(expert_rows, rows, gates, residual)
    spread = [
        torch.stack([t.detach(), torch.full_like(t, torch.nan)], -1)[..., 0].requires_grad_()
        for t in (expert_rows, gates, residual)
    ]
    assert not any(t.is_contiguous() for t in spread)
    strided_rows = torch.stack([rows, rows], -1)[..., 0]
    strided = check_kernel(spread[0], strided_rows, spread[1], spread[2])
    for ours, theirs in zip(strided, contiguous, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.triton
def test_kernel_takes_a_gradient_of_stride_zero(kernel_device):
    expert_rows, rows, gates, _ = problem(9, 4, 2, 8, torch.float32, kernel_device)
    found = torch.autograd.grad(combine(expert_rows, rows, gates).sum(), (expert_rows, gates))
    by_claim = gates.flatten()[rows.flatten().argsort()]
    assert_near(found[0], by_claim[:, None].expand(18, 8), torch.float32)
    assert_near(found[1], expert_rows.sum(1)[rows], torch.float32)


@pytest.mark.triton
def test_kernel_gives_rows_without_a_claim_no_gradient(kernel_device):
    expert_rows, rows, gates, _ = problem(9, 4, 2, 8, torch.float32, kernel_device)
    check_kernel(expert_rows, rows[2:5], gates.detach()[2:5].requires_grad_(), None)


def by_hand_without_expert_rows(grad, rows, gates, expert_ids, down_bias, partials):
    grad_rows, grad_gates = torch.zeros(rows.numel(), grad.shape[1]), torch.zeros(rows.shape)
    for t, k in (gates != 0).nonzero().tolist():
        row = rows[t, k]
        grad_rows[row] = gates[t, k] * grad[t].float()
        grad_gates[t, k] = partials[row].sum()
        if down_bias is not None:
            grad_gates[t, k] += grad[t].float() @ down_bias[expert_ids[t, k]].float()
    return grad_rows, grad_gates


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(
    ("tokens", "d_model", "num_partials"),
    [(0, 8, 3), (7, 8, 1), (33, 20, 3), (3, 1030, 130)],
    ids=["no token", "one partial", "blocks of rows", "blocks of columns and of partials"],
)
def test_gradients_without_expert_rows(
    tokens, d_model, num_partials, with_bias, dtype, kernel_device
):
    from moe_mt.kernels.combine import combine_grad

    expert_ids = torch.randint(0, 5, (tokens, 2), dtype=torch.int32)
    _, rows, _ = expert_order(expert_ids, 4)
    gates = torch.rand(tokens, 2).masked_fill(expert_ids == 4, 0)
    grad = torch.randn(tokens, d_model, dtype=dtype)
    down_bias = torch.randn(4, d_model, dtype=dtype) if with_bias else None
    partials = torch.randn(tokens * 2, num_partials)
    partials[rows[expert_ids == 4]] = torch.nan
    arguments = (grad, rows, gates, expert_ids, down_bias, partials)
    found = combine_grad(*(None if t is None else t.to(kernel_device) for t in arguments))
    expected = by_hand_without_expert_rows(*arguments)
    assert [t.dtype for t in found] == [dtype, torch.float32]
    assert_near(found[0], expected[0].to(dtype), dtype, "gradient of the rows")
    assert_near(found[1], expected[1], torch.float32, "gradient of the gates")


@pytest.mark.triton
@pytest.mark.parametrize("tokens", [0, 5])
def test_kernel_as_an_operator(tokens, kernel_device):
    expert_rows, rows, gates, residual = problem(tokens, 4, 2, 8, torch.float32, kernel_device)
    operator = torch.ops.moe_mt.combine.default
    torch.library.opcheck(operator, (expert_rows, rows, gates, residual))
    torch.library.opcheck(operator, (expert_rows, rows, gates, None))
    grad = torch.randn(tokens, 8, device=kernel_device)
    backward = torch.ops.moe_mt.combine_backward.default
    torch.library.opcheck(backward, (grad, expert_rows.detach(), rows, gates.detach()))
    with torch.inference_mode():
        assert_near(
            combine(expert_rows, rows, gates), combine_eager(expert_rows, rows, gates), grad.dtype
        )
    on_meta = [t.detach().to("meta") for t in (expert_rows, rows, gates, residual)]
    assert combine(*on_meta).shape == (tokens, 8)


@pytest.mark.triton
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_kernel_compiles_without_a_break(dynamic, kernel_device):
    compiled = torch.compile(combine, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (5, 9):
        arguments = problem(tokens, 4, 2, 8, torch.float32, kernel_device)
        inputs = (arguments[0], arguments[2], arguments[3])
        ours, theirs = compiled(*arguments), combine_eager(*arguments)
        assert_near(ours, theirs, torch.float32)
        for mine, other in zip(gradients(ours, *inputs), gradients(theirs, *inputs), strict=True):
            assert_near(mine, other, torch.float32)
