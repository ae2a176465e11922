"""From rows to README, documentation and pictures."""

import json
import re

import pytest

from benchmarks import report
from benchmarks.record import write_rows
from benchmarks.report import END, START, ReportError, render_docs, render_readme, replace_block

README = f"# Title\n\nBefore.\n\n{START}\nold table\n{END}\n\nAfter.\n"


def spread(middle):
    return {"median": middle, "q1": 0.9 * middle, "q3": 1.1 * middle, "rounds": 9}


def signature(model, sizes, *, dtype="float32", peer=""):
    return (
        f"model:{model}|dtype:{dtype}|{sizes}|device:Fast CPU, 2 cores|threads:2|torch:2.13.0"
        f"{peer}|commit:1a2b3c4|v:0.1.0"
    )


def layer_row(tokens, *, beside=True, dtype="float32"):
    row = {
        "name": f"moe/bench_layer.py::test_layer{'_beside_transformers' * beside}[T{tokens}]",
        "date": "2026-11-21",
        "seconds": spread(0.001 * tokens),
        "signature": signature(
            "layer", f"T:{tokens}", dtype=dtype, peer="|peer:transformers-4.57.1" * beside
        ),
        "figures": {"extra_bytes": 10_000 * tokens, "weight_bytes_read": 10**9, "flops": 10**10},
    }
    if beside:
        row["peer"] = {
            **{"name": "transformers-4.57.1", "seconds": spread(0.002 * tokens)},
            "extra_bytes": 500_000 * tokens,
        }
        row["speedup"] = spread(2.0)
    return row


def translate_row(batch, beam):
    return {
        "name": f"end_to_end/bench_translate.py::test_translate[batch{batch}-beam{beam}]",
        "date": "2026-11-21",
        "seconds": spread(4.0),
        "signature": signature("tiny", f"batch:{batch}|beam:{beam}|sentences:480"),
        "figures": {
            **{"sentences": 480, "tokens": 4800, "weight_bytes": 9_000_000},
            **{"extra_bytes": 20_000_000, "chrf": 98.76, "exact_match": 0.955},
        },
        "chrf_signature": "nrefs:1|case:mixed|version:2.6.0",
    }


def generate_row(model, batch, beam, *, dtype="float32", **peers):
    """A row of generation: a batch in 2 seconds, near its floor."""
    return {
        "name": f"generation/bench_generate.py::test_generate[{model}-{batch}x{beam}-{dtype}]",
        "date": "2026-11-22",
        "seconds": spread(2.0),
        "signature": signature(
            model, f"batch:{batch}|beam:{beam}", dtype=dtype, peer="|peer:ctranslate2-4.8.5"
        ),
        "figures": {
            **{"tokens": 32 * batch, "bytes": 4e10, "flops": 2e10, "floor_s": 1.6},
            **{"read_bytes_per_s": 25e9, "load_s": 1.5, "first_s": 2.5},
            "peak_anonymous_bytes": 2_100_000_000,
        },
        "peers": peers,
    }


def generate_peer(times, **more):
    return {
        **{"seconds": spread(2.0 * times), "speedup": spread(times), "same_translations": 0.5},
        **{"load_s": 0.8, "first_s": 2.0, "peak_anonymous_bytes": 1_900_000_000},
        **more,
    }


def graph_row(tokens, *, direction="forward", routing="uniform", ours=2e-3, **more):
    """A row of a layer as a graph: half as far from its floor as its time, and two peers."""
    return {
        "name": f"moe/bench_layer_graph.py::test_{direction}[T{tokens}-{routing}]",
        "date": "2026-11-21",
        "seconds": spread(ours),
        "signature": signature(
            "layer", f"direction:{direction}|routing:{routing}|T:{tokens}", dtype="bfloat16"
        ),
        "figures": {
            **{"bytes": 8e9, "flops": 1e12, "floor_s": ours / 1.25, "distinct_experts": 110.9},
            **{"copy_bytes_per_s": 4.3e12, "product_flops_per_s": 7.9e14},
            **{"extra_bytes": 5_000_000, "launched_s": 2.5 * ours},
        },
        "peers": {
            "grouped_mm": {"seconds": spread(2 * ours)},
            "loop": {"seconds": spread(4 * ours), "note": "no graph: it waits"},
            "absent": {"note": "not installed"},
        },
        **more,
    }


