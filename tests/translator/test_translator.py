"""Sentences in, sentences out: what a caller sees."""

import csv
import gc
import logging
import random
from dataclasses import FrozenInstanceError, fields, replace
from functools import cache
from itertools import count, islice
from pathlib import Path
from time import perf_counter

import pytest

import moe_mt
from moe_mt.errors import ConfigError, InputError, UnsupportedLanguageError
from moe_mt.generation import GenerationConfig
from moe_mt.translator import TranslationResult
from moe_mt.translator import windows as windows_module
from tests.translators import loop, ramble, scripted, silence, tiny, tiny_tokenizer

HELD_OUT = Path(__file__).parents[2] / "recipes" / "tiny" / "heldout.tsv"


@pytest.fixture(scope="module")
def held_out() -> list[dict[str, str]]:
    with HELD_OUT.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def one(translator, text, **options) -> TranslationResult:
    (result,) = translator.translate_iter([text], "eng_Latn", "fra_Latn", **options)
    return result


def seen_options(monkeypatch, translator=None, **options) -> GenerationConfig:
    """Return the configuration that reaches generation."""
    seen = []
    genuine = windows_module.generate_each

    def spy(model, requests, config, **rest):
        seen.append(config)
        return genuine(model, requests, config, **rest)

    monkeypatch.setattr(windows_module, "generate_each", spy)
    one(translator or scripted(), "in 14 minutes", **options)
    return seen[0]


# --- what goes in and what comes out -------------------------------------------------------------


def test_a_str_gives_a_str_and_a_list_a_list_in_its_order():
    translator = scripted()
    assert translator.translate("in 14 minutes", "eng_Latn", "fra_Latn") == "in 14 minutes"
    # Lengths out of order, so that sorting by length would show.
    texts = ["1999", "September 20, 2013 or August 21, 1960", "", "in 14 minutes", "May 2"]
    assert translator.translate(texts, "eng_Latn", "fra_Latn", batch_size=2) == texts
    assert translator.translate(tuple(texts), "eng_Latn", "fra_Latn") == texts
    assert translator.translate([], "eng_Latn", "fra_Latn") == []


def test_a_single_text_shows_no_progress_bar(capsys):
    scripted().translate("in 14 minutes", "eng_Latn", "fra_Latn")
    scripted().translate(["in 14 minutes"], "eng_Latn", "fra_Latn")  # no terminal here either
    assert capsys.readouterr().err == ""
    scripted().translate(["May 2"] * 3, "eng_Latn", "fra_Latn", show_progress_bar=True)
    assert "3/3" in capsys.readouterr().err


def test_languages_are_one_for_all_or_one_per_text_mixed():
    translator = tiny()
    texts, sources = ["in 14 minutes", "dans 14 minutes", "14分钟后"], ["en", "French", "zho_Hans"]
    targets = ["deu_Latn", "spa_Latn", "eng_Latn"]
    mixed = list(translator.translate_iter(texts, sources, targets, num_beams=1))
    assert [result.src_lang for result in mixed] == ["eng_Latn", "fra_Latn", "zho_Hans"]
    assert [result.tgt_lang for result in mixed] == targets
    for text, source, target, result in zip(texts, sources, targets, mixed, strict=True):
        alone = translator.translate(text, source, target, num_beams=1)
        assert result.text == alone
        assert result.tokens[0] == translator.tokenizer.language_id(target)
    # One source language, several targets: transformers needs a call for each.
    english = translator.translate([texts[0]] * 3, "eng_Latn", targets, num_beams=1)
    assert english[0] == mixed[0].text


@pytest.mark.parametrize("name", ["src_lang", "tgt_lang", "target_prefix"])
def test_as_many_values_as_texts(name):
    arguments = {"src_lang": "eng_Latn", "tgt_lang": "fra_Latn"} | {name: ["fra_Latn"] * 3}
    with pytest.raises(InputError, match=f"2 texts were given with 3 values of {name}"):
        scripted().translate(["a", "b"], **arguments)


