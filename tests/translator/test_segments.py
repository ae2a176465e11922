"""Nothing of a text is lost between its sentences, and none is longer than it may be."""

from time import perf_counter

import pytest
import sentencex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_mt.errors import ConfigError
from moe_mt.translator.segments import Segment, join_segments, split_text

LANGUAGES = ("eng_Latn", "fra_Latn", "zho_Hans", "hin_Deva", "amh_Ethi", "arb_Arab", "tha_Thai")
# What sentence splitters stumble over: marks, quotes, initials and every kind of white space.
CHARACTERS = "ab AJ1.!?。！।፧؟…\"'“”()«»:;,、\n\r\t\f\0\x85\xa0\u2028\u3000\u0301\u200b中😀"
HOSTILE = st.sampled_from([*CHARACTERS, "\n\n", "\r\n", "Dr. ", "e.g. ", "J.\xa0", "3.14"])
TEXTS = st.one_of(
    st.text(max_size=60),
    st.lists(HOSTILE, max_size=40).map("".join),
)


def restored(segments: list[Segment]) -> str:
    return "".join(segment.before + segment.text + segment.after for segment in segments)


def words(text: str) -> int:
    return len(text.split())


def split(text: str, language: str = "eng_Latn", how="auto", count=words, most=99):
    return split_text(text, language, how, count, most)


def texts(*arguments, **options) -> list[str]:
    return [segment.text for segment in split(*arguments, **options)]


@settings(max_examples=400, deadline=None)
@given(TEXTS, st.sampled_from(LANGUAGES), st.sampled_from(["auto", "off"]), st.integers(1, 8))
# Each of these broke something once: a splitter that fails on white space of several bytes …
@example("J\u2003.", "eng_Latn", "auto", 8)
@example("J\xa0.", "fra_Latn", "auto", 8)
# … and one that drops line ends around its tenth thousand characters.
@example("x\n\n" * 5000, "eng_Latn", "auto", 8)
def test_segments_joined_are_the_text(text, language, how, most):
    segments = split(text, language, how, len, most)
    assert restored(segments) == text
    assert all(len(segment.text) <= most for segment in segments)
    assert all(segment.text == segment.text.strip() for segment in segments)
    # An unspaced target, so that no space is added between sentences that touch.
    same = join_segments(segments, [s.text for s in segments], language, "zho_Hans")
    assert same == text


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        # An abbreviation and an initial end no sentence.
        ("eng_Latn", "Dr. Smith came. He left.", ["Dr. Smith came.", "He left."]),
        # The same with the no-break space of careful typists, on which the splitter panics.
        ("eng_Latn", "J.\xa0Smith came. He left.", ["J.\xa0Smith came.", "He left."]),
        # No space between sentences.
        ("zho_Hans", "你好。再见！", ["你好。", "再见！"]),
        # Marks of other scripts.
        ("hin_Deva", "वह आया। वह गया।", ["वह आया।", "वह गया।"]),
        ("amh_Ethi", "ሰላም። ደህና ሁን።", ["ሰላም።", "ደህና ሁን።"]),
        # A title has no mark; its line's end is its own, whichever character makes it.
        ("eng_Latn", "A title\nA line\u2028Another", ["A title", "A line", "Another"]),
        # A code the splitter has never heard of.
        ("ace_Latn", "Saboh. Dua.", ["Saboh.", "Dua."]),
    ],
)
def test_sentences_by_language(language, text, expected):
    segments = split(text, language)
    assert [segment.text for segment in segments] == expected
    assert restored(segments) == text


def test_white_space_stands_around_segments_as_it_was():
    segments = split(" \tOne.  Two.\n\n\n Three. ")
    found = [(segment.before, segment.text, segment.after) for segment in segments if segment.text]
    assert found == [(" \t", "One.", "  "), ("", "Two.", "\n"), (" ", "Three.", " ")]
    empty = [segment.before for segment in segments if not segment.text]
    assert empty == ["\n", "\n"]


@pytest.mark.parametrize("text", ["", " ", "\n\t \u3000"])
def test_a_text_of_nothing_has_nothing_to_translate(text):
    segments = split(text)
    assert not any(segment.text for segment in segments)
    assert restored(segments) == text


def test_what_the_tokenizer_does_not_see_counts_as_white_space():
    # A model that is given nothing makes something up.
    segments = split("\u200b", count=lambda part: len(part.strip("\u200b")))
    assert segments == [Segment("", "\u200b", "")]


def test_off_takes_the_text_whole():
    assert texts("One. Two.\nThree.", how="off") == ["One. Two.\nThree."]


