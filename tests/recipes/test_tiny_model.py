"""The model in the package: what it is, and that its published scores are its own."""

import json
from pathlib import Path

import pytest
import torch

import moe_mt
from recipes.tiny.domain import LANGUAGES
from recipes.tiny.evaluate import HELD_OUT, NUM_BEAMS, directions, held_out_rows
from recipes.tiny.train import PACKAGE, model_config

SCORES = json.loads((HELD_OUT.parent / "scores.json").read_text(encoding="utf-8"))

# A pair of near languages, two of far ones, and every script as a source or a target.
SAMPLE = [("eng_Latn", "spa_Latn"), ("rus_Cyrl", "zho_Hans"), ("hin_Deva", "ell_Grek")]


@pytest.fixture(scope="module")
def tiny():
    return moe_mt.from_pretrained("tiny", device="cpu")


def test_the_folder_is_at_most_ten_megabytes():
    assert sum(file.stat().st_size for file in PACKAGE.iterdir()) <= 10_000_000


def test_it_is_the_model_of_the_recipe(tiny):
    config = model_config(tiny.model.config.vocab_size)
    assert tiny.model.config == config
    assert config.moe.num_experts >= 8
    sparse = [config.encoder_layer_is_sparse(i) for i in range(config.encoder_layers)]
    sparse += [config.decoder_layer_is_sparse(i) for i in range(config.decoder_layers)]
    assert sum(sparse) >= 3
    assert tiny.languages == tuple(LANGUAGES)


def test_it_says_what_it_is(caplog):
    moe_mt.from_pretrained("tiny", device="cpu")
    assert "not a general translator" in caplog.text


def test_every_expert_of_every_layer_is_used(tiny):
    """Else quantising, pruning and batching would have nothing true to measure."""
    encode = tiny.tokenizer.encode_source
    used = [set() for _ in range(3)]
    for row in held_out_rows()[:100:4]:
        for language in LANGUAGES:
            source = torch.tensor([encode(row[language], language, "eng_Latn")])
            target = torch.tensor([[2, *tiny.tokenizer.encode_target(row[language], language)]])
            with torch.inference_mode():
                output = tiny.model(source, target)
            routings = (*output.encoder_routings, *output.decoder_routings)
            for experts, routing in zip(used, routings, strict=True):
                experts |= set(routing.expert_ids.unique().tolist())
    assert used == [set(range(8))] * 3


def test_published_scores_reach_the_bars():
    assert set(SCORES["directions"]) == {f"{source}-{target}" for source, target in directions()}
    assert SCORES["all"]["exact_match"] >= 95
    assert SCORES["all"]["chrf++"] >= 98
    for direction, scores in SCORES["directions"].items():
        assert scores["sentences"] >= 100, direction
        assert scores["exact_match"] >= 85, direction


@pytest.mark.parametrize(("src_lang", "tgt_lang"), SAMPLE)
def test_published_scores_are_those_of_the_model(tiny, src_lang, tgt_lang):
    rows = [row for row in held_out_rows() if row[src_lang] and row[tgt_lang]]
    found = tiny.translate([row[src_lang] for row in rows], src_lang, tgt_lang, num_beams=NUM_BEAMS)
    matches = sum(text == row[tgt_lang] for text, row in zip(found, rows, strict=True))
    published = SCORES["directions"][f"{src_lang}-{tgt_lang}"]
    assert len(rows) == published["sentences"]
    # Another processor may decide a near-tie in another way: one sentence at most.
    assert abs(matches - published["exact_match"] * len(rows) / 100) <= 1.01


def test_the_table_shows_every_direction():
    table = Path(HELD_OUT.parent / "scores.md").read_text(encoding="utf-8")
    for scores in SCORES["directions"].values():
        assert f"{scores['exact_match']:.1f} / {scores['chrf++']:.1f}" in table


def test_text_outside_the_domain_is_flagged(tiny):
    result = next(tiny.translate_iter(["こんにちは、元気ですか"], "zho_Hans", "eng_Latn"))
    assert any(warning.startswith("unknown") for warning in result.warnings)