def operation_row(operation, tokens, *, floor=True, **fields):
    sizes = "".join(f"|{name}:{value}" for name, value in fields.items())
    floors = {"floor_s": 4e-6, "copy_bytes_per_s": 4.3e12, "product_flops_per_s": 7.9e14}
    return {
        "name": f"ops/bench_{operation}.py::test_{operation}[T{tokens}]",
        "date": "2026-11-21",
        "seconds": spread(5e-6),
        "signature": signature("layer", f"operation:{operation}{sizes}|T:{tokens}"),
        "figures": {"bytes": 10_000, "flops": 20_000, **(floors if floor else {})},
        "peers": {"definition": {"seconds": spread(5e-5)}, "other": {"note": "not installed"}},
    }


def patched_row(major, tokens, **peers):
    """A row of a layer of transformers, patched in one of its versions."""
    name = f"layer-T{tokens}-transformers-{major}"
    return {
        "name": f"integrations/bench_patched_layer.py::test_patched_layer[{name}]",
        "date": "2026-11-22",
        "seconds": spread(0.02),
        "signature": signature("layer", f"transformers:{major}|T:{tokens}"),
        "figures": {"extra_bytes": 500_000, "first_patch_s": 0.1},
        "peers": {name.replace("_", " ", 2): peer for name, peer in peers.items()},
    }


ROWS = [
    *[layer_row(tokens) for tokens in (2048, 4, 32)],
    *[layer_row(tokens, beside=False) for tokens in (4, 32)],
    *[translate_row(32, 4), translate_row(1, 1)],
]


def table_rows(text, first_cell):
    return re.findall(rf"^\| {first_cell} \|.*$", text, re.MULTILINE)


def test_the_readme_shows_the_comparison_with_its_ratio_and_memory():
    text = render_readme(ROWS)
    assert table_rows(text, 4) == [
        "| 4 | 4.00 (3.60 – 4.40) | 0.04 | 8.00 (7.20 – 8.80) | 2.00 | **2.00** (1.80 – 2.20) "
        "| **2.0%** |"
    ]


def test_speed_memory_and_quality_stand_in_one_row():
    text = render_readme(ROWS)
    assert table_rows(text, 32)[-1] == (
        "| 32 | 4 | 480 | 120 | 1,200 | 9.00 | 20.0 | 98.8 | 95.5% |"
    )


def test_rows_are_ordered_by_size_not_by_text():
    found = re.findall(r"^\| (\d+) \| \d", render_readme(ROWS), re.MULTILINE)
    assert found == ["4", "32", "2048", "1", "32"]


def test_every_table_carries_its_signature():
    for text in (render_readme(ROWS), render_docs(ROWS)):
        tables = text.count("---:|\n")
        assert tables == text.count("Signature: `model:")
        assert "|T:4,32,2048|" in text
        assert "commit:1a2b3c4" in text
        assert "chrF++: `nrefs:1|case:mixed|version:2.6.0`" in text


def test_the_documentation_also_shows_the_layer_alone_with_its_roofline():
    assert table_rows(render_docs(ROWS), 4)[1] == "| 4 | 4.00 (3.60 – 4.40) | 0.04 | 250 | 2,500 |"
    assert len(table_rows(render_readme(ROWS), 4)) == 1


def test_a_graph_stands_beside_its_floor_and_every_timed_peer():
    text = render_readme([graph_row(1024)])
    assert table_rows(text, "uniform") == [
        "| uniform | 1024 | 2.00 (1.80 – 2.20) | 1.60 | **1.25** | 4,000 | 500 | 111 | 5.00 | 5.00 "
        "| 2.00 | 4.00 \\* |"
    ]
    assert "| grouped_mm, times ours | loop, times ours |" in text
    assert "copy 4,300 GB/s, product 790 TFLOP/s" in text
    assert "\\* loop: no graph: it waits." in text
    assert "absent not timed: not installed." in text


