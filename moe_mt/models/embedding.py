"""Token embedding, which is also the output head, and sinusoidal positions."""

# pyright: reportUnknownMemberType=false
# nn.Embedding is not fully typed.

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["SinusoidalPositions", "TokenEmbedding", "sinusoid_table"]


class TokenEmbedding(nn.Embedding):
    """One table (V, d_model) for tokens that come in, and for scores that go out."""

    def __init__(self, vocab_size: int, d_model: int, pad_id: int | None) -> None:
        """Build the table without drawing values for it; the row ``pad_id`` gets no gradient."""
        rows = torch.empty(vocab_size, d_model)
        super().__init__(vocab_size, d_model, pad_id, _weight=rows)

    def project(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states (..., d_model)."""
        return functional.linear(hidden, self.weight)


def sinusoid_table(rows: int, d_model: int, pad_id: int, device: torch.device) -> Tensor:
    """Return (rows, d_model) float32: sines of all frequencies, then cosines; row ``pad_id`` zero.

    Angles are computed in float32. An odd width gets one zero column.

    Source: Vaswani et al., arXiv:1706.03762, section 3.5, in fairseq's non-interleaved layout.
    """
    half = d_model // 2
    exponent = math.log(10000) / max(half - 1, 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=device) * -exponent)
    angles = torch.arange(rows, dtype=torch.float32, device=device)[:, None] * frequencies
    table = torch.zeros(rows, d_model, device=device)
    table[:, :half] = angles.sin()
    table[:, half : 2 * half] = angles.cos()
    if pad_id < rows:
        table[pad_id] = 0
    return table


class SinusoidalPositions(nn.Module):
    """Positions counted from ``pad_id + 1`` over the tokens that are not padding.

    The table is a cache, not a weight: it is never stored, and it grows when a longer input comes.
    """

    table: Tensor

    def __init__(self, max_positions: int, d_model: int, pad_id: int) -> None:
        """Build the table for ``max_positions`` tokens."""
        super().__init__()
        self.d_model = d_model
        self.pad_id = pad_id
        rows = max_positions + pad_id + 1
        device = torch.get_default_device()
        # On the meta device, sines cost seconds of imports; whoever builds there rebuilds it.
        real = torch.device("cpu") if device.type == "meta" else device
        table = sinusoid_table(rows, d_model, pad_id, real)
        self.register_buffer("table", table, persistent=False)

    def forward(self, tokens: Tensor, past_length: int | Tensor = 0) -> Tensor:
        """Return (B, L, d_model): the position embedding of every token.

        Args:
            tokens: (B, L) int64; padding gets the zero row and is not counted.
            past_length: Tokens that stood before, all of them counted: one number for all, or
                (B, 1) int64. For the latter, ``reserve`` must have been called.
        """
        real = tokens != self.pad_id
        positions = (real.cumsum(1) + past_length) * real + self.pad_id
        if isinstance(past_length, int):
            self.reserve(tokens.shape[1] + past_length)
        return self.table[positions]

    def reserve(self, length: int) -> None:
        """Have a row for each of ``length`` positions."""
        self._grown(length + self.pad_id + 1)

    def of_embeddings(self, length: int, past_length: int = 0) -> Tensor:
        """Return (1, L, D): positions of embeddings, among which no padding can be told.

        Args:
            length: How many there are.
            past_length: Tokens that stood before.
        """
        start = self.pad_id + 1 + past_length
        return self._grown(start + length)[None, start : start + length]

    def rebuild(self, device: torch.device, dtype: torch.dtype) -> None:
        """Compute the table anew on ``device``, for a model that was built on the meta device."""
        table = sinusoid_table(self.table.shape[0], self.d_model, self.pad_id, device)
        self.table = table.to(dtype)

    def _grown(self, rows: int) -> Tensor:
        if self.table.shape[0] < rows:
            # By doubling, as decoding asks for one row more at every step.
            rows = max(rows, 2 * self.table.shape[0])
            # A tensor of inference mode could not be used in training afterwards.
            with torch.inference_mode(False):
                table = sinusoid_table(rows, self.d_model, self.pad_id, self.table.device)
                self.table = table.to(self.table.dtype)
        return self.table
