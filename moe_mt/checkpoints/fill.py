"""Published tensors → the parameters of a model that is built on the meta device."""

import math

import torch
from torch import Tensor, nn

from moe_mt.checkpoints.fit import parameter_dtype
from moe_mt.errors import CheckpointError, PlacementError
from moe_mt.models import (
    Family,
    Int8TokenEmbedding,
    Location,
    Seq2SeqTransformer,
    TransformerConfig,
    keeps_values,
    pack_expert,
    pack_parameter,
)
from moe_mt.ops import quantize_rows

__all__ = ["FLOAT_DTYPES", "Filling", "copy_checked"]

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Dtypes of weights, in files and in models."""

CHUNK_ELEMENTS = 1 << 22
"""Elements that are copied and checked at a time: few enough to stay in the processor's cache."""


class Filling:
    """A model that becomes real tensor by tensor.

    A parameter is allocated once, at its final dtype and device, when the first of its tensors
    arrives; a layer's experts fill one stacked parameter slice by slice. Where weights are packed,
    each is packed as soon as it is there, and freed.
    """

    def __init__(
        self,
        family: Family,
        config: TransformerConfig,
        device: torch.device,
        dtype: torch.dtype,
        *,
        pack: str | None = None,
        source: str = "the checkpoint",
    ) -> None:
        """Build the model on the meta device.

        Args:
            family: How the published tensors are named.
            config: What the model is.
            device: Where its parameters go.
            dtype: What they become; routers stay in float32.
            pack: One of ``ops.PACKED_KINDS``, or ``None``; for float32 on the CPU only.
            source: What messages call the place that the tensors come from.
        """
        with torch.device("meta"):
            self.model = Seq2SeqTransformer(config)
        self._family = family
        self._locations = family.locations(config)
        self._device = device
        self._dtype = dtype
        self._pack = pack
        self._source = source
        self._filled: dict[tuple[str, int | None], str] = {}
        self._allocated: set[str] = set()

    def check_names(self, keys: tuple[str, ...]) -> None:
        """Raise unless ``keys`` name every tensor of the model and nothing else."""
        unexpected = [key for key in keys if not self.ignores(key) and self._locate(key) is None]
        if unexpected:
            raise self._unexpected(unexpected)
        stripped = {self._family.strip_prefix(key) for key in keys}
        self._require_all({_slot(self._locations[k]) for k in stripped if k in self._locations})

    def ignores(self, key: str) -> bool:
        """Whether ``key`` is known to hold nothing that the model needs."""
        return self._family.ignores(self._family.strip_prefix(key))

    def size_of(self, key: str) -> int:
        """Return the elements of a published tensor; 0 for one that is ignored."""
        location = self._locate(key)
        return 0 if location is None else math.prod(location.shape)

    @torch.no_grad()
    def place(self, key: str, source: Tensor) -> int:
        """Copy a published tensor to where it belongs; return the bytes of the model it filled.

        Args:
            key: Its published name.
            source: Of the shape that ``Location.shape`` gives, in any of ``FLOAT_DTYPES``.

        Raises:
            CheckpointError: If the tensor is none of the model's, or its shape, dtype or values
                are not fit for it, or it contradicts one that came before.
            PlacementError: If there is no memory for it.
        """
        location = self._locate(key)
        if location is None:
            raise self._unexpected([key])
        label = f"{self._source}: {key}"
        _check_form(label, source, location.shape)
        first = self._filled.get(_slot(location))
        if first is not None:
            self._require_equal(label, first, location, source)
            return 0
        if self._is_only_packed(location) and source.dtype == torch.float32:
            # Packed from the file's own pages, without a copy of its values.
            target = self._lend(location, source)
            for chunk in _chunks(source):
                _require_finite(label, chunk, chunk)
        else:
            target = self._target(location)
            copy_checked(label, target, source)
        self._filled[_slot(location)] = key
        if self._pack is not None:
            self._pack_filled(location, target, self._pack)
        return target.numel() * target.element_size()

    def finish(self) -> Seq2SeqTransformer:
        """Return the model in evaluation mode.

        Raises:
            CheckpointError: If a tensor never came.
        """
        self._require_all(set(self._filled))
        self.model.positions.rebuild(self._device, self._dtype)
        return self.model.eval()

    def _locate(self, key: str) -> Location | None:
        return self._locations.get(self._family.strip_prefix(key))

    def _pack_filled(self, location: Location, target: Tensor, kind: str) -> None:
        if location.expert is None:
            pack_parameter(self.model, location.parameter, kind)
        else:
            pack_expert(self.model, location.parameter, location.expert, target, kind)

    def _require_equal(self, label: str, first: str, location: Location, source: Tensor) -> None:
        """Compare two copies of one parameter, as the model has it."""
        path, _, leaf = location.parameter.rpartition(".")
        # A projection that became one with others is not there any more.
        module = dict(self.model.named_modules()).get(path)
        if isinstance(module, Int8TokenEmbedding):
            same = _is_quantized(module, source)
        elif self._pack is None or isinstance(getattr(module, leaf, None), nn.Parameter):
            same = _is_equal(self._filled_part(location), source)
        else:
            raise CheckpointError(
                f"{label} and {first} are one parameter, which is packed by now and cannot be "
                "compared; load the model with prepack=False, or fetch it again"
            )
        if not same:
            raise CheckpointError(
                f"{label} and {first} differ, and are one parameter in this model; weights that "
                "were trained apart cannot be used here: save the checkpoint with tied embeddings"
            )

    def _is_only_packed(self, location: Location) -> bool:
        pack = self._pack
        return pack is not None and not keeps_values(self.model, location.parameter, pack)

    def _lend(self, location: Location, source: Tensor) -> Tensor:
        """Let the model have a tensor until it is packed."""
        if location.expert is None:
            module, _, leaf = location.parameter.rpartition(".")
            lent = nn.Parameter(source, requires_grad=False)
            self.model.get_submodule(module).register_parameter(leaf, lent)
        return source

    def _target(self, location: Location) -> Tensor:
        if self._pack is not None and location.expert is not None:
            return self._empty(location.parameter, torch.Size(location.shape))
        if location.parameter not in self._allocated:
            self._allocate(location.parameter)
        return self._filled_part(location)

    def _filled_part(self, location: Location) -> Tensor:
        parameter = self.model.get_parameter(location.parameter)
        return parameter.data if location.expert is None else parameter.data[location.expert]

    def _allocate(self, name: str) -> None:
        tensor = self._empty(name, self.model.get_parameter(name).shape)
        module, _, leaf = name.rpartition(".")
        self.model.get_submodule(module).register_parameter(leaf, nn.Parameter(tensor))
        self._allocated.add(name)

    def _empty(self, name: str, shape: torch.Size) -> Tensor:
        dtype = parameter_dtype(name, self._dtype)
        try:
            return torch.empty(shape, dtype=dtype, device=self._device)
        except RuntimeError as error:
            size = shape.numel() * dtype.itemsize / 1e9
            raise PlacementError(
                f"there is no room on {self._device} for {name}, {size:.1f} GB at {dtype}; free "
                "memory there, or choose a smaller dtype, another device or a smaller model"
            ) from error

    def _require_all(self, slots: set[tuple[str, int | None]]) -> None:
        missing: dict[tuple[str, int | None], str] = {}
        for key, location in self._locations.items():
            if _slot(location) not in slots:
                missing.setdefault(_slot(location), key)
        if missing:
            raise CheckpointError(
                f"{self._source} lacks {len(missing)} of the model's tensors: "
                f"{_listed(list(missing.values()))}; fetch it again, or give the config.json that "
                "belongs to it"
            )

    def _unexpected(self, keys: list[str]) -> CheckpointError:
        return CheckpointError(
            f"{self._source} holds {len(keys)} tensors that the {self._family.name} model of its "
            f"config.json has no place for: {_listed(keys)}; give the config.json that belongs to "
            "these weights"
        )


