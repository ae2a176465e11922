"""From a checkpoint to the class of its tokenizer."""

import os
from typing import Any, NoReturn

from moe_mt.checkpoints import HUB_ARGUMENTS, fetch_small_files
from moe_mt.pretrained.tokenization.m2m100 import M2M100Tokenizer, SMALL100Tokenizer
from moe_mt.pretrained.tokenization.nllb import NllbTokenizer
from moe_mt.pretrained.tokenization.tokenizer import PretrainedTokenizer
from moe_mt.tokenizers import tokenizer_kind

__all__ = ["AutoTokenizer"]

_CLASSES: dict[str, type[PretrainedTokenizer]] = {
    "m2m100": M2M100Tokenizer,
    "nllb": NllbTokenizer,
    "small100": SMALL100Tokenizer,
}


class AutoTokenizer:
    """The right one of ``M2M100Tokenizer``, ``NllbTokenizer`` and ``SMALL100Tokenizer``."""

    def __init__(self) -> NoReturn:
        """Raise: there is no tokenizer without a checkpoint."""
        raise OSError(
            "AutoTokenizer is made by AutoTokenizer.from_pretrained(id_or_folder), which chooses "
            "the class; to choose it yourself, use NllbTokenizer or M2M100Tokenizer."
        )

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | os.PathLike[str],
        **kwargs: Any,  # noqa: ANN401
    ) -> PretrainedTokenizer:
        """Make the tokenizer of a checkpoint.

        The class is that of ``tokenizer_class`` in tokenizer_config.json or, where that says
        nothing, of the model type in config.json; SMaLL-100 is also known by the shape of its
        model.

        Args:
            pretrained_model_name_or_path: A hub id, or the folder of a checkpoint.
            **kwargs: See ``PretrainedTokenizer.from_pretrained``.

        Returns:
            The tokenizer.

        Raises:
            CheckpointError: If the files cannot be had, or do not say which tokenizer is theirs.
            LanguageCodeError: If the model has no such language; also a ``KeyError``.
        """
        of_the_hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        folder = fetch_small_files(pretrained_model_name_or_path, **of_the_hub)
        chosen = _CLASSES[tokenizer_kind(folder / kwargs.get("subfolder", ""))]
        return chosen.from_pretrained(pretrained_model_name_or_path, **kwargs)
