import pytest
import torch

from moe_mt.ops import combine, permute

# Tokens, experts, choices, d_model.
SHAPES = {
    "one token": (1, 4, 2, 8),
    "one choice": (6, 4, 1, 8),
    "every expert": (5, 3, 3, 8),
    "an odd width": (7, 4, 2, 5),
    "no token": (0, 4, 2, 8),
}


def problem(tokens, num_experts, top_k, d_model):
    expert_ids = torch.rand(tokens, num_experts).argsort(1)[:, :top_k].to(torch.int32)
    _, rows, _ = permute(expert_ids, num_experts)
    expert_rows = torch.randn(tokens * top_k, d_model, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(tokens, top_k, dtype=torch.float64, requires_grad=True)
    return expert_rows, rows, gates


@pytest.mark.parametrize("name", SHAPES)
def test_definition_and_gradients(name):
    expert_rows, rows, gates = problem(*SHAPES[name])
    ours = combine(expert_rows, rows, gates)
    by_hand = torch.zeros_like(ours)
    for t in range(rows.shape[0]):
        for k in range(rows.shape[1]):
            by_hand[t] = by_hand[t] + gates[t, k] * expert_rows[rows[t, k]]
    torch.testing.assert_close(ours, by_hand, rtol=1e-12, atol=1e-12)
    if rows.numel() == 0:
        return
    weights = torch.randn_like(ours)
    mine = torch.autograd.grad((ours * weights).sum(), (expert_rows, gates))
    theirs = torch.autograd.grad((by_hand * weights).sum(), (expert_rows, gates))
    for got, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_bfloat16_rows_are_summed_in_float32():
    # 1 + 2^-8 + 2^-8 is 1 after each bfloat16 rounding and 1 + 2^-7 when rounded once.
    expert_rows = torch.tensor([[1.0], [2.0**-8], [2.0**-8]], dtype=torch.bfloat16)
    out = combine(expert_rows, torch.tensor([[0, 1, 2]]), torch.ones(1, 3))
    assert out.dtype == torch.bfloat16
    assert out.item() == 1 + 2.0**-7


def test_gates_keep_their_precision():
    # In bfloat16 the first gate would be 1 and the rows would cancel.
    expert_rows = torch.tensor([[1.0], [-1.0]], dtype=torch.bfloat16)
    out = combine(expert_rows, torch.tensor([[0, 1]]), torch.tensor([[1 + 2.0**-9, 1.0]]))
    assert out.item() == 2.0**-9


def test_a_token_does_not_depend_on_the_rest_of_the_batch():
    expert_rows, rows, gates = problem(50, 4, 2, 16)
    whole = combine(expert_rows.float(), rows, gates.float())
    alone = combine(expert_rows.float(), rows[13:14], gates[13:14].float())
    assert torch.equal(whole[13:14], alone)
