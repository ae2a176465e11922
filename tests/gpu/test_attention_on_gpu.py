"""Attention at the sizes of NLLB and Whisper, against float64; the same tests at a small size.

A GPU runs both (``make test-gpu``), the interpreter the small size.
"""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from moe_mt import CrossAttention
from moe_mt.ops import cross_attention
from moe_mt.ops.dropout import keep_mask
from tests.closeness import assert_near
from tests.gpu.attention_problem import (
    NLLB,
    SMALL,
    WHISPER,
    answers,
    each,
    make_tensors,
    of_sentence,
    run,
)
from tests.gpu.execution import behind_a_long_wait, captured, compiled, no_synchronisation

LENGTHS = {"limits": "lengths"}
DROPOUT = {**LENGTHS, "dropout": 0.1}
PACKED = {"limits": "packed", "dropout": 0.1}
DECODING = {**LENGTHS, "queries": 4}
# The keys of one sentence and head are cut into parts.
SPLIT = {**DECODING, "sentences": 1, "heads": 1, "keys": 70}
# One case of every way through the kernels, for what must hold on all of them; few keys, for the
# interpreter runs it many times.
FEW_KEYS = {"heads": 1, "keys": 12}
PATHS = each(
    small={
        "decoding": {**FEW_KEYS, **DECODING},
        "split": SPLIT,
        "lengths": {**FEW_KEYS, **LENGTHS},
        "mask": {**FEW_KEYS, "limits": "mask"},
        "dropout": {**FEW_KEYS, **DROPOUT},
        "packed": {**FEW_KEYS, **PACKED},
    },
    full={
        "decoding": {**DECODING, "keys": 64},
        "split": {**SPLIT, "heads": 16, "keys": 512},
        "lengths": LENGTHS,
        "mask": {"limits": "mask"},
        "dropout": DROPOUT,
        "packed": PACKED,
    },
)


def check(case, tensors, results, sentences=None):
    """Compare the results with float64, all sentences' or those of some, put behind each other."""
    sentences = range(case.sentences) if sentences is None else sentences
    found = [of_sentence(case, tensors, results, sentence) for sentence in sentences]
    expected = [answers(case, tensors, sentence) for sentence in sentences]
    for name in results:
        ours, theirs = (torch.cat([part[name].flatten() for part in s]) for s in (found, expected))
        dtype = case.dtype
        if name == "log-sum-exp":
            dead, dtype = theirs == -torch.inf, torch.float32
            assert torch.equal(ours == -torch.inf, dead), "minus infinity stands elsewhere"
            ours, theirs = ours[~dead], theirs[~dead]
        assert_near(ours, theirs, dtype, name)
    for part in found:
        dead = part["log-sum-exp"] == -torch.inf
        assert not part["output"][dead].any()
        assert not part["gradient of the query"][dead].any()
    if case.limits == "packed":  # Rows behind the last sentence belong to none.
        for name, result in results.items():
            of_keys = name.endswith(("key", "value"))
            end = int(tensors["key_offsets" if of_keys else "query_offsets"][-1])
            nothing = -torch.inf if name == "log-sum-exp" else 0
            assert end < result.shape[2]
            assert (result[:, :, end:] == nothing).all(), name


@pytest.mark.parametrize(
    "case",
    each(
        small={
            "1 query": {"queries": 1, "limits": "lengths"},
            "16 queries": {"queries": 16, "limits": "mask", "grad_lse": True},
            "split": SPLIT,
            "split, mask": {**SPLIT, "limits": "mask"},
        },
        full={
            "1 query": {"queries": 1, "keys": 64, "limits": "lengths"},
            "4 queries": {"queries": 4, "keys": 64, "limits": "lengths"},
            "16 queries": {"queries": 16, "keys": 512, "limits": "mask", "grad_lse": True},
            # On a GPU of 132 multiprocessors; the fewer the sentences, the more parts.
            "split in 2": {"sentences": 16, **DECODING},
            "split in 4, mask": {"sentences": 2, "queries": 5, "limits": "mask"},
            "split in 8, Whisper": replace(WHISPER, sentences=1, queries=5, limits="lengths"),
            "split in 16": {"sentences": 1, **DECODING, "keys": 2048},
            "Whisper": replace(WHISPER, sentences=32, queries=5),
        },
    ),
)
def test_decoding_and_every_gradient(case, kernel_device):
    tensors = make_tensors(case, kernel_device)
    check(case, tensors, run(case, tensors))


