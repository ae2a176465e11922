import pytest
import torch
from torch.nn import functional

from moe_mt.errors import ConfigError
from moe_mt.ops import expert_ffn, use_backend
from moe_mt.ops.expert_ffn import expert_ffn_eager
from tests.closeness import assert_near

# Tokens, experts, choices, d_model, ffn_dim; every shape has its reason.
SHAPES = {
    "one token": (1, 4, 2, 8, 16),
    "two tokens, the largest call that decoding makes for one sentence": (2, 8, 2, 16, 16),
    "fewer tokens than experts": (3, 8, 2, 8, 16),
    "one token too many for the decode path": (5, 8, 2, 16, 24),
    "many tokens per expert": (40, 3, 2, 8, 16),
    "a block of rows and one more": (33, 2, 1, 16, 40),
    "one choice": (7, 4, 1, 8, 16),
    "four choices": (7, 8, 4, 16, 16),
    "every expert": (5, 3, 3, 8, 16),
    "one expert": (19, 1, 1, 8, 16),
    "128 experts, most of them idle": (9, 128, 2, 8, 8),
    "widths that are no power of two": (20, 4, 2, 7, 13),
    "widths larger than a block": (9, 2, 2, 40, 70),
    "no token": (0, 4, 2, 8, 16),
}
NAMES = ("x", "gates", "up_proj", "down_proj", "up_bias", "down_bias", "gate_proj", "gate_bias")
FORMS = {
    "relu": ("relu", False),
    "gelu": ("gelu", False),
    "swiglu": ("silu", True),
    "reglu": ("relu", True),  # keeps for its backward pass what ReLU without a gate does not
}


def problem(shape, *, gated=False, dtype=torch.float64, device="cpu"):
    """Expert ids (T, K), and every tensor that has a gradient by name."""
    tokens, num_experts, top_k, d_model, ffn_dim = shape
    generator = torch.Generator().manual_seed(1)

    def random(*size, scale=1.0):
        return (torch.randn(size, generator=generator) * scale).to(device, dtype).requires_grad_()

    tensors = {
        "x": random(tokens, d_model),
        "up_proj": random(num_experts, ffn_dim, d_model, scale=d_model**-0.5),
        "down_proj": random(num_experts, d_model, ffn_dim, scale=ffn_dim**-0.5),
        "up_bias": random(num_experts, ffn_dim),
        "down_bias": random(num_experts, d_model),
        "residual": random(tokens, d_model),
    }
    if gated:
        tensors["gate_proj"] = random(num_experts, ffn_dim, d_model, scale=d_model**-0.5)
        tensors["gate_bias"] = random(num_experts, ffn_dim)
    gates_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    gates = torch.rand(tokens, top_k, generator=generator).to(device, gates_dtype)
    tensors["gates"] = (gates + 0.1).requires_grad_()
    chosen = [torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(tokens)]
    ids = torch.stack(chosen) if tokens else torch.zeros(0, top_k)
    return ids.to(device, torch.int32), tensors


def drop_some(expert_ids, tensors, num_experts):
    """Drop every other token's last claim, and the second token altogether."""
    dropped = torch.zeros_like(expert_ids, dtype=torch.bool)
    dropped[::2, -1] = True
    dropped[1:2] = True
    gates = tensors["gates"].detach().masked_fill(dropped, 0).requires_grad_()
    return expert_ids.masked_fill(dropped, num_experts), {**tensors, "gates": gates}


def by_hand(expert_ids, x, gates, up_proj, down_proj, up_bias, down_bias, **others):
    activation = {"relu": torch.relu, "gelu": functional.gelu, "silu": functional.silu}[
        others.get("activation", "relu")
    ]
    out = []
    for t, row in enumerate(expert_ids.tolist()):
        total = torch.zeros_like(x[t])
        for k, e in enumerate(row):
            if e < up_proj.shape[0]:
                up = up_proj[e] @ x[t] + up_bias[e]
                if "gate_proj" in others:
                    gate = others["gate_proj"][e] @ x[t] + others["gate_bias"][e]
                    hidden = activation(gate) * up
                else:
                    hidden = activation(up)
                total = total + gates[t, k] * (down_proj[e] @ hidden + down_bias[e])
        out.append(total + others["residual"][t])
    return torch.stack(out) if out else x * 1


