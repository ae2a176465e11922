"""Tuning: what it times computes right, what it chooses is fastest, what it writes stays."""

import itertools
import os
import signal
from dataclasses import replace

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.errors import OutOfResources

from moe_mt.errors import BackendUnavailableError, ConfigError
from moe_mt.kernels import _configurations, _products, _tuning
from moe_mt.kernels._candidates import candidates
from moe_mt.kernels._configurations import Choice, Tile, read_table, rule, write_table
from moe_mt.kernels._launch import Accelerator
from moe_mt.ops import ExpertShape, tile_tables, tune, tuning_problems

H200 = Accelerator(arch="sm_90", multiprocessors=132)
SHAPE = ExpertShape(d_model=64, ffn_dim=96, num_experts=4, top_k=2)


def layer_of(device, *, gated=False, dtype=torch.float32):
    # Widths that are no multiple of the tiles, experts that are no power of two.
    return _products.Layer(
        d_model=40, ffn_dim=72, num_experts=3, top_k=2, gated=gated, dtype=dtype, device=device
    )


PRODUCTS = {
    f"{number} {product.kind} {'gated' if gated else 'plain'}": (product, gated)
    for gated in (False, True)
    for number, product in enumerate(_products.products(gated=gated))
}


@pytest.mark.triton
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_the_same_in_every_tile(name, kernel_device):
    product, gated = PRODUCTS[name]
    inputs = _products.Inputs(layer=layer_of(kernel_device, gated=gated), tokens=17)
    tiles = candidates(product.problem(inputs))
    if kernel_device.type == "cpu":
        # All candidates take minutes there: the largest, which take least, and the other order of
        # operands, which is last.
        largest = sorted(tiles[1:-1], key=lambda tile: tile.rows * tile.columns * tile.inner)
        tiles = [tiles[0], *largest[-2:], tiles[-1]]
    expected = _tuning.results_of(product, inputs, tiles[0])
    assert all(result.isfinite().all() and result.any() for result in expected)
    ran = 0
    for tile in tiles[1:]:
        try:
            found = _tuning.results_of(product, inputs, tile)
        except OutOfResources:
            continue
        ran += 1
        assert _tuning.difference(found, expected) == "", tile
    assert ran >= 2
    # The same comparison finds a single wrong row.
    expected[0][-1, ..., 0] += 1.0
    assert "computes wrong" in _tuning.difference(found, expected)


def test_a_difference_is_found_where_it_is():
    a = torch.randn(3, 5, 8, dtype=torch.float16)
    assert _tuning.difference([a, a], [a, a]) == ""
    rounded = a + a * 2**-11
    assert _tuning.difference([a], [rounded.half()]) == ""
    for value in (torch.nan, torch.inf, 0.0):
        b = a.clone()
        b[2, 4, 7] = value
        assert "wrong" in _tuning.difference([b], [a]), value
        assert "wrong" in _tuning.difference([a, b], [a, a]), value
    # What should be zero, such as the gradient of an expert without rows, must be.
    zero = torch.zeros(2, 8)
    assert _tuning.difference([zero], [zero]) == ""
    assert "wrong" in _tuning.difference([zero + 1e-20], [zero])


META = torch.device("meta")


def small_task(*, tokens=(8,)):
    """Return one task with many tiles; nothing of it is computed."""
    layer = replace(layer_of(META), d_model=2048, ffn_dim=8192, dtype=torch.bfloat16)
    return _tuning.tasks(layer, tokens, H200, forward=True, backward=False)[0]


@pytest.fixture
def clock(monkeypatch):
    """Let tiles take what a dictionary says, in seconds, and all others 1."""
    seconds, wrong = {}, {}

    def seconds_of(product, inputs, tile):
        if tile not in wrong:
            return seconds.get((tile, inputs.tokens), seconds.get(tile, 1.0))
        raise AssertionError("a tile was timed that computes wrong")

    def results_of(product, inputs, tile):
        if wrong.get(tile) == "memory":
            raise OutOfResources(300_000, 232_448, "shared memory")
        return [torch.full((1, 2), 2.0 if tile in wrong else 1.0)]

    monkeypatch.setattr(_tuning, "seconds_of", seconds_of)
    monkeypatch.setattr(_tuning, "results_of", results_of)
    return seconds, wrong


def run_task(task, failures=()):
    inputs = {n: _products.Inputs(layer=layer_of(META), tokens=n) for _, n in task.runs}
    calls = []
    result = _tuning.fastest(task, inputs, dict(failures), lambda: calls.append(1))
    assert len(calls) == len(task.tiles) * len(task.runs)
    return result


