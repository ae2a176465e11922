"""``moe-mt translate``: as many lines out as in, whatever is in them and whatever happens."""

import csv
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest
import torch

from moe_mt.checkpoints import fit
from moe_mt.translator import Progress, TranslationResult
from tests.test_from_pretrained import write_54b
from tests.translators import loop, random_checkpoint, scripted

LANGUAGES = ("-s", "eng_Latn", "-t", "fra_Latn")
# Buffered, as on most machines: a write can then fail late, at the interpreter's end.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
PYTHON_M = (sys.executable, "-m", "moe_mt", "translate")


class FakeTranslator:
    """Calls a function for every text; what a translator promises, without a model."""

    def __init__(self, translate_one, window=4):
        self.translate_one = translate_one
        self.window = window
        self.options = None

    def translate_iter(self, texts, src_lang, tgt_lang, **options):
        self.options = options
        texts = iter(texts)

        def results():
            while read := list(islice(texts, self.window)):
                done = [self.translate_one(text) for text in read]
                for found in done:
                    options["on_progress"](Progress(texts=1, sentences=1, tokens=len(found.tokens)))
                yield from done

        return results()


def result(text, score=-0.25, reason="stop", warnings=()):
    return TranslationResult(
        text=text,
        score=score,
        tokens=(4057, 5, 2),
        finish_reason=reason,
        src_lang="eng_Latn",
        tgt_lang="fra_Latn",
        warnings=warnings,
    )


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture
def files(tmp_path):
    """Return the paths of an input of 40 lines and of an output."""
    source = tmp_path / "in.txt"
    source.write_text("".join(f"May {n}\n" for n in range(40)))
    return source, tmp_path / "out.txt"


# --- lines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "",
        "\n",
        "May 2\n",
        "\n\nMay 2\n\n\nMay 3\n\n",  # empty lines
        "May 2\r\n\r\nMay 3\r\n",  # the \r of Windows is kept
        "May 2\u2028May 3\u2029May 4\x85May 5\n",  # lines for others, not for us
        "May 2\fMay 3\vMay 4\n",
        "\t\t\n \u3000\n",  # only white space
        " May 2 \n\tMay 3\n",
        "May 2. May 3.  May 4.\n",  # sentences
    ],
)
def test_lines_out_are_lines_in_with_their_white_space(run, echo, content):
    outcome = run("translate", *LANGUAGES, stdin=content.encode())
    assert (outcome.code, outcome.out.decode()) == (0, content)


def test_a_last_line_without_newline_gets_one(run, echo):
    assert run("translate", *LANGUAGES, stdin=b"May 2\nMay 3").out == b"May 2\nMay 3\n"


@pytest.mark.parametrize(
    "content",
    [
        b"May 2\0\n\0\nMay 3\n",  # NUL bytes
        b"\x01\x02\x7f\n\x1b[31m\n",  # other control characters
        "\u200b\n\ufeff\n".encode(),  # characters without width
        "\ue000\n\U0010ffff\n".encode(),  # characters without meaning
    ],
)
def test_odd_characters_take_no_line_away(run, echo, content):
    outcome = run("translate", *LANGUAGES, stdin=content)
    assert outcome.code == 0
    assert outcome.out.count(b"\n") == content.count(b"\n")


def test_a_nul_byte_alone_is_flagged(run, echo):
    outcome = run("translate", *LANGUAGES, "--strict", stdin=b"\0\n")
    assert outcome.code == 5
    assert "line 1: unknown: 1 of 1 characters" in outcome.err


def test_a_line_break_in_a_translation_becomes_a_space(run, use):
    use(FakeTranslator(lambda text: result("a\nb")))
    outcome = run("translate", *LANGUAGES, stdin=b"x\n")
    assert outcome.out == b"a b\n"
    assert "line 1: a line break in the translation became a space" in outcome.err