def test_an_iterator_of_languages_that_ends_too_soon():
    results = scripted().translate_iter(["a", "b"], iter(["eng_Latn"]), "fra_Latn")
    with pytest.raises(InputError, match="src_lang has fewer values"):
        list(results)


def test_a_str_is_no_iterable_of_texts():
    # It would be translated letter by letter.
    with pytest.raises(InputError, match="texts is one str"):
        scripted().translate_iter("in 14 minutes", "eng_Latn", "fra_Latn")


def test_a_text_must_be_a_str():
    with pytest.raises(InputError, match="found bytes"):
        scripted().translate([b"in 14 minutes"], "eng_Latn", "fra_Latn")


def test_unknown_languages_are_refused_at_once():
    # At the call and not at the first result: a wrong command must not start work.
    with pytest.raises(UnsupportedLanguageError, match=r"zho_Hans.*zho_Hant"):
        scripted().translate_iter(iter([]), "zh", "eng_Latn")
    with pytest.raises(UnsupportedLanguageError, match=r"tha_Thai.* not one this .* fra_Latn"):
        tiny().translate_iter(iter([]), "eng_Latn", "tha_Thai")
    with pytest.raises(UnsupportedLanguageError, match="Klingon"):
        scripted().translate("a", "eng_Latn", "Klingon")


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "length_penalty": 0.5, "early_stopping": True},
        {"num_beams": 2, "early_stopping": "never"},
        {"num_beams": 3, "num_return_sequences": 2},
        {"max_new_tokens": 7, "min_new_tokens": 3},
        {"no_repeat_ngram_size": 2, "repetition_penalty": 1.5},
        {"do_sample": True, "temperature": 0.5, "top_k": 5, "top_p": 0.9, "seed": 3},
    ],
)
def test_every_generation_option_passes_through(monkeypatch, options):
    config = seen_options(monkeypatch, **options)
    assert {name: getattr(config, name) for name in options} == options


def test_every_option_of_generation_is_tried_above():
    tried = test_every_generation_option_passes_through.pytestmark[0].args[1]
    left = {field.name for field in fields(GenerationConfig)} - {n for o in tried for n in o}
    # Names of checkpoints, which mean what an option above means.
    assert left == {"max_length", "min_length"}


def test_unset_options_are_the_checkpoint_s(monkeypatch):
    assert tiny().generation_config.num_beams == 4  # generation_config.json of the package
    assert seen_options(monkeypatch, tiny()).num_beams == 4
    assert seen_options(monkeypatch, tiny(), num_beams=None).num_beams == 4
    assert seen_options(monkeypatch, tiny(), num_beams=2).num_beams == 2


def test_the_output_limit_follows_the_source_unless_set():
    # generation_config.json says 200; a constant cuts long sentences and lets short ones loop.
    assert tiny().generation_config.new_token_limit is None
    translator = scripted(ramble)
    short, long = (one(translator, text) for text in ("May 2", "May 2 or " * 30 + "May 3"))
    source = len(tiny_tokenizer().encode_source("May 2", "eng_Latn", "fra_Latn"))
    assert len(short.tokens) == 1 + 3 * source + 32
    assert len(long.tokens) > 200
    assert len(one(translator, "May 2", max_new_tokens=9).tokens) == 9
    # A least length above what the source suggests must not contradict it.
    assert len(one(scripted(silence), "May 2", min_new_tokens=100).tokens) == 101


def test_an_unknown_option_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match="'num_beam' is unknown; did you mean 'num_beams'"):
        scripted().translate_iter(iter([]), "eng_Latn", "fra_Latn", num_beam=4)


@pytest.mark.parametrize("name", ["batch_size", "max_batch_tokens", "max_input_tokens"])
def test_sizes_are_positive(name):
    with pytest.raises(ConfigError, match=f"{name} is 0; it must be an integer, at least 1"):
        scripted().translate_iter(iter([]), "eng_Latn", "fra_Latn", **{name: 0})


