"""torch.compile of patched models, and how much memory patching needs."""

import copy
import re
import subprocess
import sys

import pytest
import torch

from moe_mt.integrations import patch, unpatch
from tests.closeness import assert_near
from tests.integrations.families import inputs_for, make

# What torch traces warns, of what it does itself.
pytestmark = [pytest.mark.transformers, pytest.mark.filterwarnings("default")]


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def logits_of(model, family):
    with torch.no_grad():
        return model(**inputs_for(family)).logits


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_patched_model_compiles_as_one_graph_with_the_same_logits(family):
    model = make(family)
    patch(model)
    expected = logits_of(model, family)
    found = logits_of(torch.compile(model, backend="eager", fullgraph=True), family)
    assert_near(found, expected, torch.float32)


@pytest.mark.parametrize("family", ["switch", "nllb_moe"])
def test_a_patched_model_whose_router_breaks_the_graph_gives_the_same_logits(family):
    model = make(family)
    patch(model)
    expected = logits_of(model, family)
    found = logits_of(torch.compile(model, backend="eager"), family)
    assert_near(found, expected, torch.float32)


def test_a_compiled_model_is_cast_and_unpatched():
    model = make("mixtral", num_hidden_layers=1)
    plain = copy.deepcopy(model)
    patch(model)
    compiled = torch.compile(model, backend="aot_eager")
    assert_near(logits_of(compiled, "mixtral"), logits_of(plain, "mixtral"), torch.float32)
    model.to(torch.bfloat16)
    assert_near(logits_of(compiled, "mixtral"), logits_of(model, "mixtral"), torch.bfloat16)
    unpatch(model)
    plain.to(torch.bfloat16)
    assert_near(logits_of(compiled, "mixtral"), logits_of(plain, "mixtral"), torch.bfloat16)


def test_a_model_is_patched_after_it_was_compiled():
    model = make("mixtral", num_hidden_layers=1)
    expected = logits_of(model, "mixtral")
    compiled = torch.compile(model, backend="eager")
    logits_of(compiled, "mixtral")
    patch(compiled)
    assert_near(logits_of(compiled, "mixtral"), expected, torch.float32)


def test_new_weights_are_seen_by_a_compiled_model():
    model = make("mixtral", num_hidden_layers=1)
    patch(model)
    compiled = torch.compile(model, backend="eager")
    logits_of(compiled, "mixtral")
    other = make("mixtral", num_hidden_layers=1, seed=1)
    expected = logits_of(other, "mixtral")
    model.load_state_dict(other.state_dict())
    assert_near(logits_of(compiled, "mixtral"), expected, torch.float32)
    model.load_state_dict(make("mixtral", num_hidden_layers=1, seed=2).state_dict(), assign=True)
    expected = logits_of(make("mixtral", num_hidden_layers=1, seed=2), "mixtral")
    assert_near(logits_of(compiled, "mixtral"), expected, torch.float32)


def test_a_compiled_patched_model_trains():
    model = make("mixtral", num_hidden_layers=1).train()
    plain = copy.deepcopy(model)
    patch(model)
    compiled = torch.compile(model, backend="aot_eager")
    inputs = inputs_for("mixtral")
    for trained in (compiled, plain):
        trained(**inputs, labels=inputs["input_ids"]).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            assert_near(ours.grad, theirs.grad, torch.float32, name)


BIG_MODEL = """
import re
from pathlib import Path

import torch
import transformers

from moe_mt.integrations import patch

def kilobytes(name):
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{name}:\\\\s+(\\\\d+) kB", status, re.MULTILINE)[1])

torch.set_num_threads(1)
config = transformers.MixtralConfig(
    vocab_size=32,
    hidden_size=1024,
    intermediate_size=3584,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=8,
    max_position_embeddings=32,
)
with torch.device("meta"):
    model = transformers.MixtralForCausalLM(config)
model.to_empty(device="cpu")
for parameter in model.parameters():
    parameter.data.fill_(0.01)
Path("/proc/self/clear_refs").write_text("5")  # The peak begins anew.
before = kilobytes("VmHWM")
patch(model)
print("MORE", (kilobytes("VmHWM") - before) * 1024)
""".replace("\\\\", "\\")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_patching_a_gigabyte_of_experts_needs_the_memory_of_less_than_two_experts():
    run = subprocess.run(
        [sys.executable, "-c", BIG_MODEL], capture_output=True, text=True, check=True
    )
    found = re.search(r"MORE (\d+)", run.stdout)
    assert found, run.stderr
    expert = 3 * 1024 * 3584 * 4
    assert int(found[1]) < 2 * expert
