"""The options that name a model, and opening it under a progress bar."""

import argparse

from moe_mt.cli.progress import byte_progress
from moe_mt.translator import Translator, from_pretrained

__all__ = ["add_model_options", "open_model"]


def add_model_options(
    parser: argparse.ArgumentParser, default: str | None = "tiny", *, to_train: bool = False
) -> None:
    """Add ``--model``, ``--device``, ``--dtype``, what the hub needs, and ways to be fast.

    Args:
        parser: Of a command that calls ``open_model``.
        default: Model to open where none is named; ``None`` demands a name.
        to_train: Whether the model is opened to be trained, so that no weight may be packed.
    """
    group = parser.add_argument_group("model")
    group.add_argument(
        "-m",
        "--model",
        default=default,
        required=default is None,
        help="hub id, local folder, or 'tiny', the small model in this package"
        + ("" if default is None else " (default: %(default)s)"),
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 …")
    group.add_argument(
        "--dtype", default="auto", help="auto, float32, bfloat16, float16 or float64"
    )
    group.add_argument("--revision", help="branch, tag or commit on the hub")
    group.add_argument("--cache-dir", help="folder for hub files")
    group.add_argument("--local-files-only", action="store_true", help="never ask the hub")
    if to_train:
        parser.set_defaults(quantization=None, prepack=False, compile=False, batch_invariant=False)
        return
    group.add_argument(
        "--quantization",
        metavar="KIND",
        help="int8-dynamic: int8 weights and inputs, on the CPU",
    )
    group.add_argument(
        "--no-prepack",
        dest="prepack",
        action="store_const",
        const=False,
        default="auto",
        help="do not pack weights for the CPU: slower, and one copy of the embedding less",
    )
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default="auto",
        help="compile the decoder's step; the default is to do so on a GPU",
    )
    group.add_argument(
        "--batch-invariant",
        action="store_true",
        help="scores to the last bit the same in any batch; one sentence at a time, so slower",
    )


def open_model(options: argparse.Namespace) -> Translator:
    """Open the model that the options name."""
    with byte_progress(options, "loading") as on_progress:
        return from_pretrained(
            options.model,
            options.device,
            options.dtype,
            quantization=options.quantization,
            prepack=options.prepack,
            compile=options.compile,
            batch_invariant=options.batch_invariant,
            revision=options.revision,
            cache_dir=options.cache_dir,
            local_files_only=options.local_files_only,
            on_progress=on_progress,
        )
