"""The corpus of the tiny model: its meanings, its hold-out and its files."""

import random
from collections import Counter
from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest
import sentencepiece
from sentencex import segment

from recipes.tiny import corpus
from recipes.tiny.domain import (
    LANGUAGES,
    LOCALES,
    NUMBER_WORD_LANGUAGES,
    Listing,
    Money,
    Name,
    NumberWords,
    Quantity,
    Sentence,
    normalise,
    render,
)
from recipes.tiny.inventory import COUNTRIES, CURRENCIES, LANGUAGE_NAMES, UNITS
from recipes.tiny.sampling import (
    DRAWS,
    SENTENCE_KINDS,
    ambiguities,
    draw,
    held_out_meanings,
    is_held_out,
    training_meanings,
    training_pairs,
)
from recipes.tiny.times import TIME_UNITS, Date, DateRange, MonthRange, RelativeTime

SEED = 1
COMMITTED = Path(corpus.__file__).with_name("heldout.tsv")
NAMES = [
    Name(table, code)
    for table, codes in (
        ("country", COUNTRIES),
        ("language", LANGUAGE_NAMES),
        ("currency", CURRENCIES),
    )
    for code in codes
]
PLURALS = [Decimal(text) for text in ("0", "1", "2", "5", "11", "21", "1000", "1.5", "12.25")]


def sample(count: int, seed: int = SEED) -> list:
    rng = random.Random(seed)
    return [draw(rng) for _ in range(count)]


@pytest.fixture(scope="module")
def heldout_rows() -> list[list[str]]:
    lines = COMMITTED.read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines]


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> sentencepiece.SentencePieceProcessor:
    path = tmp_path_factory.mktemp("pieces") / "sentencepiece.bpe.model"
    corpus.train_sentencepiece(path, corpus.surfaces(30_000, SEED), 4000)
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.mark.parametrize(
    ("meaning", "language", "surface"),
    [
        # The long name in the right plural form: Russian has three.
        (Quantity(Decimal(5), "length-meter"), "rus_Cyrl", "5 метров"),
        (Quantity(Decimal("1.5"), "length-meter"), "rus_Cyrl", "1,5 метра"),
        # No long pattern in the locale: the short one, never the unit's code.
        (Quantity(Decimal(5), "length-meter"), "zho_Hans", "5米"),
        (Quantity(Decimal(5), "duration-minute"), "swh_Latn", "dakika 5"),
        # A narrow no-break space of CLDR becomes a plain one.
        (Money(Decimal("1234.50"), "USD"), "fra_Latn", "1 234,50 dollars des États-Unis"),
        # A whole amount has no decimals, a broken one always two.
        (Money(Decimal(1234), "USD"), "eng_Latn", "1,234 US dollars"),
        (Money(Decimal("0.50"), "EUR"), "eng_Latn", "0.50 euros"),
        # Sixty minutes stay minutes: the unit is exact, not the largest that fits.
        (RelativeTime(60, "minute", past=True), "eng_Latn", "60 minutes ago"),
        (RelativeTime(1, "day", past=False), "eng_Latn", "in 1 day"),
        (RelativeTime(13, "month", past=False), "deu_Latn", "in 13 Monaten"),
        (RelativeTime(40, "year", past=True), "fra_Latn", "il y a 40 ans"),
        # Across months both months must be said, which CLDR's Swahili interval does not.
        (
            DateRange(date(2024, 5, 5), date(2024, 6, 7)),
            "swh_Latn",
            "5 Mei 2024 – 7 Juni 2024",
        ),
        (DateRange(date(2024, 5, 5), date(2024, 5, 7)), "zho_Hans", "2024年5月5日至7日"),
        (MonthRange(date(2024, 5, 1), date(2024, 6, 1)), "eng_Latn", "May – June 2024"),
        (Date(date(2024, 5, 5), weekday=True), "deu_Latn", "Sonntag, 5. Mai 2024"),
        # Without num2words there is no surface, and none for a list of it.
        (NumberWords(21), "hin_Deva", None),
        (Listing((NumberWords(21), NumberWords(2)), "or"), "zho_Hans", None),
        # A sentence has a capital and the language's own full stop.
        (Sentence(Name("language", "fr")), "fra_Latn", "Français."),
        (Sentence(Name("language", "fr")), "hin_Deva", "फ़्रेंच।"),
        (Sentence(Name("language", "fr")), "zho_Hans", "法语。"),
    ],
)
def test_surface(meaning, language, surface):
    # Expected surfaces are put through NFKC so that the table may be typed either way.
    assert render(meaning, language) == (surface and normalise(surface))


