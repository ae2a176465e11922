"""What a call of ``generate`` may ask for: settings, their priority, inputs, callables, errors."""

import logging
import time
from functools import cache
from pathlib import Path

import pytest
import torch

from moe_mt.errors import ConfigError, InputError
from moe_mt.generation import GenerationConfig
from moe_mt.pretrained.generation.config import PublishedGenerationConfig
from moe_mt.pretrained.m2m100 import M2M100ForConditionalGeneration
from moe_mt.pretrained.outputs import BaseModelOutput

FOLDER = Path(__file__).parents[1] / "golden" / "models" / "dense_3_1"
PAD, EOS, LANGUAGE = 1, 2, 7
SOURCES = torch.tensor([[34, 28, 39, 45, EOS], [34, 49, EOS, PAD, PAD]])
ENDLESS = {"eos_token_id": None}


@cache
def shared_model():
    return M2M100ForConditionalGeneration.from_pretrained(FOLDER)


@pytest.fixture
def model():
    """Return the model with generation settings of this test alone."""
    shared = shared_model()
    shared.generation_config = PublishedGenerationConfig.from_model_config(shared.config)
    return shared


@pytest.fixture
def warnings_of(caplog):
    caplog.set_level(logging.WARNING)
    return lambda: " | ".join(record.getMessage() for record in caplog.records)


def length(model, **options):
    return model.generate(SOURCES, **ENDLESS, **options).shape[1]


# How long a sequence may be.


def test_max_length_counts_the_start_and_max_new_tokens_does_not(model):
    assert length(model, max_length=9) == 9
    assert length(model, max_new_tokens=9) == 10
    prompt = torch.tensor([[EOS, LANGUAGE, 5]] * 2)
    assert length(model, max_length=9, decoder_input_ids=prompt) == 9
    assert length(model, max_new_tokens=9, decoder_input_ids=prompt) == 12


def test_max_new_tokens_of_the_checkpoint_beats_max_length_and_a_warning_names_both(
    model, warnings_of
):
    model.generation_config.max_new_tokens = 4
    assert length(model, max_length=9) == 5
    assert "max_length=9" in warnings_of()
    assert "max_new_tokens=4" in warnings_of()
    assert "pass max_new_tokens=8 instead" in warnings_of()


def test_the_advice_of_that_warning_is_right(model, warnings_of):
    model.generation_config.max_new_tokens = 4
    assert length(model, max_new_tokens=8) == 9
    assert length(model, max_length=9, max_new_tokens=None) == 9
    assert warnings_of() == ""


def test_max_new_tokens_of_the_call_beats_its_max_length(model, warnings_of):
    assert length(model, max_length=9, max_new_tokens=3) == 4
    assert "both passed" in warnings_of()


def test_twenty_tokens_where_nobody_said_how_long(model, warnings_of):
    assert length(model) == 21
    assert "at most 20 tokens" in warnings_of()
    model.generation_config.max_length = 12
    assert length(model) == 12


def test_more_tokens_at_least_than_at_most_is_said(model, warnings_of):
    assert length(model, max_new_tokens=4, min_new_tokens=6) == 5
    assert "at least 7 and at most 5 tokens" in warnings_of()


# Which setting wins.


def test_keywords_win_over_the_given_configuration_and_that_over_the_models(model):
    model.generation_config.max_new_tokens = 4
    model.generation_config.num_beams = 2
    given = PublishedGenerationConfig(max_new_tokens=6)
    found = model.generate(SOURCES, given, return_dict_in_generate=True, **ENDLESS)
    assert found.sequences.shape[1] == 7
    assert found.beam_indices is not None
    assert length(model, generation_config=given, max_new_tokens=8) == 9
    assert model.generation_config.max_new_tokens == 4
    assert given.max_new_tokens == 6


def test_settings_of_an_old_file_lend_a_given_configuration_their_special_tokens_alone(model):
    # As in transformers 4.57, whose rule is the version that wrote the model's file.
    model.generation_config.transformers_version = "4.27.0.dev0"
    model.generation_config.num_beams = 2
    given = PublishedGenerationConfig(max_new_tokens=5)
    assert "beam_indices" not in model.generate(SOURCES, given, return_dict_in_generate=True)
    found = model.generate(SOURCES, given, use_model_defaults=True, return_dict_in_generate=True)
    assert "beam_indices" in found
    model.generation_config.transformers_version = "4.51.0"
    assert "beam_indices" in model.generate(SOURCES, given, return_dict_in_generate=True)


