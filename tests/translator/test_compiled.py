"""How the decoder's step is run, as a caller of the translator chooses it."""

import pytest
import torch

import moe_mt
from moe_mt.errors import ConfigError
from moe_mt.generation import CompiledStep, EagerStep
from tests.translators import tiny

TEXTS = ["May 2", "in 14 minutes", "9 hours ago"]


@pytest.fixture
def _traced_only(monkeypatch):
    """Trace without generating code, which takes a minute and is tested with the step itself."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, **options | EAGER))
    torch._dynamo.reset()


EAGER = {"backend": "eager"}


def step_of(translator):
    return translator._vocabularies.whole.step


def test_a_cpu_compiles_only_when_asked():
    assert isinstance(step_of(tiny()), EagerStep)
    assert isinstance(
        step_of(moe_mt.from_pretrained("tiny", device="cpu", compile=False)), EagerStep
    )
    asked = moe_mt.from_pretrained("tiny", device="cpu", compile=True)
    assert isinstance(step_of(asked), CompiledStep)


@pytest.mark.usefixtures("_traced_only")
def test_after_a_warm_up_translations_of_its_sizes_compile_nothing():
    translator = moe_mt.from_pretrained("tiny", device="cpu", compile=True)
    translator.warmup(batch_size=4, num_beams=2, source_tokens=20, new_tokens=20)
    step = step_of(translator)
    assert step.graphs == 3  # of four sentences, two and one
    options = {"num_beams": 2, "max_new_tokens": 20}
    expected = tiny().translate(TEXTS, "eng_Latn", "fra_Latn", **options)
    assert translator.translate(TEXTS, "eng_Latn", "fra_Latn", **options) == expected
    assert step.graphs == 3


def test_a_warm_up_without_compilation_is_one_step():
    tiny().warmup(batch_size=2)


def test_another_value_is_named():
    with pytest.raises(ConfigError, match="compile is 'yes'; choose 'auto', True or False"):
        moe_mt.from_pretrained("tiny", device="cpu", compile="yes")
