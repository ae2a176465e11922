from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck

from moe_mt.errors import ConfigError
from moe_mt.ops import (
    cross_attention,
    cross_attention_weights,
    cross_attention_with_lse,
    use_backend,
)
from moe_mt.ops.cross_attention import cross_attention_eager, cross_attention_with_lse_eager
from moe_mt.ops.dropout import dropped_below, keep_mask, kept_share, philox
from tests.closeness import assert_near

RESULTS = (
    "output",
    "log-sum-exp",
    "gradient of the query",
    "gradient of the key",
    "gradient of the value",
)
LIMITS = ("key_lengths", "key_mask", "query_offsets", "key_offsets")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A problem; of lengths, mask and packing at most one is given."""

    shape: tuple[int, int, int, int, int]
    """B, H, L, S, d_head."""

    lengths: Sequence[int] | None = None
    mask: Sequence[Sequence[tuple[int, int]]] | None = None
    """The ranges of valid keys of each sentence."""

    packed: Sequence[tuple[int, int]] | None = None
    """Queries and keys of each sentence; the rest of L and S belongs to none."""

    scale: float | None = None
    dropout: float = 0.0

    def sentences(self):
        """Return of each sentence: its row of the batch, queries, keys, and valid keys."""
        batch, _, queries, keys, _ = self.shape
        if self.packed is not None:
            found, q, k = [], 0, 0
            for own_queries, own_keys in self.packed:
                own = range(k, k + own_keys)
                found.append((0, range(q, q + own_queries), own, own))
                q, k = q + own_queries, k + own_keys
            return found
        valid = [range(keys)] * batch
        if self.lengths is not None:
            valid = [range(min(length, keys)) for length in self.lengths]
        if self.mask is not None:
            valid = [
                [k for first, end in ranges for k in range(first, end)] for ranges in self.mask
            ]
        return [(b, range(queries), range(keys), valid[b]) for b in range(batch)]

    def options(self, device="cpu", dtype=torch.int32):
        """Return all arguments but query, key and value; lengths and offsets in ``dtype``."""
        found = {"scale": self.scale, "dropout": self.dropout}
        if self.dropout > 0:
            found["seed"] = torch.tensor([2**40 + 7], device=device)
        if self.lengths is not None:
            found["key_lengths"] = torch.tensor(self.lengths, dtype=dtype, device=device)
        if self.mask is not None:
            mask = torch.zeros(self.shape[0], self.shape[3], dtype=torch.bool)
            for row, _, _, valid in self.sentences():
                mask[row, list(valid)] = True
            found["key_mask"] = mask.to(device)
        if self.packed is not None:
            sizes = torch.tensor([(0, 0), *self.packed], dtype=dtype, device=device)
            offsets = sizes.cumsum(0, dtype=dtype)
            found["query_offsets"], found["key_offsets"] = offsets[:, 0], offsets[:, 1]
        return found


CASES = {
    "one query and one key": Case(shape=(1, 1, 1, 1, 3)),
    "every key": Case(shape=(2, 2, 3, 4, 3)),
    "lengths 0, 1, all and more": Case(shape=(4, 2, 2, 4, 3), lengths=[0, 1, 4, 9]),
    "a mask with holes, and nothing valid": Case(
        shape=(3, 2, 2, 5, 3), mask=[[(1, 2), (3, 5)], [], [(0, 1)]]
    ),
    "a scale": Case(shape=(2, 1, 2, 4, 3), lengths=[4, 2], scale=0.3),
    "packed, with empty sentences and rows of none": Case(
        shape=(1, 2, 8, 9, 3), packed=[(2, 3), (0, 2), (3, 0), (1, 2), (0, 0)]
    ),
    "packed, one sentence, a scale": Case(shape=(1, 2, 2, 3, 3), packed=[(2, 3)], scale=0.3),
    "no query": Case(shape=(2, 2, 0, 3, 3)),
    "no key": Case(shape=(2, 2, 3, 0, 3)),
    "no sentence": Case(shape=(0, 2, 3, 4, 3)),
}


def problem(case, dtype=torch.float64, device="cpu"):
    """Return query, key and value, and the gradients of the output and of the log-sum-exp."""
    batch, heads, queries, keys, d_head = case.shape
    generator = torch.Generator().manual_seed(1)

    def randn(*size):
        drawn = torch.randn(*size, generator=generator, dtype=torch.float64)
        return drawn.to(device, dtype)

    query, grad = randn(batch, heads, queries, d_head), randn(batch, heads, queries, d_head)
    key, value = randn(batch, heads, keys, d_head), randn(batch, heads, keys, d_head)
    grad_lse = randn(batch, heads, queries).to(torch.promote_types(dtype, torch.float32))
    return query, key, value, grad, grad_lse


def results(attention, tensors, options):
    """Return what RESULTS names, without the log-sum-exp where ``attention`` gives none."""
    query, key, value, *grads = tensors
    inputs = [t.detach().requires_grad_() for t in (query, key, value)]
    outputs = attention(*inputs, **options)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    names = RESULTS if len(outputs) == 2 else (RESULTS[0], *RESULTS[2:])
    gradients = torch.autograd.grad(outputs, inputs, grads[: len(outputs)])
    return dict(zip(names, (*(t.detach() for t in outputs), *gradients), strict=True))


def assert_same(found, expected):
    """Fail unless all results that both have are the same to float64's rounding."""
    for name in found.keys() & expected.keys():
        torch.testing.assert_close(
            found[name],
            expected[name],
            rtol=1e-11,
            atol=1e-12,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_same_bits(found, expected):
    for name in RESULTS:
        assert torch.equal(found[name], expected[name]), name


def assert_results_near(found, expected, dtype):
    """Fail unless minus infinity stands at the same places, and all else is near."""
    for name in found:
        ours, theirs = found[name], expected[name].to(found[name].device)
        if name == "log-sum-exp":
            dead = theirs == -torch.inf
            assert torch.equal(ours == -torch.inf, dead), "minus infinity stands elsewhere"
            ours, theirs = ours[~dead], theirs[~dead]
        assert_near(ours, theirs, dtype, name)


def by_hand(case, query, key, value):
    """Return output and log-sum-exp, one weight after the other."""
    _, heads, queries, keys, d_head = case.shape
    scale = d_head**-0.5 if case.scale is None else case.scale
    sentences = case.sentences()
    kept = torch.ones(len(sentences), heads, queries, keys, dtype=torch.bool)
    if case.dropout > 0:
        sizes = dict(zip(("sentences", "heads", "queries", "keys"), kept.shape, strict=True))
        kept = keep_mask(case.options()["seed"], case.dropout, **sizes)
    # Sums with nothing in them, but with gradients.
    out, lse = query * 0 + (key.sum() + value.sum()) * 0, query.sum(-1) * 0 - torch.inf
    for number, (row, rows, own_keys, valid) in enumerate(sentences):
        for h in range(heads):
            for i, q in enumerate(rows):
                if not valid:
                    continue
                scores = {k: scale * (query[row, h, q] * key[row, h, k]).sum() for k in valid}
                total = sum(score.exp() for score in scores.values())
                for k, score in scores.items():
                    if kept[number, h, i, k - own_keys.start]:
                        weight = score.exp() / total / kept_share(case.dropout)
                        out[row, h, q] = out[row, h, q] + weight * value[row, h, k]
                lse[row, h, q] = total.log()
    return out, lse


@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("name", CASES)
def test_definition_and_every_gradient(name, dropout):
    case = replace(CASES[name], dropout=dropout)
    tensors, options = problem(case), case.options()
    expected = results(lambda *inputs: by_hand(case, *inputs), tensors, {})
    assert_same(results(cross_attention_with_lse, tensors, options), expected)
    out_alone = results(lambda *inputs: by_hand(case, *inputs)[0], tensors, {})
    assert_same(results(cross_attention, tensors, options), out_alone)


@pytest.mark.parametrize("name", CASES)
def test_the_forms_of_the_definition_agree(name):
    tensors, options = problem(CASES[name]), CASES[name].options()
    fused = results(cross_attention_eager, tensors, options)
    explicit = results(lambda *t, **o: cross_attention_with_lse_eager(*t, **o)[0], tensors, options)
    assert_same(fused, explicit)
    if CASES[name].packed is not None:
        return
    del options["dropout"]
    weighted = results(lambda q, k, v: cross_attention_weights(q, k, **options) @ v, tensors, {})
    assert_same(fused, weighted)


def test_packed_sentences_without_rows_are_an_empty_batch():
    case = Case(shape=(1, 2, 3, 4, 3), packed=[])
    out, lse = cross_attention_with_lse(*problem(case)[:3], **case.options())
    assert not out.any()
    assert (lse == -torch.inf).all()


def test_weights_are_a_distribution_over_the_valid_keys():
    case = CASES["a mask with holes, and nothing valid"]
    query, key, *_ = problem(case, torch.float32)
    weights = cross_attention_weights(query, key, key_mask=case.options()["key_mask"])
    assert weights.shape == (3, 2, 2, 5)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights[[0, 2]].sum(-1), torch.ones(2, 2, 2))
    assert not weights[0, ..., [0, 2]].any()
    assert not weights[1].any()


