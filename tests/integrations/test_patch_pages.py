"""The lines that docs/patch*.md show run, on tiny models in place of the published ones."""

import re
from pathlib import Path

import pytest

import moe_mt
from moe_mt.integrations import TESTED_VERSIONS
from tests.integrations import families
from tests.integrations.test_patch_cross_attention import make as make_without_experts

pytestmark = pytest.mark.transformers

DOCS = Path(__file__).parents[2] / "docs"

STAND_INS = {
    "facebook/nllb-moe-54b": lambda: families.make("nllb_moe"),
    "google/switch-base-8": lambda: families.make("switch"),
    "mistralai/Mixtral-8x7B-v0.1": lambda: families.make("mixtral"),
    "allenai/OLMoE-1B-7B-0924": lambda: families.make("olmoe"),
    "facebook/nllb-200-distilled-600M": lambda: make_without_experts("m2m_100"),
}


@pytest.fixture
def stand_ins(monkeypatch):
    """Let ``from_pretrained`` give a tiny model of the family that a name is of."""
    import transformers

    loaded = []

    def from_pretrained(name, **options):
        loaded.append(name)
        return STAND_INS[name]()

    for auto in (transformers.AutoModelForSeq2SeqLM, transformers.AutoModelForCausalLM):
        monkeypatch.setattr(auto, "from_pretrained", from_pretrained)
    return loaded


@pytest.mark.parametrize("page", ["nllb-moe", "switch-transformers", "mixtures", "cross-attention"])
def test_three_lines_patch_a_model(page, stand_ins, capsys):
    text = (DOCS / f"patch-{page}.md").read_text(encoding="utf-8")
    code = re.search(r"```python no-run\n(.*?)```", text, re.DOTALL)[1]
    namespace = {}
    exec(compile(code, page, "exec"), namespace)
    assert len(stand_ins) == 1
    assert "compute with moe_mt:" in capsys.readouterr().out
    moe_mt.unpatch(namespace["model"])


def test_the_experts_implementation_is_taken(stand_ins):
    if families.VERSION < (5, 7):
        pytest.skip("others' experts implementations are taken since transformers 5.7")
    text = (DOCS / "experts-implementation.md").read_text(encoding="utf-8")
    code = re.search(r"```python no-run\n(.*?)```", text, re.DOTALL)[1]
    namespace = {}
    exec(compile(code, "page", "exec"), namespace)
    assert namespace["model"].config._experts_implementation == "moe_mt"


def test_this_version_is_among_the_tested_ones():
    assert ".".join(map(str, families.VERSION)) in TESTED_VERSIONS
