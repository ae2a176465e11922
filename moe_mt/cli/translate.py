"""``moe-mt translate``: as many lines out as in, in order."""

import argparse
import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from moe_mt.cli.input import Lines, count_lines, open_lines
from moe_mt.cli.model import add_model_options, open_model
from moe_mt.cli.output import Mark, Output, ResumableFile, StandardOutput
from moe_mt.cli.progress import progress_hidden
from moe_mt.errors import InputError
from moe_mt.translator import ProgressBar, TranslationResult
from moe_mt.version import __version__

__all__ = ["add_parser"]

LOGGER = logging.getLogger(__name__)
DONE, FLAGGED = 0, 5

GENERATION_OPTIONS: dict[str, tuple[type, str]] = {
    "num_beams": (int, "beams; 1 is greedy"),
    "max_new_tokens": (int, "output limit in tokens; follows the source where unset"),
    "min_new_tokens": (int, "tokens before the end may come"),
    "length_penalty": (float, "above 0 favours longer outputs"),
    "no_repeat_ngram_size": (int, "no n-gram of this size twice"),
    "repetition_penalty": (float, "above 1 discourages tokens that were used"),
    "temperature": (float, "of sampling"),
    "top_k": (int, "sample among so many tokens"),
    "top_p": (float, "sample among tokens of this total probability"),
    "seed": (int, "of sampling"),
}
LINE_OPTIONS = (
    *GENERATION_OPTIONS,
    "do_sample",
    "early_stopping",
    "split",
    "target_prefix",
    "max_input_tokens",
)
"""Options of ``translate_iter`` that change what a line becomes."""

UNSAFE_IN_COLUMN = str.maketrans("\t\r", "  ")


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:  # noqa: ANN401
    """Add the command to the parser's sub-commands."""
    parser = commands.add_parser(
        "translate",
        parents=[common],
        help="translate lines of text",
        description="Translate lines of text: exactly as many lines out as in, in order. Lines end "
        "at \\n only; text is UTF-8.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("-s", "--src-lang", required=True, help="source: fra_Latn, fr or French")
    parser.add_argument("-t", "--tgt-lang", required=True, help="target, likewise")
    parser.add_argument("-i", "--input", default="-", help="file; - is standard input")
    parser.add_argument("-o", "--output", default="-", help="file; - is standard output")
    parser.add_argument(
        "--format",
        choices=("lines", "tsv", "jsonl"),
        default="lines",
        help="an output line is the translation (lines, the default); translation, score, finish "
        "reason and warnings (tsv); or every field of the result (jsonl)",
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted -o file")
    parser.add_argument("--strict", action="store_true", help="exit with 5 if a line was flagged")
    add_model_options(parser)
    work = parser.add_argument_group("translation")
    work.add_argument(
        "--split",
        choices=("auto", "off"),
        default="auto",
        help="translate sentence by sentence (auto, the default), or lines whole (off)",
    )
    work.add_argument("--target-prefix", default="", help="what every translation begins with")
    work.add_argument("--batch-size", type=int, help="most sentences at once")
    work.add_argument("--max-batch-tokens", type=int, help="most padded source tokens at once")
    work.add_argument("--max-input-tokens", type=int, help="longest sentence; longer ones are cut")
    work.add_argument("--do-sample", action="store_true", default=None, help="sample")
    work.add_argument(
        "--early-stopping",
        action="store_true",
        default=None,
        help="stop a beam search when all its beams are finished",
    )
    for name, (kind, text) in GENERATION_OPTIONS.items():
        work.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)


def run(options: argparse.Namespace) -> int:
    """Translate the input and return the exit code."""
    output = _output(options)
    with ExitStack() as stack:
        lines = stack.enter_context(open_lines(options.input))
        _skip(lines, output.mark)
        translator = open_model(options)
        # Whatever is wrong with the command is found before an output file is made.
        progress = ProgressBar(
            total=count_lines(options.input),
            unit="line",
            initial=lines.count,
            description=f"{options.src_lang} → {options.tgt_lang}",
            hidden=progress_hidden(options),
        )
        results = translator.translate_iter(
            lines,
            options.src_lang,
            options.tgt_lang,
            show_progress_bar=False,
            on_progress=progress.show,
            **_options(options),
        )
        stack.callback(output.close)
        output.open()
        stack.enter_context(progress)
        flagged = _write(results, lines, output, options.format)
        if lines.error is not None:
            raise lines.error
        output.finish()
    if flagged:
        LOGGER.warning("%d of %d lines were flagged", flagged, lines.count)
    return FLAGGED if flagged and options.strict else DONE


def _output(options: argparse.Namespace) -> Output:
    if options.output != "-":
        source, target = Path(options.input), Path(options.output)
        if source.exists() and target.exists() and source.samefile(target):
            raise InputError(f"{target} is the input; it would be replaced: name another output")
        return ResumableFile(Path(options.output), _settings(options), resume=options.resume)
    if options.resume:
        raise InputError("--resume continues a file; name it with -o")
    return StandardOutput()


def _skip(lines: Lines, mark: Mark) -> None:
    """Stand behind the lines that an earlier run translated."""
    lines.skip(mark.lines)
    if (lines.count, lines.sha256) != (mark.lines, mark.input_sha256):
        raise InputError(
            f"the first {mark.lines} lines of the input are not those that the interrupted run "
            "translated; give the same input, or remove the partial file to start again"
        )


def _write(
    results: Iterator[TranslationResult],
    lines: Lines,
    output: Output,
    kind: str,
) -> int:
    """Write results as they come and return how many were flagged."""
    flagged = output.mark.flagged
    try:
        for number, result in enumerate(results, output.mark.lines + 1):
            for warning in result.warnings:
                LOGGER.warning("line %d: %s", number, warning)
            flagged += bool(result.warnings)
            output.write_line(_format(result, number, kind))
            if number == lines.count:
                # Lines are translated in batches of what was read together. A run that continues
                # where all that was read is written makes the same batches, so the same bytes.
                output.set_mark(Mark(lines=number, flagged=flagged, input_sha256=lines.sha256))
    except KeyboardInterrupt:
        if isinstance(output, ResumableFile):
            LOGGER.warning(
                "%d lines are in %s; continue with --resume", output.lines_written, output.partial
            )
        raise
    return flagged


def _format(result: TranslationResult, number: int, kind: str) -> str:
    if kind == "jsonl":
        fields = {name: value for name, value in vars(result).items() if name != "alternatives"}
        return json.dumps({"line": number, **fields}, ensure_ascii=False)
    text = result.text
    if "\n" in text:
        LOGGER.warning("line %d: a line break in the translation became a space", number)
        text = text.replace("\n", " ")
    if kind == "lines":
        return text
    columns = (text.translate(UNSAFE_IN_COLUMN), f"{result.score:.6f}", result.finish_reason)
    return "\t".join((*columns, "; ".join(result.warnings)))


def _options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a translation."""
    names = (*LINE_OPTIONS, "batch_size", "max_batch_tokens")
    return {name: getattr(options, name) for name in names}


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return what a line of output depends on besides its text; batches are not among it."""
    names = (
        "src_lang",
        "tgt_lang",
        "model",
        "revision",
        "device",
        "dtype",
        "quantization",
        "format",
    )
    settings = {name: getattr(options, name) for name in (*names, *LINE_OPTIONS)}
    return settings | {"version": __version__}
