"""The checklist of the documented API: no row is open, and every test that it names exists."""

import re

import pytest

from tests.docs.test_docs import DOCS

PAGE = (DOCS / "api-checklist.md").read_text()
LINK = re.compile(r"\[([a-z0-9 ]+)\]\((\.\./tests/[a-z0-9_/]+\.py)\)")
ROWS = [line for line in PAGE.splitlines() if re.match(r"\| (?!#|---|item|field|statement)", line)]
ROWS = [row for row in ROWS if not row.startswith("|---")]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip()[:40])
def test_every_row_names_a_test_that_exists(row):
    links = LINK.findall(row)
    assert links
    for name, file in links:
        function = f"def test_{name.replace(' ', '_')}("
        assert function in (DOCS / file).read_text(), f"{file} has no test {name!r}"


def test_every_documented_item_has_a_row():
    numbers = [row.split("|")[1].strip() for row in ROWS]
    assert [n for n in numbers if n.isdigit()] == [str(n) for n in range(1, 33)]
    assert [n for n in numbers if re.fullmatch(r"E\d+", n)] == [f"E{n}" for n in range(1, 11)]


def test_every_output_field_has_a_row():
    from moe_mt.pretrained import outputs

    fields = {
        name
        for output in (
            outputs.Seq2SeqLMOutput,
            outputs.Seq2SeqMoEOutput,
            outputs.Seq2SeqModelOutput,
        )
        for name in output._names()
    }
    assert {name for name in fields if f"`{name}`" not in PAGE and name not in PAGE} == set()