def compare_gradients(ours, theirs, mine, wanted, check):
    seed = torch.randn_like(ours)
    names = list(mine)
    found = torch.autograd.grad(ours, [mine[name] for name in names], seed)
    expected = torch.autograd.grad(theirs, [wanted[name] for name in names], seed.to(theirs))
    for name, got, right in zip(names, found, expected, strict=True):
        check(got, right, f"gradient of {name}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("drop", [False, True], ids=["all kept", "some dropped"])
def test_definition_and_every_gradient(name, form, drop):
    activation, gated = FORMS[form]
    expert_ids, tensors = problem(SHAPES[name], gated=gated)
    if drop:
        expert_ids, tensors = drop_some(expert_ids, tensors, SHAPES[name][1])
    ours = expert_ffn(expert_ids=expert_ids, activation=activation, **tensors)
    theirs = by_hand(expert_ids, activation=activation, **tensors)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    if expert_ids.numel() == 0 or (expert_ids == SHAPES[name][1]).all():
        return

    def check(got, right, what):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-10, msg=what)

    seen = {key: t for key, t in tensors.items() if not (drop and key == "gates")}
    compare_gradients(ours, theirs, seen, seen, check)


# What the forms do differently happens at every shape alike: one of each kind of call.
EVERY_FORM = [
    "one token",
    "many tokens per expert",
    "every expert",
    "widths larger than a block",
    "no token",
]
MOST_TILES = "128 experts, most of them idle"  # more than programs only while all claims are kept
SOME_DROPPED = [(name, "relu", True) for name in SHAPES if name != MOST_TILES]
ALL_KEPT = [
    (MOST_TILES, "relu", False),
    ("many tokens per expert", "reglu", False),
    *((name, form, False) for name in EVERY_FORM for form in ("gelu", "swiglu")),
]


@pytest.mark.triton
@pytest.mark.parametrize(
    ("name", "form", "drop"),
    SOME_DROPPED + ALL_KEPT,
    ids=lambda value: {True: "some dropped", False: "all kept"}.get(value, value),
)
def test_kernels_and_every_gradient(name, form, drop, kernel_device):
    activation, gated = FORMS[form]
    # Half precision for one form; not everywhere, as it would hide the tanh approximation of GELU.
    half = form == "gelu" and name != "many tokens per expert"
    dtype = torch.float16 if half else torch.float32
    expert_ids, tensors = problem(SHAPES[name], gated=gated, dtype=dtype, device=kernel_device)
    if drop:
        expert_ids, tensors = drop_some(expert_ids, tensors, SHAPES[name][1])
    wide = {key: t.detach().double().requires_grad_() for key, t in tensors.items()}
    theirs = expert_ffn_eager(expert_ids=expert_ids, activation=activation, **wide)
    with torch.no_grad():  # the path without a backward pass: few tokens take other kernels
        alone = expert_ffn(expert_ids=expert_ids, activation=activation, **tensors)
    assert_near(alone, theirs, dtype, "result without gradients")
    ours = expert_ffn(expert_ids=expert_ids, activation=activation, **tensors)
    assert_near(ours, theirs, dtype)
    if expert_ids.numel() == 0:
        ours.sum().backward()
        assert all(t.grad is None or not t.grad.any() for t in tensors.values())
        return
    compare_gradients(
        ours,
        theirs,
        tensors,
        wide,
        lambda got, right, what: assert_near(got, right, dtype, what),
    )


@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=pytest.mark.triton)])
def test_a_claim_whose_gate_is_zero_has_no_gradient(backend, request):
    device = request.getfixturevalue("kernel_device") if backend == "triton" else "cpu"
    expert_ids, tensors = problem((12, 4, 2, 8, 16), dtype=torch.float32, device=device)
    expert_ids[0, 0] = 4
    gates = tensors["gates"].detach().clone()
    gates[0, 0] = gates[1, 1] = 0
    tensors["gates"] = gates.requires_grad_()
    one = expert_ffn if backend == "triton" else expert_ffn_eager
    (found,) = torch.autograd.grad(one(expert_ids=expert_ids, **tensors).sum(), gates)
    assert found[0, 0] == found[1, 1] == 0
    assert (found != 0).sum() == found.numel() - 2


