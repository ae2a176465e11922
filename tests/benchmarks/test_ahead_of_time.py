"""The tool that compiles for absent GPUs: does it compile what would run, and see what is wrong?"""

import importlib.util
import json
import os
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted here, not compiled", allow_module_level=True)

import triton
import triton.language as tl

from benchmarks.ahead_of_time import __main__ as command
from benchmarks.ahead_of_time.binary import Figures, access
from benchmarks.ahead_of_time.cases import ALLOWED, EXPECTATIONS, Case, Expectation, all_cases
from benchmarks.ahead_of_time.checks import defects, depends_on_tokens, regressions
from benchmarks.ahead_of_time.compile import Failure, compile_all, compile_one
from benchmarks.ahead_of_time.launches import needed, variants
from benchmarks.ahead_of_time.specialise import source_hash, specialise
from benchmarks.ahead_of_time.table import TableError, read_table, row_of, show, write_table
from benchmarks.ahead_of_time.targets import TARGETS
from moe_mt.kernels._launch import Launch, launch, record_launches

HOPPER = TARGETS["sm_90"]
WIDE = Expectation(matrix="x_ptr", left_rows=("BLOCK_ROWS", ""), wide_weights=True)


@triton.jit
def load_rows(ptrs):
    return tl.load(ptrs)


