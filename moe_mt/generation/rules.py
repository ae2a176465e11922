"""Which rules apply to the scores of the next token, and in what order.

A rule takes the history (rows, length) int64 and the scores (rows, V) float32 of the token that
follows it, and returns new scores. Functions with that signature can be given by the caller too.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from moe_mt.errors import InputError
from moe_mt.generation.logits import (
    NOT_FORCED,
    SequenceBias,
    ban,
    ban_repeated_ngrams,
    force,
    force_any,
    keep_min_p,
    keep_probable,
    keep_probable_by_entropy,
    keep_top_k,
    keep_top_p,
    keep_typical,
    penalize_repetition,
    raise_end,
    replace_invalid,
)

__all__ = [
    "ForcedTokens",
    "LogitsProcessor",
    "Rule",
    "RuleContext",
    "logits_rules",
    "rows_of",
    "select_rows",
]

Rule: TypeAlias = Callable[[Tensor, Tensor], Tensor]

Options: TypeAlias = Mapping[str, Any]
"""Options by the names of transformers; what is missing or ``None`` is off."""


class LogitsProcessor:
    """Rules, applied one after the other to the scores of all rows at once."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        """Take the rules in their order."""
        self.rules = list(rules)

    def __call__(self, history: Tensor, scores: Tensor) -> Tensor:
        """Apply the rules to scores (rows, V) that follow a history (rows, length)."""
        for rule in self.rules:
            scores = rule(history, scores)
        return scores

    def select(self, rows: Tensor) -> None:
        """Go on with some of the rows, (N,) int64, in that order."""
        for rule in self.rules:
            select_rows(rule, rows)


def select_rows(part: object, rows: Tensor) -> None:
    """Let a part of a search go on with some of its rows, if it keeps anything about rows."""
    if isinstance(part, KeepsRows):
        part.select(rows)


def rows_of(sentences: Tensor, rows_per_sentence: int) -> Tensor:
    """Return (N * rows_per_sentence,) int64: the rows of sentences (N,)."""
    within = torch.arange(rows_per_sentence, device=sentences.device)
    return (sentences[:, None] * rows_per_sentence + within).flatten()


@runtime_checkable
class KeepsRows(Protocol):
    """Whatever knows rows apart."""

    def select(self, rows: Tensor) -> None:
        """Go on with some of the rows, (N,) int64, in that order."""
        ...


class ForcedTokens:
    """A rule: what must follow the prompt, row by row."""

    def __init__(
        self, tokens: Sequence[Sequence[int]], device: torch.device, prompt_length: int = 1
    ) -> None:
        """Prepare the table.

        Args:
            tokens: For each row the tokens that must follow its prompt.
            device: Where the scores will be.
            prompt_length: Tokens of the history before the first generated one.
        """
        width = max(map(len, tokens), default=0)
        table = [[*row, *[NOT_FORCED] * (width - len(row))] for row in tokens]
        self._table = torch.tensor(table, device=device).view(len(table), width)
        self._prompt_length = prompt_length

    def select(self, rows: Tensor) -> None:
        """Go on with some of the rows, (N,) int64, in that order."""
        self._table = self._table[rows]

    def at(self, step: int) -> Tensor | None:
        """Return (rows,) int64: each row's forced token at ``step`` or -1; ``None`` if none is."""
        return self._table[:, step] if step < self._table.shape[1] else None

    def __call__(self, history: Tensor, scores: Tensor) -> Tensor:
        """Ban every token but the forced one, which gets the score 0."""
        forced = self.at(history.shape[1] - self._prompt_length)
        return scores if forced is None else force(scores, forced)