def test_a_graph_that_is_none_is_marked():
    text = render_readme([graph_row(1, note="no graph: ours waits")])
    assert "2.00 (1.80 – 2.20) \\* |" in text
    assert "\\* ours: no graph: ours waits." in text


def test_a_patched_layer_stands_beside_both_versions_of_transformers():
    four = {"seconds": spread(0.03), "speedup": spread(1.5), "extra_bytes": 3_000_000}
    five = {"seconds": spread(0.022), "speedup": spread(1.1), "extra_bytes": 2_000_000}
    copies = {"note": "it copies weights"}
    peers = {"transformers_4": four, "transformers_5_grouped_mm": five, "transformers_5_it": copies}
    text = render_readme([patched_row(major, 4, **peers) for major in (5, 4)])
    ratios = "**1.50** (1.35 – 1.65) | **1.10** (0.99 – 1.21) grouped_mm"
    assert table_rows(text, "layer") == [
        f"| layer | {major} | 4 | 20.0 (18.0 – 22.0) | {ratios} | 0.50 | 3.00 | 2.00 |"
        for major in (4, 5)
    ]
    assert "transformers 5 it not timed: it copies weights." in text


def test_a_peer_that_was_not_timed_at_this_size_leaves_its_cell_empty():
    other = graph_row(32, peers={"grouped_mm": {"note": "too large"}})
    [cells] = [row for row in table_rows(render_readme([graph_row(1), other]), "uniform")][1:]
    assert cells.endswith("| – | – |")


def test_graphs_are_ordered_by_routing_then_by_size():
    rows = [graph_row(1024, routing="zipf"), graph_row(1024), graph_row(8), graph_row(128)]
    found = re.findall(r"^\| (uniform|zipf) \| (\d+)", render_docs(rows), re.MULTILINE)
    assert found == [("uniform", "8"), ("uniform", "128"), ("uniform", "1024"), ("zipf", "1024")]


def test_backward_has_a_table_of_its_own():
    text = render_readme([graph_row(1024), graph_row(1024, direction="backward")])
    assert text.count("---:|\n") == 2
    assert "direction:backward|" in text


def test_the_first_call_is_shown_with_and_without_compiled_kernels():
    row = {
        "name": "moe/bench_layer_graph.py::test_first_call[forward-T1]",
        "seconds": spread(12.0),
        "signature": signature("layer", "direction:forward|T:1"),
        "figures": {"warm_s": 0.5},
    }
    assert table_rows(render_docs([row]), "forward") == ["| forward | 1 | 12.0 | 0.50 |"]


def test_operations_stand_in_one_table_with_what_else_computes_them():
    rows = [
        operation_row("route", 8, capacity="none"),
        operation_row("permute", 1024),
        operation_row("permute", 8, floor=False),
    ]
    text = render_docs(rows)
    assert re.findall(r"^\| (?:permute|route) .*$", text, re.MULTILINE) == [
        "| permute | – | 8 | 5.00 (4.50 – 5.50) | – | – | 2.00 | 4.00 | definition 10.0 |",
        "| permute | – | 1024 | 5.00 (4.50 – 5.50) | 4.00 | 1.25 | 2.00 | 4.00 | definition 10.0 |",
        "| route | none | 8 | 5.00 (4.50 – 5.50) | 4.00 | 1.25 | 2.00 | 4.00 | definition 10.0 |",
    ]
    assert "permute" not in render_readme(rows)


def test_precisions_get_a_table_each():
    text = render_docs([layer_row(4), layer_row(4, dtype="bfloat16")])
    assert text.count("---:|\n") == 2
    assert "Fast CPU, 2 cores, layer, bfloat16, 2 threads" in text


def test_a_device_without_a_peer_leaves_no_empty_table():
    text = render_readme([layer_row(4, beside=False), translate_row(1, 1)])
    assert "transformers" not in text
    assert "tiny" in text