@pytest.mark.triton
@pytest.mark.parametrize("tokens", [2, 12], ids=["few tokens", "many tokens"])
def test_a_dropped_claim_adds_nothing_whatever_its_gate(tokens, kernel_device):
    # Its row is memory that nobody wrote.
    expert_ids, tensors = problem((tokens, 4, 2, 8, 16), dtype=torch.float32, device=kernel_device)
    expert_ids[1:, -1] = 4
    silent = tensors["gates"].detach().masked_fill(expert_ids == 4, 0).requires_grad_()
    found = []
    for gates in (tensors["gates"], silent):
        wanted = {**tensors, "gates": gates}
        with torch.no_grad():
            alone = expert_ffn(expert_ids=expert_ids, **wanted)
        out = expert_ffn(expert_ids=expert_ids, **wanted)
        found.append([alone, out, *torch.autograd.grad(out.sum(), list(wanted.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# Tokens, experts, choices; whether each claim reads its expert's weights for itself.
PATHS = {
    "one token, however many its claims": ((1, 32, 20), True),
    "as many claims as experts": ((8, 8, 1), True),
    "a claim more than experts": ((9, 8, 1), False),
    "as many claims as that path takes": ((8, 32, 2), True),
    "a claim more than that": ((17, 32, 1), False),
}


@pytest.mark.triton
@pytest.mark.parametrize("name", PATHS)
def test_few_claims_take_the_path_without_an_order(name, kernel_device, monkeypatch):
    from moe_mt.kernels import expert_ffn as kernels

    (tokens, num_experts, top_k), few = PATHS[name]
    expert_ids, tensors = problem(
        (tokens, num_experts, top_k, 4, 4), dtype=torch.float32, device=kernel_device
    )
    orders = []
    order = kernels.expert_order
    monkeypatch.setattr(kernels, "expert_order", lambda *a: orders.append(1) or order(*a))
    with torch.no_grad():
        expert_ffn(expert_ids=expert_ids, **tensors)
    assert bool(orders) is not few


@pytest.mark.triton
@pytest.mark.parametrize("tokens", [3, 12], ids=["few tokens", "many tokens"])
def test_a_wider_residual_keeps_its_precision(tokens, kernel_device):
    # As under autocast, where the residual stream stays in float32.
    expert_ids, tensors = problem((tokens, 8, 2, 8, 16), dtype=torch.float16, device=kernel_device)
    residual = torch.full((tokens, 8), 1 + 2.0**-20, device=kernel_device, requires_grad=True)
    tensors["residual"] = residual
    silent = {**tensors, "gates": torch.zeros_like(tensors["gates"])}
    with torch.no_grad():
        assert torch.equal(expert_ffn(expert_ids=expert_ids, **silent), residual)
    out = expert_ffn(expert_ids=expert_ids, **silent)
    assert torch.equal(out, residual)
    (grad,) = torch.autograd.grad(out, residual, torch.full_like(out, 1 + 2.0**-20))
    assert torch.equal(grad, residual)
    found = expert_ffn(expert_ids=expert_ids, **tensors)
    assert_near(found, expert_ffn_eager(expert_ids=expert_ids, **tensors), torch.float16)


@pytest.mark.triton
def test_only_what_needs_a_gradient_gets_one(kernel_device):
    expert_ids, tensors = problem((12, 4, 2, 8, 16), dtype=torch.float32, device=kernel_device)
    frozen = {name: t.detach() for name, t in tensors.items()}
    frozen["x"].requires_grad_()
    out = expert_ffn(expert_ids=expert_ids, **frozen)
    out.sum().backward()
    whole = expert_ffn(expert_ids=expert_ids, **tensors)
    (expected,) = torch.autograd.grad(whole.sum(), tensors["x"])
    assert torch.equal(frozen["x"].grad, expected)
    assert all(t.grad is None for name, t in frozen.items() if name != "x")


@pytest.mark.triton
def test_one_tensor_alone_gets_the_gradient_it_gets_among_others(kernel_device):
    expert_ids, tensors = problem(
        (3, 2, 1, 4, 4), gated=True, dtype=torch.float32, device=kernel_device
    )
    options = {"expert_ids": expert_ids, "activation": "silu"}
    whole = expert_ffn(**options, **tensors).square().sum()
    gradients = torch.autograd.grad(whole, list(tensors.values()))
    for name, expected in zip(tensors, gradients, strict=True):
        alone = {key: t.detach() for key, t in tensors.items()}
        alone[name].requires_grad_()
        expert_ffn(**options, **alone).square().sum().backward()
        assert torch.equal(alone[name].grad, expected), name


@pytest.mark.triton
@pytest.mark.parametrize("tokens", [2, 12], ids=["few tokens", "many tokens"])
def test_operands_in_any_layout(tokens, kernel_device):
    # Turned, or parts of larger tensors, each of other strides: a stride that is taken from a
    # shape or from another tensor shows, and so does an operand that must be copied and is not.
    expert_ids, tensors = problem(
        (tokens, 4, 2, 16, 24), gated=True, dtype=torch.float32, device=kernel_device
    )
    parts = {
        name: torch.cat([t.detach(), t.detach()], -1)[..., : t.shape[-1]]
        for name, t in tensors.items()
        if name in ("down_proj", "up_bias", "down_bias", "gate_proj")
    }
    parts["gate_bias"] = torch.cat([tensors["gate_bias"].detach()] * 3, 1)[:, :24]
    turned = {
        name: tensors[name].detach().transpose(-1, -2).contiguous().transpose(-1, -2)
        for name in ("x", "gates", "residual", "up_proj")
    }
    odd = {key: t.requires_grad_() for key, t in {**tensors, **parts, **turned}.items()}
    assert sum(not t.is_contiguous() for t in odd.values()) == len(parts) + len(turned)
    odd_ids = expert_ids.t().contiguous().t()
    ours = expert_ffn(expert_ids=odd_ids, activation="silu", **odd)
    theirs = expert_ffn(expert_ids=expert_ids, activation="silu", **tensors)
    seed = torch.randn(16, tokens, device=kernel_device).t()
    mine = torch.autograd.grad(ours, list(odd.values()), seed)
    wanted = torch.autograd.grad(theirs, list(tensors.values()), seed.contiguous())
    assert torch.equal(ours, theirs)
    for name, got, expected in zip(odd, mine, wanted, strict=True):
        assert torch.equal(got, expected), f"gradient of {name}"
    with torch.no_grad():
        ours = expert_ffn(expert_ids=odd_ids, activation="silu", **odd)
        assert torch.equal(ours, expert_ffn(expert_ids=expert_ids, activation="silu", **tensors))


@pytest.mark.triton
def test_autocast_is_a_cast_of_every_operand_but_gates_and_residual(kernel_device):
    expert_ids, tensors = problem((6, 4, 2, 8, 16), dtype=torch.float32, device=kernel_device)
    as_they_are = ("gates", "residual")
    cast = {k: t if k in as_they_are else t.bfloat16() for k, t in tensors.items()}
    with torch.no_grad():
        expected = expert_ffn(expert_ids=expert_ids, **cast)
        with torch.autocast(kernel_device.type, torch.bfloat16):
            assert torch.equal(expert_ffn(expert_ids=expert_ids, **tensors), expected)


@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=pytest.mark.triton)])
@pytest.mark.parametrize("tokens", [3, 12], ids=["few tokens", "many tokens"])
def test_halves_of_a_fused_weight_equal_two_weights(tokens, backend, request):
    device = request.getfixturevalue("kernel_device") if backend == "triton" else "cpu"
    expert_ids, tensors = problem(
        (tokens, 8, 2, 16, 24), gated=True, dtype=torch.float32, device=device
    )
    fused = torch.cat([tensors["gate_proj"], tensors["up_proj"]], 1).detach().requires_grad_()
    halves = {**tensors, "gate_proj": fused[:, :24], "up_proj": fused[:, 24:]}
    one = expert_ffn if backend == "triton" else expert_ffn_eager
    two = one(expert_ids=expert_ids, activation="silu", **tensors)
    ours = one(expert_ids=expert_ids, activation="silu", **halves)
    assert torch.equal(ours, two)
    (found,) = torch.autograd.grad(ours.sum(), fused)
    expected = torch.autograd.grad(two.sum(), (tensors["gate_proj"], tensors["up_proj"]))
    assert torch.equal(found, torch.cat(expected, 1))
    with torch.no_grad():
        assert torch.equal(
            one(expert_ids=expert_ids, activation="silu", **tensors),
            one(expert_ids=expert_ids, activation="silu", **halves),
        )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("widths", [(16, 40), (40, 16)], ids=["tall up", "wide up"])
def test_without_gradients_few_rows_take_another_product(widths, form, bias):
    # One expert has all rows: as many as decide which factor of a product comes first, and one
    # more, of weights with more rows than columns and with fewer.
    activation, gated = FORMS[form]
    for tokens in range(1, 8):
        expert_ids, tensors = problem((tokens, 1, 1, *widths), gated=gated, dtype=torch.float32)
        if not bias:
            tensors = {n: tensor for n, tensor in tensors.items() if "bias" not in n}
        with torch.no_grad(), use_backend("eager"):
            before = {name: tensor.clone() for name, tensor in tensors.items()}
            found = expert_ffn(expert_ids=expert_ids, activation=activation, **tensors)
            assert all(torch.equal(tensors[name], before[name]) for name in before)
            expected = expert_ffn_eager(expert_ids=expert_ids, activation=activation, **tensors)
        assert_near(found, expected, torch.float32, f"{tokens} tokens")


@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=pytest.mark.triton)])
@pytest.mark.parametrize("tokens", [6, 12], ids=["few tokens", "many tokens"])
def test_nothing_leaks(tokens, backend, request):
    # A token of NaN reaches no other; a dropped one is never read; an idle expert is not either.
    device = request.getfixturevalue("kernel_device") if backend == "triton" else "cpu"
    expert_ids, tensors = problem((tokens, 12, 2, 8, 16), dtype=torch.float32, device=device)
    expert_ids[expert_ids == 1] = 0
    one = expert_ffn if backend == "triton" else expert_ffn_eager
    with torch.no_grad():
        clean = one(expert_ids=expert_ids, **tensors)
        tensors["x"][2] = torch.nan
        tensors["up_proj"][1] = torch.nan
        found = one(expert_ids=expert_ids, **tensors)
        others = torch.arange(tokens, device=device) != 2
        assert torch.equal(found[others], clean[others])
        assert found[2].isnan().all()
        expert_ids[2] = 12
        tensors["gates"][2] = 0
        found = one(expert_ids=expert_ids, **tensors)
        # Rows have moved up by one, and the CPU's products round by a row's place.
        assert_near(found[others], clean[others], torch.float32)
        assert torch.equal(found[2], tensors["residual"][2])


