"""Products over packed weights: right, and the same for a row alone and in any batch."""

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from moe_mt.errors import ConfigError
from moe_mt.ops import PACKED_KINDS, pack_weight, packed_linear, packing_obstacle, quantize_rows
from moe_mt.ops.packed_linear import _PackedInt8

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

pytestmark = pytest.mark.skipif(
    any(packing_obstacle(kind, CPU) for kind in PACKED_KINDS),
    reason="weights cannot be packed on this machine",
)

SHAPES = {
    "one feature to one": (1, 1),
    "attention of the tiny model": (160, 160),
    "no multiple of a vector": (1000, 3001),
    "longest lone row that is summed like others": (1024, 64),
    "one longer, which is not": (1025, 64),
    "down projection": (4096, 1024),
    "head with an odd vocabulary": (64, 25603),
}


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def case(shape, rows=5, seed=0):
    width, out = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    weight = torch.randn(out, width, generator=generator) / width**0.5
    return x, weight, torch.randn(out, generator=generator)


def square_case(seed, rows=5):
    return case((16, 16), rows, seed)


def int8_bound(x, weight, steps):
    """Return the most that an element of the int8 product may be off, (..., out) float64.

    An input is off by at most half a step of its row's largest magnitude, a weight by half a step
    of its row's; the product of sums is off by |x| dw + |w| dx + dx dw a feature. What float32
    adds is below a thousandth of that at these widths.
    """
    x, weight = x.double(), weight.double()
    dx = x.abs().amax(-1, keepdim=True) / (2 * steps)
    dw = weight.abs().amax(-1) / (2 * 127)
    width = x.shape[-1]
    of_weights = x.abs().sum(-1, keepdim=True) * dw
    of_inputs = weight.abs().sum(-1) * dx
    return 1.001 * (of_weights + of_inputs + width * dx * dw)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_float32_is_as_near_to_the_exact_product_as_a_plain_one(shape):
    x, weight, bias = case(shape)
    exact = functional.linear(x.double(), weight.double(), bias.double())
    found = packed_linear(x, pack_weight(weight, "float32"), bias)
    # Sums of n products of float32 are off by at most n roundings of the sum of magnitudes.
    magnitudes = functional.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
    bound = (shape[0] + 1) * torch.finfo(torch.float32).eps / 2 * magnitudes
    assert ((found - exact).abs() <= bound).all()
    plain = functional.linear(x, weight, bias)
    # Another order of summing is worth a small factor.
    assert (found - exact).norm() <= 4 * (plain - exact).norm()