def test_beams_as_query_rows_are_beams_over_replicated_keys():
    beams, length = 3, 2
    case = Case(shape=(2, 2, beams * length, 4, 3), lengths=[4, 2])
    query, key, value, *_ = problem(case)
    shared = cross_attention(query, key, value, **case.options())
    of_beams = query.unflatten(2, (beams, length)).transpose(1, 2).flatten(0, 1)
    replicated = cross_attention(
        of_beams,
        key.repeat_interleave(beams, 0),
        value.repeat_interleave(beams, 0),
        key_lengths=torch.tensor([4] * beams + [2] * beams),
    )
    by_sentence = replicated.unflatten(0, (2, beams)).transpose(1, 2).flatten(2, 3)
    torch.testing.assert_close(shared, by_sentence, rtol=1e-12, atol=1e-12)


def test_lengths_are_a_mask_that_says_the_same():
    lengths = Case(shape=(4, 2, 3, 5, 3), lengths=[0, 1, 5, 8])
    mask = Case(shape=(4, 2, 3, 5, 3), mask=[[], [(0, 1)], [(0, 5)], [(0, 5)]])
    for attention in (cross_attention, cross_attention_with_lse):
        one, other = (results(attention, problem(c), c.options()) for c in (lengths, mask))
        for name, result in one.items():
            assert torch.equal(result, other[name]), name


@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["no dropout", "dropout"])
@pytest.mark.parametrize(
    "case",
    [
        Case(shape=(2, 2, 3, 4, 3), lengths=[0, 2]),
        Case(shape=(2, 2, 3, 4, 3), mask=[[], [(0, 1), (2, 3)]]),
        Case(shape=(1, 2, 6, 6, 3), packed=[(3, 0), (2, 3)]),
    ],
    ids=["lengths", "mask", "packed"],
)
def test_queries_without_a_valid_key_give_nothing_and_get_nothing(case, dropout):
    case = replace(case, dropout=dropout)
    tensors, options = problem(case), case.options()
    _, rows, own_keys, _ = case.sentences()[0]
    queries, keys = (0, slice(None), list(rows)), (0, slice(None), list(own_keys))
    for attention in (cross_attention, cross_attention_with_lse):
        found = results(attention, tensors, options)
        assert not found["output"][queries].any()
        assert not found["gradient of the query"][queries].any()
        assert not found["gradient of the key"][keys].any()
        assert not found["gradient of the value"][keys].any()
        assert not any(found[name].isnan().any() for name in found)
    assert (found["log-sum-exp"][queries] == -torch.inf).all()


GRADCHECK_CASES = {
    "lengths": Case(shape=(3, 1, 2, 3, 2), lengths=[0, 1, 3]),
    "mask": Case(shape=(2, 1, 2, 4, 2), mask=[[(1, 2), (3, 4)], []], scale=0.4),
    "packed": Case(shape=(1, 2, 5, 5, 2), packed=[(2, 3), (1, 0), (1, 1)]),
    "dropout": Case(shape=(2, 1, 2, 3, 2), lengths=[0, 3], dropout=0.4),
    "packed, with dropout": Case(shape=(1, 1, 4, 4, 2), packed=[(2, 3), (1, 0)], dropout=0.4),
}


@pytest.mark.parametrize("name", GRADCHECK_CASES)
def test_gradients_are_those_of_finite_differences(name):
    case = GRADCHECK_CASES[name]
    inputs = tuple(t.requires_grad_() for t in problem(case)[:3])
    options = case.options()

    def finite(*inputs):
        out, lse = cross_attention_with_lse_eager(*inputs, **options)
        return out, lse[lse > -torch.inf]

    assert gradcheck(lambda *inputs: cross_attention_eager(*inputs, **options), inputs)
    assert gradcheck(finite, inputs)


def merged_halves(query, key, value, key_lengths):
    """Attention to the first half of the keys and to the rest, merged."""
    half = key.shape[2] // 2
    out, lse = cross_attention_with_lse(
        query, key[:, :, :half], value[:, :, :half], key_lengths=key_lengths.clamp(max=half)
    )
    rest, lse_of_rest = cross_attention_with_lse(
        query, key[:, :, half:], value[:, :, half:], key_lengths=(key_lengths - half).clamp(min=0)
    )
    whole = torch.logaddexp(lse, lse_of_rest)
    shares = [(part - whole).exp()[..., None].to(out.dtype) for part in (lse, lse_of_rest)]
    return out * shares[0] + rest * shares[1], whole


def test_halves_of_the_keys_merge_into_the_whole_by_their_log_sum_exp():
    case = Case(shape=(3, 2, 3, 6, 3), lengths=[6, 4, 2])
    tensors = problem(case)
    lengths = case.options()["key_lengths"]
    found = results(lambda *t: merged_halves(*t, lengths), tensors, {})
    assert_same(found, results(cross_attention_with_lse, tensors, {"key_lengths": lengths}))


