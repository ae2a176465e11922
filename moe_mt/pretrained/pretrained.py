"""What every documented model can do: load, save, resize, tie, checkpoint."""

import copy
import logging
import os
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_mt.checkpoints import (
    HUB_ARGUMENTS,
    check_fits,
    measure_free_bytes,
    resolve,
    save_tensors,
)
from moe_mt.errors import ConfigError
from moe_mt.models import SinusoidalPositions
from moe_mt.moe import Top2Router
from moe_mt.pretrained.config import PublishedConfig
from moe_mt.pretrained.loading import LoadingInfo, fill
from moe_mt.pretrained.resizing import resize_embeddings, wanted_rows
from moe_mt.pretrained.view import View

__all__ = ["PreTrainedModel"]

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound="PreTrainedModel")

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B", re.IGNORECASE)


class PreTrainedModel(View):
    """Base of the documented models, encoders and decoders."""

    config_class: ClassVar[type[PublishedConfig]]
    base_model_prefix: ClassVar[str] = "model"
    side: ClassVar[str] = ""
    main_input_name: ClassVar[str] = "input_ids"
    supports_gradient_checkpointing: ClassVar[bool] = True
    # What code that was written for transformers' base class looks up.
    _tied_weights_keys: ClassVar[tuple[str, ...] | None] = None
    _no_split_modules: ClassVar[tuple[str, ...]] = ()
    _keys_to_ignore_on_load_missing: ClassVar[tuple[str, ...] | None] = None
    _keep_in_fp32_modules: ClassVar[tuple[str, ...] | None] = None

    def __init__(self, config: PublishedConfig, core: nn.Module, places: Mapping[str, str]) -> None:
        """Name the modules of ``core``; see ``View``."""
        super().__init__(core, places)
        self.config = config
        self.gradient_checkpointing = bool(getattr(config, "gradient_checkpointing", False))
        self.name_or_path = config.name_or_path
        self._checkpoint = partial(checkpoint, use_reentrant=False)

    @classmethod
    def _check_config(cls, config: object) -> None:
        if not isinstance(config, cls.config_class):
            found, wanted = type(config), cls.config_class
            raise ConfigError(
                f"{cls.__name__} was given a {found.__module__}.{found.__name__} as its config; "
                f"give a {wanted.__module__}.{wanted.__name__}, or use "
                f"{cls.__name__}.from_pretrained"
            )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.parameters()).dtype

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.config.vocab_size

    @property
    def base_model(self) -> nn.Module:
        """The model without its head."""
        return getattr(self, self.base_model_prefix, self)

    @property
    def framework(self) -> str:
        """``"pt"``."""
        return "pt"

    @classmethod
    def can_generate(cls) -> bool:
        """Whether it has ``generate``."""
        return hasattr(cls, "generate")

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Return how many weights there are; tied ones count once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    # Loading and saving.

    @classmethod
    def from_pretrained(
        cls: type[Model],
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,  # noqa: ANN401
        config: PublishedConfig | str | os.PathLike[str] | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: torch.device | str | Mapping[str, Any] | None = None,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        subfolder: str = "",
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Load a model of a hub id or a local folder, in evaluation mode.

        Weights the files lack are initialised and named in a warning, as are tensors that the
        model has no place for. Tied names may all be there, or any of them.

        Args:
            pretrained_model_name_or_path: A hub id or a folder; ``None`` with ``state_dict``.
            *model_args: Not used.
            config: Instead of the folder's: a configuration, or where one is.
            state_dict: Weights instead of the folder's.
            torch_dtype: Dtype of the weights, a name or ``"auto"`` for the stored one; float32
                where nothing is said.
            dtype: The same under its newer name.
            device_map: The one device the model goes to.
            output_loading_info: Whether to return ``(model, info)``, where info lists
                ``missing_keys``, ``unexpected_keys``, ``mismatched_keys`` and ``error_msgs``.
            ignore_mismatched_sizes: Whether a tensor of another shape is passed over.
            subfolder: A folder within the folder.
            **kwargs: Hub arguments (``revision``, ``cache_dir``, ``token``, ``local_files_only``)
                and fields of the configuration, which win over the file's.
                ``attn_implementation`` is noted and chooses nothing: weights are returned whenever
                they are asked for.

        Raises:
            CheckpointError: If there is no such model, its files are damaged, or a shape is wrong.
            ConfigError: If an argument is unknown, or the configuration describes no model.
            PlacementError: If the model does not fit.
        """
        attention = kwargs.pop("attn_implementation", None)
        hub, kwargs = _hub_arguments(kwargs)
        name = pretrained_model_name_or_path
        if isinstance(config, PublishedConfig):
            # The caller's own is not changed.
            config = copy.deepcopy(config)
        else:
            config, kwargs = cls._read_config(config or name, subfolder, hub, kwargs)
        if kwargs:
            raise ConfigError(
                f"from_pretrained got {sorted(kwargs)[0]!r}, which is no argument of it and no "
                f"field of {cls.config_class.__name__}"
            )
        wanted, device = (
            _dtype(torch_dtype if dtype is None else dtype, config),
            _device(device_map),
        )
        folder = None
        if state_dict is None:
            if name is None:
                raise ConfigError("from_pretrained(None) needs state_dict= and config=")
            folder = resolve(name, device=device, dtype=wanted, **hub) / subfolder
            free = measure_free_bytes(device, folder)
            check_fits(config.for_model(), name=str(name), device=device, dtype=wanted, free=free)
        model = cls._without_weights(config, wanted)
        info = LoadingInfo()
        if device.type == "meta":
            model.to(device)
        else:
            model.to_empty(device=device)
            for module in model.modules():
                if isinstance(module, SinusoidalPositions):
                    module.rebuild(device, wanted)
            info = fill(model, folder, state_dict, ignore_mismatched_sizes=ignore_mismatched_sizes)
        model.name_or_path = config.name_or_path = str(name or "")
        if attention is not None:
            config._attn_implementation = attention
        model._read_generation_config(folder)
        model.eval()
        return (model, info.as_dict()) if output_loading_info else model

    @classmethod
    def _read_config(
        cls,
        source: str | os.PathLike[str] | None,
        subfolder: str,
        hub: Mapping[str, Any],
        fields: Mapping[str, Any],
    ) -> tuple[PublishedConfig, dict[str, Any]]:
        """Return the configuration in a folder, and the fields that it does not have."""
        if source is None:
            raise ConfigError("from_pretrained(None) needs state_dict= and config=")
        return cls.config_class.from_pretrained(
            source, subfolder=subfolder, return_unused_kwargs=True, **hub, **fields
        )

    @classmethod
    def _without_weights(cls: Any, config: PublishedConfig, dtype: torch.dtype) -> Any:  # noqa: ANN401
        """Return a model on the meta device."""
        with torch.device("meta"):
            model = cls(config)
        model.to(dtype)
        for module in model.modules():
            # Routers choose with the weights that the files have, whatever the model's dtype.
            core = getattr(module, "core", None)
            if isinstance(core, Top2Router) and dtype.itemsize < 4:
                core.classifier.float()
        config.torch_dtype = dtype
        return model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Write ``config.json`` and the weights under their published names.

        Of the names of a tied weight one is written, the first.

        Args:
            save_directory: A folder, made if it does not exist.
            max_shard_size: Most bytes of a file, as a number or such as ``"5GB"``.
            safe_serialization: Whether to write .safetensors; else .bin.
            state_dict: What to write instead of the model's own.
            is_main_process: Only the main process of several writes.
            **kwargs: ``save_function`` and tokens have no effect; ``push_to_hub`` and the like are
                refused.

        Raises:
            CheckpointError: If the files cannot be written.
            ConfigError: If an argument is unknown, or ``max_shard_size`` is no size.
        """
        for name, value in kwargs.items():
            if name not in SAVE_ARGUMENTS or (value and name not in WITHOUT_EFFECT_IN_SAVING):
                raise ConfigError(f"save_pretrained cannot do {name}={value!r}; write to a folder")
        if not is_main_process:
            return
        self._check_generation_config()
        self.config.architectures = [type(self).__name__]
        self.config.torch_dtype = self.dtype
        save_tensors(
            save_directory,
            dict(_without_copies(self.state_dict() if state_dict is None else state_dict)),
            self.config.to_diff_dict(),
            max_shard_bytes=_bytes(max_shard_size),
            pickled=not safe_serialization,
        )
        self._write_generation_config(Path(save_directory))

    def _read_generation_config(self, folder: Path | None) -> None:
        """Take the folder's generation settings; nothing here generates."""

    def _check_generation_config(self) -> None:
        """Raise, before anything is written, if the generation settings are not allowed."""

    def _write_generation_config(self, folder: Path) -> None:
        """Write the generation settings; nothing here generates."""

    # Weights.

    def _apply(self, fn: Any, recurse: bool = True) -> "PreTrainedModel":  # noqa: ANN401
        tied = self._tied()
        super()._apply(fn, recurse)
        if tied:
            self.tie_weights()
        return self

    def _tied(self) -> bool:
        """Whether the head is the embedding, so that it must stay so."""
        return False

    def tie_weights(self) -> None:
        """Make the head's weight the embedding's; nothing to tie here."""

    def post_init(self) -> None:
        """Do nothing: weights are drawn when a model is built. Subclasses of old call it."""

    def init_weights(self) -> None:
        """Draw every weight anew from N(0, ``init_std``); biases zero, norms one."""
        self._initialize(set(dict(self.named_parameters(remove_duplicate=False))))

    @torch.no_grad()
    def _initialize(self, names: set[str]) -> None:
        norms = {id(m.weight) for m in self.modules() if isinstance(m, nn.LayerNorm)}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if name not in names:
                continue
            if id(parameter) in norms:
                parameter.fill_(1)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(0, self.config.init_std)
        for module in self.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                if any(module.weight is p for n, p in self.named_parameters() if n in names):
                    module.weight[module.padding_idx].zero_()

    # Embeddings.

    def get_input_embeddings(self) -> Any:  # noqa: ANN401
        """Return the token embedding; its rows are not scaled yet."""
        raise NotImplementedError(f"{type(self).__name__} has no token embedding")

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        raise NotImplementedError(f"{type(self).__name__} has no token embedding")

    def get_output_embeddings(self) -> Any:  # noqa: ANN401
        """Return the head, if there is one."""
        return None

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        raise ConfigError(f"{type(self).__name__} has no head to replace")

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """Give the embedding, and the head, another number of rows.

        Args:
            new_num_tokens: Rows; ``None`` leaves them, up to ``pad_to_multiple_of``. NLLB models
                have two rows more than their tokenizer has tokens, so that
                ``resize_token_embeddings(len(tokenizer))`` would cut rows off them.
            pad_to_multiple_of: Round the rows up to a multiple of this.
            mean_resizing: Whether new rows are the mean of the old ones plus a little noise of
                their covariance's size; else they are drawn from N(0, ``init_std``).

        Returns:
            The embedding.

        Raises:
            ConfigError: If a number is no positive integer.
        """
        rows = wanted_rows(self, new_num_tokens, pad_to_multiple_of)
        if rows != self.get_input_embeddings().weight.shape[0]:
            resize_embeddings(self, rows, mean_resizing)
        return self.get_input_embeddings()

    # Gradient checkpointing.

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether some part recomputes its activations in the backward pass."""
        return any(module.gradient_checkpointing for module in self._models())

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Recompute each layer's activations in the backward pass instead of keeping them.

        Args:
            gradient_checkpointing_kwargs: Of ``torch.utils.checkpoint.checkpoint``;
                ``use_reentrant`` is false where nothing is said.
        """
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        for module in self._models():
            module.gradient_checkpointing = True
            module._checkpoint = partial(checkpoint, **options)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        for module in self._models():
            module.gradient_checkpointing = False

    def _models(self) -> Iterator["PreTrainedModel"]:
        """Yield this model and those within it."""
        return (module for module in self.modules() if isinstance(module, PreTrainedModel))

    def enable_input_require_grads(self) -> None:
        """Let gradients flow from the embedding's output, for adapters over frozen weights."""
        self._input_hook = self.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: output.requires_grad_(True)
        )

    def disable_input_require_grads(self) -> None:
        """Undo ``enable_input_require_grads``."""
        self._input_hook.remove()


