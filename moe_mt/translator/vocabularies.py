"""What may be generated in a target language, and what decodes over it."""

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from threading import RLock
from typing import Any, Literal, TypeAlias, cast

from moe_mt.errors import ConfigError
from moe_mt.generation import (
    BatchLimits,
    CompiledStep,
    DecodeStep,
    EagerStep,
    GenerationConfig,
    Request,
    depends_on_token_count,
    generate_each,
)
from moe_mt.models import Seq2SeqTransformer, TargetVocabulary

__all__ = ["TargetTokens", "Vocabularies", "Vocabulary"]

TargetTokens: TypeAlias = Iterable[int] | Mapping[str, Iterable[int]]
"""Tokens that may be generated: for all target languages, or by language."""

MOST_KEPT = 16
"""Sets of tokens whose heads are kept."""


class Vocabulary:
    """Tokens that may be generated, and what decodes over them."""

    def __init__(self, tokens: TargetVocabulary | None, step: DecodeStep) -> None:
        """Join them; ``tokens`` is ``None`` where all may be generated."""
        self.tokens = tokens
        self.step = step
        self._lock = RLock()

    @contextmanager
    def in_use(self) -> Generator[None]:
        """Let threads decode one after the other where the step can only do one batch at a time."""
        if isinstance(self.step, EagerStep):
            yield
            return
        with self._lock:
            yield

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made of; its lock is its own."""
        return {"tokens": self.tokens, "step": self.step}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start as new."""
        self.__init__(**state)

    def warm_up(
        self,
        model: Seq2SeqTransformer,
        config: GenerationConfig,
        sentences: int,
        *,
        source_tokens: int,
        new_tokens: int,
    ) -> None:
        """Decode ``sentences`` of a length, and if steps are compiled, every smaller batch."""
        is_compiled = isinstance(self.step, CompiledStep)
        steps = new_tokens if is_compiled else 1
        sizes = [sentences]
        while is_compiled and sizes[-1] > 1:
            sizes.append((sizes[-1] + 1) // 2)
        config = GenerationConfig(num_beams=config.num_beams, min_new_tokens=steps)
        source = [model.config.eos_id] * source_tokens
        for size in sizes:
            requests = [Request(source_tokens=source, max_new_tokens=steps)] * size
            limits = BatchLimits(sentences=size)
            for _ in generate_each(model, requests, config, limits=limits, step=self.step):
                pass


class Vocabularies:
    """The whole vocabulary, and parts of it, each made once."""

    def __init__(self, model: Seq2SeqTransformer, compile: bool | Literal["auto"]) -> None:
        """Prepare the whole one.

        Raises:
            ConfigError: If ``compile`` is neither a bool nor ``"auto"``.
        """
        self._model = model
        self._compile: bool | Literal["auto"] = compile
        self._parts: dict[tuple[object, ...], Vocabulary] = {}
        self.whole = Vocabulary(None, _decode_step(model, compile))

    def by_language(
        self, given: TargetTokens | None, resolve: Callable[[str], str]
    ) -> Callable[[str], Vocabulary]:
        """Return what gives each language's vocabulary.

        Args:
            given: As a caller names them; ``None`` is the whole for all.
            resolve: From a language's name to its code.

        Raises:
            ConfigError: If a token is not in the model's vocabulary.
        """
        if given is None:
            return lambda language: self.whole
        if isinstance(given, Mapping):
            named = cast(Mapping[str, Iterable[int]], given)
            parts = {resolve(name): self._part(frozenset(ids)) for name, ids in named.items()}
            return lambda language: parts.get(language, self.whole)
        part = self._part(frozenset(given))
        return lambda language: part

    def _part(self, tokens: frozenset[int]) -> Vocabulary:
        weight = self._model.embedding.weight
        # The head is a copy, which must not outlive what it was copied from.
        key = (tokens, weight.data_ptr(), weight.dtype, weight.device, weight._version)
        if key not in self._parts:
            if len(self._parts) == MOST_KEPT:
                self._parts.pop(next(iter(self._parts)))
            vocabulary = TargetVocabulary(self._model, tokens)
            step = _decode_step(self._model, self._compile, vocabulary)
            self._parts[key] = Vocabulary(vocabulary, step)
        return self._parts[key]


def _decode_step(
    model: Seq2SeqTransformer,
    compile: bool | Literal["auto"],
    vocabulary: TargetVocabulary | None = None,
) -> DecodeStep:
    """Return what runs the decoder, over a vocabulary if there is one.

    On a CPU a compiled step gains or loses a tenth and takes a minute to compile, so it is for
    those who ask for it.
    """
    if compile not in (True, False, "auto"):
        raise ConfigError(f"compile is {compile!r}; choose 'auto', True or False")
    pads = not depends_on_token_count(model)
    on_gpu = model.embedding.weight.device.type == "cuda"
    if compile is True or (compile == "auto" and on_gpu and pads):
        return CompiledStep(vocabulary or model, pad_sentences=pads)
    return EagerStep(vocabulary or model)