class Watched:
    """Memory of Triton's interpreter that refuses what no tensor of the running launch holds."""

    def __init__(self, memory):
        self.memory, self.bounds = memory, []

    def __getattr__(self, name):
        return getattr(self.memory, name)

    def watch(self, tensors):
        storages = [t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)]
        self.bounds = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages]

    def check(self, pointers, mask):
        pointers = pointers[mask]
        held = torch.zeros(pointers.shape, dtype=torch.bool).numpy()
        for first, end in self.bounds:
            held |= (pointers >= first) & (pointers < end)
        assert held.all(), "an address outside of every tensor"

    def load(self, pointers, mask, *others):
        self.check(pointers, mask)
        return self.memory.load(pointers, mask, *others)

    def store(self, pointers, value, mask):
        self.check(pointers, mask)
        return self.memory.store(pointers, value, mask)


@pytest.mark.triton
@pytest.mark.parametrize("form", ["relu", "swiglu"])
def test_no_address_outside_of_the_tensors(form, kernel_device, monkeypatch):
    # What is read past an end and then not used shows in no result; on a GPU it may be a fault.
    if kernel_device.type != "cpu":
        pytest.skip("only the interpreter shows addresses; on a GPU, compute-sanitizer does")
    from triton.runtime import interpreter

    watched = Watched(interpreter._interpreter)
    run = interpreter.GridExecutor.__call__

    def run_watched(self, *args, **kwargs):
        watched.watch([*args, *kwargs.values()])
        return run(self, *args, **kwargs)

    monkeypatch.setattr(interpreter, "_interpreter", watched)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", run_watched)
    activation, gated = FORMS[form]
    options = {"gated": gated, "dtype": torch.float32, "device": kernel_device}
    for tokens in (2, 20):  # few for the decode path; then three experts, all of ragged sizes
        expert_ids, tensors = problem((tokens, 3 if tokens > 2 else 5, 2, 7, 13), **options)
        with torch.no_grad():
            expert_ffn(expert_ids=expert_ids, activation=activation, **tensors)
        out = expert_ffn(expert_ids=expert_ids, activation=activation, **tensors)
        torch.autograd.grad(out.sum(), list(tensors.values()))
    assert watched.bounds


