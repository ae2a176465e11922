"""From the hypotheses of an input's sentences to its result."""

from collections.abc import Sequence
from dataclasses import replace

from moe_mt.generation import Hypothesis
from moe_mt.tokenizers import Tokenizer
from moe_mt.translator.items import Item
from moe_mt.translator.result import FinishReason, TranslationResult
from moe_mt.translator.segments import join_segments

__all__ = ["assemble"]

UNKNOWN_SHARE = 0.5
"""Share of unknown characters above which a text lies outside what the model can read."""

REASON_WARNINGS: dict[FinishReason, str] = {
    "length": "length: the output reached its limit before it ended; raise max_new_tokens",
    "repetition": "repetition: the output repeats itself; check it against the source",
}
"""What there is to say about sentences that did not stop; of several reasons the first is given."""


def assemble(
    tokenizer: Tokenizer, item: Item, hypotheses: Sequence[Sequence[Hypothesis] | None]
) -> TranslationResult:
    """Put the translations of an input's sentences together.

    Args:
        tokenizer: The model's.
        item: The input.
        hypotheses: Per segment those that were generated, best first; ``None`` where the segment
            had no job.
    """
    counts = [len(found) for found in hypotheses if found]
    if not counts:
        return TranslationResult(
            text=item.text,
            score=0.0,
            tokens=(),
            finish_reason="empty",
            src_lang=item.src_lang,
            tgt_lang=item.tgt_lang,
        )
    flags = _flags(item)
    best, *others = (
        # A sentence with fewer hypotheses than others stands in with its last.
        _result(
            tokenizer, item, [h[min(rank, len(h) - 1)] if h else None for h in hypotheses], flags
        )
        for rank in range(max(counts))
    )
    return replace(best, alternatives=tuple(others))


def _result(
    tokenizer: Tokenizer,
    item: Item,
    hypotheses: Sequence[Hypothesis | None],
    flags: tuple[str, ...],
) -> TranslationResult:
    texts = ["" if h is None else tokenizer.decode(h.tokens) for h in hypotheses]
    found = [h for h in hypotheses if h is not None]
    tokens = sum(len(h.tokens) for h in found)
    reasons = {h.finish_reason for h in found}
    bad: dict[FinishReason, str] = {
        reason: text for reason, text in REASON_WARNINGS.items() if reason in reasons
    }
    return TranslationResult(
        text=join_segments(item.segments, texts, item.src_lang, item.tgt_lang),
        score=sum(h.score * len(h.tokens) for h in found) / max(tokens, 1),
        tokens=tuple(token for h in found for token in h.tokens),
        finish_reason=next(iter(bad)) if bad else "stop",
        src_lang=item.src_lang,
        tgt_lang=item.tgt_lang,
        warnings=flags + tuple(bad.values()),
    )


def _flags(item: Item) -> tuple[str, ...]:
    """Return the warnings that the source alone is worth."""
    flags: list[str] = []
    parts = sum(segment.was_cut for segment in item.segments)
    if parts:
        flags.append(
            f"cut: a sentence longer than the model takes was translated in {parts} parts; "
            "check where they meet"
        )
    characters = sum(job.characters for job in item.jobs if job)
    unknown = sum(job.unknown_characters for job in item.jobs if job)
    if unknown > UNKNOWN_SHARE * characters:
        flags.append(
            f"unknown: {unknown} of {characters} characters of the source are not in the model's "
            "vocabulary; the text lies outside what it was trained on"
        )
    return tuple(flags)
