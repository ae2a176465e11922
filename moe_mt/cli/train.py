"""``moe-mt train``: fine-tune a model folder on sentence pairs."""

import argparse
import logging
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from moe_mt.checkpoints import read_json, save
from moe_mt.cli.model import add_model_options, open_model
from moe_mt.cli.progress import byte_progress, progress_hidden
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
    add_model_options(parser, default=None, to_train=True)
    # Small updates vanish in sixteen bits, so "auto" would train badly on a GPU.
    parser.set_defaults(dtype="float32")
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
    _check_paths(options, state)
    config = TrainingConfig(**{name: getattr(options, name) for name in OPTIONS})
    settings = _settings(options)
    saved = torch.load(state, map_location="cpu", weights_only=True) if state.exists() else None
    if saved is not None and saved.get("settings") != settings:
        raise InputError(
            f"{state} was made from {saved.get('settings')} and this is {settings}; resume with "
            "the same model, pairs and languages, or start in a new folder"
        )
    translator = open_model(options)
    trainer = Trainer(translator.model, _read(options, translator), config)
    if saved is not None:
        trainer.load_state_dict(saved)
        saved = None  # a second model, otherwise kept to the end
        LOGGER.warning("continuing behind step %d", trainer.step)
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        _train(trainer, options, lambda: _save_state(trainer, settings, state))
    except KeyboardInterrupt:
        if state.exists():
            LOGGER.warning("the last state is in %s; continue with --resume", state)
        raise
    _save_model(translator, options)
    state.unlink(missing_ok=True)
    return 0


def _check_paths(options: argparse.Namespace, state: Path) -> None:
    """Find what is wrong with the command before a model is read."""
    if not options.pairs.is_file():
        raise InputError(f"there is no file {options.pairs}; name the sentence pairs with -p")
    if options.output.is_dir() and options.output.resolve() == Path(options.model).resolve():
        raise InputError(f"{options.output} is the model that is trained; name another folder")
    if options.output.exists() and not options.output.is_dir():
        raise InputError(f"{options.output} is a file; name a folder")
    if options.save_every < 1:
        raise InputError(f"--save-every is {options.save_every}; it must be at least 1")
    if not state.exists() and (options.output / "config.json").exists():
        raise InputError(
            f"{options.output} holds a model already, and no training to continue; name another "
            "folder, or remove it to train again"
        )
    if state.exists() and not options.resume:
        raise InputError(
            f"{state} is there from an interrupted run; continue it with --resume, or remove it to "
            "start again"
        )


def _settings(options: argparse.Namespace) -> dict[str, str | None]:
    """Return what the training starts from, and what it learns."""
    digest = sha256()
    with options.pairs.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    names = ("model", "revision", "dtype", "src_lang", "tgt_lang")
    return {name: getattr(options, name) for name in names} | {"pairs_sha256": digest.hexdigest()}


def _train(trainer: Trainer, options: argparse.Namespace, save_state: Callable[[], None]) -> None:
    """Run the training under a progress bar, and save its state now and then."""
    with tqdm(
        desc="training",
        unit="step",
        total=trainer.config.steps,
        initial=trainer.step,
        disable=progress_hidden(options),
    ) as bar:
        first, average = trainer.step, 0.0

        def on_step(progress: TrainingProgress) -> None:
            nonlocal average
            average += (progress.loss - average) / min(progress.step - first, 100)
            bar.set_postfix(loss=f"{average:.3f}", balance=f"{progress.balance:.2f}", refresh=False)
            bar.update()
            if progress.step % options.save_every == 0:
                LOGGER.info("step %d: loss %.4f", progress.step, average)
                save_state()

        trainer.run(on_step)


def _read(options: argparse.Namespace, translator: Translator) -> TokenPairs:
    with byte_progress(options, "reading") as on_progress:
        return read_pairs(
            options.pairs,
            translator.tokenizer,
            src_lang=options.src_lang,
            tgt_lang=options.tgt_lang,
            on_progress=on_progress,
        )


def _save_state(trainer: Trainer, settings: dict[str, str | None], path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        torch.save(trainer.state_dict() | {"settings": settings}, partial)
    except (OSError, RuntimeError) as error:
        # A full disk is a RuntimeError here.
        partial.unlink(missing_ok=True)
        raise OSError(
            f"cannot write {partial} behind step {trainer.step} ({error}); make room and add "
            "--resume to continue from the state before"
        ) from error
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