def test_the_configuration_of_the_translator_is_taken_too(model):
    given = GenerationConfig(num_beams=3, num_return_sequences=2, max_new_tokens=5)
    expected = model.generate(SOURCES, num_beams=3, num_return_sequences=2, max_new_tokens=5)
    assert torch.equal(model.generate(SOURCES, given), expected)
    with pytest.raises(ConfigError, match="manual_seed"):
        model.generate(SOURCES, GenerationConfig(do_sample=True, seed=3))


def test_options_set_on_the_models_configuration_count_while_it_has_no_file_of_its_own(model):
    with_language = model.generate(SOURCES, forced_bos_token_id=LANGUAGE, max_new_tokens=6)
    model.config.forced_bos_token_id = LANGUAGE
    try:
        assert torch.equal(model.generate(SOURCES, max_new_tokens=6), with_language)
        model.generation_config.max_length = 30
        assert not torch.equal(model.generate(SOURCES, max_new_tokens=6), with_language)
    finally:
        del model.config.forced_bos_token_id


def test_none_switches_an_option_of_the_checkpoint_off(model):
    plain = model.generate(SOURCES, max_new_tokens=6)
    model.generation_config.forced_bos_token_id = LANGUAGE
    assert not torch.equal(model.generate(SOURCES, max_new_tokens=6), plain)
    found = model.generate(SOURCES, max_new_tokens=6, forced_bos_token_id=None, num_beams=None)
    assert torch.equal(found, plain)


def test_options_that_wait_for_another_are_named(model, warnings_of):
    model.generate(SOURCES, max_new_tokens=2, temperature=0.5, early_stopping=True, top_k=50)
    assert "temperature has no effect without do_sample=True" in warnings_of()
    assert "early_stopping has no effect without num_beams" in warnings_of()
    assert "top_k" not in warnings_of()
    model.generate(SOURCES, max_new_tokens=2, output_scores=True)
    assert "output_scores has no effect without return_dict_in_generate" in warnings_of()


# Inputs.


def test_every_way_to_give_the_source_gives_the_same(model):
    expected = model.generate(SOURCES, num_beams=2, max_new_tokens=8)
    mask = (SOURCES != PAD).long()
    embeds = model.get_input_embeddings()(SOURCES) * model.config.d_model**0.5
    encoded = model.get_encoder()(SOURCES, mask)
    ways = [
        {"input_ids": SOURCES},
        {"input_ids": SOURCES, "attention_mask": mask},
        {"input_ids": SOURCES, "attention_mask": mask.bool()},
        {"encoder_outputs": encoded, "attention_mask": mask},
        {"encoder_outputs": (encoded[0],), "attention_mask": mask.float()},
        {"encoder_outputs": BaseModelOutput(encoded[0]), "attention_mask": mask},
        {"encoder_outputs": encoded, "attention_mask": mask, "use_cache": False},
        # A batch that was made for training.
        {"input_ids": SOURCES, "labels": SOURCES, "return_dict": True},
    ]
    for given in ways:
        assert torch.equal(model.generate(num_beams=2, max_new_tokens=8, **given), expected)
    # Positions of embeddings count padding, which a mask hides.
    found = model.generate(inputs_embeds=embeds, attention_mask=mask, num_beams=2, max_new_tokens=8)
    assert torch.equal(found, expected)
    assert encoded.last_hidden_state.shape[0] == 2


def test_without_any_source_the_encoder_reads_the_begin_mark(model):
    expected = model.generate(torch.tensor([[0]]), max_new_tokens=5)
    assert torch.equal(model.generate(max_new_tokens=5), expected)
    prompts = torch.tensor([[EOS, 9], [EOS, 9]])
    found = model.generate(decoder_input_ids=prompts, max_new_tokens=5)
    assert torch.equal(found[0], found[1])
    beams = model.generate(
        num_beams=4, do_sample=True, early_stopping=False, num_return_sequences=3, max_new_tokens=5
    )
    assert beams.shape == (3, 6)


def test_the_encoder_runs_once_through_the_method_that_peft_replaces(model, monkeypatch):
    expected = model.generate(SOURCES, max_new_tokens=4)
    prepare, calls = model._prepare_encoder_decoder_kwargs_for_generation, []

    def prepared(inputs, arguments, *rest):
        calls.append(inputs)
        return prepare(inputs, arguments, *rest)

    monkeypatch.setattr(model, "_prepare_encoder_decoder_kwargs_for_generation", prepared)
    assert torch.equal(model.generate(SOURCES, max_new_tokens=4), expected)
    assert [given.tolist() for given in calls] == [SOURCES.tolist()]
    alone = prepare(SOURCES, {"attention_mask": (SOURCES != PAD).long()})
    assert alone["encoder_outputs"].last_hidden_state.shape == (2, 5, model.config.d_model)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