def check_unseeded_dropout(device):
    query, key, value, *_ = problem(Case(shape=(2, 2, 4, 8, 16)), torch.float32, device)
    torch.manual_seed(3)
    first, second = (cross_attention(query, key, value, dropout=0.5) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(cross_attention(query, key, value, dropout=0.5), first)


def test_dropout_without_a_seed_draws_another_mask_each_time():
    check_unseeded_dropout("cpu")


def test_dropout_with_a_seed_repeats_and_draws_nothing():
    case = Case(shape=(2, 2, 4, 8, 3), dropout=0.5)
    query, key, value, *_ = problem(case)
    options = case.options()
    before = torch.get_rng_state()
    first = cross_attention(query, key, value, **options)
    assert torch.equal(first, cross_attention(query, key, value, **options))
    scalar = options | {"seed": options["seed"][0]}
    assert torch.equal(first, cross_attention(query, key, value, **scalar))
    assert torch.equal(before, torch.get_rng_state())
    other = options | {"seed": options["seed"] + 1}
    assert not torch.equal(first, cross_attention(query, key, value, **other))


def test_no_dropout_means_that_no_seed_matters_and_none_is_drawn():
    query, key, value, *_ = problem(CASES["every key"])
    before = torch.get_rng_state()
    expected, _ = cross_attention_with_lse(query, key, value, dropout=0.0)
    out = cross_attention(query, key, value, dropout=0.0)
    assert torch.equal(before, torch.get_rng_state())
    seed = torch.tensor(9)
    assert torch.equal(cross_attention(query, key, value, seed=seed), out)
    assert torch.equal(cross_attention_with_lse(query, key, value, seed=seed)[0], expected)


def test_dropout_changes_no_expectation():
    # Equal weights of values 1: the output is the share of what is kept, over 1 - p.
    query, key = torch.zeros(8, 8, 16, 1), torch.zeros(8, 8, 64, 1)
    out = cross_attention(query, key, torch.ones_like(key), dropout=0.3, seed=torch.tensor([5]))
    drawn = out.numel() * key.shape[2]
    deviation = (0.3 / 0.7 / drawn) ** 0.5
    assert abs(out.mean() - 1) < 4 * deviation


def test_dropout_leaves_the_log_sum_exp_alone():
    case = Case(shape=(2, 2, 3, 5, 3), lengths=[5, 2], dropout=0.6)
    options = case.options()
    dropped = cross_attention_with_lse(*problem(case)[:3], **options)[1]
    whole = cross_attention_with_lse(*problem(case)[:3], **options | {"dropout": 0.0})[1]
    assert torch.equal(dropped, whole)


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_outputs_have_the_querys_dtype_and_log_sum_exps_a_wide_one(dtype, dropout):
    query, key, value, *_ = problem(CASES["every key"], dtype)
    assert cross_attention(query, key, value, dropout=dropout).dtype == dtype
    out, lse = cross_attention_with_lse(query, key, value, dropout=dropout)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert cross_attention_weights(query, key).dtype == dtype


def offsets(*ends):
    return torch.tensor([0, *ends])


# Beside query (2, 3, 4, 8), key and value (2, 3, 5, 8).
MISFITS = {
    "query": ({"query": torch.ones(2, 4, 8)}, r"query is \(2, 4, 8\).*\(B, H, L, d_head\)"),
    "key": ({"key": torch.ones(2, 5, 8)}, r"key \(2, 5, 8\).*\(B, H, S, d_head\)"),
    "replicated keys": ({"key": torch.ones(6, 3, 5, 8)}, r"\(6, 3, 5, 8\).*Beams.*rows of query"),
    "heads": ({"key": torch.ones(2, 1, 5, 8)}, r"key is \(2, 1, 5, 8\).*\(2, 3, S, 8\)"),
    "d_head": ({"key": torch.ones(2, 3, 5, 7)}, r"key is \(2, 3, 5, 7\).*\(2, 3, S, 8\)"),
    "values": ({"value": torch.ones(2, 3, 4, 8)}, r"value \(2, 3, 4, 8\).*\(2, 3, S, 8\)"),
    "width of the values": ({"value": torch.ones(2, 3, 5, 7)}, r"value \(2, 3, 5, 7\)"),
    "lengths and a mask": (
        {
            "key_lengths": torch.ones(2, dtype=torch.int32),
            "key_mask": torch.ones(2, 5, dtype=torch.bool),
        },
        "both given",
    ),
    "lengths of other sentences": (
        {"key_lengths": torch.ones(3, dtype=torch.int32)},
        r"key_lengths are \(3,\) torch.int32; they must be \(2,\) torch.int32 or",
    ),
    "lengths of 8 bits": (
        {"key_lengths": torch.ones(2, dtype=torch.int8)},
        "torch.int8; they must be",
    ),
    "broken lengths": ({"key_lengths": torch.ones(2)}, "torch.float32; they must be"),
    "a mask as lengths": (
        {"key_lengths": torch.ones(2, dtype=torch.bool)},
        "torch.bool; they must be",
    ),
    "a mask of other keys": (
        {"key_mask": torch.ones(2, 4, dtype=torch.bool)},
        r"key_mask is \(2, 4\) torch.bool; it must be \(2, 5\)",
    ),
    "an additive mask": ({"key_mask": torch.zeros(2, 5)}, r"key_mask is \(2, 5\) torch.float32"),
    "query_offsets alone": ({"query_offsets": offsets(4)}, "belong together"),
    "key_offsets alone": ({"key_offsets": offsets(5)}, "belong together"),
    "offsets and lengths": (
        {
            "query_offsets": offsets(4),
            "key_offsets": offsets(5),
            "key_lengths": torch.ones(2, dtype=torch.int32),
        },
        "give no key_lengths",
    ),
    "offsets and a mask": (
        {
            "query_offsets": offsets(4),
            "key_offsets": offsets(5),
            "key_mask": torch.ones(2, 5, dtype=torch.bool),
        },
        "give no key_lengths and no key_mask",
    ),
    "packed rows of a batch": (
        {"query_offsets": offsets(4), "key_offsets": offsets(5)},
        "B = 1; query has B = 2",
    ),
    "a scale of zero": ({"scale": 0.0}, "scale is 0.0; it must be positive"),
    "a negative scale": ({"scale": -1.0}, "scale is -1.0"),
    "an infinite scale": ({"scale": float("inf")}, "scale is inf; it must be positive and finite"),
    "a scale that is no number": ({"scale": float("nan")}, "scale is nan"),
    "a negative dropout": ({"dropout": -0.1}, "dropout is -0.1; it must be at least 0"),
    "a dropout of all": ({"dropout": 1.0}, "dropout is 1.0; .*below 1"),
    "a dropout that is no number": ({"dropout": float("nan")}, "dropout is nan"),
    "two seeds": ({"seed": torch.tensor([1, 2])}, r"seed is \(2,\) torch.int64"),
    "a narrow seed": (
        {"seed": torch.tensor([1], dtype=torch.int32)},
        r"seed is \(1,\) torch.int32; it must be one number of torch.int64",
    ),
}
# Beside a batch of one row.
MISFIT_OFFSETS = {
    "other numbers of sentences": ((offsets(4), offsets(3, 5)), r"\(2,\).*\(3,\)"),
    "no offset": ((offsets()[1:], offsets()[1:]), r"\(0,\) torch.int64.*\(sentences \+ 1,\)"),
    "offsets of two axes": ((offsets(4)[None], offsets(5)[None]), r"\(1, 2\)"),
    "offsets of 8 bits": ((offsets(4).byte(), offsets(5)), "query_offsets are .*uint8"),
    "offsets that are a mask": ((offsets(4), offsets(5).bool()), "key_offsets .*torch.bool"),
    "broken query_offsets": ((offsets(4).float(), offsets(5)), "query_offsets are .*float32"),
    "broken key_offsets": ((offsets(4), offsets(5).float()), "key_offsets .*float32"),
}


@pytest.mark.parametrize("attention", [cross_attention, cross_attention_with_lse])
@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_named(name, attention):
    change, message = MISFITS[name]
    arguments = {
        "query": torch.ones(2, 3, 4, 8),
        "key": torch.ones(2, 3, 5, 8),
        "value": torch.ones(2, 3, 5, 8),
    }
    with pytest.raises(ConfigError, match=message):
        attention(**arguments | change)


@pytest.mark.parametrize("name", MISFIT_OFFSETS)
def test_offsets_that_do_not_fit_are_named(name):
    (query_offsets, key_offsets), message = MISFIT_OFFSETS[name]
    query, key = torch.ones(1, 3, 4, 8), torch.ones(1, 3, 5, 8)
    with pytest.raises(ConfigError, match=message):
        cross_attention(query, key, key, query_offsets=query_offsets, key_offsets=key_offsets)


@pytest.mark.parametrize("name", ["heads", "lengths and a mask", "a scale of zero"])
def test_weights_of_what_does_not_fit_are_refused(name):
    change, message = MISFITS[name]
    arguments = {"query": torch.ones(2, 3, 4, 8), "key": torch.ones(2, 3, 5, 8)}
    with pytest.raises(ConfigError, match=message):
        cross_attention_weights(**arguments | change)


# Blocks of the interpreter are 16 queries and 16 keys; "decoding" is the path of up to 16 queries.
KERNEL_CASES = {
    "one query and a few keys": Case(shape=(1, 1, 1, 5, 16)),
    "sentences and heads": Case(shape=(2, 3, 2, 4, 16), lengths=[4, 3]),
    "sentences and heads, training": Case(shape=(2, 2, 17, 4, 16), lengths=[4, 3]),
    "5 beams, lengths 0, 1 and all": Case(shape=(3, 1, 5, 20, 16), lengths=[20, 0, 1]),
    "16 queries, the most of decoding": Case(shape=(2, 1, 16, 17, 16), lengths=[16, 17]),
    "17 queries, the fewest of training": Case(shape=(2, 1, 17, 17, 16), lengths=[16, 17]),
    "whole blocks": Case(shape=(1, 1, 32, 32, 32)),
    "parts of blocks, lengths 0, 1 and all": Case(shape=(3, 1, 20, 35, 16), lengths=[0, 35, 1]),
    "Whisper, a sixteenth of its keys, decoding": Case(shape=(1, 1, 5, 94, 64)),
    "Whisper, a sixteenth of its keys, training": Case(shape=(1, 1, 20, 94, 64)),
    "BART": Case(shape=(2, 1, 18, 33, 64), lengths=[33, 20]),
    "NLLB, decoding": Case(shape=(2, 1, 4, 20, 128), lengths=[12, 20]),
    "NLLB, training": Case(shape=(2, 1, 17, 20, 128), lengths=[12, 20]),
    "a head below the narrowest tile, decoding": Case(shape=(1, 1, 2, 20, 8), lengths=[9]),
    "a head below the narrowest tile, training": Case(shape=(1, 1, 18, 20, 8), lengths=[9]),
    "a head that is no power of two, decoding": Case(shape=(1, 2, 9, 20, 80), lengths=[19]),
    "a head that is no power of two, training": Case(shape=(1, 2, 18, 20, 20), lengths=[19]),
    "the widest head, decoding": Case(shape=(1, 1, 2, 17, 256)),
    "the widest head, training": Case(shape=(1, 1, 17, 17, 256)),
    "lengths beyond the keys, decoding": Case(shape=(2, 1, 4, 20, 16), lengths=[21, 2000]),
    "lengths beyond the keys, training": Case(shape=(2, 1, 18, 20, 16), lengths=[21, 2000]),
    "a mask with holes and blocks without a key, decoding": Case(
        shape=(2, 1, 5, 70, 16), mask=[[(3, 20), (50, 60)], [(16, 31)]]
    ),
    "a mask with holes and blocks without a key, training": Case(
        shape=(2, 1, 18, 54, 16), mask=[[(3, 17), (48, 52)], [(16, 31)]]
    ),
    "a mask of nothing and of the last key alone, decoding": Case(
        shape=(2, 1, 5, 34, 16), mask=[[], [(33, 34)]]
    ),
    "a mask of nothing and of the last key alone, training": Case(
        shape=(2, 1, 18, 34, 16), mask=[[], [(33, 34)]]
    ),
    "a scale, decoding": Case(shape=(2, 1, 4, 20, 16), lengths=[20, 7], scale=0.7),
    "a scale, training": Case(shape=(2, 1, 18, 20, 16), lengths=[20, 7], scale=0.7),
    "dropout": Case(shape=(2, 2, 17, 18, 16), dropout=0.3),
    "dropout, one query": Case(shape=(2, 1, 1, 20, 16), lengths=[20, 6], dropout=0.3),
    "dropout, lengths": Case(shape=(2, 1, 18, 35, 16), lengths=[33, 0], dropout=0.3),
    "dropout, mask": Case(shape=(1, 1, 18, 35, 16), mask=[[(1, 3), (17, 34)]], dropout=0.3),
    "packed: empty sentences, rows of none": Case(
        shape=(1, 2, 26, 30, 16), packed=[(3, 5), (0, 4), (17, 18), (4, 0)]
    ),
    "packed: the first sentences empty, the last of one row": Case(
        shape=(1, 1, 20, 20, 16), packed=[(0, 0), (0, 3), (2, 0), (17, 16), (1, 1)]
    ),
    "packed: the last sentences empty": Case(
        shape=(1, 1, 17, 17, 16), packed=[(16, 17), (0, 0), (1, 0)]
    ),
    "packed: one sentence": Case(shape=(1, 1, 18, 17, 16), packed=[(18, 17)]),
    "packed: nothing but rows of none": Case(shape=(1, 1, 3, 4, 16), packed=[(0, 0)]),
    "packed: many short sentences": Case(
        shape=(1, 1, 13, 14, 16), packed=[(2, 3), (1, 1), (3, 2), (2, 2), (1, 1), (3, 4), (1, 1)]
    ),
    "packed: scale and dropout": Case(
        shape=(1, 2, 21, 24, 20), packed=[(3, 5), (17, 18), (0, 1)], scale=0.7, dropout=0.3
    ),
    "no query": Case(shape=(2, 2, 0, 3, 16)),
    "no key, decoding": Case(shape=(1, 2, 3, 0, 16)),
    "no key, training": Case(shape=(1, 1, 17, 0, 16)),
    "no sentence": Case(shape=(0, 2, 3, 4, 16)),
}

# One case of every way through the kernels, for what must hold on all of them.
PATHS = {
    "decoding": Case(shape=(2, 2, 3, 16, 20), lengths=[16, 7]),
    "decoding, split": Case(shape=(1, 1, 3, 70, 20), lengths=[61]),
    "training": Case(shape=(1, 2, 18, 20, 20), lengths=[17]),
    "decoding, mask": Case(shape=(2, 1, 3, 20, 16), mask=[[(3, 9), (17, 19)], [(1, 4)]]),
    "training, mask": Case(shape=(2, 1, 18, 20, 16), mask=[[(3, 9), (17, 19)], [(1, 4)]]),
    "dropout": Case(shape=(1, 2, 17, 20, 16), lengths=[19], dropout=0.3),
    "packed": Case(shape=(1, 1, 23, 12, 20), packed=[(2, 5), (0, 2), (17, 3), (2, 0)]),
}
# As small as can be, for tests that run each many times. Sizes differ, lest a compiler that sees
# equal ones takes them for one.
TINY = {
    "lengths": Case(shape=(2, 1, 3, 5, 16), lengths=[1, 5]),
    "mask": Case(shape=(2, 1, 3, 5, 16), mask=[[(1, 3)], [(0, 1), (4, 5)]]),
    "dropout": Case(shape=(2, 1, 3, 5, 16), dropout=0.3),
    "packed": Case(shape=(1, 1, 4, 5, 16), packed=[(1, 2), (2, 1)]),
}


def on_kernels(case, device):
    """Return the tensors of a case in float32, and its options."""
    return problem(case, torch.float32, device), case.options(device)


@cache
def undisturbed(name, device):
    """Return what the kernels give on a case of PATHS as it is: contiguous, int32, all trained."""
    return results(cross_attention_with_lse, *on_kernels(PATHS[name], device))


def poisoned(case, tensors):
    """Return copies with NaN wherever no sentence has a row or no valid key stands, and where.

    "Where" is two masks, (B, L) of queries that count and (B, S) of keys that count.
    """
    query, key, value, grad, grad_lse = (t.clone() for t in tensors)
    batch, _, queries, keys, _ = case.shape
    counts = torch.zeros(2, batch, max(queries, keys), dtype=torch.bool, device=query.device)
    for row, rows, _, valid in case.sentences():
        counts[0, row, list(rows)] = True
        counts[1, row, list(valid)] = True
    queries_count, keys_count = counts[0, :, :queries], counts[1, :, :keys]
    for tensor in (query, grad, grad_lse):
        tensor.transpose(1, 2)[~queries_count] = torch.nan
    for tensor in (key, value):
        tensor.transpose(1, 2)[~keys_count] = torch.nan
    return (query, key, value, grad, grad_lse), queries_count, keys_count


def check_kernel(case, dtype, device):
    """Compare with the definition in float64; return what the kernel gave."""
    tensors, options = problem(case, dtype, device), case.options(device)
    ours = results(cross_attention_with_lse, tensors, options)
    theirs = results(cross_attention_with_lse_eager, [t.double() for t in tensors], options)
    for name, result in ours.items():
        assert result.dtype == (torch.float32 if name == "log-sum-exp" else dtype), name
    assert_results_near(ours, theirs, dtype)
    return ours


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", KERNEL_CASES)
def test_kernel_and_every_gradient(name, dtype, kernel_device):
    check_kernel(KERNEL_CASES[name], dtype, kernel_device)


@pytest.mark.triton
@pytest.mark.parametrize("name", ["decoding", "training"])
def test_kernel_in_bfloat16(name, kernel_device):
    check_kernel(PATHS[name], torch.bfloat16, kernel_device)


# Backward, the weights of keys that do not count overflow before they are dropped.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.triton
@pytest.mark.parametrize("sign", [1, -1], ids=["above", "below"])
@pytest.mark.parametrize("queries", [4, 18], ids=["decoding", "training"])
def test_kernel_with_scores_beyond_the_range_of_exp(queries, sign, kernel_device):
    # Scores of some hundreds, whose rounding in float32 only float16's tolerance forgives. Keys
    # that do not count have score 0, far above those below.
    case = Case(shape=(2, 1, queries, 20, 16), lengths=[20, 7], scale=30.0)
    query, key, *others = problem(case, torch.float16, kernel_device)
    tensors, options = [query.abs(), sign * key.abs(), *others], case.options(kernel_device)
    found = results(cross_attention_with_lse, tensors, options)
    expected = results(cross_attention_with_lse_eager, [t.double() for t in tensors], options)
    assert (sign * expected["log-sum-exp"]).min() > 89
    assert_results_near(found, expected, torch.float16)


@pytest.mark.triton
def test_the_last_valid_key_of_a_long_mask_is_found(kernel_device):
    # A mask is looked through 1024 keys at a time. Keys are frozen: their gradients take long.
    case = Case(shape=(2, 1, 1, 1034, 16), mask=[[(2, 5)], [(7, 9), (1030, 1033)]])
    (query, key, value, grad, _), options = on_kernels(case, kernel_device)
    query.requires_grad_()
    out = cross_attention(query, key, value, **options)
    expected = cross_attention_eager(query, key, value, **options)
    assert_near(out, expected, torch.float32)
    found, theirs = (torch.autograd.grad(t, query, grad)[0] for t in (out, expected))
    assert_near(found, theirs, torch.float32, "gradient of the query")


@pytest.mark.triton
@pytest.mark.parametrize("name", PATHS)
def test_kernel_repeats_its_bits(name, kernel_device):
    again = results(cross_attention_with_lse, *on_kernels(PATHS[name], kernel_device))
    assert_same_bits(again, undisturbed(name, kernel_device))


@pytest.mark.triton
@pytest.mark.parametrize("name", PATHS)
def test_kernel_gives_the_same_output_alone_with_heads_that_join_without_a_copy(
    name, kernel_device
):
    tensors, options = on_kernels(PATHS[name], kernel_device)
    out = cross_attention(*tensors[:3], **options)
    assert torch.equal(out, undisturbed(name, kernel_device)["output"])
    assert out.transpose(1, 2).is_contiguous()


def launched(case, accelerator):
    """Return the names of the forward kernels that run on an accelerator."""
    from moe_mt.kernels import cross_attention as kernels
    from moe_mt.kernels._launch import record_launches

    query, key, value, *_ = problem(case, torch.bfloat16, "meta")
    options = case.options("meta")
    limits = kernels.Limits(*(options.get(name) for name in (*LIMITS, "seed")))
    with record_launches(accelerator) as noted:
        kernels.cross_attention(query, key, value, limits, scale=1.0, dropped_below=0)
    return [launch.kernel.__name__ for launch in noted]


@pytest.mark.triton
@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case(shape=(32, 16, 16, 512, 1)), ["_decode_kernel"]),
        (Case(shape=(1, 16, 16, 512, 1)), ["_decode_kernel", "_merge_kernel"]),
        (Case(shape=(1, 16, 16, 128, 1)), ["_decode_kernel"]),
        (Case(shape=(1, 16, 17, 512, 1)), ["_forward_kernel"]),
        (Case(shape=(1, 16, 4, 512, 1), dropout=0.1), ["_forward_kernel"]),
        (Case(shape=(1, 16, 4, 512, 1), packed=[(4, 512)]), ["_forward_kernel"]),
    ],
    ids=["decoding", "few sentences", "few keys", "17 queries", "dropout", "packed"],
)
def test_decoding_splits_keys_only_where_a_gpu_would_stand_idle(case, expected):
    from moe_mt.kernels._launch import Accelerator

    assert launched(case, Accelerator(arch="sm_90", multiprocessors=132)) == expected


