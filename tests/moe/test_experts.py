import pytest
import torch
from torch import nn

from moe_mt.errors import ConfigError
from moe_mt.moe import Experts

D_MODEL, FFN_DIM, EXPERTS = 6, 10, 4


class FeedForward(nn.Module):
    """``fc2(activation(fc1(x)))``."""

    def __init__(self, activation, *, bias=True, d_model=D_MODEL, dtype=torch.float64):
        super().__init__()
        self.fc1 = nn.Linear(d_model, FFN_DIM, bias=bias, dtype=dtype)
        self.fc2 = nn.Linear(FFN_DIM, d_model, bias=bias, dtype=dtype)
        self.activation = activation

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class Gated(nn.Module):
    """``w2(activation(w1(x)) * w3(x))``, its layers a level deeper."""

    def __init__(self, activation, *, bias=True):
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.w1 = nn.Linear(D_MODEL, FFN_DIM, bias=bias, dtype=torch.float64)
        self.mlp.w2 = nn.Linear(FFN_DIM, D_MODEL, bias=bias, dtype=torch.float64)
        self.mlp.w3 = nn.Linear(D_MODEL, FFN_DIM, bias=bias, dtype=torch.float64)
        self.activation = activation

    def forward(self, x):
        return self.mlp.w2(self.activation(self.mlp.w1(x)) * self.mlp.w3(x))


