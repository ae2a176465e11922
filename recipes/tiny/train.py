"""Makes the tiny model that ships in the package: corpus, random weights, training, scores.

Run ``make tiny``, or ``python -m recipes.tiny.train``. An interrupted run goes on where it was.
The result lies in ``build/tiny/model``, its scores beside it; ``--install`` copies both to where
the committed ones are.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch

from moe_mt.checkpoints import save
from moe_mt.cli import main as moe_mt_command
from moe_mt.models import MoEConfig, Seq2SeqTransformer, TransformerConfig
from moe_mt.tokenizers import NllbIdLayout, SentencePieceModel
from recipes.tiny.corpus import write_corpus
from recipes.tiny.domain import LANGUAGES
from recipes.tiny.evaluate import write_scores

PACKAGE = Path(__file__).parents[2] / "moe_mt" / "tiny"
SEED = 1
PAIRS = 2_000_000
STEPS = 9_000
DESCRIPTION = (
    "a small model of a small domain (dates, quantities, money, relative times, numbers in words, "
    "names of countries, languages and currencies, and lists of these), made to try and to test "
    "this package; it is not a general translator"
)


def model_config(vocab_size: int) -> TransformerConfig:
    """Return the tiny model's shape: three sparse layers of eight experts, 3.7 M parameters."""
    return TransformerConfig(
        family="nllb_moe",
        vocab_size=vocab_size,
        d_model=160,
        encoder_layers=4,
        decoder_layers=2,
        encoder_heads=5,
        decoder_heads=5,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        max_positions=256,
        # The corpus is endless and exact: there is nothing to regularise.
        dropout=0.0,
        attention_dropout=0.0,
        ffn_output_dropout=0.0,
        init_std=0.05,
        moe=MoEConfig(
            num_experts=8,
            encoder_sparse_step=2,
            decoder_sparse_step=2,
            # More than any batch holds: training drops no token.
            train_capacity=1 << 20,
            token_dropout=0.1,
            aux_loss_coef=0.01,
        ),
    )


def write_initial_model(corpus: Path, folder: Path) -> None:
    """Write a folder with random weights and the tokenizer, in the published layout."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(corpus / "sentencepiece.bpe.model", folder / "sentencepiece.bpe.model")
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(folder))
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": 0,
            "decoder_start_token_id": 2,
            "eos_token_id": 2,
            "pad_token_id": 1,
            "max_new_tokens": 200,
            "num_beams": 4,
        },
    )
    torch.manual_seed(SEED)
    model = Seq2SeqTransformer(model_config(_layout(folder).model_rows))
    ours = {"description": DESCRIPTION, "languages": list(LANGUAGES)}
    save(model, folder, extra_config={"moe_mt": ours})


def _tokenizer_config(folder: Path) -> dict[str, object]:
    """Name every special id, without which transformers would count languages differently."""
    layout = _layout(folder)
    ids = layout.special_ids | layout.language_ids
    added = {
        str(token_id): {"content": token, "special": True}
        for token, token_id in sorted(ids.items(), key=lambda item: item[1])
    }
    return {"tokenizer_class": "NllbTokenizer", "added_tokens_decoder": added}


def _layout(folder: Path) -> NllbIdLayout:
    return NllbIdLayout(len(SentencePieceModel.load(folder / "sentencepiece.bpe.model")))


def main() -> None:
    """Read the command line and make the model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/tiny"))
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--install", action="store_true", help="copy the result into the package")
    options = parser.parse_args()
    model = options.out / "model"
    if not (options.out / "train.tsv").exists():
        write_corpus(options.out, options.pairs, SEED, vocab_size=4000, piece_surfaces=200_000)
    if not (model / "config.json").exists():
        initial = options.out / "initial"
        if not (initial / "config.json").exists():
            write_initial_model(options.out, initial)
        _train(initial, options.out / "train.tsv", model, options.steps)
    write_scores(model, options.out)
    if options.install:
        for file in model.iterdir():
            shutil.copyfile(file, PACKAGE / file.name)
        for file in ("scores.json", "scores.md"):
            shutil.copyfile(options.out / file, Path(__file__).parent / file)


def _train(initial: Path, pairs: Path, model: Path, steps: int) -> None:
    settings = {
        "--steps": steps,
        "--max-batch-tokens": 2048,
        "--learning-rate": 2e-3,
        "--warmup-steps": 500,
        "--label-smoothing": 0.0,
        "--seed": SEED,
        "--save-every": 250,
        "--save-dtype": "float16",
    }
    words = [str(word) for setting in settings.items() for word in setting]
    files = ["-m", str(initial), "-p", str(pairs), "-o", str(model)]
    code = moe_mt_command(["train", *files, *words, "--resume", "-v"])
    if code != 0:
        raise SystemExit(code)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