def test_a_line_of_a_hundred_thousand_characters_is_one_line_out(run, echo):
    line = b"May 2 " * 16_667
    outcome = run("translate", *LANGUAGES, "--batch-size", 256, stdin=line + b"\nMay 3\n")
    assert outcome.code == 0
    assert outcome.out == line + b"\nMay 3\n"
    assert "line 1: cut: " in outcome.err


# --- formats, files, options ---------------------------------------------------------------------


def test_tsv(run, use):
    odd = result("a\tb\r", -0.5, "length", ("length: x", "cut: y"))
    use(FakeTranslator(lambda text: odd if text == "odd" else result(text)))
    outcome = run("translate", *LANGUAGES, "--format", "tsv", stdin=b"May 2\nodd\n\n")
    rows = list(csv.reader(io.StringIO(outcome.out.decode()), "excel-tab"))
    assert rows == [
        ["May 2", "-0.250000", "stop", ""],
        ["a b ", "-0.500000", "length", "length: x; cut: y"],
        ["", "-0.250000", "stop", ""],
    ]


def test_jsonl(run, use):
    use(FakeTranslator(lambda text: result("né\n", warnings=("cut: y",))))
    outcome = run("translate", *LANGUAGES, "--format", "jsonl", stdin=b"a\nb\n")
    lines = outcome.out.decode().splitlines()
    assert [json.loads(line)["line"] for line in lines] == [1, 2]
    assert json.loads(lines[0]) == {
        "line": 1,
        "text": "né\n",  # JSON can say it, so nothing is replaced
        "score": -0.25,
        "tokens": [4057, 5, 2],
        "finish_reason": "stop",
        "src_lang": "eng_Latn",
        "tgt_lang": "fra_Latn",
        "warnings": ["cut: y"],
    }
    assert "né" in lines[0]


def test_files_and_standard_streams(run, echo, files):
    source, target = files
    expected = source.read_bytes()
    assert run("translate", *LANGUAGES, stdin=expected).out == expected
    assert run("translate", *LANGUAGES, "-i", "-", "-o", "-", stdin=expected).out == expected
    assert run("translate", *LANGUAGES, "-i", source).out == expected
    outcome = run("translate", *LANGUAGES, "-i", source, "-o", target)
    assert (outcome.code, outcome.out) == (0, b"")
    assert target.read_bytes() == expected
    target.unlink()
    run("translate", *LANGUAGES, "-o", target, stdin=expected)
    assert target.read_bytes() == expected
    assert names(target.parent) == ["in.txt", "out.txt"]


def test_a_file_does_not_replace_itself(run, echo, tmp_path):
    # The source would be gone, and nobody would have been asked.
    file = tmp_path / "in.txt"
    file.write_text("May 2\n")
    outcome = run("translate", *LANGUAGES, "-i", str(file), "-o", str(file))
    assert outcome.code == 2
    assert "is the input" in outcome.err
    assert file.read_text() == "May 2\n"


def test_a_pipe_that_can_be_read_only_once(run, echo, tmp_path):
    # `-i <(zcat in.gz)`: to count its lines for the progress bar would eat them.
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: fifo.write_bytes(b"May 2\nMay 3\n"))
    writer.start()
    outcome = run("translate", *LANGUAGES, "-i", fifo, "-o", tmp_path / "out.txt")
    writer.join()
    assert outcome.code == 0
    assert (tmp_path / "out.txt").read_bytes() == b"May 2\nMay 3\n"


