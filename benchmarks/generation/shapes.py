"""The models, batches and systems that generation is measured with, by name."""

from dataclasses import dataclass

import torch

from moe_mt.models import MoEConfig, TransformerConfig

__all__ = [
    "MODELS",
    "NEW_TOKENS",
    "NLLB_MOE_54B",
    "ON_GPU",
    "REHEARSED",
    "SOURCE_TOKENS",
    "SYSTEMS",
    "TOY_DENSE",
    "TOY_MOE",
    "Decoding",
    "GeneratedModel",
    "System",
    "draw_sources",
]

SOURCE_TOKENS, NEW_TOKENS = 32, 32
"""Tokens of every sentence, and of every translation: the end mark is banned until the last."""

ORDINARY_TOKEN = 4
"""The first token id that is no special token."""


@dataclass(frozen=True, order=True)
class Decoding:
    """How many sentences are generated at once, and with how many beams."""

    batch: int
    beam: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.beam}"


@dataclass(frozen=True, kw_only=True)
class System:
    """Something that generates, in one precision."""

    name: str
    """As a measurement of it is called."""

    program: str
    """As ``worker.py`` knows it."""

    dtype: str = "float32"
    rival_to: tuple[str, ...] = ()
    """The systems of ours that it is compared with."""

    @property
    def is_ours(self) -> bool:
        """Whether it gets rows of its own."""
        return self.program == "moe_mt"


SYSTEMS = {
    system.name: system
    for system in (
        System(name="ours-float32", program="moe_mt"),
        System(name="ctranslate2-float32", program="ctranslate2", rival_to=("ours-float32",)),
        System(
            name="transformers-float32",
            program="transformers",
            rival_to=("ours-float32", "ours-int8-dynamic"),
        ),
        System(name="ours-int8-dynamic", program="moe_mt", dtype="int8-dynamic"),
        System(
            name="ctranslate2-int8",
            program="ctranslate2",
            dtype="int8",
            rival_to=("ours-int8-dynamic",),
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class GeneratedModel:
    """A model with random weights, and how it is measured."""

    name: str
    config: TransformerConfig
    decodings: tuple[Decoding, ...]
    systems: tuple[str, ...]
    rounds: dict[Decoding, int]
    lives: int = 1
    """How often each system is started. Once: all are held at the same time and take turns round by
    round. More often, for a model of which memory holds one: they take turns as processes, each of
    which measures all its rounds."""


DENSE_ROUNDS = {Decoding(1, 1): 5, Decoding(1, 4): 4, Decoding(8, 1): 3, Decoding(32, 1): 3}
MOE_ROUNDS = {Decoding(1, 1): 3, Decoding(8, 4): 3}


def _dense(name: str, vocab_size: int) -> GeneratedModel:
    return GeneratedModel(
        name=name,
        config=TransformerConfig(family="m2m100", vocab_size=vocab_size),
        decodings=tuple(DENSE_ROUNDS),
        systems=tuple(SYSTEMS),
        rounds=DENSE_ROUNDS,
    )


MODELS = {
    model.name: model
    for model in (
        _dense("m2m100-418m", 128_112),
        _dense("nllb-600m", 256_206),
        GeneratedModel(
            name="moe-128-experts",
            config=TransformerConfig(
                family="nllb_moe",
                vocab_size=32_000,
                d_model=512,
                encoder_layers=8,
                decoder_layers=8,
                encoder_heads=8,
                decoder_heads=8,
                encoder_ffn_dim=2048,
                decoder_ffn_dim=2048,
                moe=MoEConfig(num_experts=128, encoder_sparse_step=2, decoder_sparse_step=2),
            ),
            decodings=tuple(MOE_ROUNDS),
            # CTranslate2 knows no experts.
            systems=("ours-float32", "transformers-float32", "ours-int8-dynamic"),
            rounds=MOE_ROUNDS,
            lives=2,
        ),
    )
}
"""The shapes of M2M100-418M and of NLLB-200-distilled-600M; a mixture of 8.6 GB."""

NLLB_MOE_54B = TransformerConfig(
    family="nllb_moe",
    vocab_size=256_206,
    d_model=2048,
    encoder_layers=24,
    decoder_layers=24,
    encoder_ffn_dim=8192,
    decoder_ffn_dim=8192,
    moe=MoEConfig(),
)

ON_GPU = (Decoding(1, 1), Decoding(8, 4), Decoding(32, 4))
"""What decoder steps and whole generations of the 54B are measured with."""

REHEARSED = (Decoding(1, 2),)

_TOY = {
    "vocab_size": 500,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_heads": 4,
    "decoder_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
}
TOY_DENSE = TransformerConfig(family="m2m100", **_TOY)
TOY_MOE = TransformerConfig(
    family="nllb_moe",
    moe=MoEConfig(num_experts=8, encoder_sparse_step=2, decoder_sparse_step=2),
    **_TOY,
)
"""On which all systems must generate the same tokens before anything is timed."""


def draw_sources(config: TransformerConfig, sentences: int) -> list[list[int]]:
    """Return sentences of ``SOURCE_TOKENS`` random tokens, the last of which is the end mark."""
    generator = torch.Generator().manual_seed(sentences)
    tokens = torch.randint(
        ORDINARY_TOKEN,
        config.vocab_size,
        (sentences, SOURCE_TOKENS),
        generator=generator,
    )
    tokens[:, -1] = config.eos_id
    return tokens.tolist()