def test_scores_are_float32_whatever_the_model_is(options):
    half = M2M100ForConditionalGeneration.from_pretrained(FOLDER, torch_dtype=torch.bfloat16)
    shown = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    found = half.generate(SOURCES, max_new_tokens=3, **shown, **options)
    assert {step.dtype for step in (*found.scores, *found.logits)} == {torch.float32}


def test_padding_is_taken_as_real_where_it_cannot_be_told_from_the_end_mark(model):
    ones = torch.ones_like(SOURCES)
    expected = model.generate(SOURCES, attention_mask=ones, max_new_tokens=6, **ENDLESS)
    options = {"pad_token_id": PAD, "eos_token_id": PAD, "max_new_tokens": 6}
    assert torch.equal(model.generate(SOURCES, **options)[:, :4], expected[:, :4])


def test_a_start_for_each_sentence(model):
    found = model.generate(SOURCES, decoder_start_token_id=[5, 9], max_new_tokens=4)
    assert found[:, 0].tolist() == [5, 9]
    for row, start in enumerate((5, 9)):
        alone = model.generate(SOURCES, decoder_start_token_id=start, max_new_tokens=4)
        assert torch.equal(found[row], alone[row])


def test_the_start_falls_back_to_the_begin_mark(model):
    model.generation_config.decoder_start_token_id = None
    assert model.generate(SOURCES, max_new_tokens=2)[:, 0].tolist() == [0, 0]
    with pytest.raises(ConfigError, match="decoder_start_token_id and bos_token_id"):
        model.generate(SOURCES, max_new_tokens=2, bos_token_id=None)


def test_rows_that_have_ended_are_padded(model, warnings_of):
    options = {"eos_token_id": [EOS, 34], "max_new_tokens": 8}
    found = model.generate(SOURCES, forced_bos_token_id=34, **options)
    assert found.tolist() == [[EOS, 34]] * 2
    # Without a padding token it is the first end mark.
    found = model.generate(SOURCES, pad_token_id=None, **options)
    ended = [row.index(34) if 34 in row else None for row in found.tolist()]
    assert any(end is not None for end in ended)
    for row, end in zip(found.tolist(), ended, strict=True):
        assert end is None or set(row[end + 1 :]) <= {EOS}
    assert "pad_token_id" in warnings_of()


# Callables.


def test_rules_get_the_whole_history_and_beams_log_probabilities(model):
    seen = []

    def watch(ids, scores):
        seen.append((tuple(ids.shape), tuple(scores.shape), scores.exp().sum(-1)))
        return scores

    prompts = torch.tensor([[EOS, LANGUAGE]] * 2)
    options = {"decoder_input_ids": prompts, "max_new_tokens": 2, **ENDLESS}
    model.generate(SOURCES, logits_processor=[watch], num_beams=3, **options)
    assert [shapes[:2] for shapes in seen] == [((6, 2), (6, 64)), ((6, 3), (6, 64))]
    assert seen[0][2].tolist() == pytest.approx([1.0] * 6, rel=1e-4)
    seen.clear()
    # One function will do, too.
    model.generate(
        SOURCES, logits_processor=watch, num_return_sequences=2, do_sample=True, **options
    )
    assert [shapes[:2] for shapes in seen] == [((4, 2), (4, 64)), ((4, 3), (4, 64))]


def test_criteria_are_given_the_scores_that_are_returned(model):
    seen = []
    options = {"max_new_tokens": 3, **ENDLESS}

    def watch(ids, scores):
        seen.append((ids.shape[1], None if scores is None else len(scores)))
        return False

    model.generate(SOURCES, stopping_criteria=[watch], **options)
    assert seen == [(2, None), (3, None), (4, None)]
    seen.clear()
    shown = {"return_dict_in_generate": True, "output_scores": True}
    model.generate(SOURCES, stopping_criteria=[watch], num_beams=2, **shown, **options)
    assert seen == [(2, 1), (3, 2), (4, 3)]