@pytest.mark.parametrize(
    "case",
    each(
        small={
            "every key": {"grad_lse": True},
            "lengths": LENGTHS,
            "mask": {"limits": "mask"},
            "dropout": DROPOUT,
            "packed": {"limits": "packed", "grad_lse": True},
            "packed, dropout": PACKED,
        },
        full={
            "128, every key": {"queries": 128, "keys": 128},
            "128, lengths": {"queries": 128, "keys": 128, "limits": "lengths"},
            "128, dropout": {"queries": 128, "keys": 128, **DROPOUT},
            "512, every key": {"grad_lse": True},
            "512, lengths": LENGTHS,
            "512, mask": {"limits": "mask", "grad_lse": True},
            "512, dropout": DROPOUT,
            "512, packed": {"limits": "packed", "grad_lse": True},
            "512, packed, dropout": PACKED,
            "uneven": {"queries": 203, "keys": 301, "limits": "lengths"},
            "Whisper": WHISPER,
            "Whisper, mask, dropout": replace(WHISPER, limits="mask", dropout=0.1),
        },
    ),
)
def test_training_and_every_gradient(case, kernel_device):
    tensors = make_tensors(case, kernel_device)
    check(case, tensors, run(case, tensors))


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
UNEVEN = {"sentences": 3, "heads": 2, "queries": 203, "keys": 301, "limits": "lengths"}


# Tiles follow the width, the dtype and whether there is dropout, so each may go wrong alone.
@pytest.mark.parametrize(
    "case",
    each(
        small={"20 of fp32": {"d_head": 20, "dtype": torch.float32, "limits": "lengths"}},
        full={
            f"{d_head} of {dtype}, {name}": {
                **UNEVEN,
                **changes,
                "d_head": d_head,
                "dtype": DTYPES[dtype],
            }
            for d_head in (64, 80, 128, 256)
            for dtype in DTYPES
            for name, changes in {
                "decoding": {"queries": 5},
                "training": {},
                "dropout": {"dropout": 0.1},
            }.items()
        },
    ),
)
def test_heads_of_every_width_and_dtype(case, kernel_device):
    tensors = make_tensors(case, kernel_device)
    check(case, tensors, run(case, tensors))


def unit_rows(case, rows, first, device):
    """Return (B, H, rows, d_head) of which row ``first + c`` has a 1 in column c, nothing else."""
    units = torch.eye(rows, dtype=case.dtype, device=device)[:, first : first + case.d_head]
    units = functional.pad(units, (0, case.d_head - units.shape[1]))
    return units.expand(case.sentences, case.heads, -1, -1)


