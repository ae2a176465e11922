"""Translators for tests: the model in the package, scripted ones, and small random checkpoints."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch

import moe_mt
from moe_mt.checkpoints import save
from moe_mt.models import MoEConfig, Seq2SeqTransformer, TransformerConfig
from moe_mt.tokenizers import load_tokenizer

TINY = Path(moe_mt.__file__).parent / "tiny"
TOKENIZER_FILES = ("sentencepiece.bpe.model", "tokenizer_config.json")
VOCABULARY = 4206
EOS = 2

NextToken = Callable[[list[int], int], int]
"""(tokens of the source, step) → the token that follows; at step 0 the language is forced."""


@cache
def tiny() -> moe_mt.Translator:
    """Return the model in the package, loaded once."""
    return moe_mt.from_pretrained("tiny", device="cpu")


@cache
def tiny_tokenizer():
    return load_tokenizer(TINY)


class ScriptedModel:
    """Stands at the seam of a model: knows no weights, says what a function tells it to."""

    def __init__(self, next_token: NextToken) -> None:
        self.next_token = next_token
        self.config = TransformerConfig(family="nllb_moe", vocab_size=VOCABULARY)
        self.embedding = SimpleNamespace(weight=torch.zeros(1))
        self.batches = []
        self.rows = []

    def encode(self, source_tokens, source_mask):
        self.batches.append(_lengths(source_tokens, source_mask))
        return source_tokens, ()

    def new_cache(self, memory, source_mask, beams, capacity):
        rows = zip(memory.tolist(), _lengths(memory, source_mask), strict=True)
        return ScriptedCache([row[:length] for row, length in rows], beams, memory.shape[1])

    def decode_step(self, tokens, cache):
        self.rows.append(len(tokens))
        chosen = torch.tensor([self.next_token(*row) for row in cache.rows()])
        cache.steps = [step + 1 for step in cache.steps]
        # A plain slope below the chosen token, so that beams are told apart.
        slope = torch.arange(VOCABULARY).mul(-1e-3).expand(len(chosen), -1)
        return slope.scatter(1, chosen[:, None], 20.0)


class ScriptedCache:
    """What a scripted model remembers: the sources, and how far each has come."""

    def __init__(self, sources, beams, memory_length) -> None:
        self.sources = sources
        self.steps = [0] * len(sources)
        self.beams = beams
        self.memory_length = memory_length

    def rows(self):
        pairs = zip(self.sources, self.steps, strict=True)
        return [pair for pair in pairs for _ in range(self.beams)]

    def reorder(self, parents):
        pass

    def regroup(self, keep, joining, *, memory_length, length, capacity):
        pairs = [(self.sources[i], self.steps[i]) for i in keep.tolist()]
        if joining is not None:
            pairs += zip(joining.sources, joining.steps, strict=True)
        self.sources, self.steps = map(list, zip(*pairs, strict=True))
        self.memory_length = memory_length


def _lengths(tokens, mask):
    return [tokens.shape[1]] * len(tokens) if mask is None else mask.sum(1).tolist()


def echo(source: list[int], step: int) -> int:
    """Say the source again."""
    return source[step] if step < len(source) else EOS


def loop(source: list[int], step: int) -> int:
    """Say one word for ever."""
    return 900


def ramble(source: list[int], step: int) -> int:
    """Never end and never say a word twice in a row."""
    return 100 + step % 97 * 29 + step % 89


def silence(source: list[int], step: int) -> int:
    """End at once."""
    return EOS


def scripted(next_token: NextToken = echo, **options) -> moe_mt.Translator:
    """Return a translator whose model is scripted, with the tokenizer of the model in the package.

    Languages that the tokenizer names are all known; tests mix scripts.
    """
    return moe_mt.Translator(ScriptedModel(next_token), tiny_tokenizer(), **options)


def random_checkpoint(folder: Path, *, moe: bool = True, seed: int = 0) -> Path:
    """Write a small random model in the published layout and return its folder."""
    torch.manual_seed(seed)
    config = TransformerConfig(
        family="nllb_moe",
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_heads=2,
        decoder_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_positions=64,
        dropout=0.1,
        attention_dropout=0.0,
        ffn_output_dropout=0.0,
        # Large weights, or a random model says the same whatever it reads.
        init_std=0.3,
        moe=MoEConfig(num_experts=4, encoder_sparse_step=1, decoder_sparse_step=1) if moe else None,
    )
    save(Seq2SeqTransformer(config), folder)
    for name in TOKENIZER_FILES:
        shutil.copyfile(TINY / name, folder / name)
    return folder
