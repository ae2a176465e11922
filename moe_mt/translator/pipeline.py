"""``pipeline("translation")``: what transformers had until 4.57, with nothing cut or lost."""

import copy
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from moe_mt.checkpoints import HUB_ARGUMENTS
from moe_mt.errors import ConfigError, InputError
from moe_mt.pretrained import AutoModelForSeq2SeqLM, AutoTokenizer
from moe_mt.translator.batching import plan_batches
from moe_mt.translator.segments import Segment, join_segments, split_text
from moe_mt.translator.translator import DEFAULT_MAX_BATCH_TOKENS, LONGEST_INPUT

__all__ = ["TranslationPipeline", "pipeline"]

logger = logging.getLogger(__name__)

DEFAULT_BATCH_SIZE = 16
WINDOW_BATCHES = 8
DEFAULT_MAX_NEW_TOKENS = 256
DEFAULT_NUM_BEAMS = 4
"""What pipelines of transformers 4.57 use where the model's own settings say nothing."""

UNSET_MAX_LENGTH = 20
"""The value that ``max_length`` has where nobody set it."""

IGNORED = ("framework", "modelcard", "feature_extractor", "image_processor", "processor")


def pipeline(
    task: str | None = None,
    model: Any = None,  # noqa: ANN401
    tokenizer: Any = None,  # noqa: ANN401
    *,
    device: int | str | torch.device | None = None,
    batch_size: int | None = None,
    torch_dtype: torch.dtype | str | None = None,
    dtype: torch.dtype | str | None = None,
    model_kwargs: dict[str, Any] | None = None,
    **options: Any,  # noqa: ANN401
) -> "TranslationPipeline":
    """Return a pipeline that translates.

    Args:
        task: ``"translation"``, or ``"translation_xx_to_yy"`` with the languages in the name.
        model: A documented model, or the name of one: a hub id, a folder or ``"tiny"``.
        tokenizer: Its tokenizer, or the name of one; the model's own where ``None``.
        device: Where to compute: a number of a GPU, -1 for the CPU, or a device.
        batch_size: Most texts that are translated together.
        torch_dtype: Of the model's weights, if it is named.
        dtype: The same under its newer name.
        model_kwargs: More arguments of ``from_pretrained``.
        **options: ``src_lang``, ``tgt_lang``, ``max_input_tokens``, hub arguments
            (``revision``, ``token``, ``cache_dir``, ``local_files_only``), ``config`` and
            ``device_map`` of a model that is named, and arguments of ``generate``.

    Raises:
        ConfigError: If the task is another, or there is no model.
        CheckpointError: If the model cannot be found or read.
    """
    task = task or "translation"
    if task != "translation" and not _languages_in(task):
        raise ConfigError(
            f"task {task!r} is none that these models do; choose 'translation' or "
            "'translation_xx_to_yy'"
        )
    if model is None:
        raise ConfigError(
            f"pipeline({task!r}) has no model of its own to fall back on; give "
            'model="facebook/nllb-200-distilled-600M", another hub id, a folder or "tiny"'
        )
    hub = {name: options.pop(name) for name in HUB_ARGUMENTS if name in options}
    for name in ("trust_remote_code", "use_fast"):
        options.pop(name, None)
    opened = {**(model_kwargs or {})}
    opened |= {name: options.pop(name) for name in ("config", "device_map") if name in options}
    if dtype is not None or torch_dtype is not None:
        opened["torch_dtype"] = torch_dtype if dtype is None else dtype
    named = model if isinstance(model, (str, os.PathLike)) else None
    if isinstance(model, (str, os.PathLike)):
        model = AutoModelForSeq2SeqLM.from_pretrained(model, **hub, **opened)
    if tokenizer is None:
        tokenizer = named or model.name_or_path
    if not callable(tokenizer):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer, **hub)
    return TranslationPipeline(
        model, tokenizer, task=task, device=device, batch_size=batch_size, **options
    )


