"""Whether ``doctor`` tells a right transformers from a wrong one.

Needs transformers 4.57 in the same environment: ``pytest -m peers``.
"""

import pytest
import torch

from moe_mt.cli import main

pytestmark = pytest.mark.peers


@pytest.fixture
def layer_class():
    from transformers.models.nllb_moe import modeling_nllb_moe

    return modeling_nllb_moe.NllbMoeSparseMLP


def check() -> str:
    # Imported here, for without transformers the room cannot be entered.
    from moe_mt.integrations import check_transformers

    return check_transformers()


def test_transformers_4_57_is_right(layer_class):
    import transformers

    assert transformers.__version__.startswith("4.57")
    assert check().startswith("computes NLLB-MoE right (relative difference ")


def test_the_verdict_leaves_no_trace_in_random_numbers(layer_class):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    check()
    assert torch.equal(torch.rand(3), expected)


def test_experts_that_do_not_run_are_noticed(layer_class, monkeypatch):
    # What transformers 5 does: a token's second choice goes to the wrong expert.
    genuine = layer_class.forward

    def forward(self, hidden_states, padding_mask=None):
        children = dict(self.experts.named_children())
        children["expert_2"].load_state_dict(children["expert_0"].state_dict())
        return genuine(self, hidden_states, padding_mask)

    monkeypatch.setattr(layer_class, "forward", forward)
    verdict = check()
    assert verdict.startswith("computes NLLB-MoE WRONG: its sparse layer differs")
    assert "Use moe_mt, or transformers 4.57" in verdict


def test_a_small_difference_is_noticed(layer_class, monkeypatch):
    # Masked outputs are scaled by 0.8 at evaluation; a tenth of a per cent is no rounding.
    genuine = layer_class.forward

    def forward(self, hidden_states, padding_mask=None):
        output, *rest = genuine(self, hidden_states, padding_mask)
        return (output * 1.001, *rest)

    monkeypatch.setattr(layer_class, "forward", forward)
    assert "WRONG" in check()


def test_doctor_says_so(capsys):
    assert main(["doctor"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("transformers 4.57")
    assert ": computes NLLB-MoE right" in last
