"""How far a translation has come."""

from dataclasses import dataclass
from time import monotonic
from typing import Any

from tqdm import tqdm

__all__ = ["Progress", "ProgressBar"]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What is newly done."""

    texts: int = 0
    """Texts of which every sentence is done."""

    sentences: int = 0
    """Sentences."""

    tokens: int = 0
    """Tokens of the sentences' best translations."""


class ProgressBar:
    """Texts, sentences, tokens per second and the time left, on standard error.

    A context: the bar appears when it is entered.
    """

    def __init__(
        self,
        *,
        total: int | None,
        unit: str,
        hidden: bool | None,
        initial: int = 0,
        description: str | None = None,
    ) -> None:
        """Prepare the bar.

        Args:
            total: Texts in all, if that is known; then the bar says how long it will take.
            unit: What a text is called.
            hidden: ``None`` hides the bar where standard error is no terminal.
            initial: Texts that were done before.
            description: What stands before the bar.
        """
        self._options: dict[str, Any] = {
            "total": total,
            "unit": unit,
            "disable": hidden,
            "initial": initial,
            "desc": description,
        }
        self._bar: Any = None
        self._sentences = 0
        self._tokens = 0
        self._start = 0.0

    def __enter__(self) -> "ProgressBar":
        self._bar = tqdm(**self._options)
        self._start = monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def show(self, progress: Progress) -> None:
        """Move on."""
        self._sentences += progress.sentences
        self._tokens += progress.tokens
        rate = self._tokens / max(monotonic() - self._start, 1e-9)
        self._bar.set_postfix_str(
            f"{self._sentences} sentences, {rate:.0f} tokens/s", refresh=False
        )
        self._bar.update(progress.texts)