@pytest.mark.triton
@pytest.mark.parametrize("form", ["relu", "swiglu"])
def test_three_runs_give_the_same_bits(form, kernel_device):
    activation, gated = FORMS[form]
    expert_ids, tensors = problem(
        (20, 3, 2, 16, 24), gated=gated, dtype=torch.float16, device=kernel_device
    )
    runs = []
    for _ in range(3):
        out = expert_ffn(expert_ids=expert_ids, activation=activation, **tensors)
        runs.append([out, *torch.autograd.grad(out, list(tensors.values()), torch.ones_like(out))])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.triton
def test_bfloat16(kernel_device):
    expert_ids, tensors = problem((20, 4, 2, 16, 24), dtype=torch.bfloat16, device=kernel_device)
    wide = {key: t.detach().double() for key, t in tensors.items()}
    ours = expert_ffn(expert_ids=expert_ids, **tensors)
    assert_near(ours, expert_ffn_eager(expert_ids=expert_ids, **wide), torch.bfloat16)


def without_gradients(tensors):
    return {key: t.detach() for key, t in tensors.items()}


@pytest.mark.parametrize("form", [*FORMS, "gelu_new"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("drop", [False, True], ids=["all kept", "some dropped"])
def test_the_operator_of_the_cpu_is_the_definition(name, form, drop):
    activation, gated = FORMS.get(form, (form, False))
    expert_ids, tensors = problem(SHAPES[name], gated=gated)
    if drop:
        expert_ids, tensors = drop_some(expert_ids, tensors, SHAPES[name][1])
    tensors = without_gradients(tensors)
    with use_backend("eager"):
        ours = expert_ffn(expert_ids=expert_ids, activation=activation, **tensors)
    theirs = expert_ffn_eager(expert_ids=expert_ids, activation=activation, **tensors)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 9], ids=["one token", "many tokens"])
