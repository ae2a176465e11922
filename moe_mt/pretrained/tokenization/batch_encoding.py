"""What a tokenizer returns: rows of ids and masks by name, as lists or as tensors."""

from collections import UserDict
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch

from moe_mt.errors import InputError

__all__ = ["BatchEncoding", "as_lists"]

_ONLY_FAST = "offsets into the text, which only a tokenizer in Rust keeps"


class BatchEncoding(UserDict[str, Any]):
    """Model inputs by name; ``encoding["input_ids"]`` and ``encoding.input_ids`` are the same.

    ``model(**encoding)`` unpacks it. A slice, ``encoding[:2]``, cuts every value alike.
    """

    is_fast = False
    encodings = None

    def __init__(
        self,
        data: Mapping[str, Any] | None = None,
        tensor_type: str | None = None,
        prepend_batch_axis: bool = False,
    ) -> None:
        """Hold model inputs.

        Args:
            data: The inputs by name.
            tensor_type: ``"pt"`` for torch tensors, ``"np"`` for NumPy arrays, ``None`` for lists.
            prepend_batch_axis: Whether tensors get a first axis of one row.

        Raises:
            InputError: As ``convert_to_tensors``.
        """
        super().__init__(data or {})
        self.convert_to_tensors(tensor_type, prepend_batch_axis)

    def __getitem__(self, key: str | slice) -> Any:  # noqa: ANN401
        """Return the value of a name, or every value cut by a slice."""
        if isinstance(key, str):
            return self.data[key]
        if isinstance(key, slice):
            return {name: value[key] for name, value in self.data.items()}
        raise KeyError(
            f"An encoding is indexed by a name ({', '.join(self.data)}) or a slice and not by "
            f"{key!r}: integers stand for {_ONLY_FAST}."
        )

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        # Copying and unpickling ask for attributes before there is any data.
        if name != "data" and name in self.data:
            return self.data[name]
        raise AttributeError(f"{type(self).__name__} has no {name!r}")

    def __getstate__(self) -> dict[str, Any]:
        return {"data": self.data}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.data = state["data"]

    def convert_to_tensors(
        self, tensor_type: str | None = None, prepend_batch_axis: bool = False
    ) -> "BatchEncoding":
        """Turn every value into a tensor of int64, in place.

        Args:
            tensor_type: As for the constructor.
            prepend_batch_axis: As for the constructor.

        Returns:
            This encoding.

        Raises:
            InputError: If there is no such type of tensor, or rows are of unlike lengths.
        """
        if tensor_type is None:
            return self
        as_tensor = _tensor_maker(tensor_type)
        for name, value in self.data.items():
            try:
                self.data[name] = as_tensor([value] if prepend_batch_axis else value)
            except (TypeError, ValueError) as error:
                raise InputError(
                    f"return_tensors={tensor_type!r} was asked for and the rows of {name!r} make "
                    f"no tensor ({error}): give padding=True, and truncation=True with max_length "
                    "where texts are long, so that all rows are of one length."
                ) from error
        return self

    def to(
        self, device: str | int | torch.device, *, non_blocking: bool = False
    ) -> "BatchEncoding":
        """Move the tensors to a device, in place.

        Args:
            device: Where to.
            non_blocking: Whether copies from pinned memory may go on in the background.

        Returns:
            This encoding.
        """
        for name, value in self.data.items():
            if isinstance(value, torch.Tensor):
                self.data[name] = value.to(device, non_blocking=non_blocking)
        return self

    def tokens(self, batch_index: int = 0) -> list[str]:
        """Raise: this is for tokenizers in Rust; use ``convert_ids_to_tokens``."""
        raise InputError(f"tokens() needs {_ONLY_FAST}: use tokenizer.convert_ids_to_tokens(ids).")

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """Raise: this is for tokenizers in Rust."""
        raise InputError(f"word_ids() needs {_ONLY_FAST}.")


def as_lists(value: Any) -> Any:  # noqa: ANN401
    """Return tensors, arrays and sequences of them as nested lists of Python numbers."""
    if isinstance(value, Mapping):
        return {name: as_lists(item) for name, item in value.items()}
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [as_lists(item) for item in value]
    return value


def _tensor_maker(tensor_type: str) -> Callable[[Any], Any]:
    if tensor_type == "pt":
        return _torch_tensor
    if tensor_type == "np":
        return _numpy_array
    raise InputError(
        f"return_tensors is {tensor_type!r}; choose 'pt' for torch, 'np' for NumPy or None for "
        "lists."
    )


def _torch_tensor(value: Any) -> torch.Tensor:  # noqa: ANN401
    if isinstance(value, torch.Tensor):
        return value
    # torch makes an empty list a float.
    return torch.tensor(as_lists(value), dtype=None if _has_numbers(value) else torch.int64)


def _numpy_array(value: Any) -> Any:  # noqa: ANN401
    import numpy as np

    if isinstance(value, np.ndarray):
        return value
    rows = as_lists(value)
    if not _has_numbers(rows):
        return np.asarray(rows, dtype=np.int64)
    if isinstance(rows, list) and len({len(row) for row in rows if isinstance(row, list)}) > 1:
        return np.array([np.asarray(row) for row in rows], dtype=object)
    return np.asarray(rows)


def _has_numbers(value: Any) -> bool:  # noqa: ANN401
    rows = as_lists(value)
    while isinstance(rows, list) and rows and isinstance(rows[0], list):
        rows = list(chain.from_iterable(rows))
    return rows != []