def test_only_what_stands_between_the_markers_changes():
    assert replace_block(README, "new table\n") == (
        f"# Title\n\nBefore.\n\n{START}\n\nnew table\n\n{END}\n\nAfter.\n"
    )


def test_replacing_twice_is_replacing_once():
    once = replace_block(README, "table")
    assert replace_block(once, "table") == once


@pytest.mark.parametrize(
    "text",
    [
        "no markers",
        f"{START} and no end",
        f"no start and {END}",
        f"{END} the wrong way round {START}",
        f"{START} {END} and again {START} {END}",  # which one?
    ],
)
def test_missing_markers_are_an_error_that_says_what_to_do(text):
    with pytest.raises(ReportError, match=r"benchmarks:start.*benchmarks:end.*README"):
        replace_block(text, "table")


@pytest.fixture
def project(tmp_path):
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "open.md").write_text("# Not yet measured\n")  # no result, no error
    return tmp_path


def make_report(project):
    return report.main(["--root", str(project), "--results", str(project / "results")])


def written(project):
    paths = [project / "README.md", *(project / "docs").rglob("*.*")]
    return {str(path.relative_to(project)): path.read_bytes() for path in paths}


def test_the_report_writes_readme_documentation_and_pictures(project):
    write_rows(ROWS, project / "results")
    assert make_report(project) == 0
    files = written(project)
    setting = "fast-cpu-2-cores"
    layer = f"docs/images/layer-{setting}-layer-float32-2-threads.svg"
    translate = f"docs/images/translate-{setting}-tiny-float32-2-threads.svg"
    assert set(files) == {"README.md", "docs/benchmarks.md", layer, translate}
    readme, docs = files["README.md"].decode(), files["docs/benchmarks.md"].decode()
    assert f"({layer})" in readme
    assert f"({layer.removeprefix('docs/')})" in docs
    assert "old table" not in readme
    assert "transformers-4.57.1" in files[layer].decode()
    assert "chrF++ 98.8" in files[translate].decode()


def test_graphs_are_drawn_with_floor_and_peers(project):
    rows = [graph_row(t, routing=r) for t in (1, 1024) for r in ("uniform", "zipf")]
    rows += [graph_row(1024, direction="backward")]  # one point, one panel
    write_rows(rows, project / "results")
    assert make_report(project) == 0
    setting = "fast-cpu-2-cores-layer-bfloat16-2-threads"
    files = written(project)
    for direction, panels in (("forward", ("uniform", "zipf")), ("backward", ("uniform",))):
        picture = files[f"docs/images/{direction}-{setting}.svg"].decode()
        assert f"(docs/images/{direction}-{setting}.svg)" in files["README.md"].decode()
        for words in (*[f"{routing} routing" for routing in panels], "floor", "grouped_mm", "loop"):
            assert words in picture
        assert "absent" not in picture


def test_the_same_results_give_the_same_bytes(project):
    write_rows(ROWS, project / "results")
    make_report(project)
    first = written(project)
    make_report(project)
    assert written(project) == first
    for name, content in first.items():
        assert not re.search(rb"\d\d:\d\d:\d\d|dc:date", content), name


def test_newer_versions_replace_older_ones(project):
    slow = json.loads(json.dumps(layer_row(4)).replace("v:0.1.0", "v:0.0.9"))
    slow["seconds"] = spread(77.0)
    write_rows([slow], project / "results")
    write_rows([layer_row(4)], project / "results")
    make_report(project)
    assert len(table_rows((project / "README.md").read_text(), 4)) == 1
    assert "77,000" not in (project / "README.md").read_text()


def test_without_results_nothing_is_written(project, capsys):
    assert make_report(project) == 1
    assert "make bench" in capsys.readouterr().err
    assert (project / "README.md").read_text() == README


def test_a_readme_without_markers_is_left_alone(project, capsys):
    write_rows(ROWS, project / "results")
    (project / "README.md").write_text("# Title\n")
    assert make_report(project) == 1
    assert START in capsys.readouterr().err
    assert (project / "README.md").read_text() == "# Title\n"
    assert not (project / "docs").exists()