@pytest.mark.parametrize(
    "case",
    each(
        small={"one head": {"sentences": 2, "heads": 1, "dropout": 0.3}},
        full={"NLLB": {"dropout": 0.1}, "Whisper": replace(WHISPER, dropout=0.1)},
    ),
)
def test_dropout_keeps_what_its_definition_keeps(case, kernel_device):
    """All weights are equal. Unit rows show which are there; of gradients the signs say it."""
    tensors = make_tensors(case, kernel_device)
    sizes = {name: getattr(case, name) for name in ("sentences", "heads", "queries", "keys")}
    kept = keep_mask(tensors["seed"], case.dropout, **sizes)
    zeros, ones = {}, {}
    for name in ("query", "key"):
        zeros[name], ones[name] = torch.zeros_like(tensors[name]), torch.ones_like(tensors[name])
    for first in range(0, case.keys, case.d_head):
        units = unit_rows(case, case.keys, first, kernel_device)
        found = run(
            case,
            tensors
            | {"query": zeros["query"], "key": units, "value": units, "grad": ones["query"]},
        )
        expected = kept[..., first : first + case.d_head]
        for name in ("output", "gradient of the query"):
            assert torch.equal(found[name][..., : expected.shape[-1]] > 0, expected), name
    for first in range(0, case.queries, case.d_head):
        units = unit_rows(case, case.queries, first, kernel_device)
        found = run(
            case,
            tensors | {"query": units, "key": zeros["key"], "value": ones["key"], "grad": units},
        )
        expected = kept[:, :, first : first + case.d_head].mT
        for name in ("gradient of the key", "gradient of the value"):
            assert torch.equal(found[name][..., : expected.shape[-1]] > 0, expected), name


def elements_before_the_last_sentence(case, tensors):
    """Return how many elements stand before it where most do: in rows, log-sum-exp or mask."""
    if case.limits == "packed":
        rows = min(int(tensors[name][-2]) for name in ("query_offsets", "key_offsets"))
        return rows * case.heads * case.d_head
    counts = [case.heads * rows * case.d_head for rows in (case.queries, case.keys)]
    counts += [case.heads * case.queries] if case.grad_lse else []
    counts += [case.keys] if case.limits == "mask" else []
    return (case.sentences - 1) * max(counts)


