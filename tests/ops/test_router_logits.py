import pytest
import torch

from moe_mt.errors import ConfigError
from moe_mt.ops import router_logits
from moe_mt.ops.backend import use_backend
from moe_mt.ops.router_logits import router_logits_eager
from tests.closeness import assert_near, relative_difference

SHAPES = {
    "no token": (0, 4, 16),
    "one token, one expert": (1, 1, 64),
    "two tokens, two experts, a width below every block": (2, 2, 5),
    "tokens, experts and width that are no multiple of a block": (7, 5, 70),
    "one token more than two blocks of 16": (33, 8, 64),
    "one token more than the blocks of a big batch, all experts of the 54B": (129, 128, 96),
}

DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float16 tokens": (torch.float16, torch.float32),
    "bfloat16 tokens: the weight is split": (torch.bfloat16, torch.float32),
    "a bfloat16 model: one product is exact": (torch.bfloat16, torch.bfloat16),
    "a float16 model": (torch.float16, torch.float16),
    "float32 tokens, bfloat16 weight": (torch.float32, torch.bfloat16),
    "bfloat16 tokens, float16 weight": (torch.bfloat16, torch.float16),
}


def inputs(shape, x_dtype=torch.float32, weight_dtype=torch.float32, device="cpu"):
    tokens, experts, d_model = shape
    generator = torch.Generator().manual_seed(5)
    # Not around zero: a lone score that cancels to nothing would be compared with nothing.
    x = (torch.randn(tokens, d_model, generator=generator) + 0.5).to(device, x_dtype)
    weight = (torch.randn(experts, d_model, generator=generator) + 0.5).to(device, weight_dtype)
    bias = torch.randn(experts, generator=generator).to(device, weight_dtype)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


@pytest.mark.parametrize("with_bias", [False, True])
def test_definition_by_hand(with_bias):
    x, weight, bias = inputs((3, 2, 4))
    found = router_logits_eager(x, weight, bias if with_bias else None)
    for t in range(3):
        for e in range(2):
            score = sum(x[t, i].item() * weight[e, i].item() for i in range(4))
            score += bias[e].item() if with_bias else 0
            assert found[t, e].item() == pytest.approx(score, rel=1e-5)


def test_definition_computes_in_the_dtype_it_is_told():
    x, weight, bias = inputs((4, 3, 8), torch.bfloat16, torch.float32)
    assert router_logits_eager(x, weight, bias).dtype == torch.float32
    found = router_logits_eager(x, weight, bias, dtype=torch.float64)
    torch.testing.assert_close(found, x.double() @ weight.double().T + bias.double())
    halves = router_logits_eager(x, weight, bias, dtype=torch.bfloat16)
    assert halves.dtype == torch.bfloat16
    assert relative_difference(halves, found) > 1e-4


def test_definition_has_its_gradients():
    x, weight, bias = (tensor.detach().double().requires_grad_() for tensor in inputs((3, 2, 4)))
    assert torch.autograd.gradcheck(
        lambda *given: router_logits_eager(*given, dtype=torch.float64), (x, weight, bias)
    )


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 4), (2, 5), None), r"\(2, 5\)"),
        (((2, 3, 4), (2, 4), None), r"\(2, 3, 4\)"),
        (((3, 4), (2, 4), (3,)), r"bias is \(3,\); it must be \(2,\)"),
    ],
)
def test_what_does_not_fit_together_is_named(shapes, message):
    tensors = [None if shape is None else torch.zeros(shape) for shape in shapes]
    with pytest.raises(ConfigError, match=message):
        router_logits(*tensors)


def outputs_and_gradients(operation, tensors, **options):
    found = operation(*tensors, **options)
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(6)).to(found)
    wanted = [tensor for tensor in tensors if tensor is not None]
    return found, torch.autograd.grad(found, wanted, grad)


@pytest.mark.triton
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_kernel_is_its_definition(kernel_device, shape, dtypes):
    tensors = inputs(SHAPES[shape], *DTYPES[dtypes], kernel_device)
    with use_backend("triton"):
        found, grads = outputs_and_gradients(router_logits, tensors)
    expected, expected_grads = outputs_and_gradients(router_logits_eager, tensors)
    assert found.dtype == torch.float32
    # float32 whatever the inputs are: they are taken as they are, only the sums differ.
    assert_near(found, expected, torch.float32)
    for name, mine, theirs in zip(("x", "weight", "bias"), grads, expected_grads, strict=True):
        assert mine.dtype == theirs.dtype
        assert_near(mine, theirs, theirs.dtype, f"gradient of {name}")


@pytest.mark.triton
def test_kernel_without_bias(kernel_device):
    x, weight, _ = inputs(SHAPES["one token more than two blocks of 16"], device=kernel_device)
    found, grads = outputs_and_gradients(router_logits, (x, weight, None))
    expected, expected_grads = outputs_and_gradients(router_logits_eager, (x, weight, None))
    assert_near(found, expected, torch.float32)
    for mine, theirs in zip(grads, expected_grads, strict=True):
        assert_near(mine, theirs, torch.float32)