@triton.jit(do_not_specialize=["num_rows"])
def product(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    scale,
    inner,
    stride_x_row,
    stride_weight_row,
    stride_weight_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    MATRIX: tl.constexpr,
):
    """Multiply one tile of rows with one of weights."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    k = tl.arange(0, BLOCK_INNER)
    safe_rows = tl.minimum(rows, num_rows - 1)
    x_ptrs = x_ptr + (safe_rows[:, None] * stride_x_row + k[None, :])
    weight_ptrs = weight_ptr + (
        columns[None, :] * stride_weight_row + k[:, None] * stride_weight_column
    )
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in tl.range(0, inner, BLOCK_INNER):
        x = tl.load(x_ptrs + start)
        # Through a helper, as kernels load: whose line it is must not decide what it is.
        weight = load_rows(weight_ptrs + start * stride_weight_column)
        if MATRIX:
            total = tl.dot(x, weight, total)
        else:
            total += tl.sum(x.to(tl.float32), 1)[:, None] * tl.sum(weight.to(tl.float32), 0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns)[None, :]
    out_ptrs = out_ptr + (rows[:, None] * BLOCK_COLUMNS + columns[None, :])
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty) * scale, mask=rows[:, None] < num_rows)


@triton.jit
def adds_atomically(x_ptr, total_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(total_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)), 0))


@triton.jit
def refuses(x_ptr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK > 99, "blocks are too small")


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_product(
    *,
    tokens=2048,
    dtype=torch.bfloat16,
    weight=None,
    bias=None,
    tile=(64, 128, 64),
    matrix=True,
    kernel=product,
    **options,
):
    """Launch the product of x (tokens, 2048) and a weight (4096, 2048)."""
    weight = meta(4096, 2048, dtype=dtype) if weight is None else weight
    x = meta(tokens, 2048, dtype=dtype)
    launch(
        kernel,
        (1, 1),
        x_ptr=x,
        weight_ptr=weight,
        bias_ptr=bias,
        out_ptr=meta(tokens, 4096, dtype=dtype),
        num_rows=tokens,
        scale=0.5,
        inner=2048,
        stride_x_row=x.stride(0),
        stride_weight_row=weight.stride(0),
        stride_weight_column=weight.stride(1),
        BLOCK_ROWS=tile[0],
        BLOCK_COLUMNS=tile[1],
        BLOCK_INNER=tile[2],
        MATRIX=matrix,
        **{"num_warps": 4, "num_stages": 3, **options},
    )


def noted(target=HOPPER, run=launch_product, **options):
    with record_launches(target.accelerator) as launches:
        run(**options)
    return launches[0]


def compiled(target=HOPPER, **options):
    """Return the row of a product."""
    compilation = specialise(noted(target, **options), target)
    figures = compile_one(compilation)
    assert isinstance(figures, Figures), figures
    return row_of(compilation, ["toy T=2048"], figures)


@pytest.fixture(scope="module")
def hopper_row():
    return compiled()


# What is compiled is what would run.


def test_arguments_are_specialised_as_at_run_time():
    assert specialise(noted(tokens=2048), HOPPER).arguments == (
        "x_ptr:*bf16/16 weight_ptr:*bf16/16 bias_ptr:=None out_ptr:*bf16/16 "
        "num_rows:i32 scale:fp32 inner:i32/16 stride_x_row:i32/16 stride_weight_row:i32/16 "
        "stride_weight_column:=1"
    )


SPECIALISED = {
    "a view that begins 2 bytes later is not aligned": (
        {"weight": meta(4097 * 2048)[1 : 1 + 4096 * 2048].view(4096, 2048)},
        "weight_ptr:*bf16 ",
    ),
    "a stride that 16 does not divide": (
        {"weight": meta(4096, 2056)[:, :2048]},
        "stride_weight_row:i32 ",
    ),
    "a number beyond 31 bits": ({"weight": meta(2, 2**32)[:, :2048]}, "stride_weight_row:i64/16"),
    "a tensor where None may stand": (
        {"bias": meta(4096, dtype=torch.float32)},
        "bias_ptr:*fp32/16",
    ),
    "another dtype": ({"dtype": torch.float16}, "x_ptr:*fp16/16"),
}


@pytest.mark.parametrize("what", SPECIALISED)
def test_specialisation_follows_values(what):
    options, expected = SPECIALISED[what]
    assert expected in specialise(noted(**options), HOPPER).arguments


def test_amd_knows_which_tensors_are_below_2_gb():
    small = specialise(noted(TARGETS["gfx942"]), TARGETS["gfx942"]).arguments
    large = {"weight": meta(2**20 + 1, 2048)}
    beyond = specialise(noted(TARGETS["gfx942"], **large), TARGETS["gfx942"]).arguments
    assert "weight_ptr:*bf16/16/2GB" in small
    assert "weight_ptr:*bf16/16 " in beyond


def cases_of(kernel=product):
    return [
        Case(
            family="toy",
            tokens=tokens,
            run=lambda tokens=tokens: launch_product(tokens=tokens, kernel=kernel),
        )
        for tokens in (1, 16, 33)
    ]


def test_a_kernel_that_a_number_of_tokens_compiles_anew_is_named():
    assert needed(cases_of(product), [HOPPER])[1] == []
    specialising = triton.jit(product.fn)  # without do_not_specialize
    [problem] = needed(cases_of(specialising), [HOPPER])[1]
    assert "num_rows:=1 or num_rows:i32 or num_rows:i32/16" in problem


def test_equal_launches_are_compiled_once():
    wanted, _ = needed(cases_of(), [HOPPER, TARGETS["sm_80"]])
    assert [(one.compilation.target.name, one.cases) for one in wanted] == [
        ("sm_90", ["toy T=1,16,33"]),
        ("sm_80", ["toy T=1,16,33"]),
    ]


def test_settings_are_tried_in_all_combinations():
    tried = variants(noted(), {"BLOCK_ROWS": [16, 32], "num_warps": [4, 8], "UNKNOWN": [1, 2]})
    assert [(one.arguments["BLOCK_ROWS"], one.num_warps) for one in tried] == [
        *((16, 4), (16, 8)),
        *((32, 4), (32, 8)),
    ]


MODULE = """
import triton
import triton.language as tl

LIMIT = tl.constexpr({limit})

@triton.jit
def helper(x):
    return x * {factor}

{comment}
@triton.jit
def kernel(x_ptr):
    {docstring}
    tl.store(x_ptr, tl.minimum(helper(tl.load(x_ptr)), LIMIT)){remark}