def test_the_prefix_function_is_told_the_sentence_whatever_its_rows(model):
    sentences = set()

    def allowed(sentence, ids):
        sentences.add(sentence)
        return [20 + sentence]

    options = {"prefix_allowed_tokens_fn": allowed, "max_new_tokens": 2}
    expected = [[EOS, 20, 20], [EOS, 21, 21]]
    for rows in ({}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}):
        found = model.generate(SOURCES, **rows, **options).tolist()
        assert found == [row for row in expected for _ in range(len(found) // 2)]
    assert sentences == {0, 1}
    with pytest.raises(InputError, match="prefix_allowed_tokens_fn allows no token for sentence 0"):
        model.generate(SOURCES, prefix_allowed_tokens_fn=lambda *_: [], max_new_tokens=2)


def test_beams_share_the_source_that_rules_look_at(model):
    for options in ({"encoder_no_repeat_ngram_size": 1}, {"encoder_repetition_penalty": 1e-9}):
        found = model.generate(SOURCES, num_beams=3, max_new_tokens=6, **options).tolist()
        for source, row in zip(SOURCES.tolist(), found, strict=True):
            assert not set(row[1:]) & (set(source) - {PAD})


def test_rules_about_the_source_wait_for_its_tokens(model, warnings_of):
    encoded = model.get_encoder()(SOURCES)
    plain = model.generate(encoder_outputs=encoded, max_new_tokens=4)
    found = model.generate(
        encoder_outputs=encoded, max_new_tokens=4, encoder_no_repeat_ngram_size=1
    )
    assert torch.equal(found, plain)
    assert "encoder_no_repeat_ngram_size needs input_ids" in warnings_of()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beam 3"])
def test_time_ends_generation_after_the_step_it_ran_out_in(model, options):
    assert length(model, max_new_tokens=30, max_time=0.0, **options) == 2
    started = time.monotonic()
    slow = {"logits_processor": [lambda _, scores: time.sleep(0.05) or scores]}
    assert 2 < length(model, max_new_tokens=200, max_time=0.3, **slow, **options) < 10
    assert time.monotonic() - started < 3


class Spelling:
    """A tokenizer whose tokens are two letters each."""

    def decode(self, tokens):
        return "".join(f"{chr(97 + token // 8)}{chr(97 + token % 8)}" for token in tokens)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2, "early_stopping": True}], ids=["greedy", "beam 2"]
)
def test_texts_end_the_row_that_completes_them(model, options):
    # An end mark that never comes, so that nothing else ends a row.
    tokenizer, options = Spelling(), {"max_new_tokens": 12, "eos_token_id": -1, **options}
    whole = model.generate(SOURCES, **options)
    # The text begins within one token and ends within the next.
    text = tokenizer.decode(whole[0, 4:6].tolist())[1:3]
    found = model.generate(SOURCES, stop_strings=[text, "zz"], tokenizer=tokenizer, **options)
    generated = tokenizer.decode([token for token in found[0].tolist() if token != PAD])
    assert 8 < len(generated) < 26
    assert generated.index(text) == len(generated) - 3
    with pytest.raises(ConfigError, match="tokenizer="):
        model.generate(SOURCES, stop_strings=text, **options)


def test_a_streamer_hears_prompts_and_tokens_as_they_come(model):
    class Streamer:
        def __init__(self):
            self.heard, self.ended = [], False

        def put(self, value):
            self.heard.append(value)

        def end(self):
            self.ended = True

    streamer = Streamer()
    found = model.generate(SOURCES, streamer=streamer, max_new_tokens=4)
    assert streamer.heard[0].tolist() == [[EOS], [EOS]]
    assert torch.equal(torch.stack(streamer.heard[1:], dim=1), found[:, 1:])
    assert streamer.ended
    with pytest.raises(ConfigError, match="streamer needs num_beams=1"):
        model.generate(SOURCES, streamer=streamer, num_beams=2)


def test_what_only_ever_said_how_to_compute_changes_nothing(model):
    plain = model.generate(SOURCES, max_new_tokens=4)
    ignored = {"cache_implementation": "static", "disable_compile": True, "synced_gpus": False}
    assert torch.equal(model.generate(SOURCES, max_new_tokens=4, **ignored), plain)


# Errors.

NOT_OFFERED = {
    "num_beam_groups": 2,
    "constraints": ["any"],
    "force_words_ids": [[5]],
    "penalty_alpha": 0.6,
    "guidance_scale": 1.5,
    "prompt_lookup_num_tokens": 3,
    "assistant_model": "any",
    "negative_prompt_ids": SOURCES,
    "custom_generate": "any",
}