def test_the_fastest_tile_wins(clock):
    seconds, _ = clock
    task = small_task()
    seconds[task.tiles[3]] = 0.5
    seconds[task.tiles[5]] = 0.8
    result = run_task(task)
    assert (result.tile, result.seconds, result.failures) == (task.tiles[3], [0.5], {})
    assert result.speedup == pytest.approx(2.0)


def test_what_is_no_more_than_noise_leaves_the_rule(clock):
    seconds, _ = clock
    task = small_task()
    seconds[task.tiles[3]] = 0.995
    result = run_task(task)
    assert (result.tile, result.speedup) == (task.tiles[0], 1.0)


def test_a_tile_must_be_fast_at_all_numbers_of_tokens_of_a_problem(clock):
    seconds, _ = clock
    task = small_task(tokens=(1, 2))
    assert [tokens for _, tokens in task.runs] == [1, 2]
    # Four times as fast at one, five times as slow at the other.
    seconds[task.tiles[2], 1], seconds[task.tiles[2], 2] = 0.25, 5.0
    seconds[task.tiles[4], 1], seconds[task.tiles[4], 2] = 0.9, 0.9
    assert run_task(task).tile == task.tiles[4]


def test_what_computes_wrong_or_does_not_fit_is_left_out_and_named(clock):
    seconds, wrong = clock
    task = small_task()
    for number in (1, 2, 3):
        seconds[task.tiles[number]] = 0.1
    wrong[task.tiles[1]] = "value"
    wrong[task.tiles[2]] = "memory"
    result = run_task(task, {task.tiles[3]: "does not compile"})
    assert result.tile == task.tiles[0]
    assert [*result.failures] == [task.tiles[3], task.tiles[1], task.tiles[2]]
    assert "computes wrong" in result.failures[task.tiles[1]]
    assert "out of resource: shared memory" in result.failures[task.tiles[2]]
    assert result.failures[task.tiles[3]] == "does not compile"


def test_a_rule_that_fails_is_no_result(clock):
    task = small_task()
    with pytest.raises(RuntimeError, match="the rule's own tile fails"):
        run_task(task, {task.tiles[0]: "does not compile"})


# Compiling ahead

GPU = GPUTarget("cuda", 90, 32)


def crash(compilation, target, accelerator):
    """Take the process along, for one tile of several."""
    if compilation.tile.num_stages == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return ""


def some_compilations(number):
    task = small_task()
    return _tuning.compilations_of(layer_of(META), [task])[:number]


@pytest.mark.slow
def test_compiling_ahead_fills_the_cache_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    [one] = some_compilations(1)
    # No kernel takes complex numbers.
    wrong = one._replace(layer=replace(one.layer, dtype=torch.complex64))
    found = {
        done.layer.dtype: why for done, why in _tuning.compile_ahead([one, wrong], GPU, H200, 1)
    }
    assert found[torch.float32] == ""
    assert "complex" in found[torch.complex64]
    assert len(list(tmp_path.rglob("*.cubin"))) == 1


@pytest.mark.slow
def test_the_tile_that_crashes_the_compiler_is_found(monkeypatch):
    monkeypatch.setattr(_tuning, "_compile", crash)
    [one] = some_compilations(1)
    tiles = [replace(one.tile, num_stages=stages) for stages in (3, 2)]
    wanted = [one._replace(tile=tile) for tile in tiles]
    found = {done.tile: failure for done, failure in _tuning.compile_ahead(wanted, GPU, H200, 2)}
    assert found == {tiles[0]: "", tiles[1]: "crashes the compiler"}


def test_each_binary_is_compiled_once():
    layer = layer_of(META)
    found = _tuning.tasks(layer, [2, 8, 900], H200, forward=True, backward=True)
    wanted = _tuning.compilations_of(layer, found)
    pairs = [(one.product, one.tile) for one in wanted]
    assert len(set(pairs)) == len(pairs)
    needed = {(product, tile) for task in found for product, _ in task.runs for tile in task.tiles}
    assert set(pairs) == needed


# The operation


@pytest.fixture
def gpu(monkeypatch, tmp_path, clock):
    """Pretend that there is a GPU, and a table of the user's."""
    monkeypatch.setenv("MOE_MT_CACHE", str(tmp_path))
    monkeypatch.setattr(_tuning, "accelerator_on", lambda device: H200)
    monkeypatch.setattr(_tuning, "target_of", lambda device: GPU)
    monkeypatch.setattr(_tuning, "compile_ahead", lambda wanted, *_: ((one, "") for one in wanted))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Great GPU")
    _configurations._tables.cache_clear()
    yield tmp_path / "tiles.json"
    _configurations._tables.cache_clear()


