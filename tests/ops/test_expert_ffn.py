import pytest
import torch
from torch.nn import functional

from moe_mt.errors import ConfigError
from moe_mt.ops import expert_ffn, permute

# Tokens, experts, choices, d_model, ffn_dim; every shape has its reason.
SHAPES = {
    "one token": (1, 4, 2, 8, 16),
    "fewer tokens than experts": (3, 8, 2, 8, 16),
    "many tokens per expert": (40, 3, 2, 8, 16),
    "one choice": (7, 4, 1, 8, 16),
    "every expert": (5, 3, 3, 8, 16),
    "widths that are no power of two": (9, 4, 2, 7, 13),
    "no token": (0, 4, 2, 8, 16),
}


def problem(tokens, num_experts, top_k, d_model, ffn_dim, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shapes = [
        (tokens, d_model),
        (num_experts, ffn_dim, d_model),
        (num_experts, d_model, ffn_dim),
        (num_experts, ffn_dim),
        (num_experts, d_model),
    ]
    tensors = [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]
    chosen = [torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(tokens)]
    ids = torch.stack(chosen) if tokens else torch.zeros(0, top_k)
    return ids.to(torch.int32), tensors


def by_hand(expert_ids, x, up_proj, down_proj, up_bias, down_bias, activation=torch.relu):
    """Each claim's output in claim order, dropped claims zero: (T, K, d_model)."""
    num_experts = up_proj.shape[0]
    out = torch.zeros(*expert_ids.shape, x.shape[1], dtype=x.dtype)
    for t, row in enumerate(expert_ids.tolist()):
        for k, e in enumerate(row):
            if e < num_experts:
                hidden = activation(up_proj[e] @ x[t] + up_bias[e])
                out[t, k] = down_proj[e] @ hidden + down_bias[e]
    return out


def run(expert_ids, x, up_proj, down_proj, up_bias, down_bias, **options):
    """The op's rows, brought back to claim order: (T, K, d_model)."""
    order, rows, offsets = permute(expert_ids, up_proj.shape[0])
    out = expert_ffn(
        x, up_proj, down_proj, order, offsets, up_bias=up_bias, down_bias=down_bias, **options
    )
    assert out.shape == (expert_ids.numel(), x.shape[1])
    return out[rows]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("drop", [False, True], ids=["all kept", "some dropped"])
def test_definition_and_every_gradient(name, drop):
    expert_ids, tensors = problem(*SHAPES[name])
    if drop:
        expert_ids[::2, -1] = SHAPES[name][1]
    ours, theirs = run(expert_ids, *tensors), by_hand(expert_ids, *tensors)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    if expert_ids.numel() == 0:
        return
    weights = torch.randn(ours.shape, dtype=ours.dtype)
    ours_grads = torch.autograd.grad((ours * weights).sum(), tensors)
    theirs_grads = torch.autograd.grad((theirs * weights).sum(), tensors)
    for mine, expected in zip(ours_grads, theirs_grads, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "function"),
    [("relu", torch.relu), ("gelu", functional.gelu), ("silu", functional.silu)],
)
def test_activations(name, function):
    expert_ids, tensors = problem(6, 3, 2, 8, 16)
    ours = run(expert_ids, *tensors, activation=name)
    torch.testing.assert_close(ours, by_hand(expert_ids, *tensors, activation=function))


def test_biases_may_be_missing():
    expert_ids, (x, up, down, up_bias, down_bias) = problem(6, 3, 2, 8, 16)
    expected = by_hand(expert_ids, x, up, down, torch.zeros_like(up_bias), down_bias * 0)
    torch.testing.assert_close(run(expert_ids, x, up, down, None, None), expected)


def test_a_dropped_token_is_never_read():
    expert_ids, (x, *weights) = problem(6, 3, 2, 8, 16)
    expert_ids[2] = 3
    poisoned = x.detach().clone()
    poisoned[2] = torch.nan
    torch.testing.assert_close(run(expert_ids, poisoned, *weights), run(expert_ids, x, *weights))


def test_experts_without_rows_are_not_touched():
    expert_ids, (x, up, down, up_bias, down_bias) = problem(6, 3, 2, 8, 16)
    expert_ids[expert_ids == 1] = 3
    up = up.detach().clone()
    up[1] = torch.nan
    assert run(expert_ids, x, up, down, up_bias, down_bias).isfinite().all()


def test_activation_dropout_zeroes_hidden_units_and_rescales():
    # Identity experts show the dropout itself: every output is 0 or x / (1 - p).
    x = torch.rand(1000, 4) + 1
    identity = torch.eye(4)[None]
    order, _, offsets = permute(torch.zeros(1000, 1, dtype=torch.int32), 1)
    out = expert_ffn(x, identity, identity, order, offsets, activation_dropout=0.25)
    kept = out != 0
    torch.testing.assert_close(out[kept], x[kept] / 0.75)
    assert 0.7 < kept.float().mean() < 0.8


def test_unknown_activation_is_named():
    expert_ids, tensors = problem(2, 2, 1, 4, 4)
    with pytest.raises(ConfigError, match=r"'swish'.*relu"):
        run(expert_ids, *tensors, activation="swish")
