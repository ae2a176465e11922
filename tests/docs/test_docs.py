"""The documentation is true: its code runs, its commands parse, its tables are those of the code.

A page's ``python`` blocks run top to bottom in one namespace; ``python no-run`` blocks (network,
GPU) are compiled. ``#> value`` is compared with the expression before it, a ``text`` block behind a
``python`` block with what that printed. ``#~ value`` is a right translation: it must be made of
held-out references, and is not asked of whatever model lies in the package. Commands behind
``$`` in ``console`` blocks are parsed, and run where the tiny model or none is enough.
"""

import argparse
import ast
import contextlib
import importlib
import inspect
import io
import logging
import re
import shlex
import subprocess
import sys
from dataclasses import MISSING, dataclass, fields
from itertools import pairwise, takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

import moe_mt
from moe_mt import errors
from moe_mt.models import FAMILIES
from moe_mt.moe import Experts, Routing, Top1Router, Top2Router, TopKRouter
from moe_mt.training import TrainingConfig
from recipes.tiny import train as tiny_recipe
from recipes.tiny.domain import LANGUAGES
from recipes.tiny.evaluate import held_out_rows
from tests.models.test_published_checkpoints import CHECKPOINTS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
CLI = importlib.import_module("moe_mt.cli.main")  # the room's name for it is the function
TRANSLATOR = importlib.import_module("moe_mt.translator.translator")
ITEMS = importlib.import_module("moe_mt.translator.items")
ASSEMBLY = importlib.import_module("moe_mt.translator.assembly")
RESULT = importlib.import_module("moe_mt.translator.result")
VERDICT = importlib.import_module("moe_mt.integrations.verdict")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
each_linked = pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))

INPUT = "July 8, 2047\nin 14 minutes\n"
"""What the examples call in.txt, and what a command reads that is given nothing."""

MOST_STEPS = 20
"""A training that an example shows with more steps is parsed only."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    kind: str
    code: str
    line: int


def blocks(text: str) -> list[Block]:
    """Return a page's fenced blocks; ``line`` is that of the fence."""
    found = re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(m[1].strip(), m[2], text.count("\n", 0, m.start()) + 1) for m in found]


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


# Python


def run_python(text: str, name: str) -> None:
    """Run a page's Python blocks and compare what they say with what comes out."""
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    for block, following in pairwise([*blocks(text), Block("", "", 0)]):
        if block.kind == "python no-run":
            compile(block.code, name, "exec")
        elif block.kind == "python":
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                run_block(block, name, namespace)
            if following.kind == "text":
                assert printed.getvalue() == following.code, f"{name}:{following.line}"


def run_block(block: Block, name: str, namespace: dict[str, Any]) -> None:
    lines = block.code.splitlines()
    for node in ast.parse(block.code).body:
        place = f"{name}:{block.line + node.lineno}"
        _, shown, value = lines[node.end_lineno - 1].partition("  #> ")
        if shown:
            assert isinstance(node, ast.Expr), f"{place}: only an expression has a value"
            code = compile(ast.Expression(node.value), place, "eval")
            assert repr(eval(code, namespace)) == value, place
        else:
            exec(compile(ast.Module([node], []), place, "exec"), namespace)


