"""Whether ``doctor`` tells a right transformers from a wrong one (``make test-transformers``)."""

import re
import subprocess
import sys

import pytest
import torch

from moe_mt.cli import main
from moe_mt.integrations import check_transformers, verdict
from tests.integrations import families

needs_any = pytest.mark.transformers
needs_4_57 = pytest.mark.peers

ADVICE = (
    r"moe_mt\.patch\(model\) makes it right \(relative difference \d\.\de-0[78]\), and "
    r"moe_mt\.from_pretrained needs no transformers"
)


@pytest.fixture
def sparse_layer():
    from transformers.models.nllb_moe import modeling_nllb_moe

    return modeling_nllb_moe.NllbMoeSparseMLP


def test_the_room_is_entered_without_transformers():
    # Also where it is installed: what nobody asked for is not imported.
    code = "import sys, moe_mt.integrations; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@needs_any
def test_version_4_is_right_and_version_5_runs_two_experts():
    said = check_transformers()
    if families.VERSION < (5, 0):
        assert said.startswith("computes NLLB-MoE right (relative difference ")
    else:
        assert said.startswith(
            "computes NLLB-MoE WRONG: only experts 0 and 1 of 6 ever run; "
            "its sparse layer differs from the definition by "
        )
        assert re.search(rf"\d%\. {ADVICE}$", said)


@needs_any
def test_a_version_5_with_the_right_layer_is_right(monkeypatch, sparse_layer):
    if families.VERSION < (5, 0):
        pytest.skip("4.57 is right as it is")

    def forward(self, hidden_states, padding_mask=None):
        x = hidden_states.flatten(0, -2)
        gates = self.router(x, padding_mask)[1]  # of each token for each expert
        output = torch.zeros_like(x)
        for index, expert in enumerate(self.experts.values()):
            if isinstance(expert, torch.nn.Dropout):
                continue
            rows = gates[:, index].nonzero()[:, 0]
            output[rows] += 0.8 * gates[rows, index, None] * expert(x[rows])
        return output.view_as(hidden_states)

    monkeypatch.setattr(sparse_layer, "forward", forward)
    assert check_transformers().startswith("computes NLLB-MoE right")


@needs_any
def test_the_verdict_leaves_no_trace_in_random_numbers():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    check_transformers()
    assert torch.equal(torch.rand(3), expected)


@needs_any
def test_doctor_says_so(capsys):
    import transformers

    assert main(["doctor"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    says = "right" if families.VERSION < (5, 0) else "WRONG"
    assert last.startswith(f"transformers {transformers.__version__}: computes NLLB-MoE {says}")


@needs_4_57
def test_experts_that_do_not_run_are_named(sparse_layer, monkeypatch):
    # A layer that never asks its last three experts.
    genuine = sparse_layer.forward

    def forward(self, hidden_states, padding_mask=None):
        classify = self.router.classifier.forward
        self.router.classifier.forward = lambda x: classify(x).index_fill(
            -1, torch.tensor([3, 4, 5]), -1e9
        )
        output = genuine(self, hidden_states, padding_mask)
        self.router.classifier.forward = classify
        return output

    monkeypatch.setattr(sparse_layer, "forward", forward)
    assert "WRONG: only experts 0, 1 and 2 of 6 ever run; its sparse" in check_transformers()


@needs_4_57
def test_a_wrong_layer_that_runs_all_experts_is_noticed(sparse_layer, monkeypatch):
    # Masked outputs are scaled by 0.8 at evaluation; a tenth of a per cent is no rounding.
    genuine = sparse_layer.forward

    def forward(self, hidden_states, padding_mask=None):
        output, *rest = genuine(self, hidden_states, padding_mask)
        return (output * 1.001, *rest)

    monkeypatch.setattr(sparse_layer, "forward", forward)
    assert check_transformers().startswith("computes NLLB-MoE WRONG: its sparse layer differs")


@needs_any
def test_a_version_that_patching_does_not_mend_is_told_so(sparse_layer, monkeypatch):
    # A router that always takes its last experts, which patching leaves as it is.
    genuine = sparse_layer.__init__

    def __init__(self, *args, **kwargs):
        genuine(self, *args, **kwargs)
        route = self.router.forward
        self.router.forward = lambda *a, **k: tuple(x.flip(-1) for x in route(*a, **k))

    monkeypatch.setattr(sparse_layer, "__init__", __init__)
    said = check_transformers()
    assert "WRONG" in said
    assert re.search(r"Patched, it still differs by \d+%: use moe_mt\.from_pretrained, or", said)


@needs_4_57
def test_one_wrong_layer_of_two_is_enough(sparse_layer, monkeypatch):
    genuine = sparse_layer.forward
    seen = []

    def forward(self, hidden_states, padding_mask=None):
        seen.append(self)
        output, *rest = genuine(self, hidden_states, padding_mask)
        return (output * (1 if self is seen[0] else 1.001), *rest)

    monkeypatch.setattr(sparse_layer, "forward", forward)
    assert "WRONG" in check_transformers()
    assert len({id(layer) for layer in seen}) == 2


@pytest.mark.parametrize(
    ("ran", "words"),
    [
        ({4}, "only expert 4 of 6 ever run; "),
        ({0, 1}, "only experts 0 and 1 of 6 ever run; "),
        # Others than the definition asks for, or the same: not a sentence about missing ones.
        ({0, 5}, ""),
        ({0, 1, 2, 3, 4}, ""),
    ],
)
def test_the_sentence_about_missing_experts(ran, words):
    assert verdict._missing(ran, {0, 1, 2, 3, 4}) == words