"""
UNCHANGED = {"limit": 1, "factor": 2, "comment": "", "docstring": '"""Do."""', "remark": ""}
SOURCES = {
    "a comment in between and a line more": ({"comment": "# A comment.\n\n"}, True),
    "another docstring": ({"docstring": '"""Do it."""'}, True),
    "a comment behind": ({"remark": "  # as ever"}, True),
    "a helper that does something else": ({"factor": 3}, False),
    "another value of a constant": ({"limit": 2}, False),
}


@pytest.mark.parametrize("change", SOURCES)
def test_source_hash_sees_code_and_nothing_else(change, tmp_path):
    def hash_of(name, **parts):
        path = tmp_path / f"{name}.py"
        path.write_text(MODULE.format(**{**UNCHANGED, **parts}))
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return source_hash(module.kernel)

    parts, same = SOURCES[change]
    assert (hash_of("before") == hash_of("after", **parts)) is same


# What is read from the binary.

MNEMONICS = {
    "LDGSTS.E.BYPASS.LTC128B.128": "async 128",
    "LDGSTS.E.BYPASS.128": "async 128",
    "LDGSTS.E.64": "async 64",
    "LDGSTS.E": "async 32",
    "UTMALDG.2D": "tma",
    "LDG.E.128.CONSTANT": "load 128",
    "LDG.E.U16": "load 16",
    "LDG.E": "load 32",
    "STG.E.64": "store 64",
    "RED.E.ADD.F32.FTZ.RN.STRONG.GPU": "atomic",
    "REDUX.SUM": "",
    "LDS.128": "",
    "LDL.64": "",
    "HGMMA.64x128x16.F32.BF16": "",
    "cp.async.cg.shared.global [ %r171 + 0 ], [ %rd113 + 0 ], 0x10, %r172;": "async 128",
    "cp.async.ca.shared.global [ %r171 + 0 ], [ %rd113 + 0 ], 0x4, %r172;": "async 32",
    "cp.async.wait_group \t0;": "",
    "ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];": "load 128",
    "ld.global.b16 { %rs1 }, [ %rd182 + 0 ];": "load 16",
    "global_load_dwordx4": "load 128",
    "buffer_load_ushort": "load 16",
    "global_load_short_d16_hi": "load 16",
    "buffer_load_dword_lds": "async 32",
    "buffer_store_dwordx2": "store 64",
    "global_atomic_add_f32": "atomic",
    "s_load_dwordx4": "",
    "ds_read_b128": "",
}


@pytest.mark.parametrize("mnemonic", MNEMONICS)
def test_accesses_are_read_from_mnemonics(mnemonic):
    assert access(mnemonic) == MNEMONICS[mnemonic]


MATRICES = {
    "sm_80": "HMMA.16816.F32.BF16",
    "sm_90": "HGMMA.64x128x16.F32.BF16",
    "sm_100": "UTCHMMA",
    "gfx942": "v_mfma_f32_",
}


@pytest.mark.parametrize("target", TARGETS)
def test_a_good_product_is_seen_to_be_good(target):
    row = compiled(TARGETS[target])
    figures = row.figures
    assert figures.matrix.startswith(MATRICES[target])
    # A tile of weights is twice one of x, and both are copied 16 bytes at a time.
    wide = "load 128" if target == "gfx942" else "async 128"
    assert set(figures.weights) == {wide}
    assert 3 * figures.weights[wide] == 2 * figures.accesses[wide]
    assert 32 <= figures.registers <= 255
    assert (figures.spills, figures.stack, figures.warps) == (0, 0, 4)
    # Two of three stages of both operands at least.
    assert figures.shared >= 2 * (64 + 128) * 64 * 2 or target == "gfx942"
    assert defects(row, WIDE) == []


# What is wrong is named.


def test_a_kernel_that_spills_is_named():
    row = compiled(tile=(128, 256, 64))  # 256 numbers for each of 128 threads
    assert row.figures.spills > 0
    assert row.figures.stack > 0
    [defect] = defects(row, WIDE)
    assert "spills" in defect
    assert defects(replace(row, allowed="the tile is a test's"), WIDE) == []


def test_a_kernel_without_the_matrix_unit_is_named():
    row = compiled(matrix=False, tile=(64, 64, 32))
    assert row.figures.matrix == ""
    assert "has no matrix instruction, but HGMMA was expected" in defects(row, WIDE)


def test_the_instruction_of_a_warp_group_is_expected_from_64_rows_on():
    row = compiled(tile=(32, 128, 64))
    assert row.figures.matrix.startswith("HMMA")
    assert defects(row, WIDE) == []
    wide = replace(row, tile=row.tile.replace("BLOCK_ROWS=32", "BLOCK_ROWS=64"))
    for target, unit in (("sm_90", "HGMMA"), ("sm_100", "UTCHMMA")):
        [defect] = defects(replace(wide, target=target), WIDE)
        assert f"{unit} was expected" in defect
        assert defects(replace(row, target=target), WIDE) == []


NARROW = {
    "a stride that no vector fits": {"weight": meta(4096, 2049)[:, :2048]},
    "a tensor that is not aligned": {
        "weight": meta(4097 * 2048)[1 : 1 + 4096 * 2048].view(4096, 2048)
    },
}


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("why", NARROW)
def test_a_kernel_that_loads_weights_in_small_pieces_is_named(why, target):
    # Only what the compiler may assume of the weights differs from the good product.
    row = compiled(TARGETS[target], **NARROW[why])
    assert any("loads weights 16 bits at a time" in defect for defect in defects(row, WIDE))


def test_a_kernel_whose_weights_are_not_found_is_named(hopper_row):
    nameless = replace(hopper_row, figures=replace(hopper_row.figures, weights={}))
    [defect] = defects(nameless, WIDE)
    assert "loads no weights" in defect


def test_a_kernel_that_adds_atomically_is_named():
    run = {"x_ptr": meta(64, dtype=torch.float32), "total_ptr": meta(1, dtype=torch.float32)}
    compilation = specialise(
        noted(run=lambda: launch(adds_atomically, (1,), BLOCK=64, **run)), HOPPER
    )
    [defect] = defects(row_of(compilation, ["toy"], compile_one(compilation)), Expectation())
    assert "atomically" in defect


LIMITS = {
    "shared memory": ({"shared": 232_449}, "232448 exist"),
    "registers of all threads": ({"registers": 255, "warps": 16}, "65536 exist"),
    "registers, in the multiples that a thread gets": ({"registers": 169, "warps": 12}, "65536"),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_a_kernel_that_takes_more_than_there_is_is_named(limit, hopper_row):
    figures, expected = LIMITS[limit]
    row = replace(hopper_row, figures=replace(hopper_row.figures, **figures))
    [defect] = defects(row, WIDE)
    assert expected in defect


def test_a_kernel_that_does_not_compile_is_named():
    compilation = specialise(
        noted(run=lambda: launch(refuses, (1,), x_ptr=meta(8), BLOCK=16)), HOPPER
    )
    failure = compile_one(compilation)
    assert isinstance(failure, Failure)
    assert "blocks are too small" in failure.reason


@pytest.mark.slow
def test_a_kernel_that_crashes_the_compiler_is_named_and_the_others_compiled(tmp_path, monkeypatch):
    crash = "import multiprocessing, os\nif multiprocessing.parent_process():\n    os._exit(3)\n"
    body = "@triton.jit\ndef kernel(x_ptr):\n    tl.store(x_ptr, 1.0)\n"
    header = "import triton\nimport triton.language as tl\n"
    (tmp_path / "crashing_kernel.py").write_text(crash + header + body)
    (tmp_path / "sound_kernel.py").write_text(header + body)
    monkeypatch.syspath_prepend(tmp_path)
    compilations = []
    for name in ("crashing_kernel", "sound_kernel"):
        kernel = importlib.import_module(name).kernel
        noted_launch = Launch(
            kernel=kernel, arguments={"x_ptr": meta(8)}, num_warps=4, num_stages=2
        )
        compilations.append(specialise(noted_launch, HOPPER))
    try:
        results = {found.kernel_name: result for found, result in compile_all(compilations, 2)}
    finally:
        for name in ("crashing_kernel", "sound_kernel"):
            del sys.modules[name]
    assert results["crashing_kernel.kernel"] == Failure(
        "the compiler crashed and took its process with it"
    )
    assert isinstance(results["sound_kernel.kernel"], Figures)


LOST = {
    "a few registers more": ({"registers": 109}, None),
    "many registers more": ({"registers": 111}, "registers grew from 100 to 111"),
    "fewer registers": ({"registers": 50}, None),
    "more shared memory": ({"shared": 45_000}, "shared grew"),
    "another shape of the same instruction": ({"matrix": "HGMMA.64x8x16.F32.BF16"}, None),
    "another instruction": ({"matrix": "HMMA.16816.F32.BF16"}, "was lost for HMMA"),
    "no matrix instruction": ({"matrix": ""}, "was lost for no matrix instruction"),
    "narrower weights": (
        {"weights": {"async 128": 8, "async 64": 1}},
        "weights narrowed from 128 to 64",
    ),
    "weights by whole tiles": ({"weights": {"tma": 2}}, None),
    "narrower copies": (
        {"accesses": {"async 32": 1, "load 64": 4}},
        "copies to shared memory narrowed to 32 bits",
    ),
    "narrower loads of what is not copied": ({"accesses": {"async 128": 9, "load 8": 4}}, None),
}


@pytest.mark.parametrize("change", LOST)
def test_only_what_a_row_lost_is_a_regression(change, hopper_row):
    before = replace(
        hopper_row.figures,
        registers=100,
        shared=40_000,
        matrix="HGMMA.64x128x16.F32.BF16",
        weights={"async 128": 9},
        accesses={"async 128": 9, "load 64": 4},
    )
    changed, expected = LOST[change]
    now = replace(hopper_row, figures=replace(before, **changed))
    found = regressions(now, replace(hopper_row, figures=before))
    assert found == [] if expected is None else expected in found[0] and len(found) == 1


# The table, and the command.


def test_a_table_is_read_as_it_was_written_one_row_a_line(tmp_path, hopper_row):
    rows = [hopper_row, replace(hopper_row, target="sm_80", allowed="why not")]
    path = tmp_path / "triton.jsonl"
    write_table(path, rows)
    assert list(read_table(path).values()) == sorted(rows, key=lambda row: row.identity)
    assert [json.loads(line)["target"] for line in path.read_text().splitlines()] == [
        "sm_80",
        "sm_90",
    ]
    assert read_table(tmp_path / "there is none") == {}


@pytest.mark.parametrize("text", ["{", '{"kernel": "k"}\n', "[]\n"])
def test_another_file_is_no_table(tmp_path, text):
    path = tmp_path / "triton.jsonl"
    path.write_text(text)
    with pytest.raises(TableError, match="delete it and write it anew with make aot"):
        read_table(path)


def test_rows_are_shown_in_columns(hopper_row):
    head, line = show([hopper_row]).splitlines()
    assert line.index("HGMMA.64x128x16") == head.index("matrix")
    assert "bias_ptr=None stride_weight_column=1" in line
    assert line.endswith("toy T=2048")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the command on one toy case, with a table of its own, in this process."""
    toy = Case(family="toy", tokens=2048, run=launch_product)
    monkeypatch.setattr(command, "all_cases", lambda: [toy])

    def run(*arguments, target="sm_90"):
        given = ["--jobs", "1", "--results", str(tmp_path), "--target", target, *arguments]
        return command.main(given), capsys.readouterr().out

    run.table = tmp_path / f"triton-{triton.__version__}.jsonl"
    return run