def test_the_operator_of_the_cpu_reads_no_idle_expert_and_no_dropped_token(tokens):
    expert_ids, tensors = problem((tokens, 12, 2, 8, 16), dtype=torch.float32)
    tensors = without_gradients(tensors)
    expert_ids[expert_ids == 1] = 0
    expert_ids[0, 1] = 12
    with use_backend("eager"):
        tensors["gates"][0, 1] = 0
        clean = expert_ffn(expert_ids=expert_ids, **tensors)
        tensors["down_proj"][1] = torch.nan
        # A dropped claim adds nothing whatever its gate, and a silent one whatever its expert.
        tensors["gates"][0, 1] = torch.nan
        assert torch.equal(expert_ffn(expert_ids=expert_ids, **tensors)[1:], clean[1:])
        expert_ids[0], tensors["gates"][0] = 1, 0
        found = expert_ffn(expert_ids=expert_ids, **tensors)
    assert torch.equal(found[0], tensors["residual"][0])


@pytest.mark.parametrize("tokens", [1, 9], ids=["one token", "many tokens"])
def test_autocast_on_the_cpu_is_that_of_the_definition(tokens):
    expert_ids, tensors = problem((tokens, 4, 2, 8, 16), dtype=torch.float32)
    tensors = without_gradients(tensors)
    plain = expert_ffn_eager(expert_ids=expert_ids, **tensors)
    for dtype in (torch.float32, torch.bfloat16):
        tensors["x"] = tensors["x"].to(dtype)
        with torch.autocast("cpu", torch.bfloat16), use_backend("eager"):
            ours = expert_ffn(expert_ids=expert_ids, **tensors)
            theirs = expert_ffn_eager(expert_ids=expert_ids, **tensors)
        assert ours.dtype == theirs.dtype == torch.float32
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, plain)


