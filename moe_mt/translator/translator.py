"""The translator: text in, results in the same order out."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import Any, Literal

from moe_mt.errors import ConfigError, InputError, UnsupportedLanguageError
from moe_mt.generation import BatchLimits, GenerationConfig
from moe_mt.models import Seq2SeqTransformer
from moe_mt.tokenizers import Tokenizer
from moe_mt.translator.assembly import assemble
from moe_mt.translator.items import Item, prepare_item
from moe_mt.translator.progress import Progress, ProgressBar
from moe_mt.translator.result import TranslationResult
from moe_mt.translator.segments import Split
from moe_mt.translator.vocabularies import TargetTokens, Vocabularies
from moe_mt.translator.windows import SegmentHypotheses, generate_items

__all__ = ["Translator"]

DEFAULT_BATCH_SIZE = 64
DEFAULT_MAX_BATCH_TOKENS = 2048
WINDOW_BATCHES = 8
"""Inputs read ahead, in batches: enough to sort by length, few enough to stay lazy."""

LONGEST_INPUT = 512
"""Tokens in the longest sentence the published models were trained on."""

SHORTEST_LIMIT = 8
"""Least limit of a sentence that a caller may set."""


class Translator:
    """A model and its tokenizer, as one thing that translates."""

    def __init__(
        self,
        model: Seq2SeqTransformer,
        tokenizer: Tokenizer,
        generation_config: GenerationConfig | None = None,
        *,
        languages: Sequence[str] | None = None,
        folder: Path | None = None,
        compile: bool | Literal["auto"] = "auto",
        batch_invariant: bool = False,
    ) -> None:
        """Join a model and a tokenizer.

        Args:
            model: In evaluation mode, where it is to compute.
            tokenizer: The one the model was trained with.
            generation_config: What unset options mean; the defaults of ``GenerationConfig``.
            languages: Codes of the languages the model knows, where these are not all that the
                tokenizer names.
            folder: Where the checkpoint's files are, if it came from files.
            compile: Whether the decoder step is compiled, as in ``from_pretrained``.
            batch_invariant: Whether scores are bit-identical in any batch, as there.

        Raises:
            ConfigError: If ``compile`` is neither a bool nor ``"auto"``.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.generation_config = generation_config or GenerationConfig()
        self.languages = tuple(languages or tokenizer.languages)
        self.folder = folder
        self.batch_invariant = batch_invariant
        self._vocabularies = Vocabularies(model, compile)

    def warmup(
        self,
        *,
        batch_size: int | None = None,
        num_beams: int | None = None,
        source_tokens: int = 32,
        new_tokens: int = 32,
    ) -> None:
        """Do now what the first translations would wait for: compile and capture, touch weights.

        Translating a batch goes through every smaller one as sentences end, so all of them are
        made ready, at the length that the arguments ask for.

        Args:
            batch_size: Sentences of the largest batch; 64.
            num_beams: Beams; the checkpoint's.
            source_tokens: Tokens of its longest source.
            new_tokens: Tokens of its longest output.
        """
        most = _positive(
            "batch_size", batch_size, 1 if self.batch_invariant else DEFAULT_BATCH_SIZE
        )
        config = self.generation_config.merged(num_beams=num_beams)
        self._vocabularies.whole.warm_up(
            self.model, config, most, source_tokens=source_tokens, new_tokens=new_tokens
        )

    def translate(
        self,
        text: str | Sequence[str],
        src_lang: str | Sequence[str],
        tgt_lang: str | Sequence[str],
        **options: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Translate a text or a list of texts.

        Args:
            text: One text, or a sequence of them.
            src_lang: Source language: one for all, or one per text. A code of the model
                (``"fra_Latn"``), or a name that means one of them (``"fr"``, ``"French"``).
            tgt_lang: Target language, likewise.
            **options: See ``translate_iter``.

        Returns:
            A str for a str, a list in the same order for a sequence. With
            ``num_return_sequences`` above 1, a list of that many translations, best first, stands
            in the place of each str.

        Raises:
            UnsupportedLanguageError: If the model does not have a language.
            ConfigError: If an option is unknown or out of range.
            InputError: If there are not as many languages as texts.
        """
        single = isinstance(text, str)
        if not isinstance(text, Sequence) or isinstance(text, (bytes, bytearray)):
            raise InputError(
                f"text is a {type(text).__name__}; give a str or a sequence of them, or call "
                "translate_iter with any other iterable"
            )
        texts = [text] if isinstance(text, str) else list(text)
        prefix = options.get("target_prefix", "")
        per_text = {"src_lang": src_lang, "tgt_lang": tgt_lang, "target_prefix": prefix}
        for name, given in per_text.items():
            if not isinstance(given, (str, Sequence)):
                found = type(given).__name__
                raise InputError(f"{name} is a {found}; give a str for all texts, or one for each")
            if not isinstance(given, str) and len(given) != len(texts):
                raise InputError(
                    f"{len(texts)} texts were given with {len(given)} values of {name}; give one "
                    "for all, or one per text"
                )
        if single:
            options.setdefault("show_progress_bar", False)
        wanted = options.get("num_return_sequences") or self.generation_config.num_return_sequences
        results = [
            [result.text, *(other.text for other in result.alternatives)] if wanted > 1
            else result.text
            for result in self.translate_iter(texts, src_lang, tgt_lang, **options)
        ]  # fmt: skip
        return results[0] if single else results

    def translate_iter(  # noqa: PLR0913
        self,
        texts: Iterable[str],
        src_lang: str | Iterable[str],
        tgt_lang: str | Iterable[str],
        *,
        target_prefix: str | Iterable[str] = "",
        batch_size: int | None = None,
        max_batch_tokens: int | None = None,
        max_input_tokens: int | None = None,
        split: Split = "auto",
        target_vocab: TargetTokens | None = None,
        show_progress_bar: bool | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        **generation_options: Any,  # noqa: ANN401
    ) -> Iterator[TranslationResult]:
        """Translate texts lazily, in order; an endless iterable is fine.

        Every sentence is translated on its own: these models were trained on single sentences and
        drop some of several.

        Args:
            texts: What to translate.
            src_lang: Source language, one for all or one per text.
            tgt_lang: Target language, one for all or one per text.
            target_prefix: What the translation must begin with, one for all or one per text.
            batch_size: Most sentences that are generated together; 64. Where memory runs out,
                half as many go on.
            max_batch_tokens: Most padded source tokens that are generated together; 2048.
            max_input_tokens: Longest sentence; a longer one is cut at clauses and flagged. The
                smaller of 512 and what the checkpoint names.
            split: ``"auto"`` cuts texts into sentences, ``"off"`` does not, a callable
                ``(text, language) -> pieces`` does it its own way.
            target_vocab: Token ids that translations may be made of, for all target languages or
                by language (those that are not named may use all): a smaller head is faster.
                Probabilities are among these tokens. ``None`` allows all.
            show_progress_bar: On standard error; ``None`` shows it on a terminal only.
            on_progress: Called with what is newly done whenever sentences are, which is before
                their texts' results can be handed over in order.
            **generation_options: Fields of ``GenerationConfig`` (``num_beams``,
                ``max_new_tokens``, ``length_penalty``, ``do_sample``, …); unset ones are the
                checkpoint's. ``max_new_tokens`` follows the length of the source where unset.

        Returns:
            One result per text, as they are asked for.

        Raises:
            UnsupportedLanguageError: If the model does not have a language.
            ConfigError: If an option is unknown or out of range; at once, before a text is read.
            InputError: If a text is no str, or there are fewer languages than texts.
        """
        if isinstance(texts, str) or not isinstance(texts, Iterable):
            found = type(texts).__name__
            raise InputError(f"texts is one {found}; give an iterable of texts, or call translate")
        config = self.generation_config.merged(**generation_options)
        batch_size = _positive("batch_size", batch_size, DEFAULT_BATCH_SIZE)
        budget = _positive("max_batch_tokens", max_batch_tokens, DEFAULT_MAX_BATCH_TOKENS)
        limit = _positive("max_input_tokens", max_input_tokens, self._longest_input())
        if limit < SHORTEST_LIMIT:
            raise ConfigError(
                f"max_input_tokens is {limit}, language and end mark counted; below "
                f"{SHORTEST_LIMIT} hardly a word would stay whole"
            )
        src_lang, tgt_lang = (
            self.resolve_language(given) if isinstance(given, str) else given
            for given in (src_lang, tgt_lang)
        )
        items = (
            prepare_item(
                self.tokenizer,
                config,
                _text(text),
                self.resolve_language(source),
                self.resolve_language(target),
                target_prefix=prefix,
                split=split,
                max_input_tokens=limit,
            )
            for text, source, target, prefix in zip(
                texts,
                _each("src_lang", src_lang),
                _each("tgt_lang", tgt_lang),
                _each("target_prefix", target_prefix),
                strict=False,  # texts end first, or _each raises
            )
        )
        total = len(texts) if isinstance(texts, Sequence) else None
        hidden = None if show_progress_bar is None else not show_progress_bar
        vocabulary_of = self._vocabularies.by_language(target_vocab, self.resolve_language)
        limits = BatchLimits(
            sentences=1 if self.batch_invariant else batch_size, source_tokens=budget
        )
        window = WINDOW_BATCHES * batch_size
        tell = [] if on_progress is None else [on_progress]
        translate = partial(
            generate_items, self.model, vocabulary_of=vocabulary_of, config=config, limits=limits
        )
        return self._results(items, translate, window, tell, total=total, hidden=hidden)

    def resolve_language(self, name: str) -> str:
        """Return the model's code for a language.

        Raises:
            UnsupportedLanguageError: If the model does not know it.
        """
        if not isinstance(name, str):
            raise InputError(f"a language must be a str; found {type(name).__name__}")
        code = self.tokenizer.resolve_language(name)
        if code not in self.languages:
            raise UnsupportedLanguageError(
                f"language {name!r} ({code}) is not one this model was trained on; it knows "
                f"{', '.join(self.languages)}"
            )
        return code

    def _longest_input(self) -> int:
        return min(LONGEST_INPUT, self.model.config.max_positions)

    def _results(
        self,
        items: Iterator[Item],
        translate: Callable[..., list[SegmentHypotheses]],
        window: int,
        listeners: list[Callable[[Progress], None]],
        *,
        total: int | None,
        hidden: bool | None,
    ) -> Iterator[TranslationResult]:
        with ProgressBar(total=total, unit="text", hidden=hidden) as bar:
            while ahead := list(islice(items, window)):
                found = translate(ahead, listeners=[bar.show, *listeners])
                for item, hypotheses in zip(ahead, found, strict=True):
                    yield assemble(self.tokenizer, item, hypotheses)


def _each(name: str, value: str | Iterable[str]) -> Iterator[str]:
    """Yield one value per text; a single one for ever."""
    if isinstance(value, str):
        yield from repeat(value)
    yield from value
    raise InputError(f"{name} has fewer values than there are texts; give one for all or one each")


def _text(text: object) -> str:
    if not isinstance(text, str):
        raise InputError(f"a text must be a str; found {type(text).__name__}")
    return text


def _positive(name: str, value: int | None, default: int) -> int:
    if value is None:
        return default
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} is {value!r}; it must be an integer, at least 1")
    return value
