"""What a translation is, beyond its text."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["FinishReason", "TranslationResult"]

FinishReason = Literal["stop", "length", "repetition", "empty"]


@dataclass(frozen=True, kw_only=True)
class TranslationResult:
    """One input, translated."""

    text: str
    """The translation, with the white space of the input around and between its sentences."""

    score: float
    """Length-normalised log-probability, averaged over tokens where there were several sentences;
    0 for an empty input."""

    tokens: tuple[int, ...]
    """Generated token ids, language and end tokens included, sentence after sentence."""

    finish_reason: FinishReason
    """``"stop"``: every sentence ended by itself; ``"length"``: one was cut at the output limit;
    ``"repetition"``: one loops; ``"empty"``: there was nothing to translate."""

    src_lang: str
    """Code of the source language."""

    tgt_lang: str
    """Code of the target language."""

    warnings: tuple[str, ...] = ()
    """What the caller should know about this result; empty where all went well."""

    alternatives: tuple["TranslationResult", ...] = ()
    """The next best translations, where ``num_return_sequences`` asked for them."""
