"""``moe-mt languages`` lists codes and names."""

import pytest

from moe_mt.tokenizers import list_languages


@pytest.mark.parametrize(
    ("arguments", "number", "line"),
    [
        ((), 202, "fra_Latn\tFrench"),
        (("--family", "nllb"), 202, "zho_Hant\tChinese (Traditional)"),
        (("--family", "m2m100"), 100, "fr\tFrench"),
        (("--family", "wmt21"), 8, "is\tIcelandic"),
    ],
)
def test_lists(run, arguments, number, line):
    outcome = run("languages", *arguments)
    assert outcome.code == 0
    lines = outcome.out.decode().splitlines()
    assert len(lines) == number
    assert line in lines
    family = arguments[-1] if arguments else "nllb"
    assert [tuple(line.split("\t")) for line in lines] == list_languages(family)


def test_an_unknown_family_is_refused(run):
    outcome = run("languages", "--family", "madlad")
    assert outcome.code == 2
    assert "'nllb', 'm2m100', 'wmt21'" in outcome.err