@each_page
def test_python_blocks_run_and_give_what_they_show(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_python(read(page), page.name)


@pytest.mark.parametrize(
    "wrong",
    [
        "```python\n1 + 1  #> 3\n```\n",
        "```python\nprint(1)\n```\n\n```text\n2\n```\n",
        "```python\nundefined\n```\n",
        "```python no-run\n1 +\n```\n",
    ],
    ids=["value", "print", "exception", "syntax"],
)
def test_wrong_python_is_found(wrong):
    with pytest.raises((AssertionError, NameError, SyntaxError)):
        run_python(wrong, "wrong.md")


def untrue_parts(shown: str, cells: list[str]) -> str:
    """Return what is left of a shown translation when all held-out references are taken out."""
    for cell in cells:
        shown = shown.replace(cell, "")
    return shown.strip()


@each_page
def test_shown_translations_are_held_out_references(page):
    rows = held_out_rows()
    cells = sorted({row[language] for row in rows for language in LANGUAGES} - {""}, key=len)
    for value in re.findall(r"  #~ (.*)", read(page)):
        shown = ast.literal_eval(value)
        for text in [shown] if isinstance(shown, str) else shown:
            assert untrue_parts(text, cells[::-1]) == "", value


def test_an_untrue_translation_is_found():
    assert untrue_parts("8 juillet 2048", ["8 juillet 2047", "14 minutes"]) == "8 juillet 2048"


# Commands


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Return the commands of a page's console blocks, and the lines shown behind each."""
    found = []
    for block in blocks(text):
        if block.kind == "console":
            lines = block.code.splitlines()
            for number, line in enumerate(lines):
                if line.startswith("$ "):
                    shown = takewhile(lambda line: not line.startswith("$ "), lines[number + 1 :])
                    found.append((line[2:], list(shown)))
    return found


@dataclass(frozen=True)
class Command:
    """A ``moe-mt`` command as the shell would understand it."""

    arguments: list[str]
    given: bytes
    into: str | None


def shell_command(line: str) -> Command | None:
    """Split a line at ``|``, ``<`` and ``>``; ``None`` if it holds no ``moe-mt``."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(lexer)
    if "moe-mt" not in words:
        return None
    start = words.index("moe-mt")
    before, own = words[:start], words[start + 1 :]
    given, into = INPUT.encode(), None
    if before and before[0] == "echo":
        given = f"{before[1]}\n".encode()
    arguments = list(takewhile(lambda word: word not in ("|", "<", ">"), own))
    for sign, file in pairwise(own):
        if sign == "<":
            given = Path(file).read_bytes()
        elif sign == ">":
            into = file
    return Command(arguments, given, into)


def parsed(arguments: list[str]) -> argparse.Namespace | None:
    """Return the arguments as the real parser reads them; ``None`` for ``--version``."""
    code = None
    try:
        return CLI._parser().parse_args(arguments)
    except SystemExit as error:
        code = error.code
    assert code == 0, f"moe-mt {shlex.join(arguments)} does not parse"
    return None


def is_quick(options: argparse.Namespace | None) -> bool:
    if options is None:
        return True
    if options.command == "train" and options.steps > MOST_STEPS:
        return False
    if options.command == "tune" and not options.dry_run:
        return False
    model = getattr(options, "model", "tiny") or "tiny"
    return model == "tiny" or Path(model).is_dir()


@pytest.fixture
def run_command(monkeypatch):
    """Run ``moe-mt`` in this process; return its exit code and what it printed."""

    def run(command: Command) -> tuple[int, str]:
        stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(command.given)))
            patch.setattr(sys, "stdout", stdout)
            try:
                code = CLI.main(command.arguments)
            except SystemExit as error:
                code = error.code
        stdout.flush()
        printed = stdout.buffer.getvalue()
        if command.into is not None:
            Path(command.into).write_bytes(printed)
        return code, printed.decode("utf-8")

    handlers, level = logging.root.handlers[:], logging.root.level
    yield run
    # The command takes over the root logger.
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@each_page
def test_commands_parse_and_run(page, tmp_path, monkeypatch, run_command):
    monkeypatch.chdir(tmp_path)
    Path("in.txt").write_text(INPUT, encoding="utf-8")
    for line, shown in commands(read(page)):
        command = shell_command(line)
        if command is None:
            if line.startswith("printf "):
                subprocess.run(["bash", "-c", line], check=True)
            continue
        options = parsed(command.arguments)
        if not is_quick(options):
            continue
        code, printed = run_command(command)
        assert code == 0, line
        if shown and (options is None or options.command == "languages"):
            # Only these print the same on every machine and with every model.
            assert shown == printed.splitlines(), line


def test_a_wrong_command_is_found():
    with pytest.raises(AssertionError, match="does not parse"):
        parsed(shell_command("moe-mt translate -s en -t fr --beams 4 | head").arguments)


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.MULTILINE))
    named = {
        target
        for page in LINKED
        for target in re.findall(r"`make ([a-z-]+)`|^\$ make ([a-z-]+)", read(page), re.MULTILINE)
    }
    assert {name for pair in named for name in pair if name} <= targets


# Links


def slugs(text: str) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(text: str, page: Path) -> list[str]:
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not re.match(r"https?://|mailto:", target):
            file, _, anchor = target.partition("#")
            goal = (page.parent / file).resolve() if file else page
            if goal == page:
                found = not anchor or anchor in slugs(text)
            else:
                found = goal.exists() and (not anchor or anchor in slugs(read(goal)))
            broken += [] if found else [target]
    return broken


@each_linked
def test_links_lead_somewhere(page):
    assert broken_links(read(page), page) == []


def test_a_broken_link_is_found():
    text = "# One\n[a](nowhere.md) [b](#two) [c](#one) [d](models.md#nothing) [e](models.md)\n"
    page = DOCS / "page.md"
    assert broken_links(text, page) == ["nowhere.md", "#two", "models.md#nothing"]


def test_every_page_is_in_the_index():
    index = read(DOCS / "README.md")
    assert [page.name for page in PAGES[2:] if f"]({page.name})" not in index] == []


# Tables


def table(page: str, column: str, occurrence: int = 0) -> dict[str, list[str]]:
    """Return a table of a page: first cell → the others; found by its first column's title.

    Args:
        page: The page's name.
        column: Title of the first column.
        occurrence: Which of several tables with that title.
    """
    found: list[dict[str, list[str]]] = []
    before = ""
    for line in read(DOCS / page).splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if line.startswith("|") and not before.startswith("|"):
            found += [{}] if cells[0] == column else []
            open_table = cells[0] == column
        elif line.startswith("|") and open_table and not set(line) <= set("|-: "):
            found[-1][cells[0]] = cells[1:]
        before = line
    return found[occurrence]


def bare(cell: str) -> str:
    return cell.strip("`")


def default_of(value: object) -> str:
    """Return a default as the pages write it."""
    return repr(value).replace("'", '"')


def documented_defaults(rows: dict[str, list[str]]) -> dict[str, str]:
    return {bare(name): bare(cells[0]) for name, cells in rows.items()}


def signature_defaults(function: object, kind: str | None = None) -> dict[str, str]:
    parameters = inspect.signature(function).parameters.values()
    return {
        parameter.name: "required"
        if parameter.default is parameter.empty
        else default_of(parameter.default)
        for parameter in parameters
        if (kind is None or parameter.kind.name == kind) and parameter.kind.name != "VAR_KEYWORD"
    }


def test_from_pretrained_table():
    found = documented_defaults(table("translating.md", "argument"))
    assert found == signature_defaults(moe_mt.from_pretrained)


def test_translate_options_table():
    rows = table("translating.md", "option")
    found = documented_defaults(rows)
    assert found == signature_defaults(moe_mt.Translator.translate_iter, "KEYWORD_ONLY")
    for option, value in {
        "batch_size": TRANSLATOR.DEFAULT_BATCH_SIZE,
        "max_batch_tokens": TRANSLATOR.DEFAULT_MAX_BATCH_TOKENS,
        "max_input_tokens": TRANSLATOR.LONGEST_INPUT,
    }.items():
        assert f"`None` is {value}" in rows[f"`{option}`"][1]


def test_generation_options_table():
    found = documented_defaults(table("translating.md", "option", 1))
    assert found == {
        field.name: default_of(field.default) for field in fields(moe_mt.GenerationConfig)
    }


def test_result_tables():
    text = read(DOCS / "translating.md")
    names = [field.name for field in fields(moe_mt.TranslationResult)]
    assert [bare(name) for name in table("translating.md", "field")] == names
    reasons = get_args(RESULT.FinishReason)
    assert {name.strip('`"') for name in table("translating.md", "`finish_reason`")} == {*reasons}
    written = set(re.findall(r'"([a-z]+:) ', inspect.getsource(ASSEMBLY)))
    assert {bare(prefix) for prefix in table("translating.md", "warning")} == written
    factor, extra = ITEMS.OUTPUT_TOKENS_PER_SOURCE_TOKEN, ITEMS.OUTPUT_TOKENS_EXTRA
    assert f"    {factor} × source tokens + {extra} + forced tokens\n" in text
    assert f"`{TRANSLATOR.WINDOW_BATCHES} * batch_size` texts" in text


def test_errors_table():
    found = {bare(name): bare(cells[0]) for name, cells in table("translating.md", "error").items()}
    classes = [getattr(errors, name) for name in errors.__all__ if name != "MoeMtError"]
    assert found == {error.__name__: error.__mro__[2].__name__ for error in classes}


def command_parsers() -> dict[str, argparse.ArgumentParser]:
    actions = CLI._parser()._actions
    return next(a for a in actions if isinstance(a, argparse._SubParsersAction)).choices


def documented_default(action: argparse.Action) -> str:
    if action.required:
        return "required"
    if action.default is None:
        return "unset"
    if action.nargs == 0 and not isinstance(action, argparse.BooleanOptionalAction):
        return "off"
    if isinstance(action.default, tuple):
        return " ".join(map(str, action.default))
    return str(action.default) or "none"


COMMAND_TABLES = {"common": 0, "translate": 1, "model": 2, "languages": 3, "train": 4, "tune": 5}


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("translate", ["common", "translate", "model"]),
        ("languages", ["common", "languages"]),
        ("doctor", ["common"]),
        ("train", ["common", "model", "train"]),
        ("tune", ["common", "tune"]),
    ],
)
def test_command_option_tables(command, parts):
    rows: dict[str, list[str]] = {}
    for part in parts:
        rows |= table("command-line.md", "option", COMMAND_TABLES[part])
    actions = {
        ", ".join(f"`{flag}`" for flag in action.option_strings): action
        for action in command_parsers()[command]._actions
        if action.dest != "help"
    }
    assert rows.keys() == actions.keys()
    for flags, action in actions.items():
        default, meaning = rows[flags]
        is_shared_model = action.dest == "model" and command == "train"
        assert is_shared_model or bare(default) == documented_default(action), flags
        assert all(f"`{choice}`" in meaning for choice in action.choices or ()), flags
    assert "required by `train`" in table("command-line.md", "option", 2)["`-m`, `--model`"][1]


def test_exit_codes_table():
    described = CLI._parser().epilog.removeprefix("exit codes: ").split("; ")
    assert [*table("command-line.md", "code")] == [code.split()[0] for code in described]
    assert [*table("command-line.md", "`--format`")] == ["`lines`", "`tsv`", "`jsonl`"]
    assert [*command_parsers()] == ["translate", "languages", "train", "tune", "doctor"]


def test_training_options_are_those_of_the_trainer():
    # The page says so, and the command has the defaults of its own table.
    defaults = {action.dest: action.default for action in command_parsers()["train"]._actions}
    for field in fields(TrainingConfig):
        assert field.default is MISSING or field.default == defaults[field.name]
    assert next(f.name for f in fields(TrainingConfig) if f.default is MISSING) == "steps"


def test_published_checkpoints_table():
    rows = table("models.md", "checkpoint")
    assert len(rows) == len(CHECKPOINTS)
    for (names, cells), (key, (_, count)) in zip(rows.items(), CHECKPOINTS.items(), strict=True):
        assert key.lower() in names.lower()
        # Routers in float32 are 6 MB of the largest model, below the last digit shown.
        assert cells == [f"{count:,}", f"{4 * count / 1e9:.1f} GB", f"{2 * count / 1e9:.1f} GB"]


def test_file_and_key_names():
    text = " ".join(read(DOCS / "models.md").split())
    shards = importlib.import_module("moe_mt.checkpoints.shards")
    family = importlib.import_module("moe_mt.models.family")
    for names in (shards.LAYOUTS, family.TIED_KEYS, family.IGNORED_KEYS):
        assert ", ".join(f"`{name}`" for name in names) in text
    assert all(f"`{model_type}`" in text for model_type in FAMILIES)


def test_router_table():
    found = documented_defaults(table("moe-layer.md", "router option"))
    assert found == signature_defaults(Top2Router, "KEYWORD_ONLY")
    shared = {"bias", "router_dtype", "route_padding"}
    for router in (TopKRouter, Top1Router):
        own = signature_defaults(router, "KEYWORD_ONLY")
        found = documented_defaults(table("moe-layer.md", f"`{router.__name__}` option"))
        assert found == {name: value for name, value in own.items() if name not in shared}
    experts = documented_defaults(table("moe-layer.md", "expert option"))
    assert experts == signature_defaults(Experts, "KEYWORD_ONLY")
    routing = [bare(name) for name in table("moe-layer.md", "`Routing`")]
    assert routing == [field.name for field in fields(Routing)]


def test_tiny_recipe_table():
    rows = table("training.md", "")
    translator = moe_mt.from_pretrained("tiny", prepack=False)
    moe = translator.model.config.moe
    parameters = sum(parameter.numel() for parameter in translator.model.parameters())
    assert rows["shape"][0].startswith(f"{parameters:,} parameters")
    assert f"{moe.num_experts} experts" in rows["shape"][0]
    assert rows["languages"][0].endswith(", ".join(translator.languages))
    recipe = f"{tiny_recipe.PAIRS:,} pairs, {tiny_recipe.STEPS:,} steps, seed {tiny_recipe.SEED}"
    assert rows["training"] == [recipe]
    held_out = held_out_rows()
    everywhere = [row for row in held_out if all(row[language] for language in LANGUAGES)]
    assert (len(everywhere), len(held_out)) == (128, 160)
    assert "has 128 meanings in all ten languages and 32 more" in read(DOCS / "training.md")


def test_differences_quotes_the_doctor():
    chosen = {*range(6)}
    wrong = SimpleNamespace(difference=1.03, ran={0, 1}, chosen=chosen)
    right = SimpleNamespace(difference=1.7e-07, ran=chosen, chosen=chosen)
    assert VERDICT._finding([right]) is None
    quoted = re.findall(
        r"^transformers [45]\.\S+: computes NLLB-MoE (.*)$",
        read(DOCS / "differences.md"),
        re.MULTILINE,
    )
    advice = VERDICT._advice(right.difference)
    assert quoted == [
        f"right (relative difference {VERDICT._difference([right]):.1e})",
        f"WRONG: {VERDICT._finding([wrong])}. {advice}",
    ]


def test_contributing_is_short_and_the_changelog_knows_the_version():
    assert len(read(ROOT / "CONTRIBUTING.md").splitlines()) < 60
    assert f"## [{moe_mt.__version__}]" in read(ROOT / "CHANGELOG.md")
