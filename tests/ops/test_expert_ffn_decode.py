"""The kernels for few tokens, called past the operation: which rows they read, and every bit."""

import pytest
import torch
from torch.nn import functional

from tests.closeness import assert_near

pytestmark = pytest.mark.triton

ACTIVATIONS = {"relu": torch.relu, "gelu": functional.gelu, "silu": functional.silu}
WEIGHTS = ("up_proj", "down_proj", "gate_proj", "up_bias", "gate_bias", "down_bias")

# Tokens, experts, choices, d_model, ffn_dim; every shape has its reason. In float32 a block is 16
# features (8 if gated) x 128 of d_model, and then 8 x 512 of ffn_dim.
SHAPES = {
    "no token": (0, 4, 2, 8, 16),
    "one token": (1, 4, 2, 8, 16),
    "one expert": (3, 1, 1, 16, 16),
    "every expert, no power of two": (2, 3, 3, 16, 24),
    "four choices of many experts": (2, 128, 4, 16, 16),
    "odd widths below the width of a load": (2, 2, 2, 3, 5),
    "two full blocks of d_model": (1, 2, 1, 256, 40),
    "two full blocks of ffn_dim": (1, 2, 2, 16, 1024),
    "one feature past a block of d_model": (1, 2, 1, 129, 40),
    "one feature past a block of ffn_dim": (1, 2, 2, 16, 513),
    "a token more than experts": (9, 8, 2, 8, 16),
}


def problem(shape, device, *, gated=False, dtype=torch.float32):
    """Return the arguments of ``mixture``, and nothing dropped."""
    tokens, num_experts, top_k, d_model, ffn_dim = shape
    generator = torch.Generator().manual_seed(1)

    def randn(*size, scale=1.0):
        return (torch.randn(*size, generator=generator) * scale).to(device, dtype)

    chosen = torch.rand(tokens, num_experts, generator=generator).argsort(1)[:, :top_k]
    return {
        "x": randn(tokens, d_model),
        "expert_ids": chosen.to(device, torch.int32),
        "gates": torch.rand(tokens, top_k, generator=generator).to(device) + 0.1,
        "up_proj": randn(num_experts, ffn_dim, d_model, scale=d_model**-0.5),
        "down_proj": randn(num_experts, d_model, ffn_dim, scale=ffn_dim**-0.5),
        "gate_proj": randn(num_experts, ffn_dim, d_model, scale=d_model**-0.5) if gated else None,
        "up_bias": randn(num_experts, ffn_dim),
        "gate_bias": randn(num_experts, ffn_dim) if gated else None,
        "down_bias": randn(num_experts, d_model),
        "activation": "silu" if gated else "relu",
        "residual": randn(tokens, d_model),
    }


def mixture(**arguments):
    from moe_mt.kernels.expert_ffn.decode import expert_ffn_decode

    return expert_ffn_decode(**arguments)


def by_hand(x, expert_ids, gates, activation, residual, **weights):
    """Return the mixture in float64, one claim after the other."""
    num_experts = weights["up_proj"].shape[0]
    x, gates = x.cpu().double(), gates.cpu().double()
    out = torch.zeros_like(x) if residual is None else residual.cpu().double().clone()
    for t, row in enumerate(expert_ids.tolist()):
        for k, e in enumerate(row):
            if e == num_experts or gates[t, k] == 0:
                continue
            expert = {name: w[e].cpu().double() for name, w in weights.items() if w is not None}
            hidden = expert["up_proj"] @ x[t] + expert.get("up_bias", 0)
            if "gate_proj" in expert:
                gate = expert["gate_proj"] @ x[t] + expert.get("gate_bias", 0)
                hidden = ACTIVATIONS[activation](gate) * hidden
            else:
                hidden = ACTIVATIONS[activation](hidden)
            out[t] += gates[t, k] * (expert["down_proj"] @ hidden + expert.get("down_bias", 0))
    return out