def test_normalise_removes_what_decoding_cannot_restore():
    # No-break, narrow and doubled spaces, direction marks, soft hyphens, wide letters.
    assert normalise("\u200e1\u202f234\u00a0 km\u00ad Ａ ") == "1 234 km A"


def test_key_ignores_order_conjunction_punctuation_and_weekday():
    # What is held out must not come back in another dress.
    france, peru = Name("country", "FR"), Name("country", "PE")
    one = Listing((france, peru), "standard")
    assert one.keys == Sentence(Listing((peru, france), "or")).keys
    day = date(2024, 5, 5)
    assert Date(day).keys == Date(day, weekday=True).keys


def test_keys_hold_every_nested_structure():
    # A held-out date must not be an end of a range or an item of a list in training.
    first, last = date(2024, 5, 5), date(2024, 6, 7)
    span, days = DateRange(first, last), Listing((Date(first), Date(last)), "or")
    for day in (first, last):
        assert Date(day).key in span.keys
        assert Date(day).key in Sentence(days).keys
    # A name cannot be guessed from other names, so it alone is never held out.
    assert Name("country", "FR").keys == ()


def test_every_name_unit_and_small_number_is_unambiguous():
    # Exhaustive over what has to be learned by rote, in both punctuations and all plural forms.
    meanings = [
        *NAMES,
        *map(Sentence, NAMES),
        *(Quantity(value, unit) for unit in UNITS for value in PLURALS),
        *(Money(value, currency) for currency in CURRENCIES for value in PLURALS[:-2]),
        *(
            RelativeTime(count, unit, past)
            for unit in TIME_UNITS
            for count in (1, 2, 5, 21)
            for past in (False, True)
        ),
        *map(NumberWords, range(1000)),
        *map(Sentence, map(NumberWords, range(1000))),
    ]
    assert ambiguities(meanings) == []


def test_a_sample_is_unambiguous():
    # Across kinds and inside lists, where "and" could belong to an item or to the list.
    assert ambiguities(sample(15_000)) == []


def test_ambiguities_are_found():
    # The check itself can fail: the pairs that the inventory and the lists leave out.
    somali = [Sentence(Name("language", "so")), Sentence(Name("country", "SO"))]
    assert ("rus_Cyrl", "Сомали.", "eng_Latn") in ambiguities(somali)
    numbers = [NumberWords(305), Listing((NumberWords(300), NumberWords(5)), "standard")]
    assert ("eng_Latn", "three hundred and five", "fra_Latn") in ambiguities(numbers)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name.key)
def test_name_is_a_name_everywhere(name):
    # A missing CLDR name shows as its code; a comma or bracket would blur where an item ends.
    for language in LANGUAGES:
        surface = render(name, language)
        assert surface
        assert surface != name.code
        assert not set(surface) & set(",.、()&/\t")


@pytest.mark.parametrize("language", LANGUAGES)
def test_five_sentences_split_into_five(language):
    # Several sentences in one string are translated one by one, so they must come apart again.
    rng = random.Random(SEED)
    drawn = (draw(rng, kind) for kind in sorted(SENTENCE_KINDS) for _ in range(400))
    sentences = [render(meaning, language) for meaning in drawn if isinstance(meaning, Sentence)]
    sentences = [sentence for sentence in sentences if sentence]
    sentences += [str(render(Sentence(name), language)) for name in NAMES]
    rng.shuffle(sentences)
    joint = "" if language == "zho_Hans" else " "
    for start in range(0, len(sentences) - 4, 5):
        five = sentences[start : start + 5]
        parts = segment(LOCALES[language].language, joint.join(five))
        assert [part.strip() for part in parts] == five


def test_training_holds_nothing_held_out():
    # The hold-out by meaning, on what the training file is written from.
    meanings = [meaning for *_, meaning in training_meanings(20_000, SEED)]
    keys = {key for meaning in meanings for key in meaning.keys}
    held_out = held_out_meanings(corpus.HELD_OUT_COUNT, corpus.HELD_OUT_WORDS_COUNT, SEED)
    assert not keys & {meaning.key for meaning in held_out}
    assert not any(is_held_out(meaning, SEED) for meaning in meanings)
    # The sample is not empty of composite structures, of any kind.
    assert {meaning.kind for meaning in meanings} == set(DRAWS)


