"""What is written is kept, and a finished file appears all at once."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from moe_mt.cli.output import Mark, ResumableFile, StandardOutput
from moe_mt.errors import InputError

SETTINGS = {"num_beams": 4, "src_lang": "eng_Latn"}


def new(path, settings=SETTINGS, *, resume=False) -> ResumableFile:
    return ResumableFile(path, settings, resume=resume)


def interrupted(path, lines=("one", "two", "three"), marked=2):
    """Leave what a killed run leaves: lines, and a mark behind some of them."""
    output = new(path)
    output.open()
    for number, line in enumerate(lines, 1):
        output.write_line(line)
        if number == marked:
            output.set_mark(Mark(lines=number, flagged=1, input_sha256="digest"))
    output.close()
    return output


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.txt"


def names(path):
    return sorted(entry.name for entry in path.parent.iterdir())


def test_a_finished_file_replaces_the_old_one_at_once(path):
    path.write_text("old\n")
    output = new(path)
    output.open()
    output.write_line("né")
    # Flushed: a kill loses nothing.
    assert output.partial.read_bytes() == "né\n".encode()
    assert path.read_text() == "old\n"
    output.finish()
    assert path.read_bytes() == "né\n".encode()
    assert names(path) == ["out.txt"]


def test_nothing_is_written_before_the_output_is_opened(path):
    # What is wrong with the command is found out in between.
    new(path)
    assert names(path) == []


def test_the_journal_says_what_was_made_from_what(path):
    output = interrupted(path)
    assert json.loads(output.journal.read_text()) == {
        "settings": SETTINGS,
        "mark": {"lines": 2, "flagged": 1, "input_sha256": "digest"},
        "output_bytes": len("one\ntwo\n"),
    }
    assert names(path) == ["out.txt.partial", "out.txt.partial.json"]


@pytest.mark.parametrize("rest", [b"", b"half a li", b"a whole line more\nand a half"])
def test_what_stands_behind_the_mark_is_cut(path, rest):
    output = interrupted(path)
    with output.partial.open("ab") as file:
        file.write(rest)
    again = new(path, resume=True)
    assert asdict(again.mark) == {"lines": 2, "flagged": 1, "input_sha256": "digest"}
    again.open()
    again.write_line("drei")
    again.finish()
    assert path.read_text() == "one\ntwo\ndrei\n"
    assert names(path) == ["out.txt"]


def test_a_run_killed_before_its_first_mark_begins_again(path):
    interrupted(path, marked=None)
    again = new(path, resume=True)
    assert again.mark == Mark()
    again.open()
    again.close()
    assert again.partial.read_bytes() == b""


def test_resume_without_a_partial_file_begins(path):
    output = new(path, resume=True)
    output.open()
    output.finish()
    assert path.read_bytes() == b""


def test_a_journal_alone_is_what_a_kill_at_the_very_start_leaves(path):
    interrupted(path).partial.unlink()
    output = new(path)
    output.open()
    output.finish()
    assert names(path) == ["out.txt"]


def test_a_partial_file_is_not_overwritten_unasked(path):
    interrupted(path)
    with pytest.raises(InputError, match=r"out\.txt\.partial is there .* --resume, or remove it"):
        new(path)


def test_other_options_are_named(path):
    interrupted(path)
    with pytest.raises(InputError, match="other options: num_beams was 4 and is 1; use"):
        new(path, SETTINGS | {"num_beams": 1}, resume=True)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"settings": {}}', b"\xff"])
def test_a_missing_or_damaged_journal(path, content):
    output = interrupted(path)
    output.journal.unlink()
    if content is not None:
        output.journal.write_bytes(content)
    with pytest.raises(InputError, match="missing or unreadable; remove both"):
        new(path, resume=True)


def test_a_partial_file_shorter_than_its_journal_says(path):
    os.truncate(interrupted(path).partial, 5)
    with pytest.raises(InputError, match="shorter than its journal says"):
        new(path, resume=True)


@pytest.mark.parametrize("name", ["/dev/null", "."])
def test_what_is_no_ordinary_file_is_not_replaced_by_one(tmp_path, name):
    # A rename to /dev/null would make an ordinary file of it, for everybody.
    with pytest.raises(InputError, match="no ordinary file"):
        new(tmp_path / name)


def test_a_missing_folder(path):
    with pytest.raises(InputError, match=r"there is no folder .*nowhere to write out\.txt"):
        new(path.parent / "nowhere" / "out.txt")


def test_a_failing_disk_is_named_with_the_last_line(path):
    output = new(path)
    output.open()
    output.write_line("one")
    # Every write to this fails as on a full disk, at the flush.
    output._file.close()
    output._file = open("/dev/full", "ab")  # noqa: PTH123
    with pytest.raises(
        OSError, match=r"partial behind line 1: No space left on device; .*--resume"
    ):
        output.write_line("two")
    output.close()
    assert output.partial.read_text() == "one\n"


def test_standard_output_is_utf_8_whatever_the_locale_says(capsysbinary):
    StandardOutput().write_line("né\u2028")
    assert capsysbinary.readouterr().out == "né\u2028\n".encode()


def test_a_link_is_written_through(tmp_path):
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    real.write_text("old\n")
    link.symlink_to(real)
    output = ResumableFile(link, {}, resume=False)
    output.open()
    output.write_line("new")
    output.finish()
    assert link.is_symlink()
    assert real.read_text() == "new\n"


def test_a_place_of_the_system_is_no_file():
    with pytest.raises(InputError, match="no ordinary file"):
        ResumableFile(Path("/dev/stdout"), {}, resume=False)