@pytest.mark.parametrize("steps", [63, 127], ids=["7 bits", "8 bits"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_int8_is_off_by_no_more_than_its_steps(shape, steps):
    if steps == 127 and _PackedInt8(torch.ones(1, 4))._steps == 63:
        pytest.skip("eight bits saturate on this processor and are not used")
    x, weight, bias = case(shape)
    found = _PackedInt8(weight, steps).multiply(x, bias, False)
    exact = functional.linear(x.double(), weight.double(), bias.double())
    assert ((found - exact).abs() <= int8_bound(x, weight, steps)).all()


def test_int8_does_not_saturate_where_all_signs_are_equal():
    # The worst case of sums in 16 bits: neighbours add up, and nothing cancels.
    x, weight, _ = case((512, 64))
    x, weight = x.abs() + 3, weight.abs() + 1
    packed = pack_weight(weight, "int8-dynamic")
    exact = x.double() @ weight.double().T
    assert ((packed_linear(x, packed) - exact).abs() <= int8_bound(x, weight, packed._steps)).all()


def test_int8_scales_every_row_by_itself():
    x, weight, bias = case((64, 32))
    packed = pack_weight(weight, "int8-dynamic")
    scales = torch.tensor([1e-30, 1e-6, 1.0, 1e6, 1e30])[:, None]
    exact = (x * scales).double() @ weight.double().T
    error = (packed_linear(x * scales, packed) - exact).abs()
    assert (error <= int8_bound(x * scales, weight, packed._steps)).all()
    # A row of zeros, and one too small to be divided by.
    x[0], x[1] = 0, 1e-45
    assert torch.equal(packed_linear(x, packed, bias)[:2], bias.expand(2, -1))


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_what_is_not_finite_stays_in_its_row(kind):
    x, weight, bias = case((64, 32))
    packed = pack_weight(weight, kind)
    before = packed_linear(x, packed, bias)
    x[1, 3], x[3, 5] = torch.inf, torch.nan
    after = packed_linear(x, packed, bias)
    assert torch.equal(after[::2], before[::2])
    assert not after[1::2].isfinite().any()


@pytest.mark.parametrize("kind", PACKED_KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_row_is_the_same_alone_and_in_any_batch(kind, shape):
    x, weight, bias = case(shape, rows=300 if shape[0] * shape[1] < 3_000_000 else 70)
    packed = pack_weight(weight, kind)
    for relu in (False, True):
        whole = packed_linear(x, packed, bias, relu=relu)
        for start, stop in ((0, 1), (1, 3), (3, 7), (7, 15), (15, 32), (32, 65), (5, 70)):
            assert torch.equal(
                packed_linear(x[start:stop], packed, bias, relu=relu), whole[start:stop]
            )


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_a_row_is_the_same_on_any_number_of_threads_and_in_any_layout(kind):
    x, weight, bias = case((1100, 500), rows=40)
    packed = pack_weight(weight, kind)
    whole = packed_linear(x, packed, bias)
    assert torch.equal(packed_linear(x.view(2, 4, 5, 1100), packed, bias).view(40, 500), whole)
    assert torch.equal(packed_linear(x.T.contiguous().T, packed, bias), whole)
    unaligned = torch.cat([torch.zeros(1), x.flatten()])[1:].view(40, 1100)
    assert torch.equal(packed_linear(unaligned, packed, bias), whole)
    alone = packed_linear(x[3].view(1, 1, 1100), packed, bias)
    assert alone.shape == (1, 1, 500)
    assert torch.equal(alone[0, 0], whole[3])
    before = torch.get_num_threads()
    torch.set_num_threads(2 if before == 1 else 1)
    try:
        assert torch.equal(packed_linear(x, packed, bias), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_relu_keeps_the_positive_part_of_the_sum_with_the_bias(kind):
    x, weight, bias = case((160, 96))
    packed = pack_weight(weight, kind)
    found = packed_linear(x, packed, bias, relu=True)
    assert torch.equal(found, packed_linear(x, packed, bias).relu())
    assert (found == 0).any()
    assert packed_linear(x[:0], packed, bias).shape == (0, 96)


def test_rows_are_quantised_to_the_nearest_of_255():
    weight = torch.tensor([[1.0, -0.5, 0.0], [0.0, 0.0, 0.0], [-254.0, 3.0, 5.0]])
    rows, scale = quantize_rows(weight)
    assert rows.tolist() == [[127, -64, 0], [0, 0, 0], [-127, 2, 2]]
    assert scale[[0, 2]].tolist() == pytest.approx([1 / 127, 2.0])
    # More rows than are quantised at a time.
    weight = torch.randn(3000, 2000, generator=torch.Generator().manual_seed(1))
    rows, scale = quantize_rows(weight)
    assert ((rows * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()


def test_the_engine_that_a_process_chose_is_left_as_it_was():
    engines = torch.backends.quantized
    before = engines.engine
    try:
        for engine in set(engines.supported_engines) - {"none"}:
            engines.engine = engine
            x, weight, _ = case((64, 32))
            packed = pack_weight(weight, "int8-dynamic")
            assert engines.engine == engine
            assert packed_linear(x, packed).shape == (5, 32)
    finally:
        engines.engine = before


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_packed_weights_are_shared_by_copies_and_not_pickled(kind):
    packed = pack_weight(torch.ones(4, 4), kind)
    assert copy.deepcopy(packed) is packed
    with pytest.raises(ConfigError, match="save the model before it is packed"):
        pickle.dumps(packed)


@pytest.mark.parametrize(
    ("kind", "device", "dtype", "obstacle"),
    [
        ("float32", CUDA, torch.float32, "for the CPU, and the device is 'cuda'"),
        ("int8-dynamic", CPU, torch.bfloat16, "the dtype is torch.bfloat16"),
    ],
)
def test_what_cannot_be_packed_is_said_in_words(kind, device, dtype, obstacle):
    assert obstacle in packing_obstacle(kind, device, dtype)


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_operators_that_this_torch_lacks(monkeypatch, kind):
    # The door's function hides the file of the same name.
    file = sys.modules["moe_mt.ops.packed_linear"]
    monkeypatch.setattr(file, "_has_operator", lambda name: False)
    with pytest.raises(ConfigError, match="lacks the operator"):
        pack_weight(torch.ones(2, 2), kind)


def test_bad_requests():
    packed = pack_weight(torch.ones(4, 3), "float32")
    with pytest.raises(ConfigError, match="choose from float32, int8-dynamic"):
        pack_weight(torch.ones(2, 2), "int4")
    with pytest.raises(ConfigError, match="must be"):
        pack_weight(torch.ones(2), "float32")
    with pytest.raises(ConfigError, match=r"x is \(2, 4\)"):
        packed_linear(torch.ones(2, 4), packed)
    with pytest.raises(ConfigError, match=r"bfloat16 on cpu and the weight is packed"):
        packed_linear(torch.ones(2, 3, dtype=torch.bfloat16), packed)


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_a_gradient_is_refused(kind):
    packed = pack_weight(torch.ones(4, 3), kind)
    out = packed_linear(torch.ones(2, 3, requires_grad=True), packed)
    with pytest.raises(NotImplementedError, match="packed weights have no gradient"):
        out.sum().backward()


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_operator_keeps_the_rules_of_operators(kind):
    x, weight, bias = case((1030, 24))
    packed = pack_weight(weight, kind)
    operator = torch.ops.moe_mt.packed_linear.default
    for rows in (x, x[:1], x.view(1, 5, 1030)):
        torch.library.opcheck(operator, (rows, packed.handle, 24, bias, True))
    torch.library.opcheck(operator, (x, packed.handle, 24, None, False))


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_layers_compile_to_one_graph_for_all_batches(kind):
    graphs = 0

    def counting(module, inputs):
        nonlocal graphs
        graphs += 1
        return module.forward

    layers = [(pack_weight(weight, kind), bias) for _, weight, bias in map(square_case, range(3))]

    def run(x):
        for packed, bias in layers:
            x = packed_linear(x, packed, bias, relu=True)
        return x

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend=counting, dynamic=True)
    x = square_case(4, rows=9)[0]
    for rows in (x, x[:7], x[:2], x[:5]):
        assert torch.equal(compiled(rows), run(rows))
    assert graphs == 1
    torch.compiler.reset()


def test_inputs_of_many_lengths_do_not_pile_up_code():
    # oneDNN writes code for every number of rows, half a megabyte and more each at this size.
    weight = pack_weight(torch.randn(1024, 1024), "float32")
    inputs = torch.randn(300, 1024)
    packed_linear(inputs[:1], weight)
    before = anonymous_bytes()
    for rows in range(1, 301):
        packed_linear(inputs[:rows], weight)
    assert anonymous_bytes() - before < 80e6