def test_options_reach_the_translator(run, use):
    fake = FakeTranslator(result)
    use(fake)
    arguments = (
        "--num-beams 2 --max-new-tokens 9 --min-new-tokens 3 --length-penalty 0.5 "
        "--no-repeat-ngram-size 3 --repetition-penalty 1.5 --temperature 0.5 --top-k 5 "
        "--top-p 0.9 --seed 7 --do-sample --early-stopping --split off --batch-size 8 "
        "--max-batch-tokens 100 --max-input-tokens 50 --target-prefix le"
    ).split()
    assert run("translate", *LANGUAGES, *arguments, stdin=b"a\n").code == 0
    given = {
        name.removeprefix("--").replace("-", "_") for name in arguments if name.startswith("--")
    }
    assert set(fake.options) == given | {"show_progress_bar", "on_progress"}
    assert fake.options["length_penalty"] == 0.5
    assert fake.options["do_sample"] is True
    assert fake.options["split"] == "off"
    # Unset ones are left to the checkpoint.
    run("translate", *LANGUAGES, stdin=b"a\n")
    unset = {name for name, value in fake.options.items() if value is None}
    assert unset == given - {"split", "target_prefix"}


def test_model_options_reach_from_pretrained(run, monkeypatch):
    seen = {}

    def from_pretrained(*arguments, **options):
        seen.update(options, arguments=arguments)
        return FakeTranslator(result)

    monkeypatch.setattr("moe_mt.cli.model.from_pretrained", from_pretrained)
    arguments = "-m a/b --device cpu --dtype float16 --revision r --cache-dir c --local-files-only"
    packing = "--quantization int8-dynamic --no-prepack --no-compile --batch-invariant"
    run("translate", *LANGUAGES, *arguments.split(), *packing.split(), stdin=b"a\n")
    del seen["on_progress"]
    assert seen == {
        "arguments": ("a/b", "cpu", "float16"),
        "quantization": "int8-dynamic",
        "prepack": False,
        "compile": False,
        "batch_invariant": True,
        "revision": "r",
        "cache_dir": "c",
        "local_files_only": True,
    }