@dataclass
class _Text:
    """One input on its way."""

    text: str
    segments: list[Segment]
    encoded: list[dict[str, Any]] = field(default_factory=list)
    forced_bos: int | None = None
    sequences: list[Tensor | None] = field(default_factory=list)


class TranslationPipeline:
    """A model and its tokenizer, called with texts.

    A text is translated as one, as pipelines of transformers do, unless it has more tokens than
    ``max_input_tokens``: then its sentences are translated one by one, where transformers' model
    would read it whole and drop most of it. What is out of the ordinary (a text that was split, an
    output that reached its limit) stands in the result under ``"warnings"``.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401
        tokenizer: Any,  # noqa: ANN401
        *,
        task: str = "translation",
        device: int | str | torch.device | None = None,
        batch_size: int | None = None,
        max_input_tokens: int | None = None,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        **options: Any,  # noqa: ANN401
    ) -> None:
        """Join a model and a tokenizer.

        Args:
            model: A documented model with a head.
            tokenizer: The one it was trained with.
            task: The task's name, which may name the languages.
            device: Where the model goes; it stays where it is if ``None``.
            batch_size: Most texts that are translated together.
            max_input_tokens: Most tokens of a text that is translated as one; 512, or the
                tokenizer's ``model_max_length`` if that is less.
            src_lang: What texts are written in, where a call does not say.
            tgt_lang: What they become.
            **options: Arguments of ``generate`` for every call, and those of a call.

        Raises:
            ConfigError: If the model cannot generate.
        """
        if not hasattr(model, "generate"):
            raise ConfigError(
                f"model is a {type(model).__name__}, which cannot generate; give a model with its "
                "head, such as AutoModelForSeq2SeqLM.from_pretrained(...)"
            )
        self.task = task
        self.model = model if device is None else model.to(_device(device))
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        longest = getattr(tokenizer, "model_max_length", None) or LONGEST_INPUT
        self.max_input_tokens = max_input_tokens or min(LONGEST_INPUT, longest)
        named_src, named_tgt = _languages_in(task) or (None, None)
        self._preprocess_params = {
            name: language
            for name, language in (
                ("src_lang", src_lang or named_src),
                ("tgt_lang", tgt_lang or named_tgt),
            )
            if language is not None
        }
        self._options = {name: value for name, value in options.items() if name not in IGNORED}
        self.generation_config = self._generation_config()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def __call__(self, inputs: Any, **options: Any) -> Any:  # noqa: ANN401
        """Translate.

        Args:
            inputs: A text, a list of texts, a dataset or any iterable of texts.
            **options: ``src_lang``, ``tgt_lang``, ``batch_size``; ``return_tensors`` (token ids
                instead of text), ``clean_up_tokenization_spaces``, ``truncation`` (cut a long
                text instead of splitting it); arguments of ``generate``.

        Returns:
            For a text a list of ``{"translation_text": ...}``, one per returned sequence. For a
            list of texts a list of these dicts, or of such lists where there are several
            sequences. For another iterable an iterator over such lists, which reads ahead a few
            batches.

        Raises:
            InputError: If a language is missing, or an input is no text.
        """
        call = self._call(options)
        if isinstance(inputs, str):
            return next(self._run([inputs], call))
        if isinstance(inputs, (list, tuple)):
            results = list(self._run(inputs, call))
            if all(len(result) == 1 for result in results):
                return [result[0] for result in results]
            return results
        if hasattr(inputs, "__getitem__") and hasattr(inputs, "__len__"):
            # A dataset; a mapping has texts under names, and which one is meant is not said.
            if not isinstance(inputs, (bytes, bytearray, Mapping)):
                return self._run((inputs[i] for i in range(len(inputs))), call)
        elif isinstance(inputs, Iterable):
            return self._run(inputs, call)
        raise InputError(f"inputs is a {type(inputs).__name__}; give a text, or several")

    def _call(self, options: dict[str, Any]) -> "_Call":
        """Return what a call asks for; what it does not say, the pipeline does."""
        merged: dict[str, Any] = {**self._preprocess_params, **self._options, **options}
        languages = [merged.pop(name, None) for name in ("src_lang", "tgt_lang")]
        if None in languages:
            raise InputError(
                f"src_lang is {languages[0]!r} and tgt_lang is {languages[1]!r}; a translation "
                "needs both, in the call or in pipeline(...)"
            )
        src_lang, tgt_lang = (
            self.tokenizer._code(language, name)
            for language, name in zip(languages, ("src_lang", "tgt_lang"), strict=True)
        )
        return_type = merged.pop("return_type", None)
        as_text = merged.pop("return_text", None)
        as_ids = merged.pop("return_tensors", None) or return_type == 0
        config = merged.pop("generation_config", self.generation_config)
        if merged.get("max_length") and "max_new_tokens" not in merged:
            # Else a limit that nobody here asked for, of the model or of pipelines, would win.
            merged["max_new_tokens"] = merged.pop("max_length") - 1
        return _Call(
            src_lang=src_lang,
            tgt_lang=tgt_lang,
            as_ids=bool(as_ids) and not as_text,
            clean_up=merged.pop("clean_up_tokenization_spaces", False),
            truncation=merged.pop("truncation", None),
            batch_size=merged.pop("batch_size", None) or self.batch_size or DEFAULT_BATCH_SIZE,
            generate={"generation_config": config, **merged},
        )

    def _run(self, texts: Iterable[Any], call: "_Call") -> Iterator[list[dict[str, Any]]]:
        source = iter(texts)
        while window := list(islice(source, call.batch_size * WINDOW_BATCHES)):
            prepared = [self._prepare(text, call) for text in window]
            self._translate(prepared, call)
            for text in prepared:
                yield self._results(text, call)

    def _prepare(self, text: Any, call: "_Call") -> _Text:  # noqa: ANN401
        if not isinstance(text, str):
            raise InputError(f"an input is a {type(text).__name__}; every input must be a text")
        item = _Text(text, [Segment(text, "", "")])
        if not call.truncation and self._encode(item, text, call) > self.max_input_tokens:
            item.segments = self._split(text, call)
            item.encoded = []
        for segment in item.segments if not item.encoded else ():
            if segment.text or len(item.segments) == 1:
                self._encode(item, segment.text, call)
        return item

    def _encode(self, item: _Text, text: str, call: "_Call") -> int:
        """Add a text's model input to the item; return how many tokens it has."""
        encoded = dict(
            self.tokenizer._build_translation_inputs(
                text,
                src_lang=call.src_lang,
                tgt_lang=call.tgt_lang,
                return_tensors=None,
                truncation=call.truncation or False,
            )
        )
        item.forced_bos = encoded.pop("forced_bos_token_id", None)
        encoded.pop("token_type_ids", None)
        item.encoded.append(encoded)
        return len(encoded["input_ids"])

    def _split(self, text: str, call: "_Call") -> list[Segment]:
        special = self.tokenizer.num_special_tokens_to_add()
        return split_text(
            text,
            call.src_lang,
            "auto",
            lambda part: len(self.tokenizer.tokenize(part)),
            self.max_input_tokens - special,
        )

    def _translate(self, items: Sequence[_Text], call: "_Call") -> None:
        """Generate for every model input, those of similar length together."""
        rows = [(item, encoded) for item in items for encoded in item.encoded]
        lengths = [len(encoded["input_ids"]) for _, encoded in rows]
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        for batch in plan_batches(lengths, call.batch_size, DEFAULT_MAX_BATCH_TOKENS):
            padded = self.tokenizer.pad([rows[i][1] for i in batch], return_tensors="pt")
            given = {name: tensor.to(self.device) for name, tensor in padded.items()}
            forced = rows[batch[0]][0].forced_bos
            if forced is not None:
                given["forced_bos_token_id"] = forced
            with torch.no_grad():
                output = self.model.generate(**{**given, **call.generate})
            sequences: Any = getattr(output, "sequences", output)
            sequences = sequences.view(len(batch), -1, sequences.shape[-1])
            for place, index in enumerate(batch):
                found[index] = sequences[place].cpu()
        sequences = iter(found)
        for item in items:
            item.sequences = [next(sequences) for _ in item.encoded]

    def _results(self, item: _Text, call: "_Call") -> list[dict[str, Any]]:
        warnings = self._warnings(item, call)
        for warning in warnings:
            logger.warning("%.40r: %s", item.text, warning)
        flags = {"warnings": warnings} if warnings else {}
        if call.as_ids:
            parts = [list(ids) for ids in zip(*item.sequences, strict=True)]
            return [{"translation_token_ids": torch.cat(ids)} | flags for ids in parts]
        texts = [
            self.tokenizer.batch_decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=call.clean_up
            )
            for ids in item.sequences
        ]
        return [
            {"translation_text": self._joined(item, list(parts), call)} | flags
            for parts in (zip(*texts, strict=True) if texts else [()])
        ]

    def _joined(self, item: _Text, parts: list[str], call: "_Call") -> str:
        if len(item.segments) == 1:
            return parts[0]
        translated = iter(parts)
        texts = [next(translated) if segment.text else "" for segment in item.segments]
        return join_segments(item.segments, texts, call.src_lang, call.tgt_lang)

    def _warnings(self, item: _Text, call: "_Call") -> list[str]:
        warnings: list[str] = []
        if len(item.segments) > 1:
            warnings.append(
                f"split: the text has more than {self.max_input_tokens} tokens and was translated "
                f"in {len(item.segments)} parts"
            )
        ends = call.end_marks(self.model.config)
        # Where other criteria may have ended it, an output without an end mark is no sign.
        if ends is not None and any(
            not torch.isin(ids[:, 1:], ends).any(1).all()
            for ids in item.sequences
            if ids is not None
        ):
            warnings.append(
                "length: the output reached its limit before it ended; raise max_new_tokens"
            )
        return warnings

    def _generation_config(self) -> Any:  # noqa: ANN401
        """Return the model's settings, and where they say nothing those of pipelines."""
        config = copy.deepcopy(self.model.generation_config)
        if config.max_new_tokens is None and config.max_length in (None, UNSET_MAX_LENGTH):
            config.max_new_tokens = DEFAULT_MAX_NEW_TOKENS
        if config.num_beams in (None, 1):
            config.num_beams = DEFAULT_NUM_BEAMS
        return config


@dataclass(frozen=True, kw_only=True)
class _Call:
    """What one call of a pipeline asks for."""

    src_lang: str
    tgt_lang: str
    as_ids: bool
    clean_up: bool
    truncation: Any
    batch_size: int
    generate: dict[str, Any]

    def end_marks(self, config: Any) -> Tensor | None:  # noqa: ANN401
        """Return the tokens that end an output, ``None`` where something else may end it."""
        if self.generate.get("stop_strings") or self.generate.get("stopping_criteria"):
            return None
        settings = self.generate["generation_config"]
        ends = self.generate.get("eos_token_id") or settings.eos_token_id or config.eos_token_id
        return torch.tensor(ends if isinstance(ends, (list, tuple)) else [ends])


def _languages_in(task: str) -> tuple[str, str] | None:
    """Return the languages that ``translation_xx_to_yy`` names; codes may have underscores."""
    head, _, rest = task.partition("_")
    source, _, target = rest.partition("_to_")
    return (source, target) if head == "translation" and source and target else None


def _device(device: int | str | torch.device) -> torch.device:
    if isinstance(device, int):
        return torch.device("cpu" if device < 0 else f"cuda:{device}")
    return torch.device(device)