@dataclass(frozen=True, kw_only=True)
class RuleContext:
    """What rules need to know besides their options."""

    device: torch.device
    """Where the scores will be."""

    eos_ids: tuple[int, ...]
    """End marks."""

    prompt_length: int = 1
    """Tokens of the history before the first generated one."""

    forced: ForcedTokens | None = None
    """What must follow the prompt."""

    max_length: int | None = None
    """Length of the longest history, its prompt counted."""

    source_tokens: Tensor | None = None
    """(B, S) int64, for rules about the source."""

    rows_per_sentence: int = 1
    """Rows ``b * rows_per_sentence`` and following belong to sentence ``b``."""

    allowed_tokens: Callable[[int, Tensor], Sequence[int]] | None = None
    """``(sentence, history (length,)) -> tokens`` that may follow."""

    extra: Sequence[Rule] = ()
    """The caller's own rules; they come before those of sampling."""

    @property
    def end_tokens(self) -> Tensor:
        """(N,) int64: the end marks that the vocabulary has."""
        return self.tensor([token for token in self.eos_ids if token >= 0])

    @property
    def source_rows(self) -> Tensor:
        """(rows, S) int64: each row's source."""
        assert self.source_tokens is not None, "rules about the source need its tokens"
        return self.source_tokens.repeat_interleave(self.rows_per_sentence, 0)

    def tensor(self, tokens: Sequence[int]) -> Tensor:
        """Return tokens as (N,) int64 on the device."""
        return torch.tensor(list(tokens), dtype=torch.int64, device=self.device)


def logits_rules(options: Options, context: RuleContext) -> list[Rule]:
    """Return the rules that options ask for, in the order of transformers 4.57.

    Args:
        options: As in ``GenerationConfig``, and those that only the documented ``generate`` has.
        context: What the rules need to know besides.
    """
    makers = [*PROCESSORS, lambda *_: context.extra]
    if options.get("do_sample"):
        makers += WARPERS
    makers.append(_renormalization)
    return [rule for make in makers for rule in make(options, context)]


Rules: TypeAlias = Iterable[Rule]


def _sequence_bias(options: Options, context: RuleContext) -> Rules:
    given = options.get("sequence_bias")
    if given:
        pairs = given.items() if isinstance(given, Mapping) else given
        biases = {tuple(tokens): bias for tokens, bias in pairs}
        yield SequenceBias(biases, context.device)


def _source_repetition(options: Options, context: RuleContext) -> Rules:
    penalty = options.get("encoder_repetition_penalty")
    if penalty not in (None, 1):
        source = context.source_rows
        # The other way round: tokens of the source are made more likely.
        yield lambda _, scores: penalize_repetition(scores, source, 1 / penalty)


def _repetition(options: Options, context: RuleContext) -> Rules:
    penalty = options.get("repetition_penalty")
    if penalty not in (None, 1):
        yield lambda history, scores: penalize_repetition(scores, history, penalty)


def _repeated_ngrams(options: Options, context: RuleContext) -> Rules:
    size = options.get("no_repeat_ngram_size")
    if size:
        yield lambda history, scores: ban_repeated_ngrams(scores, history, size)


def _source_ngrams(options: Options, context: RuleContext) -> Rules:
    size = options.get("encoder_no_repeat_ngram_size")
    if size:
        source = context.source_rows
        yield lambda history, scores: ban_repeated_ngrams(scores, history, size, source)


def _bad_words(options: Options, context: RuleContext) -> Rules:
    ends = [[token] for token in context.eos_ids]
    words = [tuple(word) for word in options.get("bad_words_ids") or () if list(word) not in ends]
    if words:
        yield SequenceBias(dict.fromkeys(words, -torch.inf), context.device)


def _minimum(options: Options, context: RuleContext) -> Rules:
    more = options.get("min_new_tokens")
    least = options.get("min_length") or 0 if more is None else context.prompt_length + more
    if least > context.prompt_length:
        ends = context.end_tokens
        yield lambda history, scores: ban(scores, ends) if history.shape[1] < least else scores


def _allowed_tokens(options: Options, context: RuleContext) -> Rules:
    allowed = context.allowed_tokens
    if allowed is not None:

        def keep_allowed(history: Tensor, scores: Tensor) -> Tensor:
            kept = torch.full_like(scores, -torch.inf)
            for row, tokens in enumerate(history):
                sentence = row // context.rows_per_sentence
                ids = context.tensor(allowed(sentence, tokens))
                if len(ids) == 0:
                    raise InputError(
                        f"prefix_allowed_tokens_fn allows no token for sentence {sentence} after "
                        f"{tokens.tolist()}; let it return one at least"
                    )
                kept[row, ids] = scores[row, ids]
            return kept

        yield keep_allowed