# --- what is wrong with the command --------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-s", "eng_Latn", "-t", "Klingon"), "Klingon"),
        (("-s", "zh", "-t", "eng_Latn"), "'zho_Hans' (Chinese (Simplified)) or 'zho_Hant'"),
        ((*LANGUAGES, "--num-beams", "0"), "num_beams is 0"),
        ((*LANGUAGES, "--batch-size", "-1"), "batch_size is -1"),
        ((*LANGUAGES, "--top-p", "2"), "top_p is 2.0"),
    ],
)
def test_a_wrong_command_leaves_no_file_behind(run, echo, files, arguments, message):
    # A partial file would stop the mended command with "continue it with --resume".
    source, target = files
    outcome = run("translate", *arguments, "-i", source, "-o", target)
    assert outcome.code == 2
    assert message in outcome.err
    assert names(target.parent) == ["in.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-i", "nowhere.txt"), "cannot read nowhere.txt: No such file or directory; name a file"),
        (("-i", "."), "cannot read .: Is a directory"),
        (("-o", "nowhere/out.txt"), "there is no folder nowhere to write out.txt to; make it"),
        (("-o", "."), "no ordinary file"),
        (("-o", "/dev/null"), "no ordinary file"),
        (("--resume",), "--resume continues a file; name it with -o"),
    ],
)
def test_wrong_files_are_found_before_the_model_is_opened(
    run, monkeypatch, tmp_path, arguments, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("moe_mt.cli.model.from_pretrained", None)
    outcome = run("translate", *LANGUAGES, *arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert names(tmp_path) == []


# --- what is wrong with the model ----------------------------------------------------------------


def test_a_missing_model(run):
    outcome = run("translate", *LANGUAGES, "-m", "./nowhere", stdin=b"a\n")
    assert (outcome.code, outcome.out) == (3, b"")
    assert "there is no folder ./nowhere" in outcome.err


def test_a_truncated_model(run, tmp_path):
    folder = random_checkpoint(tmp_path / "model")
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    outcome = run("translate", *LANGUAGES, "-m", folder, "-o", tmp_path / "out.txt", stdin=b"a\n")
    assert outcome.code == 3
    assert "model.safetensors" in outcome.err
    assert names(tmp_path) == ["model"]


def test_a_model_that_does_not_fit(run, monkeypatch, tmp_path):
    monkeypatch.setattr(fit, "free_host_bytes", lambda: 64_000_000_000)
    folder = write_54b(tmp_path / "54b")
    outcome = run("translate", *LANGUAGES, "-m", folder, "--device", "cpu", stdin=b"a\n")
    assert outcome.code == 4
    assert "required" in outcome.err
    assert "What can be done:" in outcome.err


def test_running_out_of_memory_keeps_what_was_done(run, use, files):
    source, target = files

    def translate_one(text):
        if text == "May 9":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return result(text)

    use(FakeTranslator(translate_one))
    assert run("translate", *LANGUAGES, "-i", source, "-o", target).code == 4
    # The mended command differs in its batches only, and may go on.
    use(FakeTranslator(result))
    outcome = run(
        "translate", *LANGUAGES, "-i", source, "-o", target, "--resume", "--batch-size", 1
    )
    assert outcome.code == 0
    assert target.read_bytes() == source.read_bytes()


# --- flags ---------------------------------------------------------------------------------------


def test_flagged_lines_are_told_and_fail_a_strict_run(run, use):
    use(scripted(loop))
    outcome = run("translate", *LANGUAGES, stdin=b"May 2\n\n")
    assert outcome.code == 0
    assert "line 1: repetition: " in outcome.err
    assert "1 of 2 lines were flagged" in outcome.err
    assert run("translate", *LANGUAGES, "--strict", stdin=b"May 2\n\n").code == 5
    assert run("translate", *LANGUAGES, "--strict", stdin=b"\n").code == 0


# --- what standard error shows -------------------------------------------------------------------


def test_no_progress_where_nobody_watches(run, echo, files):
    outcome = run("translate", *LANGUAGES, "-i", files[0])
    assert outcome.err == ""


def test_progress_on_a_terminal_without_colour(run, use, files, monkeypatch):
    use(FakeTranslator(result))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("moe_mt.cli.translate.progress_hidden", lambda options: False)
    outcome = run("translate", *LANGUAGES, "-i", files[0])
    assert "40/40" in outcome.err
    assert "40 sentences" in outcome.err
    assert "tokens/s" in outcome.err
    assert "\x1b[" not in outcome.err
    assert outcome.out == files[0].read_bytes()


def test_quiet_says_nothing_but_errors(run, use):
    use(FakeTranslator(lambda text: result(text, warnings=("cut: x",))))
    assert run("translate", "-q", *LANGUAGES, stdin=b"a\n").err == ""
    assert "cut: x" in run("translate", *LANGUAGES, stdin=b"a\n").err


# --- interruptions -------------------------------------------------------------------------------


def interrupt_at(text, error=KeyboardInterrupt):
    def translate_one(given):
        if given == text:
            raise error
        return result(given)

    return FakeTranslator(translate_one)


def test_an_interrupted_run_leaves_a_partial_file_and_says_how_to_go_on(run, use, files):
    source, target = files
    target.write_text("of an earlier run\n")
    use(interrupt_at("May 21"))
    outcome = run("translate", *LANGUAGES, "-i", source, "-o", target)
    assert outcome.code == 130
    partial = target.with_name("out.txt.partial")
    # Results come in windows of four.
    assert partial.read_text().splitlines() == [f"May {n}" for n in range(20)]
    assert f"20 lines are in {partial}; continue with --resume" in outcome.err
    assert outcome.err.endswith("moe-mt: interrupted\n")
    # Whoever waits for the file sees the old one or the whole one.
    assert target.read_text() == "of an earlier run\n"

    use(FakeTranslator(result))
    outcome = run("translate", *LANGUAGES, "-i", source, "-o", target)
    assert outcome.code == 2
    assert "continue it with --resume, or remove it" in outcome.err
    assert partial.read_text().count("\n") == 20

    seen = []
    use(FakeTranslator(lambda text: seen.append(text) or result(text)))
    assert run("translate", *LANGUAGES, "-i", source, "-o", target, "--resume").code == 0
    assert target.read_bytes() == source.read_bytes()
    # Nothing that was done is done again.
    assert seen[0] == "May 20"
    assert names(target.parent) == ["in.txt", "out.txt"]


def test_standard_input_can_be_resumed_if_it_is_the_same(run, use, files):
    source, target = files
    use(interrupt_at("May 21"))
    run("translate", *LANGUAGES, "-o", target, stdin=source.read_bytes())
    use(FakeTranslator(result))
    outcome = run("translate", *LANGUAGES, "-o", target, "--resume", stdin=source.read_bytes())
    assert outcome.code == 0
    assert target.read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda content: content.replace(b"May 3\n", b"May 4\n"), 2),  # a line that was done
        (lambda content: content[:30], 2),  # fewer than were done
        (lambda content: content.replace(b"May 30\n", b"May 31\n"), 0),  # one still to do
        (lambda content: content + b"May 40\n", 0),  # the file has grown
    ],
    ids=["done", "shorter", "to do", "longer"],
)
def test_resume_with_another_input(run, use, files, change, code):
    # What counts is that the result is that of an uninterrupted run on the input as it is now.
    source, target = files
    use(interrupt_at("May 21"))
    run("translate", *LANGUAGES, "-i", source, "-o", target)
    source.write_bytes(change(source.read_bytes()))
    use(FakeTranslator(result))
    outcome = run("translate", *LANGUAGES, "-i", source, "-o", target, "--resume")
    assert outcome.code == code
    if code == 0:
        assert target.read_bytes() == source.read_bytes()
    else:
        assert "the first 20 lines of the input are not those" in outcome.err
        assert not target.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-beams", "2"), "num_beams was None and is 2"),
        (("--format", "tsv"), "format was 'lines' and is 'tsv'"),
        (("-t", "deu_Latn"), "tgt_lang was 'fra_Latn' and is 'deu_Latn'"),
        (("-m", "other"), "model was 'tiny' and is 'other'"),
    ],
)
def test_resume_with_other_options(run, use, files, arguments, message):
    source, target = files
    use(interrupt_at("May 21"))
    run("translate", *LANGUAGES, "-i", source, "-o", target)
    outcome = run("translate", *LANGUAGES, "-i", source, "-o", target, "--resume", *arguments)
    assert outcome.code == 2
    assert f"other options: {message}; use the same ones" in outcome.err


