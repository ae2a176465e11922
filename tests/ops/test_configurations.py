"""Tiles: the rule's are legal everywhere, tables come before it, grids are large enough."""

import itertools
import json
from dataclasses import asdict, replace

import pytest
import torch

from moe_mt.errors import ConfigError
from moe_mt.kernels import _configurations, _products
from moe_mt.kernels import expert_ffn as kernels
from moe_mt.kernels._candidates import MOST, candidates
from moe_mt.kernels._configurations import (
    BUCKETS,
    KINDS,
    SHIPPED_TABLE,
    TWO_WEIGHTS,
    Choice,
    Problem,
    Tile,
    choose_tile,
    memory_limit,
    memory_of,
    problem_of,
    programs_for,
    read_table,
    rule,
    use_tiles,
    user_table,
    write_table,
)
from moe_mt.kernels._launch import Accelerator, record_launches

H200 = Accelerator(arch="sm_90", multiprocessors=132)
ARCHES = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950", "interpreter")
SHAPES = ((8192, 2048), (2048, 8192), (768, 2048), (14336, 4096))
PROBLEMS = [
    Problem(
        arch=arch,
        kind=kind,
        dtype_bytes=dtype_bytes,
        outer=outer,
        inner=inner,
        rows_per_expert=rows,
    )
    for arch, kind, dtype_bytes, (outer, inner), rows in itertools.product(
        ARCHES, KINDS, (2, 4), SHAPES, BUCKETS
    )
]
PROBLEM = PROBLEMS[0]
TILE = Tile(rows=32, columns=64, inner=16, num_warps=2, num_stages=2)
FIRST, SECOND, THIRD = (replace(TILE, num_stages=stages) for stages in (3, 4, 5))


