"""Attention at the sizes of published models, small ones of the same make, and float64 answers."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch.nn import functional

from moe_mt.ops import cross_attention_with_lse
from moe_mt.ops.dropout import keep_mask

__all__ = [
    "NLLB",
    "SMALL",
    "WHISPER",
    "Case",
    "answers",
    "each",
    "make_tensors",
    "of_sentence",
    "options",
    "run",
]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What decides which kernels run, and on how much."""

    sentences: int
    heads: int
    queries: int
    keys: int
    d_head: int
    dtype: torch.dtype
    limits: str | None = None
    """``"lengths"``, ``"mask"``, ``"packed"``, or ``None`` where every key is valid."""

    dropout: float = 0.0
    grad_lse: bool = False
    """Whether the log-sum-exp has a gradient, too."""


# float16, because the interpreter only truncates to bfloat16. Tiles are 16 x 16 there.
SMALL = Case(sentences=3, heads=2, queries=18, keys=20, d_head=16, dtype=torch.float16)
NLLB = Case(sentences=32, heads=16, queries=512, keys=512, d_head=128, dtype=torch.bfloat16)
WHISPER = Case(sentences=8, heads=20, queries=448, keys=1500, d_head=64, dtype=torch.bfloat16)


def each(*, small, full):
    """Return pytest's parameters: small cases for the interpreter and a GPU, full ones for a GPU.

    Both are dicts from a name to a case, or to what distinguishes it from ``SMALL`` or ``NLLB``.
    """
    return [
        pytest.param(
            case if isinstance(case, Case) else replace(base, **case),
            marks=mark,
            id=f"{size}, {name}",
        )
        for size, cases, base, mark in (
            ("small", small, SMALL, pytest.mark.triton),
            ("full", full, NLLB, pytest.mark.gpu),
        )
        for name, case in cases.items()
    ]


def make_tensors(case, device):
    """Return the tensors of a case by name, random ones, as projections lay them out.

    query, key, value and grad, and where the case has them grad_lse, the seed and the limits.
    """
    packed = case.limits == "packed"

    def randn(rows):
        shape = (1, case.sentences * rows) if packed else (case.sentences, rows)
        made = torch.randn(*shape, case.heads, case.d_head, dtype=case.dtype, device=device)
        return made.transpose(1, 2)

    tensors = {
        "query": randn(case.queries),
        "key": randn(case.keys),
        "value": randn(case.keys),
        "grad": randn(case.queries),
    }
    if case.grad_lse:
        tensors["grad_lse"] = torch.randn(tensors["grad"].shape[:3], device=device)
    if case.dropout > 0:
        tensors["seed"] = torch.randint(1 << 62, (1,), device=device)
    if case.limits is not None:
        tensors |= _LIMITS[case.limits](case, device)
    return tensors


def _lengths(case, device):
    lengths = torch.randint(1, case.keys + 1, (case.sentences,))
    if case.sentences > 1:
        lengths[0], lengths[-1] = 0, case.keys
    return {"key_lengths": lengths.to(device, torch.int32)}


def _mask(case, device):
    mask = torch.rand(case.sentences, case.keys, device=device) < 0.7
    if case.sentences > 1:
        mask[0] = False
    mask[-1, -1] = True
    return {"key_mask": mask}


def _packed(case, device):
    """The first sentence has no keys, the second no queries, the last one all; some rows none."""
    found = {}
    for empty, (name, rows) in enumerate(
        {"key_offsets": case.keys, "query_offsets": case.queries}.items()
    ):
        lengths = torch.randint(1, rows + 1, (case.sentences,))
        lengths[empty], lengths[-1] = 0, rows
        found[name] = functional.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
    return found


_LIMITS = {"lengths": _lengths, "mask": _mask, "packed": _packed}


def options(case, tensors):
    """Return the arguments of ``cross_attention`` beside query, key and value."""
    names = ("key_lengths", "key_mask", "query_offsets", "key_offsets", "seed")
    return {name: tensors.get(name) for name in names} | {"dropout": case.dropout}


def run(case, tensors):
    """Return what the operation gives, and all its gradients, by name."""
    inputs = [tensors[name].detach().requires_grad_() for name in ("query", "key", "value")]
    out, lse = cross_attention_with_lse(*inputs, **options(case, tensors))
    outputs, grads = [out], [tensors["grad"]]
    if case.grad_lse:
        outputs, grads = [out, lse], [tensors["grad"], tensors["grad_lse"]]
    grad_query, grad_key, grad_value = torch.autograd.grad(outputs, inputs, grads)
    return {
        "output": out.detach(),
        "log-sum-exp": lse.detach(),
        "gradient of the query": grad_query,
        "gradient of the key": grad_key,
        "gradient of the value": grad_value,
    }


def _own_rows(case, tensors, sentence):
    """Return a sentence's row of the batch, its queries and its keys."""
    if case.limits != "packed":
        return sentence, slice(None), slice(None)
    queries, keys = (
        slice(*tensors[name][sentence : sentence + 2].tolist())
        for name in ("query_offsets", "key_offsets")
    )
    return 0, queries, keys


def of_sentence(case, tensors, results, sentence):
    """Return a sentence's part of what ``run`` returns."""
    row, queries, keys = _own_rows(case, tensors, sentence)
    return {
        name: result[row, :, keys if name.endswith(("key", "value")) else queries]
        for name, result in results.items()
    }


def answers(case, tensors, sentence):
    """Return what a sentence's part of ``run``'s results should be, in float64."""
    row, queries, keys = _own_rows(case, tensors, sentence)
    query, grad = (tensors[name][row, :, queries].double() for name in ("query", "grad"))
    key, value = (tensors[name][row, :, keys].double() for name in ("key", "value"))
    heads, length, d_head = query.shape
    valid = torch.ones(key.shape[1], dtype=torch.bool, device=key.device)
    if case.limits == "lengths":
        valid = torch.arange(key.shape[1], device=key.device) < tensors["key_lengths"][row]
    elif case.limits == "mask":
        valid = tensors["key_mask"][row]
    share_kept = torch.ones_like(valid, dtype=torch.float64)
    if case.dropout > 0:
        sizes = {"sentences": 1, "heads": heads, "queries": length, "keys": key.shape[1]}
        kept = keep_mask(tensors["seed"], case.dropout, **sizes, first_sentence=sentence)[0]
        share_kept = kept.double() / (1 - case.dropout)
    scale = d_head**-0.5
    scores = (query @ key.mT * scale).masked_fill(~valid, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.where(valid, (scores - lse[..., None]).exp(), 0.0)
    grad_weights = grad @ value.mT * share_kept
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    if case.grad_lse:
        grad_scores += weights * tensors["grad_lse"][row, :, queries, None]
    return {
        "output": weights * share_kept @ value,
        "log-sum-exp": lse,
        "gradient of the query": grad_scores @ key * scale,
        "gradient of the key": grad_scores.mT @ query * scale,
        "gradient of the value": (weights * share_kept).mT @ grad,
    }
