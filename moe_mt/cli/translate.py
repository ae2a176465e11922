"""``moe-mt translate``: as many lines out as in, in order."""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from moe_mt.cli.model import add_model_options, open_model, progress_hidden
from moe_mt.cli.output import ResumableFile, StandardOutput
from moe_mt.errors import InputError
from moe_mt.translator import TranslationResult

__all__ = ["add_parser"]

LOGGER = logging.getLogger(__name__)
DONE, FLAGGED = 0, 5
FLUSH_EVERY = 16

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
    with ExitStack() as stack:
        source = None if options.input == "-" else Path(options.input)
        stream = sys.stdin.buffer if source is None else stack.enter_context(source.open("rb"))
        lines = _Lines(stream, "standard input" if source is None else str(source))
        translator = open_model(options)
        # Languages are checked before an output file is made.
        src_lang = translator.resolve_language(options.src_lang)
        tgt_lang = translator.resolve_language(options.tgt_lang)
        settings = _settings(options) | {"src_lang": src_lang, "tgt_lang": tgt_lang}
        output = (
            StandardOutput()
            if options.output == "-"
            else ResumableFile(Path(options.output), source, settings, resume=options.resume)
        )
        progress = stack.enter_context(
            tqdm(
                desc=f"{src_lang} → {tgt_lang}",
                unit="line",
                total=None if source is None else _count_lines(source),
                initial=output.lines_done,
                disable=progress_hidden(options),
            )
        )
        todo = islice(lines, output.lines_done, None)
        results = translator.translate_iter(
            todo, src_lang, tgt_lang, show_progress_bar=False, **_arguments(options)
        )
        flagged = _write(results, output, options, progress)
        if lines.error is not None:
            raise lines.error
        output.finish()
    if flagged:
        LOGGER.warning("%d of %d lines were flagged", flagged, lines.count)
    return FLAGGED if flagged and options.strict else DONE


class _Lines:
    """Lines of a byte stream, split on newlines only.

    A line that is not UTF-8 ends the lines before it, so that these are still translated; it is
    left in ``error``.
    """

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self.stream = stream
        self.name = name
        self.count = 0
        self.error: InputError | None = None

    def __iter__(self) -> Iterator[str]:
        for raw in self.stream:
            try:
                line = raw.removesuffix(b"\n").decode("utf-8")
            except UnicodeDecodeError as error:
                self.error = InputError(
                    f"{self.name}, line {self.count + 1}: not UTF-8 ({error.reason} at byte "
                    f"{error.start} of the line); {self.count} lines before it were translated. "
                    "Convert the input to UTF-8 and run again, with --resume if -o was used"
                )
                return
            self.count += 1
            yield line


def _write(
    results: Iterator[TranslationResult],
    output: ResumableFile | StandardOutput,
    options: argparse.Namespace,
    progress: "tqdm[Any]",
) -> int:
    """Write results as they come and return how many were flagged."""
    flagged = 0
    number = output.lines_done
    try:
        for number, result in enumerate(results, output.lines_done + 1):
            for warning in result.warnings:
                LOGGER.warning("line %d: %s", number, warning)
            flagged += bool(result.warnings)
            output.write_line(_format(result, number, options.format))
            if number % FLUSH_EVERY == 0:
                output.flush()
            progress.update()
        output.flush()
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise OSError(
            f"cannot write {options.output} behind line {number - 1}: {error.strerror}. The lines "
            "before are kept; make room and run again, with --resume if -o was used"
        ) from error
    except KeyboardInterrupt:
        output.flush()
        if isinstance(output, ResumableFile):
            LOGGER.warning("%d lines are in %s; continue with --resume", number, output.partial)
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
    columns = (text.replace("\t", " "), f"{result.score:.6f}", result.finish_reason)
    return "\t".join((*columns, "; ".join(result.warnings)))


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _arguments(options: argparse.Namespace) -> dict[str, Any]:
    names = (*GENERATION_OPTIONS, "do_sample", "early_stopping", "batch_size", "max_batch_tokens")
    return {name: getattr(options, name) for name in names} | {
        "split": options.split,
        "target_prefix": options.target_prefix,
        "max_input_tokens": options.max_input_tokens,
    }


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return what a translation depends on besides the text."""
    names = ("model", "revision", "dtype", "format")
    return {name: getattr(options, name) for name in names} | _arguments(options)