def test_batches_are_as_large_as_asked_for():
    translator = scripted()
    translator.translate(["May 2"] * 5, "eng_Latn", "fra_Latn", batch_size=2)
    assert [len(batch) for batch in translator.model.batches] == [2, 2, 1]
    translator.model.batches.clear()
    translator.translate(["May 2"] * 5, "eng_Latn", "fra_Latn", max_batch_tokens=12)
    # Five tokens each, so two of them.
    assert translator.model.batches == [[5, 5], [5, 5], [5]]


def test_num_return_sequences():
    translator = tiny()
    found = translator.translate("in 14 minutes", "eng_Latn", "fra_Latn", num_return_sequences=3)
    assert len(found) == 3
    assert found[0] == translator.translate("in 14 minutes", "eng_Latn", "fra_Latn")
    both = translator.translate(
        ["in 14 minutes", "1999"], "eng_Latn", "fra_Latn", num_return_sequences=3
    )
    assert both[0] == found
    best = one(translator, "in 14 minutes", num_return_sequences=3)
    assert [best.text, *(other.text for other in best.alternatives)] == found
    # Two ways to spell one text are two hypotheses, so that tokens differ and texts may not.
    assert len({result.tokens for result in (best, *best.alternatives)}) == 3
    scores = [best.score, *(other.score for other in best.alternatives)]
    assert scores == sorted(scores, reverse=True)
    # Alternatives of a text are its sentences' alternatives, rank by rank.
    text = "Chinese. Greek."
    first, second = (
        translator.translate(sentence, "eng_Latn", "fra_Latn", num_return_sequences=2)
        for sentence in text.split()
    )
    pairs = translator.translate(text, "eng_Latn", "fra_Latn", num_return_sequences=2)
    assert pairs == [f"{a} {b}" for a, b in zip(first, second, strict=True)]


def test_target_prefix_begins_the_translation():
    translator = tiny()
    assert translator.translate(
        "in 14 minutes", "eng_Latn", "fra_Latn", target_prefix="pendant"
    ).startswith("pendant")
    # One per text, and only the first sentence of it.
    found = scripted().translate(
        ["May 2. May 3.", "May 4."], "eng_Latn", "fra_Latn", target_prefix=["a b c", ""]
    )
    assert found[0].startswith("a b c")
    assert found[0].endswith(" May 3.")
    assert found[1] == "May 4."


def test_sampling_is_repeatable_with_a_seed_in_any_batch():
    translator = tiny()
    options = {"do_sample": True, "num_beams": 1, "temperature": 3.0, "seed": 11}
    texts = ["in 14 minutes", "1999", "September 20, 2013"]
    together = translator.translate(texts, "eng_Latn", "fra_Latn", **options)
    alone = [translator.translate(text, "eng_Latn", "fra_Latn", **options) for text in texts]
    assert together == alone
    assert alone != [
        translator.translate(text, "eng_Latn", "fra_Latn", **(options | {"seed": 12}))
        for text in texts
    ]


def test_an_option_without_effect_is_logged(caplog):
    with caplog.at_level(logging.WARNING):
        scripted().translate("May 2", "eng_Latn", "fra_Latn", temperature=0.5)
    assert "temperature has no effect without do_sample" in caplog.text


# --- results -------------------------------------------------------------------------------------


def test_a_result_says_everything_and_cannot_be_changed():
    result = one(scripted(), "May 2. May 3.")
    tokenizer = tiny_tokenizer()
    expected = [
        token
        for sentence in ("May 2.", "May 3.")
        for token in [
            tokenizer.language_id("fra_Latn"),
            *tokenizer.encode_text(sentence),
            tokenizer.eos_id,
        ]
    ]
    assert vars(result) == {
        "text": "May 2. May 3.",
        "score": pytest.approx(0, abs=1e-3),
        "tokens": tuple(expected),
        "finish_reason": "stop",
        "src_lang": "eng_Latn",
        "tgt_lang": "fra_Latn",
        "warnings": (),
        "alternatives": (),
    }
    with pytest.raises(FrozenInstanceError):
        result.text = "other"