def _slot(location: Location) -> tuple[str, int | None]:
    return location.parameter, location.expert


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return ", ".join(keys[:5]) + more


def _check_form(label: str, source: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(source.shape) != shape:
        raise CheckpointError(
            f"{label} has shape {tuple(source.shape)} in the checkpoint and {shape} by its "
            "config.json; give the config.json that belongs to these weights"
        )
    real = source.layout == torch.strided and not source.is_meta
    if source.dtype not in FLOAT_DTYPES or not real:
        raise CheckpointError(
            f"{label} is stored as {source.dtype} ({source.layout}, {source.device}); expected "
            f"plain weights in {', '.join(str(dtype) for dtype in FLOAT_DTYPES)}: quantised files "
            "cannot be read, get the original weights"
        )


def copy_checked(label: str, target: Tensor, source: Tensor) -> None:
    """Copy a tensor into another of its shape, chunk by chunk.

    Raises:
        CheckpointError: If a value is not finite, or not in the target's dtype.
    """
    for into, out_of in zip(_chunks(target), _chunks(source), strict=True):
        into.copy_(out_of)
        _require_finite(label, into, out_of)


def _require_finite(label: str, chunk: Tensor, out_of: Tensor) -> None:
    # The extremes are NaN where any element is, so two numbers vouch for the whole chunk.
    if not torch.stack(torch.aminmax(chunk)).isfinite().all():
        raise _not_finite(label, chunk, out_of)


def _not_finite(label: str, into: Tensor, out_of: Tensor) -> CheckpointError:
    bad = ~out_of.isfinite()
    if bad.any():
        return CheckpointError(
            f"{label} holds {out_of[bad][0].item()} among its weights: a training run that "
            "diverged, or a damaged file; fetch it again, or use an earlier checkpoint"
        )
    value = out_of[~into.cpu().isfinite()][0].item()
    return CheckpointError(
        f'{label} holds {value:g}, which {into.dtype} cannot represent; choose dtype="bfloat16" or '
        '"float32"'
    )


def _is_equal(target: Tensor, source: Tensor) -> bool:
    pairs = zip(_chunks(target), _chunks(source), strict=True)
    return all(torch.equal(into, out_of.to(into)) for into, out_of in pairs)


def _is_quantized(embedding: Int8TokenEmbedding, source: Tensor) -> bool:
    """Whether quantising a table gives the embedding that is there."""
    scales = iter(embedding.scale.split(len(_chunks(embedding.weight)[0])))
    for rows, out_of in zip(_chunks(embedding.weight), _chunks(source), strict=True):
        found, scale = quantize_rows(out_of.to(torch.float32))
        if not torch.equal(found, rows) or not torch.equal(scale, next(scales)):
            return False
    return True


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.split(max(1, CHUNK_ELEMENTS // max(1, tensor[0].numel())))