CUDA = torch.device("cuda", 0)


def test_every_problem_is_written_and_others_are_kept(gpu, clock):
    seconds, _ = clock
    other = replace(small_task().problem, arch="sm_80")
    known = Choice(tile=rule(other), why="measured elsewhere")
    write_table(gpu, {other: known})
    problems = tuning_problems(SHAPE, [2, 256], device=CUDA, backward=False)
    task = _tuning.tasks(
        _products.Layer(**vars(SHAPE), device=META), [2], H200, forward=True, backward=False
    )[0]
    seconds[task.tiles[2]] = 0.5
    progress = []
    tuned = list(
        tune(
            SHAPE,
            [256, 2, 2],
            device=CUDA,
            backward=False,
            on_progress=lambda *step: progress.append(step),
        )
    )
    assert [one.name for one in tuned] == [one.name for one in problems]
    assert tuned[0].tile == problems[0].tiles[2] == str(task.tiles[2])
    assert (tuned[0].speedup, tuned[0].seconds, tuned[0].tokens) == (2.0, (0.5,), (2,))
    table = read_table(gpu)
    assert table[other] == known
    assert len(table) == 1 + len(problems) == 5
    assert table[task.problem].tile == task.tiles[2]
    for fact in ("500000.0 us at 2 tokens", "2.00 times as fast", "Great GPU", "triton "):
        assert fact in table[task.problem].why
    for stage in ("compiling", "timing"):
        steps = [(done, total) for name, done, total in progress if name == stage]
        assert [done for done, _ in steps] == list(range(len(steps)))
        assert {total for _, total in steps} == {len(steps) - 1}


def test_what_was_written_before_an_interrupt_stays(gpu, monkeypatch):
    counted = itertools.count()
    genuine = _tuning.fastest

    def interrupted(*arguments):
        if next(counted) == 2:
            raise KeyboardInterrupt
        return genuine(*arguments)

    monkeypatch.setattr(_tuning, "fastest", interrupted)
    done = []
    with pytest.raises(KeyboardInterrupt):
        done.extend(tune(SHAPE, [2, 256], device=CUDA))
    assert len(read_table(gpu)) == 2


def test_another_file_can_be_written(gpu, tmp_path):
    path = tmp_path / "folder/mine.json"
    list(tune(SHAPE, [2], device=CUDA, backward=False, table=path))
    assert len(read_table(path)) == 2
    assert not gpu.exists()
    assert tile_tables() == {
        gpu: 0,
        _configurations.SHIPPED_TABLE: len(read_table(_configurations.SHIPPED_TABLE)),
    }


def test_forward_and_backward_are_the_two_halves_of_all(gpu):
    def names(**parts):
        return {one.name for one in tuning_problems(SHAPE, [2, 256], device=None, **parts)}

    halves = names(backward=False), names(forward=False)
    assert not halves[0] & halves[1]
    assert halves[0] | halves[1] == names()
    assert len(names()) == 12


def test_a_broken_table_is_not_written_over(gpu):
    gpu.write_text("broken")
    with pytest.raises(ConfigError, match="is not a table of tiles"):
        next(tune(SHAPE, [2], device=CUDA))
    assert gpu.read_text() == "broken"


def test_tuning_needs_a_gpu():
    with pytest.raises(BackendUnavailableError, match="not on cpu"):
        next(tune(SHAPE, [2], device=torch.device("cpu")))


def test_tuning_needs_triton(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for call in (tile_tables, lambda: tuning_problems(SHAPE, [2], device=None)):
        with pytest.raises(BackendUnavailableError, match="triton is not installed"):
            call()


@pytest.mark.parametrize("tokens", [[], [0], [4, -1]])
def test_tokens_are_checked(tokens):
    with pytest.raises(ConfigError, match="each at least 1"):
        tuning_problems(SHAPE, tokens, device=None)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"d_model": 0}, "d_model is 0"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"top_k": 5}, "only 4 experts"),
        ({"dtype": torch.float64}, "float64"),
    ],
    ids=str,
)
def test_a_shape_is_checked(wrong, said):
    with pytest.raises(ConfigError, match=said):
        replace(SHAPE, **wrong)


def test_tiles_are_told_in_words():
    tile = Tile(rows=16, columns=64, inner=128, num_warps=4, num_stages=3, swap=True)
    assert str(tile) == "16 x 64 x 128, 4 warps, 3 stages, weights left"
    problems = tuning_problems(SHAPE, [64, 70], device=None, backward=False)
    assert problems[0].name == "forward 96 x 64, 16 bits, 32 rows an expert"
    assert problems[0].tokens == (64, 70)
