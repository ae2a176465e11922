"""The tiny model on its held-out sentences: speed, memory and quality in one row.

Timed: text in, text out, so tokenising and batching count. Excluded: loading the model, and cutting
text into sentences (each text is one).
"""

from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from sacrebleu.metrics import CHRF

import moe_mt
from benchmarks.memory import extra_memory
from benchmarks.shapes import TranslateShape, translate_shapes

HELD_OUT = Path(__file__).parents[2] / "recipes" / "tiny" / "heldout.tsv"

DIRECTIONS_PER_SENTENCE = 3
LEAST_EXACT_MATCH = 0.85
"""What each direction of the tiny model must reach; below it the model is broken, not slow."""

CHECKED_ALONE = 16
ROUNDS = 3


class Pair(NamedTuple):
    """A held-out sentence in two languages."""

    source: str
    reference: str
    src_lang: str
    tgt_lang: str


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    shapes = translate_shapes(torch.device(metafunc.config.getoption("--device")))
    ids = [f"batch{shape.batch}-beam{shape.beam}" for shape in shapes]
    metafunc.parametrize("shape", shapes, ids=ids)


@pytest.fixture(scope="module")
def translator(device: torch.device, dtype: torch.dtype) -> moe_mt.Translator:
    return moe_mt.from_pretrained("tiny", device=device, dtype=dtype)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Let one thread compute: the matrices are too small to share, and handing them over is noise.

    On two busy cores, waiting for the second thread was seen to take fifty times the work.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_translate(benchmark, sign, translator, shape, device) -> None:
    pairs = read_pairs(HELD_OUT, 1 if shape.batch == 1 else DIRECTIONS_PER_SENTENCE)
    results = list(run(translator, pairs, shape))
    texts, references = [result.text for result in results], [pair.reference for pair in pairs]
    alone = run(translator, pairs[:CHECKED_ALONE], TranslateShape(batch=1, beam=shape.beam))
    assert [result.text for result in alone] == texts[:CHECKED_ALONE], "batches change translations"
    exact = sum(map(str.__eq__, texts, references)) / len(pairs)
    assert exact >= LEAST_EXACT_MATCH, f"exact match is {exact:.2f}: the model is not what it was"
    chrf = CHRF(word_order=2)
    longest = sorted(pairs, key=lambda pair: -len(pair.source))[: shape.batch]
    sign("tiny", batch=shape.batch, beam=shape.beam, sentences=len(pairs))
    benchmark.extra_info["figures"] = {
        "sentences": len(pairs),
        "tokens": sum(len(result.tokens) for result in results),
        "weight_bytes": sum(w.numel() * w.element_size() for w in translator.model.parameters()),
        "extra_bytes": extra_memory(lambda: list(run(translator, longest, shape)), device),
        "chrf": chrf.corpus_score(texts, [references]).score,
        "exact_match": exact,
    }
    benchmark.extra_info["chrf_signature"] = str(chrf.get_signature())
    benchmark.pedantic(lambda: list(run(translator, pairs, shape)), rounds=ROUNDS)


def run(
    translator: moe_mt.Translator, pairs: list[Pair], shape: TranslateShape
) -> Iterator[moe_mt.TranslationResult]:
    return translator.translate_iter(
        [pair.source for pair in pairs],
        src_lang=[pair.src_lang for pair in pairs],
        tgt_lang=[pair.tgt_lang for pair in pairs],
        batch_size=shape.batch,
        num_beams=shape.beam,
        split="off",
        show_progress_bar=False,
    )


def read_pairs(path: Path, directions_per_sentence: int) -> list[Pair]:
    """Return sentences and references, going through all directions in turn."""
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    languages = header.split("\t")[2:]
    directions = list(permutations(languages, 2))
    pairs: list[Pair] = []
    for row, line in enumerate(lines):
        text = dict(zip(languages, line.split("\t")[2:], strict=True))
        for turn in range(directions_per_sentence):
            source, target = directions[(row * directions_per_sentence + turn) % len(directions)]
            # Not every language can say every meaning (numbers in words).
            if text[source] and text[target]:
                pairs.append(Pair(text[source], text[target], source, target))
    return pairs