def test_flags_of_the_first_part_are_not_forgotten(run, use, files):
    source, target = files

    def flag_may_2(text):
        return result(text, warnings=("cut: x",) if text == "May 2" else ())

    fake = interrupt_at("May 21")
    genuine, fake.translate_one = (
        fake.translate_one,
        lambda text: genuine(text) and flag_may_2(text),
    )
    use(fake)
    arguments = ("translate", *LANGUAGES, "-i", source, "-o", target, "--strict")
    assert run(*arguments).code == 130
    use(FakeTranslator(flag_may_2))
    assert run(*arguments, "--resume").code == 5


# --- bad input -----------------------------------------------------------------------------------


def test_invalid_utf_8_is_named_and_the_lines_before_it_are_translated(run, echo):
    outcome = run("translate", *LANGUAGES, stdin=b"May 2\nMay 3\ncaf\xe9\nMay 4\n")
    assert (outcome.code, outcome.out) == (2, b"May 2\nMay 3\n")
    assert "standard input, line 3: not UTF-8" in outcome.err


def test_invalid_utf_8_can_be_mended_and_resumed(run, echo, files):
    source, target = files
    good = source.read_bytes()
    source.write_bytes(good.replace(b"May 21", b"caf\xe9"))
    outcome = run("translate", *LANGUAGES, "-i", source, "-o", target)
    assert outcome.code == 2
    assert f"{source}, line 22: not UTF-8" in outcome.err
    assert target.with_name("out.txt.partial").read_bytes().count(b"\n") == 21
    source.write_bytes(good)
    outcome = run("translate", *LANGUAGES, "-i", source, "-o", target, "--resume")
    assert outcome.code == 0
    assert target.read_bytes() == good