def test_the_operator_of_the_cpu_takes_one_dtype():
    expert_ids, tensors = problem((3, 4, 2, 8, 16), dtype=torch.float32)
    tensors = without_gradients(tensors)
    tensors["up_bias"] = tensors["up_bias"].double()
    with (
        use_backend("eager"),
        pytest.raises(ConfigError, match=r"x is torch\.float32 and up_bias torch\.float64"),
    ):
        expert_ffn(expert_ids=expert_ids, **tensors)


@pytest.mark.parametrize("tokens", [1, 9], ids=["one token", "many tokens"])
def test_the_operator_of_the_cpu_is_one_that_pytorch_takes_whole(tokens):
    operator = torch.ops.moe_mt.expert_ffn_one_by_one.default
    expert_ids, tensors = problem((tokens, 4, 2, 8, 16), gated=True, dtype=torch.float32)
    names = ("up_proj", "down_proj", "gate_proj", "up_bias", "gate_bias", "down_bias")
    found = without_gradients(tensors)
    weights = [found[name] for name in names]
    for residual in (None, found["residual"], found["residual"].double()):
        given = (found["x"], expert_ids, found["gates"], *weights, "silu", residual)
        torch.library.opcheck(operator, given)


def test_shapes_without_kernels_come_from_meta_tensors():
    expert_ids, tensors = problem((5, 4, 2, 8, 16), dtype=torch.float32, device="meta")
    with use_backend("eager"):
        found = expert_ffn(expert_ids=expert_ids, **without_gradients(tensors))
    assert found.is_meta
    assert found.shape == (5, 8)


def test_biases_and_residual_may_be_missing():
    expert_ids, tensors = problem((6, 3, 2, 8, 16))
    bare = {key: tensors[key] for key in ("x", "gates", "up_proj", "down_proj")}
    zero = {key: torch.zeros_like(tensors[key]) for key in ("up_bias", "down_bias", "residual")}
    expected = by_hand(expert_ids, **bare, **zero)
    torch.testing.assert_close(expert_ffn(expert_ids=expert_ids, **bare), expected)


@pytest.mark.triton
def test_biases_and_residual_may_be_missing_for_kernels(kernel_device):
    for tokens in (3, 12):
        expert_ids, tensors = problem(
            (tokens, 8, 2, 8, 16), dtype=torch.float32, device=kernel_device
        )
        bare = {key: tensors[key] for key in ("x", "gates", "up_proj", "down_proj")}
        expected = expert_ffn_eager(expert_ids=expert_ids, **bare)
        assert_near(expert_ffn(expert_ids=expert_ids, **bare), expected, torch.float32)
        with torch.no_grad():
            assert_near(expert_ffn(expert_ids=expert_ids, **bare), expected, torch.float32)


def test_a_dropped_token_is_its_residual_and_is_never_read():
    expert_ids, tensors = problem((6, 3, 2, 8, 16))
    expert_ids[2] = 3
    with torch.no_grad():
        tensors["gates"][2] = 0
        tensors["x"][2] = torch.nan
    out = expert_ffn(expert_ids=expert_ids, **tensors)
    assert torch.equal(out[2], tensors["residual"][2])
    assert out.isfinite().all()


@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=pytest.mark.triton)])
def test_activation_dropout_zeroes_hidden_units_and_rescales(backend, request):
    # One hidden unit for two outputs shows the dropout itself: both are 0, or both x / (1 - p).
    device = request.getfixturevalue("kernel_device") if backend == "triton" else "cpu"
    x = (torch.rand(1000, 4) + 1).to(device)
    up = torch.eye(4, device=device)[None, ::2]
    down = torch.eye(2, device=device).repeat_interleave(2, 0)[None]
    one = expert_ffn if backend == "triton" else expert_ffn_eager
    ids, gates = torch.zeros(1000, 1, dtype=torch.int32), torch.ones(1000, 1)
    out = one(x, ids.to(device), gates.to(device), up, down, activation_dropout=0.25)
    kept = out != 0
    assert torch.equal(kept[:, ::2], kept[:, 1::2])
    torch.testing.assert_close(out[kept], x[:, [0, 0, 2, 2]][kept] / 0.75)
    assert 0.7 < kept.float().mean() < 0.8


