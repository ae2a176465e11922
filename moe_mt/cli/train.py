"""``moe-mt train``: fine-tune a model folder on sentence pairs."""

import argparse
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from moe_mt.checkpoints import read_json, save
from moe_mt.cli.model import add_model_options, open_model, progress_hidden
from moe_mt.errors import InputError
from moe_mt.training import TokenPairs, Trainer, TrainingConfig, TrainingProgress, read_pairs
from moe_mt.translator import Translator

__all__ = ["add_parser"]

LOGGER = logging.getLogger(__name__)
STATE = "training_state.pt"
COMPANIONS = (
    "generation_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "vocab.json",
)
"""Files that go with the weights and that training does not change."""

OPTIONS: dict[str, tuple[type, Any, str]] = {
    "steps": (int, 1000, "optimizer steps"),
    "max_batch_tokens": (int, 4096, "most padded tokens of one side in a batch"),
    "learning_rate": (float, 1e-4, "peak learning rate"),
    "warmup_steps": (int, 100, "steps of linear warm-up"),
    "decay_fraction": (float, 0.3, "share of the steps in which the rate falls to zero at last"),
    "label_smoothing": (float, 0.1, "label smoothing"),
    "weight_decay": (float, 0.0, "decoupled weight decay"),
    "clip_norm": (float, 1.0, "largest gradient norm"),
    "seed": (int, 0, "of data order, dropout and routing"),
}


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:  # noqa: ANN401
    """Add the command to the parser's sub-commands."""
    parser = commands.add_parser(
        "train",
        parents=[common],
        help="fine-tune a model on sentence pairs",
        description="Fine-tune a model on a UTF-8 file of 'source TAB target' lines, or of "
        "'src_lang TAB tgt_lang TAB source TAB target' lines.",
    )
    parser.set_defaults(run=run)
    add_model_options(parser, default=None)
    parser.add_argument("-p", "--pairs", required=True, type=Path, help="file of sentence pairs")
    parser.add_argument("-o", "--output", required=True, type=Path, help="folder to make")
    parser.add_argument("-s", "--src-lang", help="source language of two-column lines")
    parser.add_argument("-t", "--tgt-lang", help="target language of two-column lines")
    parser.add_argument("--save-every", type=int, default=500, help="steps between saved states")
    parser.add_argument(
        "--save-dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the weights in the folder (default: %(default)s)",
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    for name, (kind, default, text) in OPTIONS.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, default=default, help=f"{text} (default: {default})")


def run(options: argparse.Namespace) -> int:
    """Train and return the exit code."""
    state = options.output / STATE
    if state.exists() and not options.resume:
        raise InputError(
            f"{state} is there from an interrupted run; continue it with --resume, or remove it to "
            "start again"
        )
    config = TrainingConfig(**{name: getattr(options, name) for name in OPTIONS})
    translator = open_model(options)
    trainer = Trainer(translator.model, _read(options, translator), config)
    if state.exists():
        trainer.load_state_dict(torch.load(state, weights_only=True))
        LOGGER.warning("continuing behind step %d", trainer.step)
    options.output.mkdir(parents=True, exist_ok=True)
    with tqdm(
        desc="training",
        unit="step",
        total=config.steps,
        initial=trainer.step,
        disable=progress_hidden(options),
    ) as bar:
        average = 0.0

        def on_step(progress: TrainingProgress) -> None:
            nonlocal average
            average += (progress.loss - average) / min(progress.step, 100)
            bar.set_postfix(loss=f"{average:.3f}", balance=f"{progress.balance:.2f}", refresh=False)
            bar.update()
            if progress.step % options.save_every == 0:
                LOGGER.info("step %d: loss %.4f", progress.step, average)
                _save_state(trainer, state)

        trainer.run(on_step)
    _save_model(translator, options)
    state.unlink(missing_ok=True)
    return 0


def _read(options: argparse.Namespace, translator: Translator) -> TokenPairs:
    with tqdm(
        desc="reading", unit="B", unit_scale=True, disable=progress_hidden(options), leave=False
    ) as bar:

        def on_progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return read_pairs(
            options.pairs,
            translator.tokenizer,
            src_lang=options.src_lang,
            tgt_lang=options.tgt_lang,
            on_progress=on_progress,
        )


def _save_state(trainer: Trainer, path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    torch.save(trainer.state_dict(), partial)
    partial.replace(path)


def _save_model(translator: Translator, options: argparse.Namespace) -> None:
    source = translator.folder
    assert source is not None
    ours = read_json(source / "config.json").get("moe_mt")
    save(
        translator.model,
        options.output,
        dtype=getattr(torch, options.save_dtype),
        extra_config={"moe_mt": ours} if ours else None,
    )
    for name in COMPANIONS:
        if (source / name).exists():
            shutil.copyfile(source / name, options.output / name)