# Heads as narrow as can be, lest what is as large as they are takes all memory.
@pytest.mark.parametrize(
    "case",
    each(
        small={
            "rows": LENGTHS,
            "packed rows": {"limits": "packed"},
            "log-sum-exp": {"d_head": 1, "grad_lse": True},
            "mask": {"d_head": 1, "heads": 1, "queries": 4, "limits": "mask"},
        },
        full={
            "queries and keys": {"sentences": 2050, "limits": "lengths"},
            "keys, decoding": {"sentences": 2050, "queries": 4, "limits": "lengths"},
            "packed rows": {"sentences": 4400, "limits": "packed"},
            "log-sum-exp": {
                "sentences": 2**12,
                "queries": 2**15 + 16,
                "keys": 8,
                "d_head": 1,
                "grad_lse": True,
            },
            "log-sum-exp, decoding": {
                "sentences": 2**23 + 8,
                "queries": 16,
                "keys": 2,
                "d_head": 1,
                "grad_lse": True,
            },
            "mask": {
                "sentences": 2**21 + 8,
                "heads": 1,
                "queries": 16,
                "keys": 1024,
                "d_head": 1,
                "limits": "mask",
            },
        },
    ),
)
def test_the_last_sentence_beyond_32_bits(case, kernel_device):
    tensors = make_tensors(case, kernel_device)
    if case.sentences > SMALL.sentences:
        assert elements_before_the_last_sentence(case, tensors) > 2**31
    last = case.sentences - 1
    check(case, tensors, run(case, tensors), sorted({0, last // 2, last - 1, last}))


@pytest.fixture
def far_apart(kernel_device):
    """Return a function: a copy of whose three rows along an axis each lies 2^31 - 16 elements on.

    In 32 bits the third would wrap to 32 elements before the first. A CPU keeps only those pages
    of the 9 GB that are written.
    """
    stride, begin = 2**31 - 16, 1024
    torch.use_deterministic_algorithms(False)  # Which would fill all of it.
    memory = torch.empty(2 * stride + 16 * begin, dtype=torch.float16, device=kernel_device)
    torch.use_deterministic_algorithms(True)

    def far_apart(near, axis):
        nonlocal begin
        assert near.shape[axis] == 3
        strides = [stride if dim == axis else near.stride(dim) for dim in range(near.dim())]
        far = memory.as_strided(near.shape, strides, begin)
        begin += near.numel()
        return far.copy_(near)

    return far_apart


@pytest.mark.triton
@pytest.mark.parametrize("axis", [0, 1], ids=["sentences", "heads"])
@pytest.mark.parametrize("queries", [4, 17], ids=["decoding", "training"])
def test_rows_far_apart_give_the_same_bits(queries, axis, far_apart, kernel_device):
    sizes = {"sentences": 1, "heads": 1, ("sentences", "heads")[axis]: 3}
    case = replace(SMALL, **sizes, queries=queries)
    near = make_tensors(case, kernel_device)
    far = {name: far_apart(tensor, axis) for name, tensor in near.items()}
    expected = run(case, near)
    for name, found in run(case, far).items():
        assert torch.equal(found, expected[name]), name


@pytest.mark.parametrize("case", PATHS)
def test_three_runs_give_the_same_bits(case, kernel_device):
    tensors = make_tensors(case, kernel_device)
    first = run(case, tensors)
    for _ in range(2):
        again = run(case, tensors)
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("case", PATHS)
def test_a_captured_graph_takes_other_data_limits_and_seeds(case, kernel_device):
    first, second, third = (make_tensors(case, kernel_device) for _ in range(3))
    for name in second.keys() & {"key_lengths", "key_mask"}:
        # The sentence without keys gets all of them, and the other way round.
        second[name] = second[name].flip(0)
    for name in first:
        assert not torch.equal(first[name], second[name]), f"{name} should change"

    def step(*tensors):
        return tuple(run(case, dict(zip(first, tensors, strict=True))).values())

    replay = captured(step, *first.values())
    for tensors in (second, third):
        replayed, expected = replay(*tensors.values()), step(*tensors.values())
        assert all(torch.equal(*pair) for pair in zip(replayed, expected, strict=True))
    if case.dropout > 0:
        third["seed"] = second["seed"]
        assert not torch.equal(replay(*third.values())[0], replayed[0])


@pytest.mark.parametrize("case", each(small={"few keys": FEW_KEYS}, full={"NLLB": {}}))
def test_a_captured_graph_without_a_seed_draws_another_mask_at_each_replay(case, kernel_device):
    def draw(query, key, value):
        return (cross_attention(query, key, value, dropout=0.1),)

    tensors = make_tensors(case, kernel_device)
    inputs = [tensors[name] for name in ("query", "key", "value")]
    replay = captured(draw, *inputs)
    assert not torch.equal(replay(*inputs)[0], replay(*inputs)[0])


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("case", PATHS)
def test_nothing_waits_for_the_gpu(case, kernel_device):
    tensors = make_tensors(case, kernel_device)
    tensors.pop("seed", None)  # Drawing one must not wait either.
    run(case, tensors)  # Loading a kernel may wait.
    with no_synchronisation(kernel_device):
        results = run(case, tensors)
    assert all(results[name].isfinite().all() for name in results if name != "log-sum-exp")


@pytest.mark.parametrize("case", PATHS)
def test_kernels_run_on_the_current_stream(case, kernel_device):
    tensors = make_tensors(case, kernel_device)
    expected = run(case, tensors)
    late = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    with behind_a_long_wait(kernel_device):
        for name, tensor in tensors.items():
            late[name].copy_(tensor)
        found = run(case, late)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [DECODING, {**SPLIT, "keys": 512}, DROPOUT],
    ids=["decoding", "split", "training"],
)
def test_kernels_run_on_the_device_of_their_tensors(changes):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = replace(SMALL, **changes)
    tensors = make_tensors(case, torch.device("cuda:1"))
    with torch.cuda.device(0):
        found = run(case, tensors)
    with torch.cuda.device(1):
        expected = run(case, tensors)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.gpu
@pytest.mark.parametrize("limits", ["lengths", "mask"])
def test_no_memory_is_taken_but_for_results(limits):
    """Neither for weights nor for a mask of every head; only delta stays inside."""
    case = replace(NLLB, sentences=4, queries=2048, keys=2048, limits=limits)
    tensors = make_tensors(case, torch.device("cuda"))
    run(case, tensors)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run(case, tensors)
    taken = torch.cuda.max_memory_allocated() - before
    sizes = [tensor.numel() * tensor.element_size() for tensor in results.values()]
    delta = results["log-sum-exp"].numel() * 4
    # What is allocated is rounded up, to 2 MB where it is large.
    assert taken <= sum(sizes) + delta + 2**21 * (len(sizes) + 1)


def make_attention(case, device):
    """Return the module whose heads a case has, its input, a memory, and the memory's lengths."""
    attention = CrossAttention(case.heads * case.d_head, case.heads)
    attention = attention.to(device, case.dtype)
    tensors = make_tensors(case, device)
    x, memory = (tensors[name].transpose(1, 2).flatten(2) for name in ("query", "key"))
    return attention, x, memory, tensors["key_lengths"]


MODULE = each(
    small={"two heads": {**LENGTHS, "queries": 6}},
    full={"NLLB": {**LENGTHS, "queries": 128, "keys": 128}},
)


@pytest.mark.parametrize("case", MODULE)
@pytest.mark.filterwarnings("ignore")  # The compiler's advice, which depends on the GPU.
def test_compiled_training(case, kernel_device):
    attention, x, memory, lengths = make_attention(case, kernel_device)
    wanted = {"x": x.requires_grad_(), "memory": memory.requires_grad_()}
    wanted |= dict(attention.named_parameters())
    # It moves all scores of a query alike, which changes nothing: what it gets is rounding.
    del wanted["k_proj.bias"]
    grad = torch.randn_like(x)

    def step(x, memory, lengths):
        key, value = attention.project_key_value(memory)
        return attention(x, key, value, key_lengths=lengths)

    def results(step):
        out = step(x, memory, lengths)
        return out, *torch.autograd.grad(out, list(wanted.values()), grad)

    pairs = zip(results(compiled(step, kernel_device)), results(step), strict=True)
    for name, (found, expected) in zip(("result", *wanted), pairs, strict=True):
        assert_near(found, expected, case.dtype, f"gradient of {name}")


@pytest.mark.parametrize("case", MODULE)
@pytest.mark.filterwarnings("ignore")  # As above.
def test_compiled_dropout(case, kernel_device):
    """Another mask at each call, and in the backward pass that of the forward pass."""
    tensors = make_tensors(case, kernel_device)
    inputs = [tensors[name].requires_grad_() for name in ("query", "key", "value")]

    def attend(query, key, value, lengths):
        return cross_attention(query, key, value, key_lengths=lengths, dropout=0.5)

    fast = compiled(attend, kernel_device)
    out, other = (fast(*inputs, tensors["key_lengths"]) for _ in range(2))
    assert not torch.equal(out, other)
    # The output is linear in the values: with the same weights, <grad, out> = <grad_value, value>.
    (grad_value,) = torch.autograd.grad(out, inputs[2], out.detach())
    found = (grad_value.double() * inputs[2].double()).sum()
    assert_near(found, out.double().square().sum(), case.dtype)


@pytest.mark.parametrize(
    "case",
    each(small={"two heads": DECODING}, full={"NLLB": {**DECODING, "keys": 64}}),
)
@pytest.mark.filterwarnings("ignore")  # As above.
def test_compiled_into_a_graph(case, kernel_device):
    beams = case.queries
    attention, *_ = make_attention(case, kernel_device)
    fast = compiled(attention, kernel_device, mode="reduce-overhead")
    batches = [make_attention(case, kernel_device)[1:] for _ in range(3)]
    with torch.no_grad():
        # Twice over: the first calls warm up and capture, the later ones replay.
        for x, memory, lengths in 2 * batches:
            rows = x.reshape(case.sentences * beams, 1, -1)
            key, value = attention.project_key_value(memory)
            found = fast(rows, key, value, key_lengths=lengths, beams=beams).clone()
            expected = attention(rows, key, value, key_lengths=lengths, beams=beams)
            assert_near(found, expected, case.dtype)
