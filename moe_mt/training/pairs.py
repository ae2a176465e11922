"""Sentence pairs as token ids, in flat arrays."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from moe_mt.errors import InputError, UnsupportedLanguageError
from moe_mt.tokenizers import Tokenizer

__all__ = ["TokenPairs", "read_pairs"]

LANGUAGE_COLUMNS = 4


@dataclass(frozen=True)
class TokenPairs:
    """``P`` pairs of token sequences: a million short ones fit in a few hundred megabytes."""

    tokens: Tensor
    """(all tokens,) int32: source, target, source, target, …"""

    offsets: Tensor
    """(2 P + 1,) int64: sequence ``i`` is ``tokens[offsets[i]:offsets[i + 1]]``."""

    def __len__(self) -> int:
        """Return the number of pairs."""
        return (self.offsets.numel() - 1) // 2

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the source and target tokens of pair ``index``."""
        start, middle, stop = self.offsets[2 * index : 2 * index + 3].tolist()
        return self.tokens[start:middle], self.tokens[middle:stop]

    def lengths(self) -> Tensor:
        """Return (P, 2) int64: source and target lengths."""
        return self.offsets.diff().view(-1, 2)

    @classmethod
    def from_sequences(cls, sequences: Iterable[tuple[list[int], list[int]]]) -> "TokenPairs":
        """Build from pairs of token id lists."""
        chunks: list[Tensor] = []
        lengths: list[int] = [0]
        for source, target in sequences:
            chunks.append(torch.tensor(source + target, dtype=torch.int32))
            lengths += [len(source), len(target)]
        tokens = torch.cat(chunks) if chunks else torch.empty(0, dtype=torch.int32)
        return cls(tokens, torch.tensor(lengths).cumsum(0))


def read_pairs(
    path: Path,
    tokenizer: Tokenizer,
    *,
    src_lang: str | None = None,
    tgt_lang: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> TokenPairs:
    """Read and tokenize a file of sentence pairs, a pair a line.

    Each line is ``source TAB target`` with the languages given here, or
    ``src_lang TAB tgt_lang TAB source TAB target``. Lines end at newlines only.

    Args:
        path: UTF-8 text.
        tokenizer: The model's tokenizer.
        src_lang: Source language of two-column lines.
        tgt_lang: Target language of two-column lines.
        on_progress: Called with bytes done and bytes in all.

    Raises:
        InputError: If a line has another number of columns, an empty side or is not UTF-8, with
            its number.
        UnsupportedLanguageError: If the model does not have a language.
    """
    resolve = cache(tokenizer.resolve_language)

    def sequences() -> Iterator[tuple[list[int], list[int]]]:
        done, size = 0, path.stat().st_size
        with path.open("rb") as lines:
            for number, raw in enumerate(lines, 1):
                columns = _columns(path, number, raw, src_lang, tgt_lang)
                try:
                    source_code, target_code = resolve(columns[0]), resolve(columns[1])
                except UnsupportedLanguageError as error:
                    raise UnsupportedLanguageError(f"{path}, line {number}: {error}") from error
                yield (
                    tokenizer.encode_source(columns[2], source_code, target_code),
                    tokenizer.encode_target(columns[3], target_code),
                )
                done += len(raw)
                if on_progress is not None and number % 1000 == 0:
                    on_progress(done, size)
        if on_progress is not None:
            on_progress(size, size)

    return TokenPairs.from_sequences(sequences())


def _columns(
    path: Path, number: int, raw: bytes, src_lang: str | None, tgt_lang: str | None
) -> tuple[str, str, str, str]:
    try:
        columns = raw.decode("utf-8").removesuffix("\n").split("\t")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start} of the line); "
            "convert the file to UTF-8"
        ) from error
    if len(columns) == LANGUAGE_COLUMNS:
        source_language, target_language, source, target = columns
    elif len(columns) == 2 and src_lang is not None and tgt_lang is not None:
        source, target = columns
        source_language, target_language = src_lang, tgt_lang
    else:
        raise InputError(
            f"{path}, line {number}: found {len(columns)} columns; expected 'source TAB target' "
            "with the languages given as options, or 'src_lang TAB tgt_lang TAB source TAB target'"
        )
    if not source.strip() or not target.strip():
        raise InputError(f"{path}, line {number}: an empty source or target; remove the line")
    return source_language, target_language, source, target
