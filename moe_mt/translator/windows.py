"""The sentences of some items, generated together and put back where they belong."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

from moe_mt.generation import BatchLimits, GenerationConfig, Hypothesis, Request, generate_each
from moe_mt.models import Seq2SeqTransformer
from moe_mt.translator.items import Item, Job
from moe_mt.translator.progress import Progress
from moe_mt.translator.vocabularies import Vocabulary

__all__ = ["SegmentHypotheses", "generate_items"]

SegmentHypotheses: TypeAlias = list[list[Hypothesis] | None]
"""The hypotheses of an item's segments; ``None`` for one without a job."""


def generate_items(
    model: Seq2SeqTransformer,
    items: Sequence[Item],
    *,
    vocabulary_of: Callable[[str], Vocabulary],
    config: GenerationConfig,
    limits: BatchLimits,
    listeners: Sequence[Callable[[Progress], None]],
) -> list[SegmentHypotheses]:
    """Generate every sentence of some items, long ones first.

    Args:
        model: In evaluation mode.
        items: What to translate.
        vocabulary_of: What may be generated in a target language.
        config: How to decode.
        limits: How much is decoded together.
        listeners: Told of what is done, as it is done.

    Returns:
        For each item the hypotheses of its segments.
    """
    found: list[SegmentHypotheses] = [[None] * len(item.jobs) for item in items]
    missing = [sum(job is not None for job in item.jobs) for item in items]
    _tell(listeners, Progress(texts=missing.count(0)))
    groups: dict[Vocabulary, list[tuple[int, int]]] = {}
    for number, item in enumerate(items):
        places = groups.setdefault(vocabulary_of(item.tgt_lang), [])
        places += [(number, k) for k, job in enumerate(item.jobs) if job is not None]
    for vocabulary, places in groups.items():
        places.sort(key=lambda place: -len(_job(items, place).source_tokens))
        requests = [_request(_job(items, place)) for place in places]
        with vocabulary.in_use():
            for rank, hypotheses in generate_each(
                model,
                requests,
                config,
                limits=limits,
                step=vocabulary.step,
                vocabulary=vocabulary.tokens,
            ):
                number, segment = places[rank]
                found[number][segment] = hypotheses
                missing[number] -= 1
                is_whole = missing[number] == 0
                tokens = len(hypotheses[0].tokens)
                _tell(listeners, Progress(texts=int(is_whole), sentences=1, tokens=tokens))
    return found


def _job(items: Sequence[Item], place: tuple[int, int]) -> Job:
    number, segment = place
    job = items[number].jobs[segment]
    assert job is not None, "a segment without a job is not generated"
    return job


def _request(job: Job) -> Request:
    return Request(
        source_tokens=job.source_tokens,
        forced_tokens=job.forced_tokens,
        max_new_tokens=job.max_new_tokens,
    )


def _tell(listeners: Sequence[Callable[[Progress], None]], progress: Progress) -> None:
    for listener in listeners:
        listener(progress)