def edit(path, **changes):
    row = json.loads(path.read_text())
    path.write_text(json.dumps({**row, **changes}) + "\n")


def test_what_was_written_passes_its_check(run):
    code, printed = run()
    assert code == 0
    assert "1 compiled, 0 unchanged, 0 wrong" in printed
    [row] = read_table(run.table).values()
    assert (row.kernel, row.cases) == (specialise(noted(), HOPPER).kernel_name, ("toy T=2048",))
    assert run("--check")[0] == 0


def test_a_regression_fails_the_check_and_is_noted_when_written(run):
    run()
    edit(run.table, registers=20)
    code, printed = run("--check")
    assert code == 1
    assert "test_ahead_of_time.product for sm_90" in printed
    assert "registers grew from 20" in printed
    code, printed = run()
    assert code == 0
    assert "\nNOTE " in f"\n{printed}"
    assert run("--check")[0] == 0


def test_a_row_that_is_not_in_the_table_fails_the_check(run):
    code, printed = run("--check")
    assert code == 1
    assert "not in the table; run make aot" in printed
    assert not run.table.exists()


def test_a_row_that_no_case_launches_fails_the_check_and_is_dropped(run):
    run()
    text = run.table.read_text()
    run.table.write_text(text + text.replace("BLOCK_ROWS=64", "BLOCK_ROWS=1024"))
    code, printed = run("--check")
    assert code == 1
    assert "in the table, but no case launches it" in printed
    run()
    assert run.table.read_text() == text