@pytest.mark.triton
@pytest.mark.parametrize("length", [134, 50, 20, 0])
def test_split_keys_merge_into_the_whole(length, kernel_device):
    # The interpreter's device cuts the keys of one head into four parts of 48, the last of which
    # has none and at shorter lengths others have none either; those of six heads it leaves whole.
    six = Case(shape=(1, 6, 3, 134, 20), lengths=[length])
    (query, key, value, *_), options = on_kernels(six, kernel_device)
    if kernel_device.type == "cpu":
        from moe_mt.kernels._launch import accelerator_of

        one = replace(six, shape=(1, 1, 3, 134, 20))
        assert launched(six, accelerator_of(query)) == ["_decode_kernel"]
        assert launched(one, accelerator_of(query)) == ["_decode_kernel", "_merge_kernel"]
    whole = cross_attention_with_lse(query, key, value, **options)
    parts = cross_attention_with_lse(query[:, :1], key[:, :1], value[:, :1], **options)
    first = [t[:, :1] for t in whole]
    assert_results_near(
        dict(zip(RESULTS, parts, strict=False)),
        dict(zip(RESULTS, first, strict=False)),
        torch.float32,
    )


@pytest.mark.triton
def test_halves_of_the_keys_merge_into_the_whole_on_kernels(kernel_device):
    case = Case(shape=(3, 1, 3, 36, 16), lengths=[36, 25, 12])
    tensors, options = on_kernels(case, kernel_device)
    lengths = options["key_lengths"]
    found = results(lambda *t: merged_halves(*t, lengths), tensors, {})
    wide = [t.double() for t in tensors]
    expected = results(cross_attention_with_lse_eager, wide, {"key_lengths": lengths})
    assert_results_near(found, expected, torch.float32)


