"""What a bar shows is what is done, when it is done."""

from tests.translators import scripted

TEXTS = ["May 2", "", "in 14 minutes. May 3", "1999"]


def follow(**options):
    seen = []
    results = scripted().translate_iter(
        TEXTS, "eng_Latn", "fra_Latn", show_progress_bar=False, on_progress=seen.append, **options
    )
    return seen, results


def total(seen, field):
    return sum(getattr(progress, field) for progress in seen)


def test_texts_sentences_and_tokens_are_counted_once_each():
    seen, results = follow()
    results = list(results)
    assert total(seen, "texts") == 4
    assert total(seen, "sentences") == 4  # two in the third text, none in the second
    assert total(seen, "tokens") == sum(len(result.tokens) for result in results)


def test_sentences_count_before_their_text_is_handed_over():
    seen, results = follow(batch_size=1)
    first = next(results)
    assert first.text == "May 2"
    assert total(seen, "texts") == 4
    # A text with two sentences counts with the later of them; one without, at once.
    assert sorted((p.texts, p.sentences) for p in seen) == [(0, 1), (1, 0), (1, 1), (1, 1), (1, 1)]


def test_the_bar_names_sentences_tokens_and_the_time_left(capsys):
    scripted().translate(TEXTS, "eng_Latn", "fra_Latn", show_progress_bar=True)
    shown = capsys.readouterr().err
    assert "4/4" in shown
    assert "4 sentences" in shown
    assert "tokens/s" in shown
