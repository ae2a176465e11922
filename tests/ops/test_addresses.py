"""Where kernels read and write: 64 bits wide wherever a stack of weights or rows needs them."""

import ast
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import moe_mt
from moe_mt.ops import combine, expert_ffn, grouped_mm, permute, router_logits
from moe_mt.ops.expert_ffn import expert_ffn_eager
from tests.closeness import assert_near

pytest.importorskip("triton")

import triton
import triton.language as tl

from moe_mt.kernels._tiles import element_offset, row_blocks_of, tile_of, tile_offsets

pytestmark = pytest.mark.triton


@triton.jit
def _offsets_kernel(indices_ptr, offsets_ptr, stride, COUNT: tl.constexpr):
    """offsets = indices * stride."""
    places = tl.arange(0, COUNT)
    indices = tl.load(indices_ptr + places)
    tl.store(offsets_ptr + places, element_offset(indices, stride))


@triton.jit
def _program_offsets_kernel(offsets_ptr, first, stride):
    """offsets[p] = (first + p) * stride, with an index that is no block."""
    program = tl.program_id(0)
    tl.store(offsets_ptr + program, element_offset(first + program, stride))


# Index and stride, and what their product is the first of.
PRODUCTS = {
    "the last element that 32 bits reach": (1, 2**31 - 1),
    "one expert of the 54B too many": (128, 8192 * 2048),
    "the last expert of a fused stack of 2^32 elements": (127, 2 * 8192 * 2048),
    "one expert more, which 32 bits would take for the first one": (128, 2 * 8192 * 2048),
    "a hidden row of a large training batch": (2**18 + 5, 8192),
    "a stride that does not fit 32 bits itself": (3, 2**31 + 16),
    "nothing": (0, 2**31 - 1),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_an_offset_is_64_bits_wide(name, kernel_device):
    index, stride = PRODUCTS[name]
    indices = torch.tensor([index, 0, 1, index], dtype=torch.int32, device=kernel_device)
    found = torch.empty(4, dtype=torch.int64, device=kernel_device)
    _offsets_kernel[(1,)](indices, found, stride, COUNT=4)
    assert found.tolist() == [index * stride, 0, stride, index * stride]
    _program_offsets_kernel[(4,)](found, index, stride)
    assert found.tolist() == [(index + program) * stride for program in range(4)]


@triton.jit
def _tile_addresses_kernel(
    addresses_ptr,
    first_row,
    first_column,
    stride_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """addresses = the offsets of a tile's elements, as kernels put them together."""
    first = element_offset(first_row, stride_row) + first_column
    found = first + tile_offsets(stride_row, BLOCK_ROWS, BLOCK_COLUMNS)
    own = tile_offsets(BLOCK_COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
    tl.store(addresses_ptr + own, found)


# First row, first column, stride.
TILES = {
    "the first": (0, 0, 24),
    "a ragged width": (7, 16, 51),
    "hidden rows beyond 2^31 elements": (2**18 + 5, 8128, 8192),
    "hidden rows beyond 2^32 elements": (2**19 + 5, 8128, 8192),
}


@pytest.mark.parametrize("name", TILES)
def test_the_elements_of_a_tile(name, kernel_device):
    row, column, stride = TILES[name]
    found = torch.empty(16, 32, dtype=torch.int64, device=kernel_device)
    _tile_addresses_kernel[(1,)](found, row, column, stride, BLOCK_ROWS=16, BLOCK_COLUMNS=32)
    rows, columns = torch.arange(16)[:, None] + row, torch.arange(32) + column
    assert torch.equal(found.cpu(), rows * stride + columns)


@triton.jit
def _schedule_kernel(
    offsets_ptr,
    blocks_ptr,
    schedule_ptr,
    num_experts,
    num_columns,
    E_PADDED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """blocks = row blocks of each expert; row i of schedule says what tile i is."""
    blocks = row_blocks_of(offsets_ptr, num_experts, E_PADDED, BLOCK_ROWS)
    tl.store(blocks_ptr + tl.arange(0, E_PADDED), blocks)
    for tile in tl.range(tl.program_id(0), tl.sum(blocks, 0) * num_columns, tl.num_programs(0)):  # pyright: ignore[reportGeneralTypeIssues]
        expert, row_block, column_block, first_row, last_row = tile_of(
            tile, blocks, num_columns, offsets_ptr, E_PADDED, BLOCK_ROWS
        )
        row_ptr = schedule_ptr + tile * 5
        tl.store(row_ptr, expert.to(tl.int64))
        tl.store(row_ptr + 1, row_block.to(tl.int64))
        tl.store(row_ptr + 2, column_block.to(tl.int64))
        tl.store(row_ptr + 3, first_row)
        tl.store(row_ptr + 4, last_row)


def some_of(num_experts, rows):
    """``rows`` rows for every fourth expert, from the second one on."""
    return [rows * (expert % 4 == 1) for expert in range(num_experts)]


# Rows of each expert, column blocks, rows of a block.
SCHEDULES = {
    "one expert, one row": ([1], 1, 16),
    "one expert, a block and a row": ([17], 2, 16),
    "one expert without rows": ([0], 3, 16),
    "three experts, the middle one idle": ([5, 0, 33], 3, 16),
    "three experts, the first and the last idle": ([0, 20, 0], 2, 16),
    "blocks that are just full": ([16, 32, 16], 1, 16),
    "eight experts, ragged": ([3, 0, 17, 16, 0, 1, 40, 15], 2, 16),
    "eight experts, all rows with the last one": ([0] * 7 + [70], 2, 32),
    "eight experts without rows": ([0] * 8, 4, 16),
    "the 54B's experts, a row for some": (some_of(128, 1), 1, 16),
    "the 54B's experts, all rows with the last one": ([0] * 127 + [130], 3, 128),
    "the 54B's experts, more rows than a block for some": (some_of(128, 65), 1, 64),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_tile_is_walked_once_and_in_order(name, kernel_device):
    rows, num_columns, block_rows = SCHEDULES[name]
    offsets = torch.tensor([0, *rows]).cumsum(0)
    expected = []
    for expert, (first, last) in enumerate(pairwise(offsets.tolist())):
        row_blocks = range(-(-(last - first) // block_rows))
        expected += [
            [expert, row_block, column_block, first, last]
            for column_block in range(num_columns)
            for row_block in row_blocks
        ]
    e_padded = triton.next_power_of_2(len(rows))
    blocks = torch.empty(e_padded, dtype=torch.int32, device=kernel_device)
    # With room for tiles that should not be there.
    room = 4 * (len(rows) + 1)
    schedule = torch.full((len(expected) + room, 5), -1, device=kernel_device)
    _schedule_kernel[(3,)](
        offsets.to(kernel_device),
        blocks,
        schedule,
        len(rows),
        num_columns,
        E_PADDED=e_padded,
        BLOCK_ROWS=block_rows,
    )
    padded = [*rows, *[0] * (e_padded - len(rows))]
    assert blocks.tolist() == [-(-count // block_rows) for count in padded]
    assert schedule.tolist() == [*expected, *[[-1] * 5] * room]


# Far apart: what lies two strides away would, in 32 bits, wrap to 32 elements before the first.
FAR, COUNT = 2**31 - 16, 3
ROOM = 16 * 1024


def far_apart(near, memory, place=1):
    """Return a copy of ``near`` (COUNT, ...) whose first axis has stride ``FAR``."""
    assert near.shape[0] == COUNT
    far = memory.as_strided(near.shape, (FAR, *near.stride()[1:]), 1024 * place)
    far.copy_(near)
    return far


@pytest.fixture
def memory(kernel_device):
    """9 GB of addresses; a CPU keeps only the pages that are written."""
    torch.use_deterministic_algorithms(False)  # Which would fill all of it.
    memory = torch.empty(2 * FAR + ROOM, dtype=torch.float16, device=kernel_device)
    torch.use_deterministic_algorithms(True)
    return memory


@pytest.mark.parametrize("gated", [False, True], ids=["relu", "swiglu"])
@pytest.mark.parametrize("tokens", [4, 20], ids=["few tokens", "many tokens"])
def test_experts_far_apart(tokens, gated, memory, kernel_device):
    shapes = {"up_proj": (24, 16), "down_proj": (16, 24), "up_bias": (24,), "down_bias": (16,)}
    if gated:
        shapes |= {"gate_proj": (24, 16), "gate_bias": (24,)}
    near, far = {}, {}
    for place, (name, shape) in enumerate(shapes.items(), start=1):
        near[name] = torch.randn(COUNT, *shape).half().to(kernel_device).requires_grad_()
        far[name] = far_apart(near[name].detach(), memory, place).requires_grad_()
    x = torch.randn(tokens, 16).half().to(kernel_device).requires_grad_()
    expert_ids = torch.tensor([[0, 2], [2, 1], [1, 2]], dtype=torch.int32).repeat(7, 1)
    expert_ids = expert_ids[:tokens].to(kernel_device)
    gates = torch.rand(tokens, 2).to(kernel_device)
    options = {"activation": "silu" if gated else "relu"}
    expected = expert_ffn_eager(x, expert_ids, gates, **near, **options)
    with torch.no_grad():
        assert_near(expert_ffn(x, expert_ids, gates, **far, **options), expected, x.dtype)
    found = expert_ffn(x, expert_ids, gates, **far, **options)
    grad = torch.randn_like(found)
    right = torch.autograd.grad(expected, [x, *near.values()], grad)
    for name, ours, theirs in zip(
        ["x", *near],
        torch.autograd.grad(found, [x, *far.values()], grad),
        right,
        strict=True,
    ):
        assert_near(ours, theirs, x.dtype, f"gradient of {name}")


def test_weights_of_a_grouped_product_far_apart(memory, kernel_device):
    weight = torch.randn(COUNT, 24, 16).half().to(kernel_device)
    x = torch.randn(40, 16).half().to(kernel_device)
    offsets = torch.tensor([0, 7, 7, 40], device=kernel_device)
    found = grouped_mm(x, far_apart(weight, memory), offsets)
    assert_near(found[7:], x[7:] @ weight[2].T, x.dtype)
    assert_near(found[:7], x[:7] @ weight[0].T, x.dtype)


def test_rows_far_apart(memory, kernel_device):
    near = torch.randn(COUNT, 16).half().to(kernel_device)
    far = far_apart(near, memory)
    weight = torch.randn(8, 16, device=kernel_device)
    assert_near(router_logits(far, weight), near.float() @ weight.T, torch.float32)
    order = torch.arange(COUNT - 1, -1, -1, device=kernel_device)
    assert torch.equal(permute(far, order, order[:, None]), near.flip(0))
    ones = torch.ones(COUNT, 1, device=kernel_device)
    assert torch.equal(combine(far, order[:, None], ones), near.flip(0))
    assert torch.equal(combine(near * 0, order[:, None], ones, far), near)


# Whatever may be large: what counts experts, rows, tokens and claims, and what a row is long.
INDICES = {"expert", "row", "token", "claim", "program", "owner", "turn", "source"}
LENGTHS = {"d_model", "ffn_dim", "inner", "outer", "num_experts", "num_columns", "num_partials"}
NARROW = {
    ("_tiles.py", "tile_offsets"): "rows inside one tile",
    ("decode.py", "hidden_row * FFN_DIM"): "one of the K hidden rows of a token",
    (
        "_tiles.py",
        "tl.sum(tl.where(tl.arange(0, E_PADDED) < expert, tiles, 0), 0) * num_columns",
    ): "counts tiles, of which there are fewer than rows",
}


def narrow_products(source, file="kernel.py"):
    """Return the products in jit functions that might need more than 32 bits and do not say so.

    A product with a stride must be ``element_offset``'s, unless the other factor is a constant; a
    product of an index with a length must be, or be made of something ``.to(tl.int64)``.
    """
    found = []
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef) and any(
            "jit" in ast.unparse(decorator) for decorator in function.decorator_list
        ):
            if (file, function.name) not in NARROW:
                found += [
                    ast.unparse(node)
                    for node in ast.walk(function)
                    if isinstance(node, ast.BinOp)
                    and isinstance(node.op, ast.Mult)
                    and (file, ast.unparse(node)) not in NARROW
                    and _is_narrow(node.left, node.right)
                ]
    return found


def _is_narrow(left, right):
    if any("int64" in ast.unparse(factor) for factor in (left, right)):
        return False
    for factor, other in ((left, right), (right, left)):
        names, others = _names(factor), _names(other)
        if any(name.startswith("stride") for name in names):
            called = any(isinstance(node, ast.Call) for node in ast.walk(other))
            return called or not all(name.isupper() for name in others)
        if any(name.lower() in LENGTHS for name in names):
            return bool(INDICES & {part for name in others for part in _parts(name)})
    return False


def _names(node):
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name)} - {"tl"}


def _parts(name):
    """``safe_rows`` is of rows; ``row_block`` and ``num_rows`` are not."""
    last = name.split("_")[-1]
    return {last, last.removesuffix("s")} if not name.startswith("num_") else set()


def test_no_kernel_multiplies_an_index_in_32_bits():
    folder = Path(moe_mt.__file__).parent / "kernels"
    files = sorted(folder.rglob("*.py"))
    assert len(files) > 10
    found = {file.name: narrow_products(file.read_text("utf-8"), file.name) for file in files}
    assert not {name: products for name, products in found.items() if products}


@pytest.mark.parametrize(
    ("line", "is_narrow"),
    [
        ("x = x_ptr + expert * stride_expert", True),
        ("x = x_ptr + rows[:, None] * stride_row + columns[None, :]", True),
        ("x = x_ptr + stride_row * (first_row + row_block * BLOCK_ROWS)", True),
        ("x = out_ptr + tokens * d_model", True),
        ("x = out_ptr + tl.program_id(0) * stride_row", True),
        ("x = out_ptr + safe_rows * D_MODEL", True),
        ("x = x_ptr + element_offset(expert, stride_expert)", False),
        ("x = out_ptr + (expert.to(tl.int64) * outer + columns) * inner", False),
        ("step = BLOCK_INNER * stride_row", False),
        ("x = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)", False),
    ],
)
def test_what_is_taken_for_narrow(line, is_narrow):
    assert bool(narrow_products(f"@triton.jit\ndef kernel():\n    {line}\n")) == is_narrow
