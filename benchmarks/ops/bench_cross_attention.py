"""``cross_attention``: decoding, and training in both directions, beside PyTorch's attentions.

Keys and values lie as a model keeps them. While decoding, the queries of a sentence are its beams.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.agreement import TOLERANCE, check_same
from benchmarks.floors import Work, attention_backward, attention_forward
from benchmarks.graphs import ROUND_SECONDS, Captured, measure, on_side_stream
from benchmarks.memory import extra_memory
from benchmarks.ops.attention import (
    Problem,
    Way,
    chosen_kernel,
    definition_in_float64,
    draw_problems,
    ours,
    peers_of,
)
from benchmarks.shapes import PADDINGS, AttentionShape, decode_shapes, training_shapes
from benchmarks.timing import Rival, affordable_rounds, spread
from moe_mt.ops import backend_for, cross_attention

SECONDS_BESIDE = 2
"""What all rounds beside PyTorch's own attention may take."""

GIVEN = {"nothing": 0, "mask": 40, "lengths": 40}
"""How the path without kernels is told of padding, and of how many per cent."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Result = Tensor | tuple[Tensor, ...]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.option
    device = torch.device(options.device)
    decode = decode_shapes(device, rehearsal=options.rehearse)
    training = training_shapes(device, rehearsal=options.rehearse)
    if metafunc.function is test_cross_attention_beside_sdpa:
        metafunc.parametrize("shape", decode, ids=[shape.sizes for shape in decode])
        metafunc.parametrize(("given", "padding"), GIVEN.items(), ids=GIVEN)
        return
    measured = {"decode": decode, "forward": training}
    if metafunc.function is test_cross_attention_backward:
        measured = {"backward": training}
    cases = [
        pytest.param(direction, shape, id=f"{direction}-{shape.sizes}")
        for direction, shapes in measured.items()
        for shape in shapes
    ]
    metafunc.parametrize(("direction", "shape"), cases)
    metafunc.parametrize("padding", PADDINGS, ids=[f"padding{share}" for share in PADDINGS])


@pytest.fixture
def problems(shape: AttentionShape, padding: int, device, dtype) -> list[Problem]:
    with torch.inference_mode(mode=False):
        return draw_problems(shape, padding / 100, device, dtype)


@pytest.fixture
def describe(time_beside, problems, direction, shape, padding, dtype, rehearsal):
    """Return what checks calls and peers, times them and writes the row."""

    def write(
        count_work: Callable[[AttentionShape, int, int], Work],
        call_of: Callable[[Way, Problem], Callable[[], Result]],
        expected: Callable[[Way], Result],
    ) -> None:
        first = problems[0]
        checked = Checked(call_of, expected, problems, TOLERANCE[dtype])
        time_beside(
            shape.name,
            checked.calls(partial(ours, first), "this operation"),
            count_work(shape, int(first.valid().sum()), dtype.itemsize),
            {
                name: partial(checked.calls, build, name)
                for name, build in peers_of(first, shape, rehearsal=rehearsal).items()
            },
            operation=f"cross_attention {direction} {shape.sizes} padding {padding}%",
        )
        assert not checked.wrong, checked.wrong

    return write


@dataclass(frozen=True)
class Checked:
    """Calls of ways to compute attention, handed out where they are right.

    A peer that cannot run costs its own figure; one that is wrong is remembered, and fails the
    benchmark once its row is written.
    """

    call_of: Callable[[Way, Problem], Callable[[], Result]]
    expected: Callable[[Way], Result]
    problems: Sequence[Problem]
    tolerance: float
    wrong: list[str] = field(default_factory=list)

    def calls(self, build: Callable[[], Way], name: str) -> list[Callable[[], Result]]:
        """Return one call for every set of data.

        Raises:
            AssertionError: If its result is wrong.
        """
        way = build()
        calls = [self.call_of(way, one) for one in self.problems]
        got = calls[0]()
        try:
            check_same(got, self.expected(way), self.tolerance, f"{name} and the definition")
        except AssertionError as error:
            self.wrong.append(str(error))
            raise
        return calls


def test_cross_attention(describe, problems) -> None:
    first = problems[0]
    right = definition_in_float64(first.query, first.key, first.value, first)
    describe(attention_forward, forward_of, lambda way: way.lay_queries(right))


def test_cross_attention_backward(describe, problems, device) -> None:
    with torch.inference_mode(mode=False), torch.enable_grad():
        first = problems[0]
        define = Way(partial(definition_in_float64, problem=first))
        right = backward_of(define, first, device)()
        describe(
            attention_backward,
            partial(backward_of, device=device),
            lambda way: (way.lay_queries(right[0]), *map(way.lay_keys, right[1:])),
        )


def test_cross_attention_beside_sdpa(
    benchmark, sign, problems, shape, given, device, dtype
) -> None:
    """What the path without kernels adds to the attention of PyTorch that it calls.

    PyTorch's has its mask at hand. Both get the same input in turns; a round is as many calls as a
    clock can read.
    """
    if backend_for(device) != "eager PyTorch":
        pytest.skip("it is about the path without kernels")
    first = problems[0]
    valid = first.valid()
    limits = {
        "nothing": {},
        "mask": {"key_mask": valid},
        "lengths": {"key_lengths": first.key_lengths},
    }
    mask = None if given == "nothing" else valid[:, None, None]
    sdpa = Way(partial(functional.scaled_dot_product_attention, attn_mask=mask), mask=mask)
    mine = partial(attend_to, first, partial(cross_attention, **limits[given]))
    theirs = partial(attend_to, first, sdpa.attend)
    check_same(mine(first.query), theirs(first.query), TOLERANCE[dtype], "this path and PyTorch's")
    once = measure(Captured(replay=partial(mine, first.query), calls=1), seconds=0.1)["median"]
    repeats = max(1, round(ROUND_SECONDS / once))
    rival = Rival(partial(repeat, theirs, repeats), [one.query for one in problems])
    benchmark.pedantic(
        partial(repeat, mine, repeats),
        setup=rival.prepare,
        teardown=rival.follow,
        rounds=affordable_rounds(partial(repeat, mine, repeats, first.query), SECONDS_BESIDE / 2),
        warmup_rounds=1,
    )
    sign(shape.name, operation=f"cross_attention beside SDPA {shape.sizes} given {given}")
    extra = benchmark.extra_info
    work = attention_forward(shape, int(first.valid().sum()), dtype.itemsize)
    memory, peer_memory = (
        extra_memory(partial(run, first.query), device) for run in (mine, theirs)
    )
    extra["figures"] = {"bytes": work.bytes, "flops": work.flops, "extra_bytes": memory}
    if benchmark.enabled:
        rounds = list(zip(benchmark.stats.stats.data, rival.seconds[1:], strict=True))
        peer = spread([taken / repeats for _, taken in rounds])
        name = f"SDPA reshaped ({chosen_kernel(sdpa, first)})"
        extra["seconds"] = spread([taken / repeats for taken, _ in rounds])
        extra["peers"] = {name: {"seconds": peer}}
        extra["peer"] = {"name": name, "seconds": peer, "extra_bytes": peer_memory}
        extra["speedup"] = spread([peer_s / our_s for our_s, peer_s in rounds])


def attend_to(problem: Problem, attend: Attend, query: Tensor) -> Tensor:
    return attend(query, problem.key, problem.value)


def repeat(call: Callable[[Tensor], Tensor], times: int, query: Tensor) -> None:
    for _ in range(times):
        call(query)


def forward_of(way: Way, problem: Problem) -> Callable[[], Tensor]:
    return partial(way.attend, *way.inputs(problem))


def backward_of(way: Way, problem: Problem, device: torch.device) -> Callable[[], Result]:
    """Run the forward pass once; return its backward pass, for queries, keys and values."""
    inputs = [tensor.detach().requires_grad_() for tensor in way.inputs(problem)]
    with on_side_stream(device):
        out = way.attend(*inputs)
    grad = way.lay_queries(problem.grad)
    return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)