@pytest.mark.triton
def test_three_terms_are_the_whole_float32_weight(kernel_device):
    # Products with one and zeros are exact: whatever is missing, the terms have lost.
    weight = inputs((0, 9, 64), device=kernel_device)[1].detach()
    found = router_logits(torch.eye(64, dtype=torch.bfloat16, device=kernel_device), weight)
    torch.testing.assert_close(found, weight.T, rtol=2**-23, atol=0)


@pytest.mark.triton
def test_three_terms_are_as_exact_as_float32(kernel_device):
    x = torch.randn(32, 512).to(kernel_device, torch.bfloat16)
    weight = torch.randn(16, 512).to(kernel_device)
    exact = x.double() @ weight.double().T
    assert relative_difference(router_logits(x, weight), exact) < 1e-6
    # What a weight in bfloat16 would have cost.
    assert relative_difference(router_logits(x, weight.bfloat16()), exact) > 1e-3


@pytest.mark.triton
def test_kernel_takes_strided_inputs(kernel_device):
    x, weight, bias = (tensor.detach() for tensor in inputs((7, 5, 70), device=kernel_device))
    expected = router_logits_eager(x, weight, bias)
    rows = torch.zeros(7, 140, device=kernel_device)[:, ::2].copy_(x)
    wide = torch.zeros(7, 99, device=kernel_device)[:, 11:81].copy_(x)
    wide_weight = torch.zeros(5, 80, device=kernel_device)[:, :70].copy_(weight)
    wide_bias = torch.zeros(10, device=kernel_device)[::2].copy_(bias)
    columns = weight.T.contiguous().T
    for strided in ((rows, columns, wide_bias), (wide, wide_weight, bias)):
        assert not strided[0].is_contiguous()
        assert_near(router_logits(*strided), expected, torch.float32)


@pytest.mark.triton
def test_kernel_s_gradient_takes_an_expanded_one(kernel_device):
    tensors = inputs((7, 5, 70), device=kernel_device)
    mine = torch.autograd.grad(router_logits(*tensors).sum(), tensors)
    theirs = torch.autograd.grad(router_logits_eager(*tensors).sum(), tensors)
    for found, expected in zip(mine, theirs, strict=True):
        assert_near(found, expected, torch.float32)


@pytest.mark.triton
def test_kernel_gives_the_same_bits_every_time(kernel_device):
    tensors = inputs((33, 8, 70), torch.bfloat16, torch.float32, kernel_device)
    first, again = router_logits(*tensors), router_logits(*tensors)
    assert torch.equal(first, again)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_keeps_a_nan_to_its_token(kernel_device, dtype):
    x, weight, bias = (t.detach() for t in inputs((7, 5, 70), dtype, device=kernel_device))
    expected = router_logits(x, weight, bias)
    x[3, 2] = torch.nan
    found = router_logits(x, weight, bias)
    assert found[3].isnan().all()
    others = torch.arange(7, device=kernel_device) != 3
    assert torch.equal(found[others], expected[others])


@pytest.mark.triton
def test_only_float32_logits_are_the_kernel_s(kernel_device):
    x, weight, bias = inputs((33, 8, 64), torch.bfloat16, torch.float32, kernel_device)
    found = router_logits(x, weight, bias, dtype=torch.bfloat16)
    expected = router_logits_eager(x, weight, bias, dtype=torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


@pytest.mark.triton
@pytest.mark.parametrize("with_bias", [False, True])
def test_kernel_is_an_operator(kernel_device, with_bias):
    x, weight, bias = inputs((7, 5, 20), torch.float16, torch.float32, kernel_device)
    operator = torch.ops.moe_mt.router_logits.default
    torch.library.opcheck(operator, (x, weight, bias if with_bias else None))


@pytest.mark.triton
@pytest.mark.parametrize("dynamic", [None, True])
def test_kernel_compiles_whole(kernel_device, dynamic):
    compiled = torch.compile(router_logits, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (3, 7):
        tensors = inputs((tokens, 5, 20), device=kernel_device)
        found, grads = outputs_and_gradients(compiled, tensors)
        expected, expected_grads = outputs_and_gradients(router_logits, tensors)
        assert torch.equal(found, expected)
        for mine, theirs in zip(grads, expected_grads, strict=True):
            assert_near(mine, theirs, torch.float32)


@pytest.mark.triton
def test_kernel_in_inference_mode_and_on_the_meta_device(kernel_device):
    x, weight, bias = inputs((7, 5, 20), device=kernel_device)
    with torch.inference_mode():
        assert_near(
            router_logits(x, weight, bias), router_logits_eager(x, weight, bias), torch.float32
        )
    shapes = router_logits(x.to("meta"), weight.to("meta"), bias.to("meta"))
    assert shapes.shape == (7, 5)
    assert shapes.is_meta