GATED_PATHS = {"up_proj": "mlp.w3", "down_proj": "mlp.w2", "gate_proj": "mlp.w1"}
PLACES = {
    "up_proj": "fc1.weight",
    "up_bias": "fc1.bias",
    "down_proj": "fc2.weight",
    "down_bias": "fc2.bias",
}
GATED_PLACES = {
    "up_proj": "mlp.w3.weight",
    "up_bias": "mlp.w3.bias",
    "down_proj": "mlp.w2.weight",
    "down_bias": "mlp.w2.bias",
    "gate_proj": "mlp.w1.weight",
    "gate_bias": "mlp.w1.bias",
}
FORMS = {
    "relu": (FeedForward, nn.functional.relu),
    "gelu": (FeedForward, nn.functional.gelu),
    "silu": (FeedForward, nn.functional.silu),
    "SwiGLU": (Gated, nn.functional.silu),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_experts_of_modules_compute_what_these_do_and_so_do_their_gradients(form, bias):
    make, activation = FORMS[form]
    modules = nn.ModuleList([make(activation, bias=bias) for _ in range(EXPERTS)])
    paths, places = (GATED_PATHS, GATED_PLACES) if make is Gated else ({}, PLACES)
    name = "silu" if form == "SwiGLU" else form
    experts = Experts.from_modules(modules, activation=name, **paths)
    x = torch.randn(12, D_MODEL, dtype=torch.float64, requires_grad=True)
    expert_ids = torch.randint(EXPERTS, (12, 2), dtype=torch.int32)
    gates = torch.rand(12, 2)
    found = experts(x, expert_ids, gates)
    expected = torch.stack(
        [
            sum(g.double() * modules[e](x[t]) for e, g in zip(ids, gates[t], strict=True))
            for t, ids in enumerate(expert_ids.tolist())
        ]
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    mine, x.grad = x.grad, None
    (expected * weights).sum().backward()
    torch.testing.assert_close(mine, x.grad, rtol=1e-6, atol=1e-7)
    stacked = dict(experts.named_parameters())
    assert stacked.keys() == {key for key in places if bias or not key.endswith("bias")}
    for key, parameter in stacked.items():
        theirs = torch.stack([one.get_parameter(places[key]).grad for one in modules])
        torch.testing.assert_close(parameter.grad, theirs, rtol=1e-6, atol=1e-7, msg=key)


def test_experts_of_modules_are_a_copy_of_their_dtype_and_want_the_gradients_that_these_do():
    modules = {f"expert_{i}": FeedForward(torch.relu, dtype=torch.bfloat16) for i in range(3)}
    for module in modules.values():
        module.fc1.requires_grad_(False)
    experts = Experts.from_modules(nn.ModuleDict(modules))
    assert experts.num_experts == 3
    assert all(parameter.dtype == torch.bfloat16 for parameter in experts.parameters())
    wanted = {name for name, parameter in experts.named_parameters() if parameter.requires_grad}
    assert wanted == {"down_proj", "down_bias"}
    before = experts.up_proj.clone()
    with torch.no_grad():
        modules["expert_1"].fc1.weight.zero_()
    assert torch.equal(experts.up_proj, before)


def test_stacked_weights_are_taken_without_a_copy():
    fused = torch.randn(EXPERTS, 2 * FFN_DIM, D_MODEL)
    down = nn.Parameter(torch.randn(EXPERTS, D_MODEL, FFN_DIM), requires_grad=False)
    gate, up = fused.chunk(2, 1)
    experts = Experts.from_stacked(up, down, gate_proj=gate, activation="silu")
    assert experts.down_proj is down
    assert experts.up_proj.data_ptr() == up.data_ptr()
    assert experts.up_proj.requires_grad
    assert [*experts.state_dict()] == ["up_proj", "down_proj", "gate_proj"]
    x, expert_ids = torch.randn(5, D_MODEL), torch.tensor([[0], [1], [3], [1], [4]]).int()
    found = experts(x, expert_ids, torch.ones(5, 1))
    expected = [
        torch.zeros(D_MODEL)
        if e == EXPERTS
        else down[e] @ (nn.functional.silu(gate[e] @ x[t]) * (up[e] @ x[t]))
        for t, e in enumerate(expert_ids[:, 0].tolist())
    ]
    torch.testing.assert_close(found, torch.stack(expected))


def test_experts_are_born_as_linear_layers_are():
    experts = Experts(50, 64, 100, gated=True)
    for name, parameter in experts.named_parameters():
        bound = (100 if name.startswith("down") else 64) ** -0.5
        assert parameter.abs().max() <= bound
        assert parameter.abs().max() > 0.99 * bound
        assert parameter.mean().abs() < 0.05 * bound
    before = experts.up_proj.clone()
    experts.reset_parameters()
    assert not torch.equal(experts.up_proj, before)


def test_experts_on_the_meta_device_draw_nothing():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with torch.device("meta"):
        experts = Experts(4, 8, 16)
    assert experts.up_proj.is_meta
    assert torch.equal(torch.rand(3), expected)


def broken(change):
    """Four experts, of which the third was changed."""
    modules = [FeedForward(torch.relu) for _ in range(EXPERTS)]
    change(modules[2])
    return modules


def replace(path, layer):
    return lambda module: setattr(module, path, layer)


class Quantized(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("modules", "names", "message"),
    [
        ([], {}, "no module"),
        (broken(lambda _: None), {"up_proj": "w1"}, "no nn.Linear at 'w1'.*'fc1', 'fc2'"),
        (broken(replace("fc1", nn.Identity())), {}, "expert 2 has no nn.Linear at 'fc1'.*'fc2'"),
        (broken(replace("fc2", Quantized(FFN_DIM, D_MODEL))), {}, "no nn.Linear at 'fc2'"),
        (broken(replace("fc1", nn.Linear(D_MODEL, 9).double())), {}, r"expert 2 is \(9, 6\)"),
        (broken(lambda module: module.fc2.float()), {}, "down_proj of expert 2.*float32"),
        (
            broken(replace("fc1", nn.Linear(D_MODEL, FFN_DIM, bias=False).double())),
            {},
            "expert 2 has .* a bias or none",
        ),
        ([FeedForward(torch.relu).to("meta")], {}, "meta device"),
        (broken(lambda module: module.fc1.to("meta")), {}, "'fc1' of expert 2 is on the meta"),
    ],
)
def test_modules_that_cannot_be_stacked_are_named(modules, names, message):
    with pytest.raises(ConfigError, match=message):
        Experts.from_modules(modules, **names)


def test_modules_of_which_one_layer_alone_has_a_bias_are_refused():
    modules = [FeedForward(torch.relu) for _ in range(EXPERTS)]
    for module in modules:
        module.fc2 = nn.Linear(FFN_DIM, D_MODEL, bias=False, dtype=torch.float64)
    with pytest.raises(ConfigError, match="down_bias was not given"):
        Experts.from_modules(modules)


UP, DOWN = torch.zeros(EXPERTS, FFN_DIM, D_MODEL), torch.zeros(EXPERTS, D_MODEL, FFN_DIM)


@pytest.mark.parametrize(
    ("up_proj", "down_proj", "others", "message"),
    [
        (UP[0], DOWN, {}, "up_proj is .10, 6."),
        (UP, DOWN.mT, {}, r"down_proj is \(4, 10, 6\).*must be \(4, 6, 10\)"),
        (UP, DOWN.half(), {}, "down_proj is .*float16"),
        (UP, DOWN, {"gate_proj": UP[:3]}, r"gate_proj is \(3, 10, 6\)"),
        (UP, DOWN, {"up_bias": UP[..., 0]}, "down_bias was not given"),
        (UP, DOWN, {"up_bias": UP[..., 0], "down_bias": DOWN[0, 0]}, r"down_bias is \(10,\)"),
        (
            UP,
            DOWN,
            {"up_bias": UP[..., 0], "gate_bias": UP[..., 0], "down_bias": DOWN[..., 0]},
            "gate_bias was given",
        ),
    ],
)
def test_stacked_weights_that_do_not_fit_are_named(up_proj, down_proj, others, message):
    with pytest.raises(ConfigError, match=message):
        Experts.from_stacked(up_proj, down_proj, **others)