def test_training_pairs_hold_no_held_out_surface(heldout_rows):
    # The same by text: nothing that the test asks for was ever seen, on either side.
    seen = set()
    for source_language, target_language, source, target in training_pairs(20_000, SEED):
        seen |= {(source_language, source), (target_language, target)}
    asked = {
        (language, surface)
        for row in heldout_rows[1:]
        for language, surface in zip(LANGUAGES, row[2:], strict=True)
        if surface
    }
    assert not seen & asked


def test_held_out_share():
    # About 4 %: enough to test on, little enough not to starve training.
    days = [Date(date(year, month, 9)) for year in range(1950, 2050) for month in range(1, 13)]
    share = sum(is_held_out(day, SEED) for day in days) / len(days)
    assert 0.025 < share < 0.055
    # Another seed holds out other meanings.
    assert [is_held_out(day, SEED) for day in days] != [is_held_out(day, 2) for day in days]


def test_committed_held_out_set_is_the_regenerated_one():
    # Scores are comparable only on the same sentences; a new CLDR shows here first.
    assert corpus.held_out_table(SEED) == COMMITTED.read_text(encoding="utf-8")


def test_held_out_set_covers_directions_and_kinds(heldout_rows):
    # At least 100 per direction, every composite kind, no sentence twice.
    header, *rows = heldout_rows
    assert header == ["id", "kind", *LANGUAGES]
    complete = [row for row in rows if all(row[2:])]
    assert len(complete) >= 100
    assert {row[1] for row in rows} == set(DRAWS) - {"country", "language", "currency"}
    for column, language in enumerate(LANGUAGES, start=2):
        surfaces = [row[column] for row in rows if row[column]]
        assert len(set(surfaces)) == len(surfaces)
        words = sum(bool(row[column]) for row in rows if row[1].startswith("number"))
        assert (words > 0) == (language in NUMBER_WORD_LANGUAGES)


def test_training_pairs_are_deterministic_and_balanced():
    # The same seed gives the same file; each of the 90 directions is as likely as another.
    pairs = list(training_pairs(9000, SEED))
    assert pairs[:500] == list(training_pairs(500, SEED))
    assert pairs[:500] != list(training_pairs(500, SEED + 1))
    directions = Counter(pair[:2] for pair in pairs)
    assert len(directions) == 90
    # 100 each on average; five standard deviations are 50.
    assert min(directions.values()) > 50
    assert max(directions.values()) < 150


def test_pieces_round_trip(processor):
    # Decoding must give every surface back, or 100 % exact match is out of reach.
    for meaning in sample(3000, seed=7):
        for language in LANGUAGES:
            surface = render(meaning, language)
            if surface:
                pieces = processor.encode(surface)
                assert processor.unk_id() not in pieces
                assert processor.decode(pieces) == surface


def test_pieces_have_the_published_layout(processor):
    # NLLB's tokenizer shifts ids by fixed offsets: unknown, begin, end come first, no padding.
    assert [processor.id_to_piece(index) for index in range(3)] == ["<unk>", "<s>", "</s>"]
    assert processor.pad_id() == -1
    assert processor.get_piece_size() == 4000
    # Digits are copied one by one, so no piece holds two.
    pieces = [processor.id_to_piece(index) for index in range(4000)]
    assert all(sum(character.isdigit() for character in piece) <= 1 for piece in pieces)


def test_command_writes_the_three_files(tmp_path, monkeypatch):
    # The one command of the recipe, at a small size.
    arguments = ["corpus", "--out", str(tmp_path / "new"), "--pairs", "200"]
    arguments += ["--piece-surfaces", "5000", "--vocab-size", "1500"]
    monkeypatch.setattr("sys.argv", arguments)
    corpus.main()
    lines = (tmp_path / "new" / "train.tsv").read_text(encoding="utf-8").splitlines()
    assert [tuple(line.split("\t")) for line in lines] == list(training_pairs(200, SEED))
    table = (tmp_path / "new" / "heldout.tsv").read_text(encoding="utf-8")
    assert table == COMMITTED.read_text(encoding="utf-8")
    model = tmp_path / "new" / "sentencepiece.bpe.model"
    assert sentencepiece.SentencePieceProcessor(model_file=str(model)).get_piece_size() == 1500
    # The model is shipped: it must be the same from any folder, and name none.
    assert str(tmp_path).encode() not in model.read_bytes()