WITHOUT_EFFECT_IN_SAVING = ("save_function", "save_peft_format", "token", "use_auth_token")

SAVE_ARGUMENTS = (*WITHOUT_EFFECT_IN_SAVING, "push_to_hub", "variant")
"""Arguments of transformers for what is not done here; nothing is asked by ``None`` or false."""

UNSUPPORTED_ARGUMENTS = (
    "load_in_4bit",
    "load_in_8bit",
    "max_memory",
    "offload_folder",
    "offload_state_dict",
    "quantization_config",
    "variant",
)
"""Arguments of transformers that are refused, unless they ask for nothing."""

IGNORED_ARGUMENTS = {
    "force_download",
    "from_tf",
    "from_flax",
    "low_cpu_mem_usage",
    "proxies",
    "resume_download",
    "trust_remote_code",
    "use_safetensors",
    "weights_only",
}
"""Arguments of transformers that choose among ways of loading of which there is one here."""


def _hub_arguments(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the hub's arguments, and the others without those that have no effect."""
    hub = {name: given[name] for name in HUB_ARGUMENTS if name in given}
    if "use_auth_token" in given:
        hub["token"] = given["use_auth_token"]
    for name in sorted(IGNORED_ARGUMENTS & given.keys()):
        logger.info("%s has no effect here", name)
    done = {*hub, "use_auth_token", *IGNORED_ARGUMENTS}
    done |= {name for name in UNSUPPORTED_ARGUMENTS if not given.get(name)}
    return hub, {name: value for name, value in given.items() if name not in done}


def _device(wanted: Any) -> torch.device:  # noqa: ANN401
    if wanted is None:
        return torch.get_default_device()
    if isinstance(wanted, Mapping) and set(wanted) == {""}:
        wanted = wanted[""]
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(wanted, (str, int, torch.device)):
        raise ConfigError(
            f"device_map is a {type(wanted).__name__}; a model goes to one device here: give "
            '"auto", "cpu", "cuda" or "cuda:1"'
        )
    return torch.device(wanted)


def _dtype(wanted: torch.dtype | str | None, config: PublishedConfig) -> torch.dtype:
    if wanted == "auto":
        wanted = config.torch_dtype
    if isinstance(wanted, str):
        wanted = getattr(torch, wanted.removeprefix("torch."), None)
        if wanted is None:
            raise ConfigError("torch_dtype names no dtype; choose float32, float16 or bfloat16")
    wanted = torch.get_default_dtype() if wanted is None else wanted
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        raise ConfigError(f"torch_dtype is {wanted}; expected a floating-point dtype")
    return wanted


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    match = SIZE.fullmatch(size.strip())
    if match is None:
        raise ConfigError(f'max_shard_size is {size!r}; expected a size such as "5GB"')
    number, unit = match.groups()
    base = 1024 if unit.upper().endswith("I") else 1000
    return int(float(number) * base ** ["", "K", "M", "G", "T"].index(unit.upper().rstrip("I")))


def _without_copies(state_dict: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors, of those that are one in memory the first."""
    seen: set[tuple[Any, ...]] = set()
    for name, tensor in state_dict.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device)
        if tensor.is_meta or tensor.numel() == 0 or place not in seen:
            seen.add(place)
            yield name, tensor