def _forced(options: Options, context: RuleContext) -> Rules:
    if context.forced is not None:
        yield context.forced


def _forced_end(options: Options, context: RuleContext) -> Rules:
    given = options.get("forced_eos_token_id")
    if given is not None and context.max_length is not None:
        ends = context.tensor([given] if isinstance(given, int) else given)
        last = context.max_length - 1
        yield (
            lambda history, scores: force_any(scores, ends) if history.shape[1] == last else scores
        )


def _invalid(options: Options, context: RuleContext) -> Rules:
    if options.get("remove_invalid_values"):
        yield lambda _, scores: replace_invalid(scores)


def _decay(options: Options, context: RuleContext) -> Rules:
    given = options.get("exponential_decay_length_penalty")
    if given is not None:
        start, factor = given
        ends = context.end_tokens

        def decay(history: Tensor, scores: Tensor) -> Tensor:
            late = history.shape[1] - context.prompt_length - start
            return raise_end(scores, ends, factor**late - 1) if late > 0 else scores

        yield decay


def _suppressed(options: Options, context: RuleContext) -> Rules:
    given = options.get("suppress_tokens")
    if given:
        tokens = context.tensor(given)
        yield lambda _, scores: ban(scores, tokens)


def _suppressed_at_begin(options: Options, context: RuleContext) -> Rules:
    given = options.get("begin_suppress_tokens")
    if given:
        tokens = context.tensor(given)
        # A forced token is no choice, so the first choice is the one after it.
        forced = context.forced is not None and context.forced.at(0) is not None
        begin = context.prompt_length + forced
        yield lambda history, scores: ban(scores, tokens) if history.shape[1] == begin else scores


def _temperature(options: Options, context: RuleContext) -> Rules:
    temperature = options.get("temperature")
    if temperature not in (None, 1):
        yield lambda _, scores: scores / temperature


def _top_k(options: Options, context: RuleContext) -> Rules:
    count = options.get("top_k")
    if count:
        kept = max(count, _least_kept(options, context))
        yield lambda _, scores: keep_top_k(scores, kept)


def _top_p(options: Options, context: RuleContext) -> Rules:
    probability, least = options.get("top_p"), _least_kept(options, context)
    if probability is not None and probability < 1:
        yield lambda _, scores: keep_top_p(scores, probability, least)


def _min_p(options: Options, context: RuleContext) -> Rules:
    share, least = options.get("min_p"), _least_kept(options, context)
    if share is not None:
        yield lambda _, scores: keep_min_p(scores, share, least)


def _typical(options: Options, context: RuleContext) -> Rules:
    mass, least = options.get("typical_p"), _least_kept(options, context)
    if mass is not None and mass < 1:
        yield lambda _, scores: keep_typical(scores, mass, least)


def _epsilon(options: Options, context: RuleContext) -> Rules:
    epsilon, least = options.get("epsilon_cutoff"), _least_kept(options, context)
    if epsilon:
        yield lambda _, scores: keep_probable(scores, epsilon, least)


def _eta(options: Options, context: RuleContext) -> Rules:
    epsilon, least = options.get("eta_cutoff"), _least_kept(options, context)
    if epsilon:
        yield lambda _, scores: keep_probable_by_entropy(scores, epsilon, least)


def _renormalization(options: Options, context: RuleContext) -> Rules:
    if options.get("renormalize_logits"):
        yield lambda _, scores: scores.log_softmax(-1)


def _least_kept(options: Options, context: RuleContext) -> int:
    """Beam search needs candidates besides the end marks, so its rows keep one token more."""
    return 1 + max(1, len(context.eos_ids)) if options.get("num_beams", 1) > 1 else 1


PROCESSORS = (
    _sequence_bias,
    _source_repetition,
    _repetition,
    _repeated_ngrams,
    _source_ngrams,
    _bad_words,
    _minimum,
    _allowed_tokens,
    _forced,
    _forced_end,
    _invalid,
    _decay,
    _suppressed,
    _suppressed_at_begin,
)

WARPERS = (_temperature, _top_k, _top_p, _min_p, _typical, _epsilon, _eta)