@pytest.mark.triton
def test_kernel_drops_what_the_definition_drops(kernel_device):
    # Values and gradients that are unit vectors: what comes out are the weights themselves.
    case = Case(shape=(2, 2, 17, 18, 18), dropout=0.3)
    (query, key, *_), options = on_kernels(case, kernel_device)
    kept = keep_mask(options["seed"], 0.3, sentences=2, heads=2, queries=17, keys=18)
    value = torch.eye(18, device=kernel_device).expand_as(key).requires_grad_()
    weights = cross_attention(query, key, value, **options)
    assert torch.equal(weights != 0, kept)
    grad = torch.eye(18, device=kernel_device)[:17].expand_as(weights)
    (grad_value,) = torch.autograd.grad(weights, value, grad)
    assert torch.equal(grad_value[..., :17] != 0, kept.mT)


@pytest.mark.triton
def test_kernel_drops_a_weight_from_the_probability_above_its_own_bits(kernel_device):
    one, seed = torch.ones(1, 1, 1, 16, device=kernel_device), torch.tensor([5])
    bits = int(philox(seed, (torch.tensor(0),) * 4)[0]) >> 8
    for dropped, kept in ((bits, True), (bits + 1, False)):
        options = {"dropout": dropped / 2**24, "seed": seed.to(kernel_device)}
        assert bool(cross_attention(one, one, one, **options).any()) is kept