@pytest.mark.triton
@pytest.mark.parametrize("form", ["relu", "swiglu"])
def test_the_step_by_step_path_of_activation_dropout_is_the_same_function(form, kernel_device):
    # A probability so small that nothing is dropped: the step by step path without its dropout.
    activation, gated = FORMS[form]
    expert_ids, tensors = problem(
        (20, 4, 2, 8, 16), gated=gated, dtype=torch.float32, device=kernel_device
    )
    expert_ids, tensors = drop_some(expert_ids, tensors, 4)
    options = {"expert_ids": expert_ids, "activation": activation}
    ours = expert_ffn(**options, activation_dropout=1e-12, **tensors)
    theirs = expert_ffn(**options, **tensors)
    assert_near(ours, theirs, torch.float32)
    compare_gradients(
        ours, theirs, tensors, tensors, lambda a, b, what: assert_near(a, b, torch.float32, what)
    )


@pytest.mark.triton
def test_an_activation_that_no_kernel_applies_stands_between_them(kernel_device):
    expert_ids, tensors = problem((20, 4, 2, 8, 16), dtype=torch.float32, device=kernel_device)
    options = {"expert_ids": expert_ids, "activation": "gelu_new"}
    ours, theirs = expert_ffn(**options, **tensors), expert_ffn_eager(**options, **tensors)
    assert_near(ours, theirs, torch.float32)
    compare_gradients(
        ours, theirs, tensors, tensors, lambda a, b, what: assert_near(a, b, torch.float32, what)
    )


# Shapes and dtypes of results follow what is there: biases, a gate, a wider residual, a gradient.
@pytest.mark.triton
@pytest.mark.parametrize("form", ["relu", "reglu, few biases, half precision"])
def test_operator_contract(form, kernel_device):
    gated = form != "relu"
    dtype = torch.float16 if gated else torch.float32
    expert_ids, t = problem((5, 3, 2, 4, 8), gated=gated, dtype=dtype)
    if gated:
        del t["up_bias"], t["gate_bias"]
        t["residual"] = t["residual"].float()
    keys = ["up_proj", "down_proj", "gate_proj", "up_bias", "gate_bias", "down_bias"]
    tensors = [t["x"], expert_ids, t["gates"], *map(t.get, keys)]
    plain = [None if a is None else a.detach().to(kernel_device) for a in tensors]
    residual = t["residual"].detach().to(kernel_device)
    operators = torch.ops.moe_mt
    torch.library.opcheck(operators.expert_ffn.default, (*plain, "relu", residual))
    for a in (*plain, residual):
        if a is not None and a.is_floating_point():
            a.requires_grad_()
    torch.library.opcheck(operators.expert_ffn_train.default, (*plain, "relu", residual))
    with torch.no_grad():
        out, *saved = operators.expert_ffn_train(*plain, "relu", residual)
    plain = [None if a is None else a.detach() for a in plain]
    for needed in ([True, False, True, False], [False, True, False, True]):
        arguments = (out, *plain, *saved, "relu", needed)
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(operators.expert_ffn_backward.default, arguments, test_utils=checks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "swish"}, r"'swish'.*relu"),
        ({"x": torch.ones(6, 7)}, r"x is \(6, 7\); it must be \(T, 8\)"),
        ({"gates": torch.ones(6, 1)}, r"both must be \(6, K\)"),
        ({"down_proj": torch.ones(3, 16, 8)}, r"down_proj is \(3, 16, 8\).*\(3, 8, 16\)"),
        ({"up_bias": torch.ones(3, 8)}, r"up_bias is \(3, 8\).*\(3, 16\)"),
        ({"gate_bias": torch.ones(3, 16)}, "gate_bias was given without gate_proj"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_named(change, message):
    expert_ids, tensors = problem((6, 3, 2, 8, 16))
    with pytest.raises(ConfigError, match=message):
        expert_ffn(expert_ids=expert_ids, **{**tensors, **change})
