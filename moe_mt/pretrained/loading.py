"""Published tensors → the weights of a documented model, in place."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_mt.checkpoints import copy_checked, open_shards
from moe_mt.errors import CheckpointError
from moe_mt.models import TIED_KEYS, Family

__all__ = ["LoadingInfo", "fill"]

logger = logging.getLogger(__name__)


@dataclass
class LoadingInfo:
    """What did not come out even between the files and the model."""

    missing_keys: list[str] = field(default_factory=list)
    """Weights that were initialised, for the files have none for them."""

    unexpected_keys: list[str] = field(default_factory=list)
    """Tensors that the model has no place for."""

    mismatched_keys: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(
        default_factory=list
    )
    """Name, shape in the files and shape in the model of weights that were initialised."""

    error_msgs: list[str] = field(default_factory=list)
    """Always empty: what would stand here is raised."""

    def as_dict(self) -> dict[str, list[Any]]:
        """Return the four lists by name."""
        return asdict(self)


@torch.no_grad()
def fill(
    model: Any,  # noqa: ANN401
    folder: Path | None,
    state_dict: Mapping[str, Tensor] | None,
    *,
    ignore_mismatched_sizes: bool,
) -> LoadingInfo:
    """Copy tensors into a model, and initialise what they leave out.

    Args:
        model: A documented model off the meta device, its weights not set.
        folder: Where the files are, if there is no ``state_dict``.
        state_dict: The tensors by name.
        ignore_mismatched_sizes: Whether a tensor of another shape is passed over.

    Raises:
        CheckpointError: If the files cannot be read, or a shape is wrong.
    """
    info = LoadingInfo()
    if state_dict is not None:
        keys = tuple(state_dict)
        tensors: Iterable[tuple[str, Any]] = ((k, lambda t=t: t) for k, t in state_dict.items())
    else:
        assert folder is not None
        tensors = shards = open_shards(folder)
        keys = shards.keys
    targets = dict(model.named_parameters(remove_duplicate=False))
    if not model.config.tie_word_embeddings:
        _untie_sides(model, {_name_in(model, targets, key) for key in keys})
        targets = dict(model.named_parameters(remove_duplicate=False))
    filled: dict[str, str] = {}
    for key, read in tensors:
        name = _name_in(model, targets, key)
        if name is None:
            if not Family.ignores(Family.strip_prefix(key)):
                info.unexpected_keys.append(key)
            continue
        target, source = targets[name], read()
        if source.shape != target.shape:
            info.mismatched_keys.append((name, tuple(source.shape), tuple(target.shape)))
            continue
        earlier = next((key for n, key in filled.items() if targets[n] is target), None)
        if earlier is None:
            copy_checked(key, target, source)
        elif not torch.equal(target, source.to(target)):
            raise CheckpointError(
                f"{key} and {earlier} differ, and are one weight in this model; load it with "
                "tie_word_embeddings=False if they were trained apart"
            )
        filled[name] = key
    if info.mismatched_keys and not ignore_mismatched_sizes:
        name, found, expected = info.mismatched_keys[0]
        raise CheckpointError(
            f"{name} has shape {found} in the checkpoint and {expected} by the configuration; "
            "give the configuration that belongs to these weights, or pass "
            "ignore_mismatched_sizes=True to initialise what does not fit"
        )
    _complete(model, targets, filled, info)
    return info


def _untie_sides(model: Any, names: set[str | None]) -> None:  # noqa: ANN401
    """Give each side whose own embedding is in the files one that is not the other's."""
    shared = model.get_input_embeddings()
    for side in (model.get_encoder(), model.get_decoder()) if hasattr(model, "get_encoder") else ():
        owner = next(name for name, module in model.named_modules() if module is side)
        if f"{owner}.embed_tokens.weight" in names and side.embed_tokens is shared:
            weight = torch.empty_like(shared.weight)
            rows, width = weight.shape
            side.embed_tokens = nn.Embedding(rows, width, shared.padding_idx, _weight=weight)


def _name_in(model: Any, targets: Mapping[str, Tensor], key: str) -> str | None:  # noqa: ANN401
    """Return a tensor's name in a model, whichever of its parts was saved and is loaded."""
    base = model.base_model_prefix
    inner = Family.strip_prefix(key)
    for name in (key, f"{base}.{key}", inner, inner.removeprefix(f"{model.side}.")):
        if name in targets:
            return name
    if inner in TIED_KEYS and (inner != "lm_head.weight" or model.config.tie_word_embeddings):
        # Any one of the tied names stands for all; only a head may be untied.
        embedding = model.get_input_embeddings().weight
        return next(name for name, target in targets.items() if target is embedding)
    return None


def _complete(
    model: Any,  # noqa: ANN401
    targets: Mapping[str, Tensor],
    filled: Iterable[str],
    info: LoadingInfo,
) -> None:
    """Fill what is tied to something that was filled, and initialise the rest."""
    tied = {id(targets[name]) for name in filled}
    head = model.get_output_embeddings()
    if head is not None and model.config.tie_word_embeddings and id(head.weight) not in tied:
        # Held apart for scripting; its values are the embedding's all the same.
        embedding = model.get_input_embeddings().weight
        if id(embedding) in tied:
            head.weight.copy_(embedding)
            tied.add(id(head.weight))
    lacking = [name for name in targets if name not in filled and id(targets[name]) not in tied]
    model._initialize(set(lacking))
    # A tied weight is named once.
    named = {id(targets[name]) for name, _, _ in info.mismatched_keys}
    for name in lacking:
        if id(targets[name]) not in named:
            info.missing_keys.append(name)
        named.add(id(targets[name]))
    where = f"{type(model).__name__} from {model.config.name_or_path or 'the given tensors'}"
    if info.missing_keys:
        logger.warning(
            "%s: %d weights were not in the checkpoint and have been initialised at random, train "
            "them before use: %s",
            where,
            len(info.missing_keys),
            _listed(info.missing_keys),
        )
    if info.mismatched_keys:
        logger.warning(
            "%s: %d tensors of another shape were passed over and those weights initialised at "
            "random: %s",
            where,
            len(info.mismatched_keys),
            _listed([f"{name} {found} for {own}" for name, found, own in info.mismatched_keys]),
        )
    if info.unexpected_keys:
        logger.warning(
            "%s: %d tensors have no place in this model and were not used: %s",
            where,
            len(info.unexpected_keys),
            _listed(info.unexpected_keys),
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
