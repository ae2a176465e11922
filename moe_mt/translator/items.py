"""One input, cut into sentences and turned into token ids."""

from dataclasses import dataclass

from moe_mt.generation import GenerationConfig
from moe_mt.tokenizers import Tokenizer
from moe_mt.translator.segments import Segment, Split, split_text

__all__ = ["Item", "Job", "prepare_item"]

OUTPUT_TOKENS_PER_SOURCE_TOKEN = 3
OUTPUT_TOKENS_EXTRA = 32

SPECIAL_TOKENS = 2
"""What a source has besides its text: the language and the end."""

SPACE_MARK = "▁"
"""Stands for a space within a piece."""


@dataclass(frozen=True)
class Job:
    """One sentence, ready to be generated."""

    source_tokens: list[int]
    """What the encoder reads."""

    forced_tokens: list[int]
    """What the output begins with: the target language, and the caller's prefix."""

    max_new_tokens: int
    """Most tokens of the output, forced ones counted."""

    characters: int
    """Characters of the source, without spaces."""

    unknown_characters: int
    """Those among them that stand in no piece of the vocabulary. Characters, because a run of
    unknown ones is a single piece."""


@dataclass(frozen=True)
class Item:
    """One input."""

    text: str
    """As it was given."""

    src_lang: str
    """Code of the source language."""

    tgt_lang: str
    """Code of the target language."""

    segments: list[Segment]
    """The text, cut up."""

    jobs: list[Job | None]
    """One per segment; ``None`` where there is nothing to translate."""


def prepare_item(
    tokenizer: Tokenizer,
    config: GenerationConfig,
    text: str,
    src_lang: str,
    tgt_lang: str,
    *,
    target_prefix: str,
    split: Split,
    max_input_tokens: int,
) -> Item:
    """Cut a text up and make a job of every sentence.

    Args:
        tokenizer: The model's.
        config: For the output limits.
        text: Any text.
        src_lang: Its language's code.
        tgt_lang: Code of the language it goes to.
        target_prefix: What the first sentence's translation must begin with.
        split: How to find sentences.
        max_input_tokens: Most tokens the encoder reads at once.
    """
    segments = split_text(
        text,
        src_lang,
        split,
        lambda part: len(tokenizer.tokenize(part)),
        max_input_tokens - SPECIAL_TOKENS,
    )
    item = Item(text, src_lang, tgt_lang, segments, [])
    prefix = tokenizer.encode_text(target_prefix)
    for segment in segments:
        if segment.text:
            item.jobs.append(_job(tokenizer, config, segment.text, item, prefix))
            prefix = []
        else:
            item.jobs.append(None)
    return item


def _job(
    tokenizer: Tokenizer, config: GenerationConfig, text: str, item: Item, prefix: list[int]
) -> Job:
    source = tokenizer.encode_source(text, item.src_lang, item.tgt_lang)
    forced = tokenizer.forced_tokens(item.tgt_lang) + prefix
    limit = config.new_token_limit
    if limit is None:
        limit = OUTPUT_TOKENS_PER_SOURCE_TOKEN * len(source) + OUTPUT_TOKENS_EXTRA
        # What must come in any case leaves the rest as much room as ever.
        limit += len(forced) + config.new_token_minimum
    sizes = [len(piece.replace(SPACE_MARK, "")) for piece in tokenizer.tokenize(text)]
    spelled = zip(sizes, tokenizer.encode_text(text), strict=True)
    unknown = sum(size for size, token_id in spelled if token_id == tokenizer.unk_id)
    return Job(source, forced, limit, sum(sizes), unknown)
