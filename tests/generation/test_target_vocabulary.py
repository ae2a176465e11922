"""A part of the vocabulary gives what the whole gives with everything else banned."""

from functools import cache
from pathlib import Path

import pytest
import torch

import moe_mt
from moe_mt.checkpoints import load
from moe_mt.errors import ConfigError, InputError
from moe_mt.generation import (
    BatchLimits,
    CompiledStep,
    EagerStep,
    GenerationConfig,
    Request,
    generate_each,
)
from moe_mt.models import TargetVocabulary
from tests.translators import tiny

GOLDENS = Path(__file__).parents[1] / "golden" / "models"
EOS, LANGUAGE = 2, 7
ALLOWED = {LANGUAGE, *range(20, 50)}


@cache
def load_model(name):
    return load(GOLDENS / name, device="cpu", dtype=torch.float64)


REQUESTS = [
    Request(source_tokens=[9, 8, EOS], forced_tokens=[LANGUAGE], max_new_tokens=9),
    Request(source_tokens=[33, 4, 5, 60, 12, EOS], forced_tokens=[LANGUAGE, 21], max_new_tokens=12),
    Request(source_tokens=[50, EOS], forced_tokens=[LANGUAGE], max_new_tokens=4),
]


def run(model, config, **more):
    limits = BatchLimits(sentences=2)
    return dict(generate_each(model, REQUESTS, config, limits=limits, **more))


class OthersBanned:
    """A step over the whole vocabulary in which other tokens score minus infinity."""

    def __init__(self, model, tokens):
        self.model = model
        self.banned = [i for i in range(model.config.vocab_size) if i not in tokens]

    def decode_step(self, tokens, cache):
        logits = self.model.decode_step(tokens, cache)
        logits[:, self.banned] = -torch.inf
        return logits


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("name", ["dense_2_2", "moe_4_experts_bias"])
def test_it_is_as_if_all_other_tokens_were_banned(name, num_beams):
    model = load_model(name)
    config = GenerationConfig(num_beams=num_beams, no_repeat_ngram_size=2)
    allowed = ALLOWED | {1, EOS, model.config.decoder_start_id}
    expected = run(model, config, step=EagerStep(OthersBanned(model, allowed)))
    vocabulary = TargetVocabulary(model, ALLOWED)
    assert len(vocabulary) == len(allowed)
    compiled = CompiledStep(vocabulary, backend="eager")
    for step in (None, compiled):
        found = run(model, config, vocabulary=vocabulary, step=step)
        for number, hypotheses in expected.items():
            assert [h.tokens for h in found[number]] == [h.tokens for h in hypotheses]
            assert found[number][0].score == pytest.approx(hypotheses[0].score, abs=1e-6)
            assert set(hypotheses[0].tokens) <= allowed
    unlimited = run(model, config)
    assert any(not set(h[0].tokens) <= allowed for h in unlimited.values())


def test_scores_of_allowed_tokens_are_those_of_the_whole_head():
    model, vocabulary = load_model("dense_2_2"), TargetVocabulary(load_model("dense_2_2"), ALLOWED)
    with torch.no_grad():
        memory = model.encode(torch.tensor([[9, 8, EOS]]))[0]
        whole = model.decode_step(torch.tensor([[EOS]]), model.new_cache(memory, None))
        start = torch.tensor([vocabulary.narrow([EOS])])
        part = vocabulary.decode_step(start, model.new_cache(memory, None))
    ids = vocabulary.widen(range(len(vocabulary)))
    torch.testing.assert_close(part, whole[:, ids], rtol=0, atol=1e-12)


def test_a_forced_token_outside_is_named():
    vocabulary = TargetVocabulary(load_model("dense_2_2"), {20, 21})
    with pytest.raises(InputError, match=r"tokens \[7\] must be generated"):
        run(load_model("dense_2_2"), GenerationConfig(), vocabulary=vocabulary)


def test_tokens_the_model_does_not_have_are_named():
    with pytest.raises(ConfigError, match="from 0 to 63"):
        TargetVocabulary(load_model("dense_2_2"), {20, 64})


# --- through the translator ----------------------------------------------------------------------


def tokens_of(translator, texts, language):
    forced = translator.tokenizer.forced_tokens(language)
    return {t for text in texts for t in translator.tokenizer.encode_text(text)} | {*forced}


@pytest.mark.parametrize("quantization", [None, "int8-dynamic"])
def test_a_translation_within_the_vocabulary_is_the_same_without_it(quantization):
    translator = moe_mt.from_pretrained("tiny", device="cpu", quantization=quantization)
    texts = ["in 14 minutes", "May 2", "1999"]
    french = translator.translate(texts, "eng_Latn", "fra_Latn")
    allowed = tokens_of(translator, french, "fra_Latn")
    again = translator.translate(texts, "eng_Latn", "fra_Latn", target_vocab=allowed)
    assert again == french
    # German needs other words, and may use them: only French is limited.
    options = {"target_vocab": {"French": allowed}}
    targets = ["fra_Latn", "deu_Latn", "fra_Latn"]
    mixed = translator.translate(texts, "eng_Latn", targets, **options)
    assert mixed == translator.translate(texts, "eng_Latn", targets)


def test_a_language_that_is_not_among_its_tokens_is_named():
    with pytest.raises(InputError, match="are not in target_vocab"):
        tiny().translate("May 2", "eng_Latn", "fra_Latn", target_vocab={20, 21})