def test_rows_of_other_targets_stay(run):
    run()
    run(target="sm_80")
    assert [row.target for row in read_table(run.table).values()] == ["sm_80", "sm_90"]


def test_what_spills_fails_even_when_it_is_written(run, monkeypatch):
    toy = Case(family="toy", tokens=1, run=lambda: launch_product(tile=(128, 256, 64)))
    monkeypatch.setattr(command, "all_cases", lambda: [toy])
    code, printed = run()
    assert code == 1
    assert "spills" in printed


def test_what_spills_fails_even_when_nothing_changed(run, monkeypatch):
    toy = Case(family="toy", tokens=1, run=lambda: launch_product(tile=(128, 256, 64)))
    monkeypatch.setattr(command, "all_cases", lambda: [toy])
    run(target="sm_80")
    code, printed = run("--check", "--changed", target="sm_80")
    assert code == 1
    assert "0 compiled, 1 unchanged, 1 wrong" in printed


def test_what_spills_passes_where_a_reason_is_given(run, monkeypatch):
    toy = Case(family="toy", tokens=1, run=lambda: launch_product(tile=(128, 256, 64)))
    monkeypatch.setattr(command, "all_cases", lambda: [toy])
    kernel = specialise(noted(), HOPPER).kernel_name
    monkeypatch.setitem(ALLOWED, (kernel, "sm_90", "BLOCK_COLUMNS=256"), "it is a test's")
    monkeypatch.setitem(ALLOWED, (kernel, "sm_80", "BLOCK_COLUMNS=64"), "another tile's")
    assert run()[0] == 0
    assert run(target="sm_80")[0] == 1
    assert [row.allowed for row in read_table(run.table).values()] == ["", "it is a test's"]
    # A reason holds from when it is given until it is taken back, for what was compiled before too.
    monkeypatch.setitem(ALLOWED, (kernel, "sm_80", ""), "now it may")
    assert run("--check", "--changed", target="sm_80")[0] == 0
    monkeypatch.delitem(ALLOWED, (kernel, "sm_80", ""))
    assert run("--check", "--changed", target="sm_80")[0] == 1