def test_the_score_of_a_text_weighs_its_sentences_by_their_tokens():
    translator = tiny()
    parts = [one(translator, text) for text in ("Chinese, Greek, and Spanish.", "Greek.")]
    whole = one(translator, "Chinese, Greek, and Spanish. Greek.")
    weights = [len(part.tokens) for part in parts]
    mean = sum(p.score * w for p, w in zip(parts, weights, strict=True)) / sum(weights)
    assert whole.score == pytest.approx(mean, abs=1e-5)
    assert whole.score < 0


@pytest.mark.parametrize("text", ["", " ", "\n \t\u3000", "\u200b"])
def test_an_empty_text_stays_as_it_is(text):
    # The last is a character that the tokenizer drops; a model given nothing makes something up.
    result = one(tiny(), text)
    assert (result.text, result.finish_reason, result.tokens) == (text, "empty", ())
    assert (result.score, result.warnings) == (0.0, ())


def test_an_output_that_reaches_its_limit_is_flagged():
    result = one(scripted(ramble), "May 2")
    assert result.finish_reason == "length"
    (warning,) = result.warnings
    assert warning.startswith("length: ")
    assert "max_new_tokens" in warning


def test_an_output_that_loops_is_flagged():
    result = one(scripted(loop), "May 2")
    assert result.finish_reason == "repetition"
    assert [warning.partition(":")[0] for warning in result.warnings] == ["repetition"]


def test_both_are_flagged_where_sentences_differ():
    short = len(tiny_tokenizer().encode_source("May 2.", "eng_Latn", "fra_Latn"))
    both = scripted(lambda source, step: (loop if len(source) == short else ramble)(source, step))
    result = one(both, "May 2. September 20, 2013 or May 3.")
    assert result.finish_reason == "length"
    assert [warning.partition(":")[0] for warning in result.warnings] == ["length", "repetition"]


def test_an_output_that_ends_at_once_is_an_empty_translation():
    result = one(scripted(silence), " May 2\n")
    assert (result.text, result.finish_reason) == (" \n", "stop")


@pytest.mark.parametrize(
    ("text", "is_outside"),
    [
        ("ราคาเท่าไหร่ครับ", True),  # a script the model never saw
        ("ราคา บาท", True),
        ("\0", True),
        ("ราคา บาท ครับ 1", True),  # all but one
        ("September 20, 2013 ครับ", False),  # a word of it
        ("September 20, 2013", False),
    ],
)
def test_a_text_of_unknown_characters_is_flagged(text, is_outside):
    result = one(tiny(), text, num_beams=1, max_new_tokens=4)
    assert any(w.startswith("unknown: ") for w in result.warnings) == is_outside


# --- no text is lost -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "separator"),
    [("eng_Latn", "fra_Latn", " "), ("fra_Latn", "zho_Hans", "  "), ("rus_Cyrl", "ell_Grek", "\n")],
)
def test_five_sentences_in_one_text_are_five_translations_rejoined(
    held_out, source, target, separator
):
    sentences = [row[source] for row in held_out if row[source].endswith(".")][:5]
    assert len(sentences) == 5
    singles = tiny().translate(sentences, source, target)
    text = separator.join(sentences)
    assert tiny().translate(text, source, target) == separator.join(singles)


def test_chinese_sentences_get_the_spaces_that_english_needs(held_out):
    sentences = [row["zho_Hans"] for row in held_out if row["zho_Hans"].endswith("。")][:5]
    singles = tiny().translate(sentences, "zho_Hans", "eng_Latn")
    assert tiny().translate("".join(sentences), "zho_Hans", "eng_Latn") == " ".join(singles)


def test_lines_of_one_text_stay_lines(held_out):
    # No mark ends these; a line's end does.
    lines = [held_out[i]["eng_Latn"] for i in (0, 4, 6)]
    singles = tiny().translate(lines, "eng_Latn", "deu_Latn")
    assert tiny().translate("\r\n".join(lines), "eng_Latn", "deu_Latn") == "\r\n".join(singles)