def drop_some(arguments):
    """Drop claims, set gates to zero, and poison all that they alone would read."""
    ids, gates = arguments["expert_ids"], arguments["gates"]
    num_experts = arguments["up_proj"].shape[0]
    ids[1, 0], gates[1, 0] = num_experts, torch.nan
    gates[2, 1] = 0
    ids[3], gates[3] = num_experts, 0
    gates[4] = 0
    read = set(ids[(ids < num_experts) & (gates != 0)].tolist())
    unread = [e for e in range(num_experts) if e not in read]
    assert set(ids[gates == 0].tolist()) & set(unread) - {num_experts}
    for name in WEIGHTS:
        if arguments[name] is not None:
            arguments[name][unread] = torch.nan
    arguments["x"][3:5] = torch.nan


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("name", SHAPES)
def test_kernel_is_the_formula(kernel_device, name, gated):
    arguments = problem(SHAPES[name], kernel_device, gated=gated)
    out = mixture(**arguments)
    assert out.dtype == torch.float32
    assert_near(out, by_hand(**arguments), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernel_in_half_precision(kernel_device, dtype):
    arguments = problem((1, 4, 2, 264, 40), kernel_device, gated=True, dtype=dtype)
    out = mixture(**arguments)
    assert out.dtype == dtype
    assert_near(out, by_hand(**arguments), dtype)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernel_with_every_activation(kernel_device, activation, gated):
    arguments = problem((3, 4, 2, 16, 24), kernel_device, gated=gated)
    arguments["activation"] = activation
    assert_near(mixture(**arguments), by_hand(**arguments), torch.float32)


OPTIONAL = ("up_bias", "gate_bias", "down_bias", "residual")


@pytest.mark.parametrize("missing", [*([name] for name in OPTIONAL), OPTIONAL], ids=" ".join)
def test_kernel_without_what_may_be_missing(kernel_device, missing):
    arguments = problem((3, 4, 2, 16, 24), kernel_device, gated="gate_bias" in missing)
    for name in missing:
        arguments[name] = None
    assert_near(mixture(**arguments), by_hand(**arguments), torch.float32)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_claims_that_do_not_count_are_not_read(kernel_device, gated):
    # Hidden rows of theirs are never written: fresh memory is NaN, and would be seen.
    arguments = problem((7, 6, 2, 16, 24), kernel_device, gated=gated)
    drop_some(arguments)
    out = mixture(**arguments)
    assert_near(out, by_hand(**arguments), torch.float32)
    assert torch.equal(out[3:5], arguments["residual"][3:5])
    assert not mixture(**{**arguments, "residual": None})[3:5].any()


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_a_nan_stays_with_its_token(kernel_device, gated):
    arguments = problem((5, 2, 2, 16, 24), kernel_device, gated=gated)
    clean = mixture(**arguments)
    arguments["x"][1, 3] = torch.nan
    arguments["gates"][3, 0] = torch.nan
    out = mixture(**arguments)
    assert out[[1, 3]].isnan().all()
    assert torch.equal(out[[0, 2, 4]], clean[[0, 2, 4]])


def test_every_run_and_every_company_gives_the_same_bits(kernel_device):
    arguments = problem((3, 4, 2, 136, 24), kernel_device, gated=True)
    together = mixture(**arguments)
    assert torch.equal(mixture(**arguments), together)
    for tokens in ([1], [2, 0]):
        chosen = {name: arguments[name][tokens] for name in ("x", "expert_ids", "gates")}
        chosen["residual"] = arguments["residual"][tokens]
        assert torch.equal(mixture(**{**arguments, **chosen}), together[tokens])


def test_halves_of_one_weight_are_two_weights(kernel_device):
    arguments = problem((3, 4, 2, 16, 24), kernel_device, gated=True)
    halves = {}
    for kind in ("proj", "bias"):
        gate, up = arguments[f"gate_{kind}"], arguments[f"up_{kind}"]
        halves[f"gate_{kind}"], halves[f"up_{kind}"] = torch.cat((gate, up), 1).chunk(2, 1)
    assert not halves["up_proj"].is_contiguous()
    assert torch.equal(mixture(**{**arguments, **halves}), mixture(**arguments))


def test_inputs_may_have_gaps(kernel_device):
    arguments = problem((3, 4, 2, 16, 24), kernel_device, gated=True)
    gaps = {}
    for name, value in arguments.items():
        if name in WEIGHTS:
            gaps[name] = torch.cat((value, value), -1)[..., : value.shape[-1]]
        elif name != "activation":
            gaps[name] = value.repeat_interleave(2, 1)[:, ::2]
    assert not any(value.is_contiguous() for value in gaps.values())
    assert torch.equal(mixture(**{**arguments, **gaps}), mixture(**arguments))


def test_experts_may_lie_beyond_32_bits(kernel_device):
    # 8.6 GB of addresses, of which hardly a page is touched. The stride fits into 32 bits; times
    # 16 it would wrap to the start, and read the first expert for the last.
    stride, num_experts = 2**28, 17
    arguments = problem((2, num_experts, 2, 16, 24), kernel_device, gated=True, dtype=torch.float16)
    arguments["expert_ids"].copy_(torch.tensor([[0, 16], [16, 0]]))
    torch.use_deterministic_algorithms(False)  # Which would fill all of it.
    memory = torch.empty(stride * num_experts, dtype=torch.float16, device=kernel_device)
    torch.use_deterministic_algorithms(True)
    for start, name in enumerate(WEIGHTS):
        near = arguments[name]
        far = memory.as_strided(near.shape, (stride, *near.stride()[1:]), 1024 * start)
        far[[0, 16]] = near[[0, 16]]
        arguments[name] = far
    assert_near(mixture(**arguments), by_hand(**arguments), torch.float16)


def recorded(tokens, multiprocessors, *, dtype=torch.bfloat16, gated=False):
    """Return the launches for NLLB-MoE's sizes on an accelerator, with tensors of no memory."""
    from moe_mt.kernels._launch import Accelerator, record_launches

    def empty(*size, dtype=dtype):
        return torch.empty(*size, dtype=dtype, device="meta")

    accelerator = Accelerator(arch="sm_90", multiprocessors=multiprocessors)
    with record_launches(accelerator) as launches:
        out = mixture(
            x=empty(tokens, 2048),
            expert_ids=empty(tokens, 2, dtype=torch.int32),
            gates=empty(tokens, 2, dtype=torch.float32),
            up_proj=empty(128, 8192, 2048),
            down_proj=empty(128, 2048, 8192),
            gate_proj=empty(128, 8192, 2048) if gated else None,
            up_bias=empty(128, 8192),
            gate_bias=None,
            down_bias=empty(128, 2048),
            activation="relu",
            residual=empty(tokens, 2048),
        )
    assert out.shape == (tokens, 2048)
    return launches


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_no_size_depends_on_the_tokens(gated):
    def sizes(tokens):
        launches = recorded(tokens, 304, gated=gated)
        assert len(launches) == 2
        return [
            {
                name: value
                for name, value in launch.arguments.items()
                if not isinstance(value, torch.Tensor)
            }
            | {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
            for launch in launches
        ]

    assert sizes(1) == sizes(7) == sizes(64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("multiprocessors", [108, 132, 304], ids=["A100", "H200", "MI300X"])
def test_one_token_has_work_for_every_multiprocessor(multiprocessors, dtype):
    up, down = recorded(1, multiprocessors, dtype=dtype)
    assert 2 * 8192 // up.arguments["BLOCK_COLUMNS"] > multiprocessors
    assert 2048 // down.arguments["BLOCK_COLUMNS"] > multiprocessors
