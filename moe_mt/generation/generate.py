"""From sources to hypotheses: which sentences are decoded together, and how each is searched."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from moe_mt.errors import ConfigError, InputError, PlacementError
from moe_mt.generation.beam import BeamSearch, candidates_per_beam, take_best_several
from moe_mt.generation.config import GenerationConfig
from moe_mt.generation.decode_step import DecodeStep, EagerStep
from moe_mt.generation.greedy import GreedySearch, take_best
from moe_mt.generation.hypotheses import Hypothesis, hypothesis_from_tokens
from moe_mt.generation.rules import ForcedTokens, LogitsProcessor, RuleContext, logits_rules
from moe_mt.generation.running_batch import BatchStrategy, Found, Newcomers, RunningBatch
from moe_mt.generation.sampling import DrawnCandidates, DrawnTokens, uniform_table
from moe_mt.generation.stopping import Stopping
from moe_mt.models import Seq2SeqTransformer, TargetVocabulary

__all__ = [
    "BatchLimits",
    "Request",
    "depends_on_token_count",
    "generate",
    "generate_each",
    "translation_rules",
]

LOGGER = logging.getLogger(__name__)

FIRST_CACHE_STEPS = 32
"""Steps the cache has room for at first; longer outputs make it grow."""

REFILL_SHARE = 0.25
"""Share of a batch that those who join make up at least: encoding few sentences is dear."""

CANDIDATES_PER_BEAM = candidates_per_beam(1)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sentence to generate from."""

    source_tokens: Sequence[int]
    """What the encoder reads."""

    forced_tokens: Sequence[int] = ()
    """What must follow the decoder's start: a language token, a prefix of the target, both."""

    max_new_tokens: int
    """Most tokens of the output, forced ones and the end mark counted."""


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """How much is decoded together."""

    sentences: int
    """Most sentences."""

    source_tokens: int | None = None
    """Most source tokens, padding counted; a longer sentence stands alone. ``None``: no limit."""

    def __post_init__(self) -> None:
        """Check the limits."""
        for name in ("sentences", "source_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"a batch of {value} {name} leaves room for none; give 1 or more")


@torch.no_grad()
def generate(
    model: Seq2SeqTransformer,
    source_tokens: Tensor,
    source_mask: Tensor | None,
    config: GenerationConfig,
    *,
    forced_tokens: Sequence[Sequence[int]],
    max_new_tokens: Sequence[int],
    generator: torch.Generator | None = None,
    step: DecodeStep | None = None,
) -> list[list[Hypothesis]]:
    """Generate ``num_return_sequences`` hypotheses for every source.

    A sentence's hypotheses do not depend on what else is in the batch, up to rounding. The memory
    is computed once per sentence; beams and samples are rows that attend to it.

    Args:
        model: In evaluation mode.
        source_tokens: (B, S) int64, on the model's device.
        source_mask: (B, S) bool, true where a token is real; ``None`` where all are.
        config: How to decode. Its length limit is not read here.
        forced_tokens: For each sentence the tokens that must follow the decoder's start: a
            language token, a prefix of the target, both or nothing. They add nothing to scores.
        max_new_tokens: Most tokens for each sentence, forced tokens and the end mark counted.
        generator: A CPU generator that sampling draws from, instead of ``config.seed``.
        step: Runs the decoder; eagerly where ``None``.

    Returns:
        For each sentence its hypotheses; those of beam search are sorted, best first, and fewer
        than asked for where fewer are possible because all tokens were forced.

    Raises:
        InputError: If the arguments disagree about the number of sentences, or a limit is below 1.
    """
    _check(source_tokens.shape[0], forced_tokens, max_new_tokens)
    sources = _without_padding(source_tokens, source_mask)
    requests = [
        Request(source_tokens=source, forced_tokens=forced, max_new_tokens=limit)
        for source, forced, limit in zip(sources, forced_tokens, max_new_tokens, strict=True)
    ]
    limits = BatchLimits(sentences=max(1, len(requests)))
    found = dict(
        generate_each(model, requests, config, limits=limits, generator=generator, step=step)
    )
    return [found[number] for number in range(len(requests))]


def generate_each(
    model: Seq2SeqTransformer,
    requests: Sequence[Request],
    config: GenerationConfig,
    *,
    limits: BatchLimits,
    generator: torch.Generator | None = None,
    step: DecodeStep | None = None,
    vocabulary: TargetVocabulary | None = None,
) -> Iterator[tuple[int, list[Hypothesis]]]:
    """Generate for each request, and hand over what is done as it is done.

    Requests start in their order: put long ones first, so that batches have little padding, and
    too little memory shows at once and not at the end. Sentences that end make room for others.
    Where memory runs out, half as many are decoded together, and those that were not done start
    again.

    Where the model's capacity depends on the number of tokens (``eval_capacity_fraction`` below 1),
    a batch stays as it began until all of it is done.

    Args:
        model: In evaluation mode.
        requests: What to generate from.
        config: How to decode. Its length limit is not read here.
        limits: How much is decoded together.
        generator: A CPU generator that sampling draws from, instead of ``config.seed``.
        step: Runs the decoder, over ``vocabulary`` if there is one; eagerly where ``None``.
        vocabulary: The tokens that may be generated; all where ``None``.

    Yields:
        The place of a request among ``requests``, and its hypotheses.

    Raises:
        PlacementError: If there is not enough memory for one sentence.
        InputError: If a forced token is not in the vocabulary, or a limit is below 1.
    """
    _check_limits([request.max_new_tokens for request in requests])
    waiting = list(range(len(requests)))
    step = step or EagerStep(vocabulary or model)
    search = _Search(model, requests, config, generator, step, vocabulary)
    while True:
        try:
            for number, hypotheses in search.run(waiting, limits):
                waiting.remove(number)
                yield number, hypotheses
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            most = search.together // 2
            if most == 0:
                raise PlacementError(
                    f"there is not enough memory to translate one sentence of "
                    f"{len(requests[waiting[0]].source_tokens)} tokens with "
                    f"{config.num_beams} beams ({error}); free memory, use fewer beams or set a "
                    "lower max_new_tokens"
                ) from error
            LOGGER.warning(
                "out of memory with %d sentences at once; going on with %d (set batch_size to "
                "begin there)",
                search.together,
                most,
            )
            limits = BatchLimits(sentences=most, source_tokens=limits.source_tokens)
        else:
            return
        # Here, where the error no longer holds the tensors of the batch.
        step.release()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


class _Search:
    """Lets requests join a running batch, each group of them with a search of its own."""

    def __init__(
        self,
        model: Seq2SeqTransformer,
        requests: Sequence[Request],
        config: GenerationConfig,
        generator: torch.Generator | None,
        step: DecodeStep,
        vocabulary: TargetVocabulary | None,
    ) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self.requests = requests
        self.config = config
        self.generator = generator
        self.step = step
        special = (model.config.pad_id, model.config.eos_id, model.config.decoder_start_id)
        self.pad_id, self.eos_id, self.start_id = self._narrow(special)
        self.beams = max(config.num_beams, config.num_return_sequences)
        self.together = 0
        """Sentences that were last decoded together."""
        self.is_fixed = depends_on_token_count(model)
        if self.is_fixed and len(requests) > 1:
            LOGGER.warning(
                "the experts of this model drop tokens beyond a capacity that follows from how "
                "many there are (eval_capacity_fraction is not 1), so a translation depends on its "
                "batch: batches stay as they begin, nobody joins or leaves"
            )

    def run(
        self, waiting: Sequence[int], limits: BatchLimits
    ) -> Iterator[tuple[int, list[Hypothesis]]]:
        """Yield what is found for the requests ``waiting``, which start in that order."""
        waiting = list(waiting)
        batch = RunningBatch(self.step, self.beams, is_fixed=self.is_fixed)
        while waiting or batch.open_sentences:
            joining = self._who_joins(waiting, batch, limits)
            self.together = batch.open_sentences + len(joining)
            if joining:
                waiting = waiting[len(joining) :]
                batch.join(self._newcomers(joining))
            for number, found in batch.advance():
                yield number, self._hypotheses(number, found)

    def _who_joins(
        self, waiting: Sequence[int], batch: RunningBatch, limits: BatchLimits
    ) -> Sequence[int]:
        """Return as many of the waiting as there is room for, if that is worth an encoding."""
        still_open, width = batch.open_sentences, batch.memory_length
        if still_open and self.is_fixed:
            return ()
        count = 0
        for number in waiting:
            width = max(width, len(self.requests[number].source_tokens))
            sentences = still_open + count + 1
            is_first = sentences == 1
            if sentences > limits.sentences:
                break
            if not is_first and sentences * width > (limits.source_tokens or sentences * width):
                break
            count += 1
        is_worth_it = count >= REFILL_SHARE * (still_open + count) or count == len(waiting)
        return waiting[:count] if is_worth_it else ()

    @torch.inference_mode()
    def _newcomers(self, numbers: Sequence[int]) -> Newcomers:
        device = self.model.embedding.weight.device
        requests = [self.requests[number] for number in numbers]
        tokens, mask = _padded([r.source_tokens for r in requests], self.model.config.pad_id)
        tokens, mask = tokens.to(device), None if mask is None else mask.to(device)
        longest = max(request.max_new_tokens for request in requests)
        memory, _ = self.model.encode(tokens, mask)
        capacity = min(longest, FIRST_CACHE_STEPS)
        prompts = tokens.new_full((len(requests) * self.beams, 1), self.start_id)
        return Newcomers(
            numbers=numbers,
            strategy=self._strategy(requests, prompts),
            cache=self.model.new_cache(memory, mask, self.beams, capacity),
            prompts=prompts,
            longest=longest,
        )

    def _strategy(self, requests: Sequence[Request], prompts: Tensor) -> BatchStrategy:
        config, eos_id, device = self.config, self.eos_id, prompts.device
        prefixes = [self._narrow(request.forced_tokens) for request in requests]
        forced = ForcedTokens([prefix for prefix in prefixes for _ in range(self.beams)], device)
        rules = translation_rules(config, forced, eos_id, device)
        limits = [request.max_new_tokens for request in requests]
        uniforms = self._uniforms(requests, device)
        if config.num_beams > 1:
            return BeamSearch(
                prompts.view(len(requests), config.num_beams, 1),
                rules,
                Stopping(limits, (eos_id,), device),
                partial(take_best_several, CANDIDATES_PER_BEAM * config.num_beams)
                if uniforms is None
                else DrawnCandidates(uniforms),
                length_penalty=config.length_penalty,
                early_stopping=config.early_stopping,
            )
        return GreedySearch(
            prompts,
            rules,
            Stopping([limit for limit in limits for _ in range(self.beams)], (eos_id,), device),
            take_best if uniforms is None else DrawnTokens(uniforms),
            pad_id=self.pad_id,
            forced=forced,
            rows_per_sentence=self.beams,
            length_penalty=config.length_penalty,
        )

    def _uniforms(self, requests: Sequence[Request], device: torch.device) -> Tensor | None:
        config = self.config
        if not config.do_sample:
            return None
        return uniform_table(
            [(*request.source_tokens, *request.forced_tokens) for request in requests],
            max(request.max_new_tokens for request in requests),
            CANDIDATES_PER_BEAM * self.beams if config.num_beams > 1 else self.beams,
            seed=config.seed,
            generator=self.generator,
        ).to(device)

    def _narrow(self, tokens: Sequence[int]) -> Sequence[int]:
        return tokens if self.vocabulary is None else self.vocabulary.narrow(tokens)

    def _widen(self, tokens: Sequence[int]) -> Sequence[int]:
        return tokens if self.vocabulary is None else self.vocabulary.widen(tokens)

    def _hypotheses(self, number: int, found: Found) -> list[Hypothesis]:
        eos_id, source = self.model.config.eos_id, self.requests[number].source_tokens
        return [
            hypothesis_from_tokens(self._widen(tokens), score, eos_id=eos_id, source=source)
            for tokens, score in found[: self.config.num_return_sequences]
        ]


def depends_on_token_count(model: Seq2SeqTransformer) -> bool:
    """Whether what else is decoded changes a sentence's result, by taking capacity from it."""
    moe = model.config.moe
    return moe is not None and moe.eval_capacity_fraction != 1.0


def translation_rules(
    config: GenerationConfig, forced: ForcedTokens, eos_id: int, device: torch.device
) -> LogitsProcessor:
    """Return the rules of a configuration.

    Args:
        config: Which rules apply.
        forced: What must follow the decoder's start.
        eos_id: The end mark.
        device: Where the scores will be.
    """
    options = asdict(config) | {"min_new_tokens": config.new_token_minimum}
    context = RuleContext(device=device, eos_ids=(eos_id,), forced=forced)
    return LogitsProcessor(logits_rules(options, context))


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: on a CPU, PyTorch says so by the words of its allocator alone."""
    named = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return named or "DefaultCPUAllocator" in str(error)


def _padded(sources: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor | None]:
    """Return tokens (B, S) and where they are real, ``None`` if everywhere."""
    rows = [torch.tensor(source, dtype=torch.int64) for source in sources]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    lengths = torch.tensor([len(row) for row in rows])
    if (lengths == tokens.shape[1]).all():
        return tokens, None
    return tokens, torch.arange(tokens.shape[1]) < lengths[:, None]


def _without_padding(source_tokens: Tensor, source_mask: Tensor | None) -> list[list[int]]:
    sources = source_tokens.tolist()
    if source_mask is None:
        return sources
    return [
        [token for token, real in zip(tokens, mask, strict=True) if real]
        for tokens, mask in zip(sources, source_mask.tolist(), strict=True)
    ]


def _check(sentences: int, forced: Sequence[Sequence[int]], limits: Sequence[int]) -> None:
    if not len(forced) == len(limits) == sentences:
        raise InputError(
            f"generation got {sentences} sources, {len(forced)} rows of forced tokens and "
            f"{len(limits)} limits; give one of each per source"
        )
    _check_limits(limits)


def _check_limits(limits: Sequence[int]) -> None:
    if any(limit < 1 for limit in limits):
        raise InputError(
            f"a limit of {min(limits)} new tokens leaves room for none; give 1 or more"
        )