@pytest.fixture
def tables(monkeypatch, tmp_path):
    """Let both tables be files of the test's own: the user's, then the shipped one."""
    monkeypatch.setenv("MOE_MT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_configurations, "SHIPPED_TABLE", tmp_path / "shipped.json")
    _configurations._tables.cache_clear()
    yield tmp_path / "cache/tiles.json", tmp_path / "shipped.json"
    _configurations._tables.cache_clear()


def rows_of(number, dtype=torch.bfloat16):
    return torch.empty(number, 0, dtype=dtype, device="meta")


def weights_of(problem):
    return 2 if problem.kind in TWO_WEIGHTS else 1


# The rule


def test_the_rule_fits_every_problem_into_memory():
    # That sizes are powers of two and large enough for a matrix unit, a tile checks itself.
    for problem in PROBLEMS:
        tile = rule(problem)
        memory = memory_of(tile, problem.arch, problem.dtype_bytes, weights_of(problem))
        assert memory <= memory_limit(problem.arch), (problem, tile)


def test_the_rule_fills_the_matrix_units_of_hopper():
    # They take 64 left rows at once; of a weight's gradient all rows are left.
    for problem in PROBLEMS:
        tile = rule(problem)
        if problem.arch in ("sm_90", "sm_100") and problem.dtype_bytes == 2:
            assert (tile.columns if tile.swap else tile.rows) >= 64, (problem, tile)
        elif problem.arch in ("sm_80", "sm_86", "sm_120", "gfx942"):
            assert not tile.swap, (problem, tile)


def test_few_rows_leave_room_for_a_second_program():
    for problem in PROBLEMS:
        few = problem.rows_per_expert <= 16 and problem.dtype_bytes == 2
        if few and problem.kind != "grad_weight" and problem.arch != "interpreter":
            tile = rule(problem)
            memory = memory_of(tile, problem.arch, 2, weights_of(problem))
            assert 2 * memory <= memory_limit(problem.arch) or tile.num_stages == 2


@pytest.mark.parametrize(
    ("rows", "bucket"),
    [
        (0, 1),
        (200, 1),
        (201, 4),
        (800, 4),
        (801, 16),
        (2400, 16),
        (2401, 32),
        (4800, 32),
        (4801, 64),
        (9600, 64),
        (9601, 128),
        (10**6, 128),
    ],
)
def test_buckets(rows, bucket):
    assert problem_of("forward", rows_of(rows), 100, 8, 8).rows_per_expert == bucket


def test_a_tile_is_chosen_by_shape_and_device_alone():
    # Tensors on the meta device have no values that could be looked at.
    with record_launches(H200):
        found = problem_of("gated", rows_of(256, torch.float32), 8, 768, 2048)
        tile = choose_tile("gated", rows_of(256, torch.float32), 8, 768, 2048)
        assert programs_for(tile, rows_of(256, torch.float32), 8, 768, weights=2) > 0
    expected = Problem(
        arch="sm_90", kind="gated", dtype_bytes=4, outer=768, inner=2048, rows_per_expert=32
    )
    assert found == expected
    assert tile == rule(expected)


# Tables


def test_the_users_table_comes_before_the_shipped_one_and_both_before_the_rule(tables):
    users, shipped = tables
    problem = replace(PROBLEM, arch="sm_90", kind="forward", rows_per_expert=1)

    def chosen():
        with record_launches(H200):
            return choose_tile("forward", rows_of(8), 8, problem.outer, problem.inner)

    assert chosen() == rule(problem)
    write_table(shipped, {problem: Choice(tile=FIRST, why="shipped")})
    assert chosen() == FIRST
    write_table(users, {problem: Choice(tile=SECOND, why="measured")})
    assert chosen() == SECOND
    with use_tiles({problem: THIRD}):
        assert chosen() == THIRD
    assert chosen() == SECOND
    # A problem that no table knows is the rule's, whatever the tables hold.
    with record_launches(H200):
        assert choose_tile("gated", rows_of(8), 8, 32, 32).swap


def test_the_interpreter_asks_no_table(tables):
    users, _ = tables
    users.parent.mkdir()
    users.write_text("broken")
    problem = problem_of("forward", torch.empty(8, 0), 8, 64, 64)
    assert problem.arch == "interpreter"
    assert choose_tile("forward", torch.empty(8, 0), 8, 64, 64) == rule(problem)
    with use_tiles({problem: FIRST}):
        assert choose_tile("forward", torch.empty(8, 0), 8, 64, 64) == FIRST


def test_tables_are_written_and_read_whole(tables):
    users, _ = tables
    written = {problem: Choice(tile=rule(problem), why=str(problem)) for problem in PROBLEMS}
    write_table(users, written)
    assert read_table(users) == written
    assert list(users.parent.iterdir()) == [users]
    # One line a problem, sorted: two tables can be compared with diff.
    lines = users.read_text().splitlines()
    assert len(lines) == len(PROBLEMS) + 2
    backwards = dict(reversed(written.items()))
    write_table(users, backwards)
    assert users.read_text().splitlines() == lines


def test_without_a_table_there_is_nothing_in_it(tables):
    assert [read_table(path) for path in tables] == [{}, {}]


def test_the_shipped_table_says_why_of_every_row():
    for problem, choice in read_table(SHIPPED_TABLE).items():
        assert len(choice.why) > 20, problem
        assert choice.tile != rule(problem), f"{problem}: the rule says the same"


def test_the_users_table_is_in_the_home_folder_unless_said_otherwise(monkeypatch, tmp_path):
    monkeypatch.delenv("MOE_MT_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_table() == tmp_path / ".cache/moe_mt/tiles.json"
    monkeypatch.setenv("MOE_MT_CACHE", str(tmp_path / "elsewhere"))
    assert user_table() == tmp_path / "elsewhere/tiles.json"


ROW = {"problem": asdict(PROBLEM), "tile": asdict(TILE), "why": "measured"}


def with_tile(**sizes):
    return {**ROW, "tile": {**ROW["tile"], **sizes}}


BROKEN = {
    "no JSON": "[{",
    "no list of rows": "3",
    "a row that is none": "[3]",
    "no reason": [{name: ROW[name] for name in ("problem", "tile")}],
    "an unknown size": [with_tile(depth=3)],
    "a size that is no power of two": [with_tile(rows=24)],
    "a size below what matrix units take": [with_tile(inner=8)],
    "a size that is no number": [with_tile(columns="64")],
    "no stage": [with_tile(num_stages=0)],
    "a switch that is none": [with_tile(swap=1)],
    "an unknown kind": [{**ROW, "problem": {**ROW["problem"], "kind": "backward"}}],
    "a number of rows between two": [{**ROW, "problem": {**ROW["problem"], "rows_per_expert": 8}}],
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_table_is_named(what, tables):
    users, _ = tables
    users.parent.mkdir()
    content = BROKEN[what]
    users.write_text(content if isinstance(content, str) else json.dumps(content))
    with (
        pytest.raises(ConfigError, match="is not a table of tiles") as raised,
        record_launches(H200),
    ):
        choose_tile("forward", rows_of(8), 8, 64, 64)
    assert str(users) in str(raised.value)
    assert "moe-mt tune" in str(raised.value)


def test_a_row_of_the_right_form_is_no_broken_table(tables):
    # Or the cases above would show nothing.
    users, _ = tables
    users.parent.mkdir()
    users.write_text(json.dumps([ROW]))
    assert read_table(users) == {PROBLEM: Choice(tile=TILE, why="measured")}


def test_a_table_that_is_a_folder_is_named(tables):
    users, _ = tables
    users.mkdir(parents=True)
    with pytest.raises(ConfigError, match="IsADirectoryError"):
        read_table(users)


# Grids


def most_blocks(rows, num_experts, block):
    """Return the most row blocks over all ways to give at most ``rows`` rows to experts."""
    best = [0] * (rows + 1)
    for _ in range(num_experts):
        best = [
            max(best[left - own] + -(-own // block) for own in range(left + 1))
            for left in range(rows + 1)
        ]
    return best[rows]


@pytest.mark.parametrize("num_experts", [1, 2, 3, 8])
def test_the_bound_of_row_blocks_is_reached_and_never_passed(num_experts):
    many = Accelerator(arch="sm_90", multiprocessors=10**6)
    for rows in (0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 100):
        for block in (16, 32, 64):
            tile = replace(TILE, rows=block, columns=64)
            with record_launches(many):
                programs = programs_for(tile, rows_of(rows), num_experts, 130)
            assert programs == 3 * most_blocks(rows, num_experts, block), (rows, block)


def test_no_more_programs_than_run_at_once():
    tile = Tile(rows=16, columns=64, inner=128, num_warps=4, num_stages=4)
    with record_launches(H200):
        # 80 KB each; with a second weight 144 KB.
        assert programs_for(tile, rows_of(10**6), 128, 8192) == 2 * 132
        assert programs_for(tile, rows_of(10**6), 128, 8192, weights=2) == 132
        # As many as 16 warps are, were there memory for more.
        small = replace(tile, inner=16)
        assert programs_for(small, rows_of(10**6), 128, 8192) == 4 * 132


# Candidates, and what is asked for


def test_candidates_begin_with_the_rule_and_fit(tables):
    users, _ = tables
    for problem in PROBLEMS:
        found = candidates(problem)
        assert found[0] == rule(problem)
        assert len(set(found)) == len(found) <= MOST
        assert len(found) >= 3, problem
        for tile in found[1:]:
            memory = memory_of(tile, problem.arch, problem.dtype_bytes, weights_of(problem))
            assert memory <= memory_limit(problem.arch)
    problem = next(problem for problem in PROBLEMS if problem.arch == "sm_90")
    write_table(users, {problem: Choice(tile=SECOND, why="measured")})
    assert candidates(problem)[1] == SECOND


@pytest.mark.parametrize("gated", [False, True])
def test_the_products_that_are_tuned_are_those_of_the_layer(gated, monkeypatch):
    """Every tile that a layer asks for, forward and backward, is one that can be tuned."""
    asked = []
    genuine = _configurations.problem_of

    def noted(*arguments):
        asked.append(genuine(*arguments))
        return asked[-1]

    monkeypatch.setattr(_configurations, "problem_of", noted)
    layer = _products.Layer(
        d_model=64,
        ffn_dim=96,
        num_experts=4,
        top_k=2,
        gated=gated,
        dtype=torch.float16,
        device=torch.device("meta"),
    )
    weights = kernels.Weights(
        layer.up_proj, layer.down_proj, layer.gate_proj, layer.up_bias, None, layer.down_bias
    )
    options = {"activation": "silu" if gated else "relu"}
    inputs = _products.Inputs(layer=layer, tokens=32)
    expert_ids = torch.empty(32, 2, dtype=torch.int32, device="meta")
    with record_launches(H200):
        for save in (False, True):
            _, saved = kernels.expert_ffn_forward(
                inputs.x, expert_ids, inputs.gates, weights, residual=None, save=save, **options
            )
        needed = kernels.Needed(x=True, up=True, gate=gated, down=True)
        kernels.expert_ffn_backward(
            inputs.x, inputs.x, expert_ids, inputs.gates, weights, saved, needed, **options
        )
        tuned = {product.problem(inputs) for product in _products.products(gated=gated)}
    assert {*asked} == tuned