@pytest.mark.triton
def test_kernel_without_a_seed_draws_another_mask_each_time(kernel_device):
    check_unseeded_dropout(kernel_device)


@pytest.mark.triton
@pytest.mark.parametrize("number", [0, -1, -(2**63), 2**63 - 1], ids=str)
def test_kernel_takes_any_seed(number, kernel_device):
    (query, key, value, *_), _ = on_kernels(TINY["dropout"], kernel_device)
    options = {"dropout": 0.5, "seed": torch.tensor(number, device=kernel_device)}
    found = cross_attention(query, key, value, **options)
    assert_near(found, cross_attention_eager(query, key, value, **options), torch.float32)


@pytest.mark.triton
@pytest.mark.parametrize("name", ["decoding", "training", "packed"])
def test_lengths_and_offsets_may_have_64_bits(name, kernel_device):
    tensors = problem(PATHS[name], torch.float32, kernel_device)
    options = PATHS[name].options(kernel_device, torch.int64)
    found = results(cross_attention_with_lse, tensors, options)
    assert_same_bits(found, undisturbed(name, kernel_device))


def heads_last(tensor):
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def of_a_fused_projection(tensor):
    """The middle of three projections, whose others are NaN: (B, S, 3, H, d_head)."""
    rows = tensor.transpose(1, 2)
    others = torch.full_like(rows, torch.nan)
    return torch.stack([others, rows, others], 2)[:, :, 1].transpose(1, 2)


def inside_a_buffer(tensor):
    """A part of a larger buffer: NaN before and behind every row, and rows of NaN around them."""
    *outer, rows, width = tensor.shape
    buffer = tensor.new_full((*outer, rows + 40, width + 40), torch.nan)
    buffer[..., 20:-20, 20:-20] = tensor
    return buffer[..., 20:-20, 20:-20]


def neighbours_of_other_rows(tensor):
    """The last stride is not 1."""
    return tensor.mT.contiguous().mT


@pytest.mark.triton
@pytest.mark.parametrize(
    "layout", [heads_last, of_a_fused_projection, inside_a_buffer, neighbours_of_other_rows]
)
@pytest.mark.parametrize("name", ["decoding", "training", "packed"])
def test_every_layout_gives_the_same_bits(name, layout, kernel_device):
    # The gradients given are laid out so, too.
    (*tensors, grad_lse), options = on_kernels(PATHS[name], kernel_device)
    tensors = [layout(t) for t in tensors]
    tensors.append(torch.stack([grad_lse, grad_lse], -1)[..., 0])
    found = results(cross_attention_with_lse, tensors, options)
    assert_same_bits(found, undisturbed(name, kernel_device))