@pytest.mark.parametrize("name", NOT_OFFERED)
def test_what_is_not_offered_is_named(model, name):
    with pytest.raises(ConfigError, match=name):
        model.generate(SOURCES, max_new_tokens=2, **{name: NOT_OFFERED[name]})


BEYOND = "has the token 64; the model has tokens 0 to 63"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"do_samples": True},
            "'do_samples', which neither it nor the model takes; did you mean 'do_sample'",
        ),
        ({"atention_mask": SOURCES}, "did you mean 'attention_mask'"),
        ({"foo": "bar"}, "'foo'"),
        ({"decoder_inputs_embeds": SOURCES}, "'decoder_inputs_embeds'"),
        ({"input_ids": SOURCES}, "inputs and input_ids"),
        ({"inputs_embeds": SOURCES}, "both input_ids and inputs_embeds"),
        ({"attention_mask": SOURCES[:, 1:]}, r"attention_mask has shape \(2, 4\); expected \(2, 5"),
        ({"decoder_input_ids": SOURCES[:1]}, r"decoder_input_ids have shape \(1, 5\)"),
        ({"decoder_attention_mask": SOURCES}, r"decoder_attention_mask has shape \(2, 5\)"),
        ({"decoder_start_token_id": [2, 2, 2]}, "lists 3 tokens for 2 sentences"),
        ({"max_length": 1}, "max_length is 1 .* leaves no room"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected an integer, at least 1"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences is 3"),
        ({"num_return_sequences": 2}, "greedy search finds one"),
        ({"do_sample": True, "temperature": 0.0}, "temperature is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"repetition_penalty": -1.0}, "repetition_penalty is -1.0"),
        ({"early_stopping": "always"}, "early_stopping is 'always'"),
        ({"bad_words_ids": [5]}, "bad_words_ids is"),
        ({"forced_bos_token_id": 64}, f"forced_bos_token_id {BEYOND}"),
        ({"forced_bos_token_id": "fra_Latn"}, r"convert_tokens_to_ids\('fra_Latn'\)"),
        ({"tgt_lang": "fra_Latn"}, "forced_bos_token_id=tokenizer"),
        ({"token_type_ids": torch.zeros(2, 5)}, "these models have none"),
        ({"bad_words_ids": [[3], [4, 64]]}, f"bad_words_ids {BEYOND}"),
        ({"sequence_bias": {(64,): 1.0}}, f"sequence_bias {BEYOND}"),
        ({"sequence_bias": [[[3, 64], 1.0]]}, f"sequence_bias {BEYOND}"),
        ({"logits_processor": ["any"]}, "logits_processor holds 'any'"),
        ({"stopping_criteria": 5}, "stopping_criteria holds 5"),
        ({"generation_config": {"num_beams": 2}}, "generation_config is a dict"),
        (
            {"past_key_values": ((torch.zeros(2, 2, 3, 8),) * 4,)},
            "past_key_values hold 3 positions",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(SOURCES, **options)


@pytest.mark.parametrize("inputs", [{"input_ids": SOURCES}, SOURCES.tolist(), ["a text"]])
def test_a_source_that_is_no_tensor_is_answered_with_how_to_pass_it(model, inputs):
    with pytest.raises(ValueError, match=r"generate\(\*\*inputs\)"):
        model.generate(inputs)


def test_a_cache_of_other_sentences_is_refused(model):
    past = ((torch.zeros(3, 2, 1, 8),) * 4,)
    with pytest.raises(InputError, match="past_key_values have 3 rows; expected 2"):
        model.generate(
            SOURCES, past_key_values=past, decoder_input_ids=torch.tensor([[EOS, 5]] * 2)
        )


def test_no_sentences_are_refused(model):
    with pytest.raises(InputError, match="no sentence"):
        model.generate(torch.zeros(0, 3, dtype=torch.int64))


def test_unknown_arguments_that_are_none_are_passed_over(model):
    plain = model.generate(SOURCES, max_new_tokens=3)
    assert torch.equal(model.generate(SOURCES, max_new_tokens=3, token_type_ids=None), plain)


def test_settings_of_another_class_may_be_set_on_the_model(model):
    model.generation_config = GenerationConfig(num_beams=2, max_new_tokens=4)
    found = model.generate(SOURCES)
    model.generation_config = PublishedGenerationConfig.from_model_config(model.config)
    assert torch.equal(found, model.generate(SOURCES, num_beams=2, max_new_tokens=4))
