"""The options that name a model, and opening it under a progress bar."""

import argparse

from moe_mt.cli.progress import byte_progress
from moe_mt.translator import Translator, from_pretrained

__all__ = ["add_model_options", "open_model"]


def add_model_options(parser: argparse.ArgumentParser, default: str | None = "tiny") -> None:
    """Add ``--model``, ``--device``, ``--dtype`` and what the hub needs."""
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


def open_model(options: argparse.Namespace) -> Translator:
    """Open the model that the options name."""
    with byte_progress(options, "loading") as on_progress:
        return from_pretrained(
            options.model,
            options.device,
            options.dtype,
            revision=options.revision,
            cache_dir=options.cache_dir,
            local_files_only=options.local_files_only,
            on_progress=on_progress,
        )