@contextmanager
def largest_file(size: int):
    """Let writes beyond ``size`` bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_named_and_what_was_written_is_kept(run, use, tmp_path):
    source, target = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text("".join(f"May {n} {'x' * 100}\n" for n in range(60)))
    use(FakeTranslator(result))
    with largest_file(3_000):
        outcome = run("translate", *LANGUAGES, "-i", source, "-o", target)
    assert outcome.code == 1
    written = target.with_name("out.txt.partial").read_bytes()
    lines = written.count(b"\n")
    assert 20 < lines < 30
    assert source.read_bytes().startswith(written)
    assert f"out.txt.partial behind line {lines}: File too large; " in outcome.err
    assert "make room and add --resume" in outcome.err
    assert not target.exists()
    assert run("translate", *LANGUAGES, "-i", source, "-o", target, "--resume").code == 0
    assert target.read_bytes() == source.read_bytes()


# --- real processes ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("model"))


def command(checkpoint, *arguments):
    options = ("-q", *LANGUAGES, "-m", str(checkpoint), "--num-beams", "1", "--max-new-tokens", "8")
    return [*PYTHON_M, *options, *map(str, arguments)]


def test_standard_output_on_a_full_disk(checkpoint):
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        done = subprocess.run(
            command(checkpoint),
            input=b"May 2\nMay 3\n",
            stdout=full,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
            check=False,
            timeout=60,
        )
    # One message, and no second one from the interpreter's last flush, which would also turn the
    # exit code into 120.
    assert done.returncode == 1
    message = "moe-mt: cannot write standard output behind line 0: No space left on device; "
    assert done.stderr.decode() == message + "make room for it\n"


def test_a_reader_that_has_seen_enough(checkpoint):
    # `moe-mt translate … | head -1`
    with subprocess.Popen(
        command(checkpoint, "--batch-size", 2),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    ) as process:
        threading.Thread(target=lambda: feed(process.stdin, b"May 2\n" * 2_000)).start()
        assert process.stdout.readline().endswith(b"\n")
        process.stdout.close()
        assert process.wait(60) == 1
        assert process.stderr.read() == b""


def feed(pipe, content):
    try:
        with pipe:
            pipe.write(content)
    except BrokenPipeError:
        pass


@pytest.mark.slow
def test_twenty_thousand_lines_killed_at_five_random_points_and_resumed(checkpoint, tmp_path):
    draw = random.Random(6)
    source, whole, target = (tmp_path / name for name in ("in.txt", "whole.jsonl", "out.jsonl"))
    words = ("May", "2047", "June. ", "in 14 minutes", "", "Greek, ", "1,722 kilometers")
    source.write_text("".join(" ".join(draw.choices(words, k=3)) + "\n" for _ in range(20_000)))
    # JSON tells scores to the last digit: equal bytes need equal batches on both sides of a kill.
    arguments = ("--format", "jsonl", "-i", source)
    subprocess.run(command(checkpoint, *arguments, "-o", whole), check=True, env=ENVIRONMENT)
    assert whole.read_bytes().count(b"\n") == 20_000

    partial = target.with_name("out.jsonl.partial")
    resuming = command(checkpoint, *arguments, "-o", target, "--resume")
    points = [draw.randrange(start, start + 4_000) for start in range(0, 20_000, 4_000)]
    size = whole.stat().st_size
    for point in points:
        with subprocess.Popen(resuming, env=ENVIRONMENT) as process:
            # A kill may come between two lines or within one, before a mark or behind it.
            while not (partial.exists() and partial.stat().st_size > size * point / 20_000):
                assert process.poll() is None, "the run ended before it could be killed"
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert not target.exists()
    subprocess.run(resuming, check=True, env=ENVIRONMENT)
    assert target.read_bytes() == whole.read_bytes()
    assert names(tmp_path) == ["in.txt", "out.jsonl", "whole.jsonl"]
