"""What a forward pass is given, checked: every complaint names the argument."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_mt.errors import InputError
from moe_mt.losses import IGNORED_LABEL

__all__ = [
    "check_ids",
    "check_labels",
    "check_memory",
    "key_mask",
    "one_of",
    "padding_of",
    "past_length",
    "rows_of_heads",
]


def one_of(
    ids: Tensor | None, embeds: Tensor | None, d_model: int, prefix: str = ""
) -> tuple[int, int]:
    """Return batch and length of ids (B, L) or embeddings (B, L, d_model), of which there is one.

    Raises:
        InputError: If both are given, or neither, or one is no tensor of such a shape.
    """
    names = f"{prefix}input_ids", f"{prefix}inputs_embeds"
    if (ids is None) == (embeds is None):
        found = "neither is given" if ids is None else "both are given"
        raise InputError(
            f"You have to specify either {names[0]} or {names[1]}: one of them, and {found}"
        )
    given, name = (ids, names[0]) if ids is not None else (embeds, names[1])
    assert given is not None
    _check_tensor(given, name)
    if ids is not None and given.dim() != 2:
        raise InputError(f"{name} has shape {tuple(given.shape)}; expected (batch, length)")
    if ids is None and (given.dim() != 3 or given.shape[2] != d_model):
        raise InputError(
            f"{name} has shape {tuple(given.shape)}; expected (batch, length, {d_model})"
        )
    return given.shape[0], given.shape[1]


def _check_tensor(value: object, name: str) -> None:
    if not isinstance(value, Tensor):
        raise InputError(
            f"{name} is a {type(value).__name__}; expected a tensor, such as a tokenizer returns "
            'with return_tensors="pt"'
        )


def check_ids(ids: Tensor, rows: int, name: str) -> None:
    """Raise if token ids are none of an embedding's rows; looked at on the CPU alone.

    Raises:
        InputError: If an id is below 0 or beyond the embedding, or ids are no integers.
    """
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"{name} are {ids.dtype}; expected token ids, an integer tensor")
    # Anywhere else, looking would wait for the device, which complains by itself.
    if ids.device.type != "cpu" or ids.numel() == 0 or torch.compiler.is_compiling():
        return
    least, most = (int(bound) for bound in ids.aminmax())
    if least < 0 or most >= rows:
        wrong = least if least < 0 else most
        raise InputError(
            f"{name} contain the id {wrong}, and the embedding has rows 0 to {rows - 1}: the "
            "tokenizer belongs to another model, or -100 of labels got in"
        )


def check_labels(labels: Tensor, rows: int) -> None:
    """Raise unless labels are (B, L) ids of an embedding's rows, or -100; ids on the CPU alone.

    Raises:
        InputError: If they are not.
    """
    _check_tensor(labels, "labels")
    if labels.dim() != 2 or labels.is_floating_point():
        raise InputError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}; expected token ids "
            "(batch, length), -100 where there is none"
        )
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = labels[(labels != IGNORED_LABEL) & ((labels < 0) | (labels >= rows))]
    if len(wrong) > 0:
        raise InputError(
            f"labels contain the id {int(wrong[0])}; expected 0 to {rows - 1}, or -100 for "
            "positions that do not count"
        )


def check_memory(memory: Tensor, batch: int, d_model: int, prefix: str) -> None:
    """Raise unless the memory is (B, S, d_model), a row for each that the decoder reads.

    Raises:
        InputError: If it is not.
    """
    # The whole model's caller knows it as what the encoder gave.
    name = "encoder_outputs" if prefix else "encoder_hidden_states"
    if memory.dim() != 3 or memory.shape[2] != d_model:
        raise InputError(
            f"{name} has shape {tuple(memory.shape)}; expected (batch, length, {d_model})"
        )
    if memory.shape[0] != batch:
        raise InputError(
            f"{prefix}input_ids have {batch} rows, and what the encoder read has "
            f"{memory.shape[0]}: expected one for each"
        )


def past_length(past: object, layers: int, rows: tuple[int, int, int]) -> int:
    """Return how many positions a cache holds.

    Args:
        past: Per layer two or four tensors (B, H, length, d_head), or ``None``.
        layers: How many layers there are.
        rows: B, H and d_head.

    Raises:
        InputError: If it is no such cache.
    """
    if past is None:
        return 0
    if not isinstance(past, (tuple, list)):
        raise InputError(f"past_key_values is a {type(past).__name__}; {PAST}")
    if len(past) != layers:
        raise InputError(f"past_key_values has {len(past)} layers, and there are {layers}; {PAST}")
    for layer in past:
        if not isinstance(layer, (tuple, list)) or len(layer) not in (2, 4):
            raise InputError(f"past_key_values has a layer of another kind; {PAST}")
        batch, heads, d_head = rows
        for state in layer[:2]:
            expected = (batch, heads, past[0][0].shape[2], d_head)
            if tuple(state.shape) != expected:
                raise InputError(
                    f"past_key_values has keys of shape {tuple(state.shape)}; expected {expected}"
                )
    return past[0][0].shape[2] if layers else 0


PAST = (
    "expected a tuple with an entry for each layer, the four tensors that a call with "
    "use_cache=True returned"
)


def key_mask(mask: Tensor | None, shape: tuple[int, int], name: str) -> Tensor | None:
    """Return an attention mask as bool (B, S), true where attention is allowed.

    Args:
        mask: (B, S), any dtype; 0 masks a position.
        shape: The B and S it must have.
        name: The argument's name.

    Raises:
        InputError: If the shape is wrong.
    """
    if mask is None:
        return None
    _check_tensor(mask, name)
    if tuple(mask.shape) != shape:
        raise InputError(
            f"{name} has shape {tuple(mask.shape)}; expected {shape}: a number for each position, "
            "1 to attend and 0 for padding"
        )
    return mask if mask.dtype == torch.bool else mask != 0


def rows_of_heads(
    mask: Tensor | None, layers: int, heads: int, name: str
) -> Sequence[Tensor | None]:
    """Return each layer's head mask (H,), ``None`` where there is none.

    Args:
        mask: (layers, H): a factor for each head.
        layers: How many layers there are.
        heads: Heads of each.
        name: The argument's name.

    Raises:
        InputError: If the shape is wrong.
    """
    if mask is None:
        return [None] * layers
    _check_tensor(mask, name)
    if tuple(mask.shape) != (layers, heads):
        raise InputError(
            f"{name} has shape {tuple(mask.shape)}; expected ({layers}, {heads}): a row for each "
            f"of {layers} layers, a factor for each of {heads} heads"
        )
    return list(mask.unbind(0))


def padding_of(mask: Tensor | None, tokens: int) -> Tensor | None:
    """Return a router's padding (T,) bool, true where a token is padding, or ``None``.

    Args:
        mask: T numbers in any shape, non-zero for padding; or (B, 1, q, k) added to scores, of
            which the last row says it.
        tokens: T.

    Raises:
        InputError: If there are fewer numbers than tokens.
    """
    if mask is None:
        return None
    last = mask[:, :, -1, :] if mask.dim() == 4 else mask
    flat = last.reshape(-1)
    if len(flat) < tokens or (mask.dim() != 4 and len(flat) != tokens):
        raise InputError(
            f"padding_mask has shape {tuple(mask.shape)}; expected a number for each of {tokens} "
            "tokens, non-zero for padding"
        )
    return flat[-tokens:] != 0
