"""Files of sentence pairs, and the flat arrays they become."""

import pytest
import torch

from moe_mt.errors import InputError, UnsupportedLanguageError
from moe_mt.training import TokenPairs, read_pairs
from tests.translators import tiny_tokenizer


@pytest.fixture
def write(tmp_path):
    def write(content: bytes):
        path = tmp_path / "pairs.tsv"
        path.write_bytes(content)
        return path

    return write


def read(path, **options):
    return read_pairs(path, tiny_tokenizer(), **options)


def test_flat_arrays_give_back_what_went_in():
    sequences = [([5, 6, 7], [8]), ([9], [10, 11]), ([], [12])]
    pairs = TokenPairs.from_sequences(sequences)
    assert len(pairs) == 3
    assert [
        (source.tolist(), target.tolist()) for source, target in map(pairs.__getitem__, range(3))
    ] == sequences
    assert pairs.lengths().tolist() == [[3, 1], [1, 2], [0, 1]]
    # Four bytes a token: a million short pairs are some tens of megabytes.
    assert pairs.tokens.dtype == torch.int32


def test_no_pair_at_all():
    assert len(TokenPairs.from_sequences([])) == 0


def test_two_columns_take_their_languages_from_the_options(write):
    tokenizer = tiny_tokenizer()
    path = write(b"May 2\t2 mai\nMay 3\t3 mai")
    pairs = read(path, src_lang="en", tgt_lang="French")
    assert len(pairs) == 2
    source, target = pairs[1]
    assert source.tolist() == tokenizer.encode_source("May 3", "eng_Latn", "fra_Latn")
    assert target.tolist() == tokenizer.encode_target("3 mai", "fra_Latn")
    assert target[0] == tokenizer.language_id("fra_Latn")
    assert target[-1] == tokenizer.eos_id


def test_four_columns_name_their_languages_line_by_line(write):
    tokenizer = tiny_tokenizer()
    path = write("eng_Latn\tfra_Latn\tMay 2\t2 mai\nru\tzho_Hans\t2 мая\t5月2日\n".encode())
    pairs = read(path)
    assert [pairs[i][0][0].item() for i in range(2)] == [
        tokenizer.language_id(code) for code in ("eng_Latn", "rus_Cyrl")
    ]
    assert pairs[1][1].tolist() == tokenizer.encode_target("5月2日", "zho_Hans")
    # They win over the options.
    assert torch.equal(read(path, src_lang="deu_Latn", tgt_lang="ell_Grek").tokens, pairs.tokens)


def test_lines_end_at_newlines_only(write):
    path = write("May 2\u2028\t2 mai\x85\r\nMay 3\t3 mai\n".encode())
    assert len(read(path, src_lang="eng_Latn", tgt_lang="fra_Latn")) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"one column", "found 1 columns; expected 'source TAB target'"),
        (b"a\tb\tc", "found 3 columns"),
        (b"a\tb\tc\td\te", "found 5 columns"),
        (b"", "found 1 columns"),  # an empty line is no pair
        (b"a\t ", "an empty source or target"),
        (b"\tb", "an empty source or target"),
        (b"caf\xe9\tb", "not UTF-8 .* at byte 3 of the line"),
    ],
)
def test_bad_lines_are_named_by_number(write, line, message):
    path = write(b"May 2\t2 mai\n" + line + b"\nMay 3\t3 mai\n")
    with pytest.raises(InputError, match=rf"pairs\.tsv, line 2: {message}"):
        read(path, src_lang="eng_Latn", tgt_lang="fra_Latn")


def test_two_columns_without_languages(write):
    with pytest.raises(InputError, match="line 1: found 2 columns"):
        read(write(b"a\tb\n"), src_lang="eng_Latn")


def test_an_unknown_language_is_named_by_its_line(write):
    path = write(b"eng_Latn\tfra_Latn\ta\tb\neng_Latn\tFrensh\ta\tb\n")
    with pytest.raises(UnsupportedLanguageError, match=r"line 2: .*'Frensh'.*fra_Latn"):
        read(path)


def test_progress_counts_bytes(write):
    calls = []
    path = write(b"May 2\t2 mai\n" * 2_500)
    read(
        path,
        src_lang="eng_Latn",
        tgt_lang="fra_Latn",
        on_progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(12_000, 30_000), (24_000, 30_000), (30_000, 30_000)]
