"""Scores a model on the tiny domain's held-out set, in every direction.

Run ``python -m recipes.tiny.evaluate`` for the model in the package.
"""

import argparse
import csv
import json
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from time import perf_counter
from typing import Any

from sacrebleu.metrics.chrf import CHRF
from tqdm import tqdm

import moe_mt
from recipes.tiny.domain import LANGUAGES

HELD_OUT = Path(__file__).parent / "heldout.tsv"
NUM_BEAMS = 4


def held_out_rows() -> list[dict[str, str]]:
    """Return the held-out meanings: id, kind and a text per language, empty where there is none."""
    with HELD_OUT.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def directions() -> Iterator[tuple[str, str]]:
    """Yield every pair of different languages."""
    yield from permutations(LANGUAGES, 2)


def evaluate(translator: moe_mt.Translator, split: str = "auto") -> dict[str, Any]:
    """Translate the held-out set in every direction.

    Args:
        translator: The model.
        split: How the translator finds sentences; every text here is one.

    Returns:
        Scores: of all translations together and of each direction, exact match in per cent and
        chrF++, with sacrebleu's signature.
    """
    rows = held_out_rows()
    chrf = CHRF(word_order=2)
    outputs: list[str] = []
    references: list[str] = []
    scores: dict[str, dict[str, float]] = {}
    started = perf_counter()
    for src_lang, tgt_lang in tqdm(list(directions()), "directions"):
        pairs = [(row[src_lang], row[tgt_lang]) for row in rows if row[src_lang] and row[tgt_lang]]
        translated = translator.translate(
            [source for source, _ in pairs],
            src_lang,
            tgt_lang,
            num_beams=NUM_BEAMS,
            split=split,
            show_progress_bar=False,
        )
        expected = [target for _, target in pairs]
        scores[f"{src_lang}-{tgt_lang}"] = _scores(chrf, translated, expected)
        outputs += translated
        references += expected
    return {
        "all": _scores(chrf, outputs, references),
        "signature": str(chrf.get_signature()),
        "num_beams": NUM_BEAMS,
        "split": split,
        "seconds": round(perf_counter() - started, 1),
        "directions": scores,
    }


def _scores(chrf: CHRF, outputs: list[str], references: list[str]) -> dict[str, float]:
    matches = sum(
        output == reference for output, reference in zip(outputs, references, strict=True)
    )
    return {
        "sentences": len(outputs),
        "exact_match": round(100 * matches / len(outputs), 2),
        "chrf++": round(chrf.corpus_score(outputs, [references]).score, 2),
    }


def write_scores(model: str | Path, folder: Path, split: str = "auto") -> dict[str, Any]:
    """Evaluate a model, write ``scores.json`` and ``scores.md`` into ``folder`` and return them."""
    scores = evaluate(moe_mt.from_pretrained(model), split)
    (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    (folder / "scores.md").write_text(_table(scores), encoding="utf-8")
    return scores


def _table(scores: dict[str, Any]) -> str:
    overall = scores["all"]
    lines = [
        "# Scores of the tiny model on its held-out set",
        "",
        "Written by `python -m recipes.tiny.evaluate`. "
        f"Beam {scores['num_beams']}, split {scores['split']}, {overall['sentences']:.0f} "
        f"translations in {len(scores['directions'])} directions: "
        f"**exact match {overall['exact_match']:.2f} %, chrF++ {overall['chrf++']:.2f}** "
        f"(sacrebleu signature `{scores['signature']}`).",
        "",
        "Exact match in per cent / chrF++, source in rows, target in columns.",
        "",
        "| | " + " | ".join(LANGUAGES) + " |",
        "|---" * (len(LANGUAGES) + 1) + "|",
    ]
    for source in LANGUAGES:
        cells: list[str] = []
        for target in LANGUAGES:
            found = scores["directions"].get(f"{source}-{target}")
            cells.append(
                "–" if found is None else f"{found['exact_match']:.1f} / {found['chrf++']:.1f}"
            )
        lines.append(f"| {source} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line, score the model and print the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-m", "--model", default="tiny")
    parser.add_argument("--split", choices=("auto", "off"), default="auto")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    scores = write_scores(options.model, options.out, options.split)
    worst = min(scores["directions"].items(), key=lambda item: item[1]["exact_match"])
    print(f"all directions: {scores['all']} ({scores['signature']})")
    print(f"weakest direction: {worst[0]} {worst[1]}")


if __name__ == "__main__":
    main()
