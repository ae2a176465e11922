"""Writes the tiny model's corpus: training pairs, held-out set and sentencepiece model.

Run ``python -m recipes.tiny.corpus --out build/tiny --pairs 1000000 --seed 1``.
"""

import argparse
import io
import random
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
from tqdm import tqdm

from recipes.tiny.domain import LANGUAGES, render
from recipes.tiny.sampling import draw, held_out_meanings, is_held_out, training_pairs

HELD_OUT_COUNT = 128
HELD_OUT_WORDS_COUNT = 32


def held_out_table(seed: int) -> str:
    """Return the held-out set as TSV text: id, kind, a column per language, empty where none."""
    lines = ["\t".join(("id", "kind", *LANGUAGES))]
    meanings = held_out_meanings(HELD_OUT_COUNT, HELD_OUT_WORDS_COUNT, seed)
    for number, meaning in enumerate(meanings):
        surfaces = (render(meaning, language) or "" for language in LANGUAGES)
        lines.append("\t".join((str(number), meaning.kind, *surfaces)))
    return "".join(f"{line}\n" for line in lines)


def surfaces(count: int, seed: int) -> Iterator[str]:
    """Yield training surfaces, the languages in turn, to learn the pieces from."""
    rng = random.Random(f"pieces {seed}")
    for number in range(count):
        language = LANGUAGES[number % len(LANGUAGES)]
        while True:
            meaning = draw(rng)
            surface = render(meaning, language)
            if surface and not is_held_out(meaning, seed):
                break
        yield surface


def train_sentencepiece(path: Path, sentences: Iterator[str], vocab_size: int) -> None:
    """Train a BPE model with NLLB's special pieces and single digits, and write it."""
    # Through a buffer: given a file name, sentencepiece would store that path in the model.
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc",
        num_threads=1,
        minloglevel=1,
    )
    path.write_bytes(model.getvalue())


def write_corpus(out: Path, pairs: int, seed: int, vocab_size: int, piece_surfaces: int) -> None:
    """Write train.tsv, heldout.tsv and sentencepiece.bpe.model into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "heldout.tsv").write_text(held_out_table(seed), encoding="utf-8")
    progress = tqdm(surfaces(piece_surfaces, seed), "pieces", piece_surfaces)
    train_sentencepiece(out / "sentencepiece.bpe.model", iter(progress), vocab_size)
    with (out / "train.tsv").open("w", encoding="utf-8", newline="\n") as file:
        for pair in tqdm(training_pairs(pairs, seed), "pairs", pairs):
            file.write("\t".join(pair) + "\n")


def main() -> None:
    """Read the command line and write the corpus."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/tiny"))
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--vocab-size", type=int, default=4000)
    parser.add_argument("--piece-surfaces", type=int, default=250_000)
    options = parser.parse_args()
    write_corpus(
        options.out, options.pairs, options.seed, options.vocab_size, options.piece_surfaces
    )


if __name__ == "__main__":
    main()