def test_a_callable_splits_and_is_told_the_language():
    seen = []

    def by_bar(text, language):
        seen.append(language)
        return text.partition("|")

    assert texts("a. b|c", "deu_Latn", by_bar) == ["a. b", "|", "c"]
    assert seen == ["deu_Latn"]


def test_a_callable_that_loses_text_is_refused():
    with pytest.raises(ConfigError, match=r"lost text.*4 characters"):
        split("a  b", how=lambda text, language: text.split())


def test_an_unknown_way_to_split_is_refused():
    with pytest.raises(ConfigError, match="split is 'sentence'; choose"):
        split("a", how="sentence")


def test_a_splitter_that_loses_text_is_not_believed(monkeypatch):
    monkeypatch.setattr(sentencex, "segment", lambda language, text: [text[:-1]])
    assert texts("One. Two.") == ["One. Two."]


@pytest.mark.parametrize(
    ("text", "most", "expected"),
    [
        # At the clause nearest the middle, not at the nearest space.
        ("one two, three four five six", 4, ["one two,", "three four five six"]),
        # No clause: at a space.
        ("one two three four", 2, ["one two", "three four"]),
    ],
)
def test_a_long_sentence_is_cut_where_it_hurts_least(text, most, expected):
    segments = split(text, most=most)
    assert [segment.text for segment in segments] == expected
    assert all(segment.was_cut for segment in segments)
    assert restored(segments) == text


def test_a_comma_within_a_number_is_no_place_to_cut():
    assert texts("about 1,000,000 people", count=len, most=15) == ["about", "1,000,000", "people"]


def test_only_the_long_sentence_is_flagged():
    segments = split("Short one. This one is far too long.", most=4)
    assert [segment.was_cut for segment in segments] == [False, True, True]


def test_a_vowel_sign_stays_with_its_letter():
    # Half of the text is marks of the combining class zero, which Hindi's vowel signs have.
    parts = texts("कि" * 40, "hin_Deva", count=len, most=9)
    assert len(parts) > 8
    assert all(part.startswith("क") for part in parts)


@pytest.mark.parametrize(
    "text",
    [
        "word " * 20_000,
        "x" * 100_000,  # no place to cut
        "a" + "\u0301" * 99_998 + "b",  # one letter under a tower of accents
        "。" * 100_000,
        "\n" * 100_000,
        "Hi. " * 25_000,
        "x\n\n" * 33_333,
    ],
    ids=["words", "one word", "accents", "full stops", "lines", "sentences", "paragraphs"],
)
def test_a_very_long_text_is_cut_in_no_time(text):
    started = perf_counter()
    segments = split(text, count=len, most=300)
    assert perf_counter() - started < 5
    assert restored(segments) == text
    assert max(len(segment.text) for segment in segments) <= 300


def joined(text, translations, src_lang, tgt_lang, most=99, count=words):
    return join_segments(
        split(text, src_lang, count=count, most=most), translations, src_lang, tgt_lang
    )


@pytest.mark.parametrize(
    ("text", "source", "target", "translations", "expected"),
    [
        # White space is the source's.
        ("One.  Two.\n", "eng_Latn", "fra_Latn", ["Un.", "Deux."], "Un.  Deux.\n"),
        # A target that needs a space gets one.
        ("你好。再见！", "zho_Hans", "eng_Latn", ["Hello.", "Bye!"], "Hello. Bye!"),
        # One that needs none gets none …
        ("你好。再见！", "zho_Hans", "jpn_Jpan", ["今日は。", "では！"], "今日は。では！"),
        # … by the short codes of M2M100 too.
        ("你好。再见！", "zh", "ja", ["今日は。", "では！"], "今日は。では！"),
        ("你好。再见！", "zh", "en", ["Hello.", "Bye!"], "Hello. Bye!"),
        # A sentence without a translation adds nothing.
        ("你好。再见！", "zho_Hans", "eng_Latn", ["Hello.", ""], "Hello."),
    ],
)
def test_translations_stand_where_sentences_stood(text, source, target, translations, expected):
    assert joined(text, translations, source, target) == expected


def test_parts_of_a_cut_sentence_keep_words_apart_and_words_whole():
    # Chinese has no space where it is cut, and English needs one there.
    assert (
        joined("一二三四", ["one two", "three"], "zho_Hans", "eng_Latn", 2, len) == "one two three"
    )
    # A word that was cut in two stays one word.
    assert joined("abcd", ["ef", "gh"], "eng_Latn", "fra_Latn", 2, len) == "efgh"