@pytest.mark.parametrize("limit", range(9, 14))
def test_a_sentence_over_the_limit_is_cut_and_flagged(limit):
    translator = scripted()
    text = "May 2, May 3, May 4, May 5, May 6, May 7, May 8, May 9"
    result = one(translator, text, max_input_tokens=limit)
    assert result.text == text
    assert result.finish_reason == "stop"
    (warning,) = result.warnings
    assert warning.startswith("cut: ")
    lengths = [length for batch in translator.model.batches for length in batch]
    assert f"in {len(lengths)} parts" in warning
    # Language and end counted.
    assert max(lengths) <= limit


def test_a_sentence_as_long_as_the_limit_is_not_cut():
    translator = scripted()
    whole = len(translator.tokenizer.encode_source("May 2, May 3", "eng_Latn", "fra_Latn"))
    assert one(translator, "May 2, May 3", max_input_tokens=whole).warnings == ()
    assert one(translator, "May 2, May 3", max_input_tokens=whole - 1).warnings != ()


@pytest.mark.parametrize(
    ("positions", "limit"),
    # Published models name 1024 positions and were trained on 512 tokens; others name fewer.
    [(1024, 512), (64, 64)],
)
def test_the_longest_input_is_the_checkpoint_s_but_at_most_512(positions, limit):
    translator = scripted(silence)
    translator.model.config = replace(translator.model.config, max_positions=positions)
    fits = "\u0e01 " * ((limit - 2) // 2)  # two pieces each
    assert one(translator, fits, split="off").warnings[0].startswith("unknown")
    assert one(translator, fits + "\u0e01", split="off").warnings[0].startswith("cut")


def test_split_off_and_callable():
    translator = scripted()
    text = "May 2.  May 3."
    assert one(translator, text).text == text
    assert len(translator.model.batches[0]) == 2
    # Taken whole, the inner spaces are the tokenizer's.
    assert one(translator, text, split="off").text == "May 2. May 3."
    assert len(translator.model.batches[1]) == 1
    by_space = one(translator, text, split=lambda text, language: text.partition("  "))
    assert by_space.text == text
    with pytest.raises(ConfigError, match="lost text"):
        one(translator, text, split=lambda text, language: text.split())
    with pytest.raises(ConfigError, match="split is 'of'"):
        one(translator, text, split="of")


@pytest.mark.parametrize("text", ["May 2 " * 16_666, "9" * 100_000], ids=["words", "no space"])
def test_a_line_of_a_hundred_thousand_characters(text):
    started = perf_counter()
    result = one(scripted(), text)
    assert perf_counter() - started < 30
    assert result.text == text
    assert [warning.partition(":")[0] for warning in result.warnings] == ["cut"]


# --- translate_iter ------------------------------------------------------------------------------


def test_results_come_lazily_and_in_order():
    read = []

    def texts():
        for number in count():
            read.append(number)
            yield f"May {number}" * (1 + number % 3)

    results = scripted().translate_iter(texts(), "eng_Latn", "fra_Latn", batch_size=2)
    assert read == []
    first = next(results)
    assert first.text == "May 0"
    # Eight batches are read ahead to be sorted by length.
    assert len(read) == 16
    texts_out = [result.text for result in islice(results, 30)]
    assert texts_out == [f"May {n}" * (1 + n % 3) for n in range(1, 31)]
    assert len(read) == 32


def test_an_error_in_the_input_comes_behind_the_results_before_it():
    def texts():
        yield from ["May 2"] * 16
        raise RuntimeError("the input broke")

    results = scripted().translate_iter(texts(), "eng_Latn", "fra_Latn", batch_size=2)
    assert len(list(islice(results, 16))) == 16
    with pytest.raises(RuntimeError, match="the input broke"):
        next(results)


def anonymous_bytes() -> int:
    gc.collect()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_an_endless_iterable_takes_constant_memory():
    # White space is quick to tokenize and is kept by whoever keeps a text or a result: a leak of
    # either would be 1,024 times 20 kB.
    pad = " " * 20_000
    texts = (f"May {number}{pad}" for number in count())
    results = scripted().translate_iter(texts, "eng_Latn", "fra_Latn", batch_size=8)
    for _ in islice(results, 256):
        pass
    before = anonymous_bytes()
    for _ in islice(results, 1_024):
        pass
    assert anonymous_bytes() - before < 6e6


# --- the same in any batch -----------------------------------------------------------------------

INVARIANCE_LANGUAGES = ("eng_Latn", "fra_Latn", "rus_Cyrl", "zho_Hans", "hin_Deva", "ell_Grek")
GROUPINGS = [(None, 1, 450), (None, 4, 150), ("int8-dynamic", 1, 300), ("int8-dynamic", 4, 100)]
"""Quantization, beams, and how many groupings: a thousand in all."""


@cache
def packed(quantization):
    return moe_mt.from_pretrained("tiny", device="cpu", quantization=quantization)


@pytest.mark.slow
@pytest.mark.parametrize(("quantization", "num_beams", "groupings"), GROUPINGS)
def test_the_same_sentence_in_any_batch_order_and_padding_gives_the_same_tokens(
    held_out, quantization, num_beams, groupings
):
    """Random groupings of 24 held-out sentences, languages mixed."""
    draw = random.Random(num_beams)
    short = [row for row in held_out if all(len(row[code]) < 40 for code in INVARIANCE_LANGUAGES)]
    sentences = []
    for row in draw.sample(short, 24):
        source, target = draw.sample(INVARIANCE_LANGUAGES, 2)
        sentences.append((row[source], source, target))
    options = {"num_beams": num_beams, "max_new_tokens": 24}

    def results(group, **sizes):
        translator = packed(quantization)
        return list(translator.translate_iter(*zip(*group, strict=True), **options, **sizes))

    alone = {sentence: results([sentence])[0] for sentence in sentences}
    assert len({result.tokens for result in alone.values()}) > 20
    for grouping in range(groupings):
        group = draw.sample(sentences, draw.randint(2, 6))
        found = results(
            group, batch_size=draw.choice((2, 3, 8)), max_batch_tokens=draw.choice((40, 2048))
        )
        for sentence, result in zip(group, found, strict=True):
            gap = result.score - alone[sentence].score
            expected = alone[sentence].tokens
            assert result.tokens == expected, (grouping, sentence, group, f"score gap {gap:.2e}")


@pytest.mark.parametrize("options", [{}, {"quantization": "int8-dynamic"}, {"prepack": False}])
def test_batch_invariant_scores_are_the_same_to_the_last_bit(held_out, options):
    translator = moe_mt.from_pretrained("tiny", device="cpu", batch_invariant=True, **options)
    draw = random.Random(5)
    texts = [row["eng_Latn"] for row in draw.sample(held_out, 12)]
    targets = [draw.choice(("fra_Latn", "deu_Latn")) for _ in texts]

    def scores(order, **sizes):
        chosen = [texts[i] for i in order], "eng_Latn", [targets[i] for i in order]
        return [result.score for result in translator.translate_iter(*chosen, **sizes)]

    alone = [scores([i])[0] for i in range(12)]
    for batch_size in (1, 5, 64):
        order = draw.sample(range(12), 12)
        assert scores(order, batch_size=batch_size) == [alone[i] for i in order]


@pytest.mark.parametrize("text", [None, 5, b"in 14 minutes", {"in 14 minutes"}])
def test_what_is_no_text_is_refused(text):
    with pytest.raises(InputError, match=f"text is a {type(text).__name__}"):
        tiny().translate(text, "eng_Latn", "fra_Latn")


def test_a_language_that_is_no_str_is_refused():
    with pytest.raises(InputError, match="a language must be a str"):
        tiny().translate(["in 14 minutes"], [5], "fra_Latn")


def test_a_limit_that_leaves_no_room_for_words_is_refused():
    with pytest.raises(ConfigError, match="max_input_tokens is 7"):
        tiny().translate("in 14 minutes", "eng_Latn", "fra_Latn", max_input_tokens=7)
