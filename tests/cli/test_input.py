"""Lines of bytes: split at newlines only, with a name for what cannot be read."""

import io
from hashlib import sha256

import pytest

from moe_mt.cli.input import Lines, count_lines, open_lines
from moe_mt.errors import InputError


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", []),
        (b"\n", [""]),
        (b"a\n", ["a"]),
        (b"a", ["a"]),  # no newline at the end
        (b"a\n\nb\n", ["a", "", "b"]),
        # Everything that other programs take for a line's end stays in the line.
        ("a\r\nb\rc\u2028d\fe\vf\x85g\n".encode(), ["a\r", "b\rc\u2028d\fe\vf\x85g"]),
        (b"\0\n\t \n", ["\0", "\t "]),
        ("\ufeffa\n".encode(), ["\ufeffa"]),  # a byte order mark is text
    ],
)
def test_lines(content, expected):
    lines = Lines(io.BytesIO(content), "name")
    assert list(lines) == expected
    assert lines.count == len(expected)
    assert lines.sha256 == sha256(content).hexdigest()
    assert lines.error is None


@pytest.mark.parametrize(
    "bad",
    [
        b"\xff",  # no byte of UTF-8
        "caf\u00e9".encode("latin-1"),
        b"a\xe4\xb8",  # cut in the middle of a character
        b"\xed\xa0\x80",  # half of a surrogate pair
    ],
)
def test_a_line_that_is_not_utf_8_ends_the_lines_and_is_named(bad):
    lines = Lines(io.BytesIO(b"one\ntwo\n" + bad + b"\nfour\n"), "name")
    assert list(lines) == ["one", "two"]
    assert isinstance(lines.error, InputError)
    assert "name, line 3: not UTF-8" in str(lines.error)
    assert "2 lines before it were translated" in str(lines.error)
    assert lines.sha256 == sha256(b"one\ntwo\n").hexdigest()


def test_a_stream_that_breaks_ends_the_lines_too():
    class Breaking(io.BytesIO):
        def __next__(self):
            if self.tell():
                raise OSError(5, "Input/output error")
            return super().__next__()

    lines = Lines(Breaking(b"one\ntwo\n"), "name")
    assert list(lines) == ["one"]
    assert "name, line 2: not readable (Input/output error)" in str(lines.error)


def test_skipped_lines_count_and_are_not_looked_at():
    lines = Lines(io.BytesIO(b"\xff\nb\nc"), "name")
    lines.skip(2)
    assert (lines.count, lines.sha256) == (2, sha256(b"\xff\nb\n").hexdigest())
    assert list(lines) == ["c"]
    lines.skip(5)
    assert lines.count == 3


def test_a_file_that_cannot_be_opened(tmp_path):
    for name in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match="cannot read"), open_lines(str(name)):
            pass


def test_count_lines_does_not_touch_what_can_be_read_only_once(tmp_path):
    (tmp_path / "file").write_bytes(b"a\nb")
    assert count_lines(str(tmp_path / "file")) == 2
    assert count_lines("-") is None
    assert count_lines("/dev/null") is None