GENERATED = [
    generate_row(
        "m2m100-418m",
        8,
        1,
        **{"ctranslate2 float32": generate_peer(1.25), "transformers float32": generate_peer(2.5)},
    ),
    generate_row("m2m100-418m", 1, 4, **{"ctranslate2 float32": {"note": "not installed"}}),
    generate_row(
        "m2m100-418m",
        1,
        1,
        dtype="int8-dynamic",
        **{"ctranslate2 int8": generate_peer(1.5), "transformers float32": generate_peer(5.0)},
    ),
    generate_row("moe", 8, 4, **{"transformers float32": generate_peer(3.0)}),
]


def test_models_and_precisions_of_generation_stand_in_one_table():
    text = render_readme(GENERATED)
    [title] = re.findall(r"^### .*$", text, re.MULTILINE)
    assert title == "### Generation beside CTranslate2 and transformers"
    lines = [line for line in text.splitlines() if line.startswith("| m")]
    assert [line.split(" | ")[:4] for line in lines[1:]] == [
        ["| m2m100-418m", "float32", "1", "4"],
        ["| m2m100-418m", "float32", "8", "1"],
        ["| m2m100-418m", "int8-dynamic", "1", "1"],
        ["| moe", "float32", "8", "4"],
    ]
    assert "**Fast CPU, 2 cores, 2 threads**" in text
    assert "dtype:float32,int8-dynamic" in text


def test_generation_is_shown_in_tokens_per_second_with_ratios_and_the_floor():
    text = render_readme(GENERATED)
    assert (
        "| m2m100-418m | float32 | 8 | 1 | 128 | 102 | 51.2 | **1.25** (1.12 – 1.38) | "
        "**2.50** (2.25 – 2.75) | 160 |"
    ) in text
    assert "Memory was read at 25.0 GB/s in the same run." in text


def test_a_system_that_was_not_measured_leaves_a_gap_and_its_reason():
    text = render_readme(GENERATED)
    assert "| m2m100-418m | float32 | 1 | 4 | 16.0 | – | – | – | – | 20.0 |" in text
    assert "ctranslate2 float32 not timed: not installed." in text


def test_memory_and_loading_stand_in_the_documentation():
    text = render_docs(GENERATED)
    row = "| m2m100-418m | int8-dynamic | 1 | 1 | 2.10 | 1.90 | 1.90 | 1.50 | 0.80 | 0.80 | 2.50 |"
    assert f"{row} 2.00 (1.80 – 2.20) | 50% |" in text
    assert "memory and loading" not in render_readme(GENERATED)


def test_a_step_its_graphs_and_reordering_have_tables():
    step = {
        **generate_row("m2m100-418m", 1, 1),
        "name": "generation/bench_step.py::test_step[m2m100-418m-float32-1x1-eager]",
        "seconds": spread(0.05),
        "signature": signature("m2m100-418m", "batch:1|beam:1|source:32|mode:eager"),
        "figures": {"floor_s": 0.04, "bytes": 1e9, "flops": 1e9, "read_bytes_per_s": 25e9},
    }
    graphs = {
        **step,
        "name": "generation/bench_generate_54b.py::test_graphs",
        "signature": signature("nllb-moe-54b", "sentences:50|longest:200"),
        "figures": {"graphs": 4, "buckets": 4, "breaks": 0},
    }
    reorder = {
        **step,
        "name": "generation/bench_reorder.py::test_reorder[8x4-L64]",
        "seconds": spread(2e-3),
        "signature": signature("16-heads-of-64", "batch:8|beam:4|length:64"),
        "figures": {},
        "peers": {"ancestry mask": {"seconds": spread(1e-3)}},
    }
    text = render_docs([step, graphs, reorder])
    assert "| 1 | 1 | eager | 50.0 (45.0 – 55.0) | 40.0 | **1.25** |" in text
    assert "| 50 | 200 | 4 | 4 | 0 |" in text
    assert "| 8 | 4 | 64 | 2,000 | 1,000 | **2.00** |" in text
