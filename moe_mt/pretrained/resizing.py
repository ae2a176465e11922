"""Another number of rows for a model's embedding, and for its head."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_mt.errors import ConfigError
from moe_mt.models import TokenEmbedding

__all__ = ["resize_embeddings", "wanted_rows"]

SAMPLE = 4096

SPREAD = 1e-5
"""Of the old rows' covariance, the share that new rows have."""


def wanted_rows(model: Any, rows: int | None, multiple: int | None) -> int:  # noqa: ANN401
    """Return the number of rows that is asked for.

    Args:
        model: A documented model.
        rows: ``None`` keeps those there are.
        multiple: Round up to a multiple of this, if any.

    Raises:
        ConfigError: If a number is no positive integer.
    """
    if rows is None:
        rows = int(model.get_input_embeddings().weight.shape[0])
    if multiple is not None:
        if not isinstance(multiple, int):
            # The sentence of the published classes, which their tests look for.
            raise ConfigError(
                f"Asking to pad the embedding matrix to a multiple of `{multiple}`, which is not "
                "and integer. Please make sure to pass an integer"
            )
        if multiple < 1:
            raise ConfigError(f"pad_to_multiple_of is {multiple}; expected a positive integer")
        rows = -(-rows // multiple) * multiple
    if not isinstance(rows, int) or rows < 1:
        raise ConfigError(f"new_num_tokens is {rows!r}; expected a positive integer")
    return rows


def resize_embeddings(model: Any, rows: int, mean_resizing: bool) -> None:  # noqa: ANN401
    """Give a model's embedding and head ``rows`` rows; tied ones stay tied.

    Args:
        model: A documented model.
        rows: How many; where there are more now, the last are lost.
        mean_resizing: Whether new rows are like the old ones' mean, or drawn from N(0, init_std).
    """
    config = model.config
    embedding, head, tied = (
        model.get_input_embeddings(),
        model.get_output_embeddings(),
        model._tied(),
    )
    resize = partial(_resized, rows=rows, std=config.init_std, mean=mean_resizing)
    pad = config.pad_token_id
    pad = pad if pad is not None and pad < rows else None
    made = TokenEmbedding(rows, embedding.weight.shape[1], pad)
    made.weight = nn.Parameter(resize(embedding.weight), embedding.weight.requires_grad)
    model.set_input_embeddings(made)
    if head is not None and not tied:
        head.weight = nn.Parameter(resize(head.weight), head.weight.requires_grad)
        head.out_features = rows
    config.vocab_size = rows
    if tied:
        model.tie_weights()


@torch.no_grad()
def _resized(weight: Tensor, rows: int, std: float, mean: bool) -> Tensor:
    """Return (rows, D): the old rows as far as they go, and new ones."""
    kept = min(rows, weight.shape[0])
    resized = weight.new_empty(rows, weight.shape[1])
    resized[:kept] = weight[:kept]
    new = resized[kept:]
    if len(new) == 0 or weight.is_meta:
        return resized
    if not mean:
        new.normal_(0, std)
        return resized
    centre = weight.mean(0, dtype=torch.float32)
    # A mixture of old rows' deviations has their covariance without computing it; a sample of the
    # rows is enough of them.
    sample = weight[torch.randperm(len(weight), device=weight.device)[:SAMPLE]].float()
    deviations = (sample - centre) * (SPREAD / max(1, len(sample) - 1)) ** 0.5
    for piece in new.split(SAMPLE):
        mixture = torch.randn(len(piece), len(sample), device=weight.device)
        piece.copy_(centre + mixture @ deviations)
    return resized