def test_what_does_not_compile_fails_with_its_reason(run, monkeypatch):
    toy = Case(family="toy", tokens=1, run=lambda: launch(refuses, (1,), x_ptr=meta(8), BLOCK=16))
    monkeypatch.setattr(command, "all_cases", lambda: [toy])
    code, printed = run("--check")
    assert code == 1
    assert "test_ahead_of_time.refuses" in printed
    assert "blocks are too small" in printed


def test_only_what_changed_is_compiled_but_all_of_the_target_tuned_for(run):
    run()
    run(target="sm_80")
    unchanged = "0 compiled, 1 unchanged, 0 wrong"
    assert unchanged in run("--check", "--changed", target="sm_80")[1]
    assert "1 compiled, 0 unchanged, 0 wrong" in run("--check", "--changed")[1]
    rows = [replace(row, source="another") for row in read_table(run.table).values()]
    write_table(run.table, rows)
    assert "1 compiled, 0 unchanged, 0 wrong" in run("--check", "--changed", target="sm_80")[1]


def test_settings_are_shown_and_not_written(run):
    code, printed = run("--show", "product", "--set", "BLOCK_ROWS=64,128", "--set", "num_warps=8")
    assert code == 0
    assert "HGMMA" in printed
    assert "BLOCK_ROWS=128" in printed
    assert "2 compiled" in printed
    assert not run.table.exists()


def test_a_kernel_that_is_not_there_is_said_so(run, capsys):
    assert command.main(["--show", "no such kernel", "--target", "sm_90"]) == 2
    assert "no kernel is called like 'no such kernel'" in capsys.readouterr().err


def test_nothing_is_compiled_where_kernels_are_interpreted(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert command.main(["--check"]) == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err


# The cases that are shipped.


@pytest.fixture(scope="module")
def shipped():
    """What the shipped cases need for the target tuned for."""
    return needed(all_cases(), [HOPPER])


def test_no_number_of_tokens_compiles_a_shipped_kernel_anew(shipped):
    assert shipped[1] == []


def test_every_expectation_is_about_a_kernel_that_is_launched(shipped):
    names = {one.compilation.kernel_name for one in shipped[0]}
    assert EXPECTATIONS.keys() <= names
    for one in shipped[0]:
        expectation = EXPECTATIONS.get(one.compilation.kernel_name, Expectation())
        parameters = {parameter.name for parameter in one.compilation.kernel.params}
        assert {expectation.matrix, *expectation.left_rows} - {""} <= parameters


def test_depending_on_tokens_is_said_of_the_argument_alone():
    key = ("kernel", "launch 1 of", "family")
    assert depends_on_tokens([(key, "a:i32 b:*bf16/16/2GB"), (key, "a:i32 b:*bf16/16")]) == []
    [problem] = depends_on_tokens([(key, "a:i32 b:i32/16"), (key, "a:i32 b:i32")])
    assert problem == (
        "kernel launch 1 of family: the number of tokens decides b:i32 or b:i32/16; "
        "put it into do_not_specialize"
    )
