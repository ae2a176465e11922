"""Which token sequences are generated together."""

from collections.abc import Sequence

__all__ = ["plan_batches"]


def plan_batches(lengths: Sequence[int], batch_size: int, max_batch_tokens: int) -> list[list[int]]:
    """Group sequences of similar length, longest first.

    Longest first, so that running out of memory shows at once and not at the end.

    Args:
        lengths: Tokens of each sequence.
        batch_size: Most sequences in a batch.
        max_batch_tokens: Most padded tokens in a batch; a longer sequence stands alone.

    Returns:
        Indices into ``lengths``, batch by batch; every index once.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        current = batches[-1] if batches else []
        room = current and (len(current) + 1) * lengths[current[0]] <= max_batch_tokens
        if room and len(current) < batch_size:
            current.append(index)
        else:
            batches.append([index])
    return batches