@pytest.mark.triton
@pytest.mark.parametrize("queries", [3, 17], ids=["decoding", "training"])
def test_keys_and_values_may_be_expanded(queries, kernel_device):
    # One head of keys for all heads of queries; values of one sentence for all.
    case = Case(shape=(2, 2, queries, 4, 16), lengths=[4, 3])
    (query, key, value, *grads), options = on_kernels(case, kernel_device)
    expanded = [key[:, :1].expand_as(key), value[:1].expand_as(value)]
    runs = [
        results(cross_attention_with_lse, [query, *inputs, *grads], options)
        for inputs in (expanded, [t.contiguous() for t in expanded])
    ]
    assert_same_bits(*runs)


FAR = 2**31 - 16
"""In 32 bits, two such strides would end 32 elements before the first."""


@pytest.mark.triton
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["decoding", "training"])
@pytest.mark.parametrize("axis", range(3), ids=["sentences", "heads", "rows"])
def test_what_lies_far_apart_is_found(axis, dropout, kernel_device):
    shape = [(3, 1, 2, 4, 16), (1, 3, 2, 4, 16), (1, 1, 3, 3, 16)][axis]
    case = Case(shape=shape, dropout=dropout)
    *tensors, grad_lse = problem(case, torch.float16, kernel_device)
    options = case.options(kernel_device)
    # A CPU keeps only the pages that are written; poison would write them all.
    torch.use_deterministic_algorithms(False)
    memory = torch.empty(2 * FAR + 1024 * 5, dtype=torch.float16, device=kernel_device)
    torch.use_deterministic_algorithms(True)
    far = []
    for place, tensor in enumerate(tensors, start=1):
        stride = list(tensor.stride())
        stride[axis] = FAR
        far.append(memory.as_strided(tensor.shape, stride, 1024 * place).copy_(tensor))
    expected = results(cross_attention_with_lse, [*tensors, grad_lse], options)
    assert_same_bits(results(cross_attention_with_lse, [*far, grad_lse], options), expected)


@pytest.mark.triton
@pytest.mark.parametrize("name", ["decoding", "training, mask", "packed"])
def test_limits_may_have_strides(name, kernel_device):
    tensors, options = on_kernels(PATHS[name], kernel_device)
    for limit in options.keys() & LIMITS:
        tensor = options[limit]
        options[limit] = torch.stack([tensor, torch.full_like(tensor, 1)], -1)[..., 0]
        assert not options[limit].is_contiguous()
    found = results(cross_attention_with_lse, tensors, options)
    assert_same_bits(found, undisturbed(name, kernel_device))


@pytest.mark.triton
def test_another_device_is_named(kernel_device):
    query, key, value = torch.ones(3, 1, 1, 4, 8, device=kernel_device)
    lengths = torch.ones(1, dtype=torch.int32, device="meta")
    with pytest.raises(ConfigError, match=f"query is on {query.device} and another .* on meta"):
        cross_attention(query, key, value, key_lengths=lengths)


@pytest.mark.triton
@pytest.mark.parametrize("name", ["decoding", "packed"])
def test_a_gradient_may_have_stride_zero(name, kernel_device):
    (*inputs, grad, _), options = on_kernels(PATHS[name], kernel_device)
    inputs = [t.requires_grad_() for t in inputs]
    found = torch.autograd.grad(cross_attention(*inputs, **options).sum(), inputs)
    out = cross_attention(*inputs, **options)
    expected = torch.autograd.grad(out, inputs, torch.ones_like(grad))
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.triton
def test_backward_takes_an_output_that_lies_otherwise(kernel_device):
    # As a compiler may hand it over, which knows shapes and not what kernels lay out.
    (query, key, value, grad, grad_lse), options = on_kernels(PATHS["training"], kernel_device)
    clean = undisturbed("training", kernel_device)
    limits = [options.get(name) for name in (*LIMITS, "seed")]
    found = torch.ops.moe_mt.cross_attention_backward(
        grad,
        grad_lse,
        query,
        key,
        value,
        clean["output"].contiguous(),
        clean["log-sum-exp"].mT.contiguous().mT,
        *limits,
        query.shape[3] ** -0.5,
        0,
        True,
    )
    for what, gradient in zip(RESULTS[2:], found, strict=True):
        assert torch.equal(gradient, clean[what]), what


@pytest.mark.triton
@pytest.mark.parametrize("which", [0, 1], ids=["output", "log-sum-exp"])
@pytest.mark.parametrize("name", TINY)
def test_one_of_the_two_outputs_may_have_a_gradient(name, which, kernel_device):
    tensors, options = on_kernels(TINY[name], kernel_device)
    runs = []
    for attention, tensors_of_run in (
        (cross_attention_with_lse, tensors),
        (cross_attention_with_lse_eager, [t.double() for t in tensors]),
    ):
        inputs = [t.requires_grad_() for t in tensors_of_run[:3]]
        output, grad = attention(*inputs, **options)[which], tensors_of_run[3 + which]
        runs.append(torch.autograd.grad(output, inputs, grad, materialize_grads=True))
    for what, found, expected in zip(RESULTS[2:], *runs, strict=True):
        assert_near(found, expected, torch.float32, what)


@pytest.mark.triton
@pytest.mark.parametrize(
    "needed", [(0,), (1, 2), (1,), (2,)], ids=["query", "key and value", "key", "value"]
)
def test_frozen_inputs_get_no_gradient_and_change_no_other(needed, kernel_device, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("nobody needs these gradients")

    if needed == (0,):
        monkeypatch.setattr("moe_mt.kernels.cross_attention.grad_key_value", refuse)
    (*inputs, grad, grad_lse), options = on_kernels(PATHS["training"], kernel_device)
    for i in needed:
        inputs[i].requires_grad_()
    outputs = cross_attention_with_lse(*inputs, **options)
    torch.autograd.backward(outputs, (grad, grad_lse))
    for i, what in enumerate(RESULTS[2:]):
        if i in needed:
            assert torch.equal(inputs[i].grad, undisturbed("training", kernel_device)[what])
        else:
            assert inputs[i].grad is None


@pytest.mark.triton
@pytest.mark.parametrize("name", PATHS)
def test_what_does_not_count_is_not_read(name, kernel_device):
    tensors, options = on_kernels(PATHS[name], kernel_device)
    tensors, queries_count, keys_count = poisoned(PATHS[name], tensors)
    assert tensors[1].isnan().any()
    found = results(cross_attention_with_lse, tensors, options)
    assert_same_bits(found, undisturbed(name, kernel_device))
    for what, counts in zip(RESULTS[2:], (queries_count, keys_count, keys_count), strict=True):
        assert not found[what].transpose(1, 2)[~counts].any(), what


# The interpreter's maximum warns of a row that is nothing but NaN.
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.triton
@pytest.mark.parametrize("name", PATHS)
def test_a_nan_in_a_query_stays_in_its_row(name, kernel_device):
    tensors, options = on_kernels(PATHS[name], kernel_device)
    clean = undisturbed(name, kernel_device)
    tensors[0][0, 0, 1, 3] = torch.nan
    found = results(cross_attention_with_lse, tensors, options)
    for what in RESULTS[:3]:
        assert found[what][0, 0, 1].isnan().all(), what
        found[what][0, 0, 1] = clean[what][0, 0, 1]
        assert torch.equal(found[what], clean[what]), what


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.triton
def test_a_nan_in_a_packed_sentence_stays_in_it(kernel_device):
    # All sentences stand in one block; the poisoned one has neighbours on both sides.
    case = Case(shape=(1, 1, 12, 12, 20), packed=[(4, 4), (4, 4), (4, 4)])
    tensors, options = on_kernels(case, kernel_device)
    clean = results(cross_attention_with_lse, tensors, options)
    for tensor in tensors:
        tensor[:, :, 4:8] = torch.nan
    found = results(cross_attention_with_lse, tensors, options)
    for what in RESULTS:
        assert found[what][:, :, 4:8].isnan().all(), what
        found[what][:, :, 4:8] = clean[what][:, :, 4:8]
        assert torch.equal(found[what], clean[what]), what


@pytest.mark.triton
@pytest.mark.parametrize("queries", [3, 17], ids=["decoding", "training"])
def test_a_sentence_does_not_depend_on_the_batch(queries, kernel_device):
    # Nor on its padding; as long as decoding splits keys alike, that is: 20 are never split.
    case = Case(shape=(2, 1, queries, 20, 16), lengths=[20, 18])
    (query, key, value, *grads), options = on_kernels(case, kernel_device)
    whole = results(cross_attention_with_lse, [query, key, value, *grads], options)
    alone = [query[1:], key[1:, :, :18], value[1:, :, :18], *(t[1:] for t in grads)]
    for what, result in results(cross_attention_with_lse, alone, {}).items():
        assert torch.equal(whole[what][1:, :, : result.shape[2]], result), what


@pytest.mark.triton
@pytest.mark.parametrize("name", TINY)
def test_operator_contract(name, kernel_device):
    (*inputs, grad, grad_lse), options = on_kernels(TINY[name], kernel_device)
    limits = [options.get(name) for name in (*LIMITS, "seed")]
    arguments = (*limits, 0.3, dropped_below(TINY[name].dropout))
    forward = torch.ops.moe_mt.cross_attention.default
    torch.library.opcheck(forward, (*(t.clone().requires_grad_() for t in inputs), *arguments))
    saved = (*inputs, *forward(*inputs, *arguments), *arguments)
    for given, need_key_value in ((grad_lse, True), (None, False)):
        torch.library.opcheck(
            torch.ops.moe_mt.cross_attention_backward.default,
            (grad, given, *saved, need_key_value),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.triton
@pytest.mark.parametrize("name", PATHS)
def test_meta_tensors_have_the_shapes_and_strides_of_real_ones(name, kernel_device):
    real = undisturbed(name, kernel_device)
    found = results(cross_attention_with_lse, *on_kernels(PATHS[name], "meta"))
    for what in RESULTS:
        assert found[what].is_meta
        assert found[what].dtype == real[what].dtype
        assert found[what].shape == real[what].shape
        assert found[what].stride() == real[what].stride()


@pytest.mark.triton
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", TINY)
def test_kernel_compiles_without_a_break(name, dynamic, kernel_device):
    torch._dynamo.reset()
    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        cross_attention_with_lse, fullgraph=True, dynamic=dynamic, backend=frames
    )
    batch, heads, queries, keys, d_head = TINY[name].shape
    compilations = []
    for more in (0, 4):
        case = replace(TINY[name], shape=(batch, heads, queries + more, keys + more, d_head))
        tensors, options = on_kernels(case, kernel_device)
        expected = results(cross_attention_with_lse, tensors, options)
        assert_same_bits(results(compiled, tensors, options), expected)
        compilations.append(frames.frame_count)
    if dynamic:  # one compilation serves all lengths
        assert len(set(compilations)) == 1


@pytest.mark.triton
def test_dropout_without_a_seed_compiles(kernel_device):
    torch._dynamo.reset()
    compiled = torch.compile(cross_attention, fullgraph=True, backend="aot_eager")
    (query, key, value, *_), _ = on_kernels(TINY["dropout"], kernel_device)
    runs = [compiled(query, key, value, dropout=0.5) for _ in range(4)]
    assert not all(torch.equal(run, runs[0]) for run in runs[1:])


def check_autocast(case, device):
    (*inputs, grad, grad_lse), options = on_kernels(case, device)
    inputs = [t.requires_grad_() for t in inputs]
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        outputs = cross_attention_with_lse(*inputs, **options)
        assert cross_attention(*inputs, **options).dtype == torch.bfloat16
        weights = cross_attention_weights(*inputs[:2])
    assert [t.dtype for t in outputs] == [torch.bfloat16, torch.float32]
    cast = [t.detach().bfloat16() for t in inputs]
    expected = results(cross_attention_with_lse, [*cast, grad.bfloat16(), grad_lse], options)
    found = (*outputs, *torch.autograd.grad(outputs, inputs, (grad.bfloat16(), grad_lse)))
    for what, result in zip(RESULTS, found, strict=True):
        assert torch.equal(result, expected[what].to(result.dtype)), what
    assert all(t.dtype == torch.float32 for t in found[2:])
    assert torch.equal(weights, cross_attention_weights(*cast[:2]))


@pytest.mark.parametrize("name", ["lengths", "dropout"])
def test_autocast_is_a_cast_of_the_inputs(name):
    check_autocast(TINY[name], "cpu")


@pytest.mark.triton
def test_autocast_is_a_cast_of_the_inputs_of_kernels(kernel_device):
    check_autocast(TINY["lengths"], kernel_device)


@pytest.mark.triton
def test_kernel_runs_in_inference_mode(kernel_device):
    with torch.inference_mode():
        (query, key, value, *_), options = on_kernels(PATHS["decoding"], kernel_device)
        found = cross_attention(query, key, value, **options)
    assert torch.equal(found, undisturbed("decoding", kernel_device)["output"])


@pytest.mark.triton
def test_a_head_too_wide_for_kernels_is_refused_and_the_way_out_works(kernel_device):
    (query, key, value, *_), _ = on_kernels(Case(shape=(1, 1, 2, 3, 257)), kernel_device)
    with pytest.raises(ConfigError, match="d_head is 257; kernels take up to 256, backend 'eager'"):
        cross_attention(query, key, value)
    with use_backend("eager"):
        assert cross_attention(query, key, value).isfinite().all()


@pytest.mark.triton
@pytest.mark.parametrize("odd", [0, 1, 2], ids=["query", "key", "value"])
def test_mixed_dtypes_are_refused_and_the_way_out_works(odd, kernel_device):
    (*inputs, _, _), _ = on_kernels(TINY["lengths"], kernel_device)
    inputs[odd] = inputs[odd].bfloat16()
    with pytest.raises(ConfigError, match=r"torch.bfloat16.*of one dtype \(autocast makes them so"):
        cross_attention(*inputs)
    with torch.autocast(kernel_device.type, torch.bfloat16):
        assert cross_attention(*inputs).dtype == torch.bfloat16
