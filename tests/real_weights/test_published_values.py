"""Published values, for whoever has the weights: ``pytest -m real_weights --model ID``.

``ID`` is a hub id or a folder. Each test belongs to some models and skips for the others. The
values are those of transformers' integration tests and of the two documentation pages; those of
the 54B are fairseq's. ``--device cuda`` and ``--dtype`` are what ``from_pretrained`` takes.
"""

import pytest
import torch

import moe_mt

pytestmark = pytest.mark.real_weights

FRENCH = [128028, 98, 12, 30527, 2732, 159, 7755, 61904, 39144, 38, 2]
CHIEF = " UN Chief Says There Is No Military Solution in Syria"


@pytest.fixture(scope="session")
def name(request):
    found = request.config.getoption("--model")
    if not found:
        pytest.skip("name a model: pytest -m real_weights --model facebook/m2m100_418M")
    return found


@pytest.fixture(scope="session")
def translator(name, request):
    option = request.config.getoption
    return moe_mt.from_pretrained(name, device=option("--device"), dtype=option("--dtype"))


@pytest.fixture
def only(name):
    """Skip unless the model's name holds one of some words."""

    def check(*words):
        if not any(word in name.lower() for word in words):
            pytest.skip(f"these values are of {' or '.join(words)}")

    return check


@torch.inference_mode()
def states(translator, source, target, mask=None):
    """Return encoder states, decoder states and logits of token id lists."""
    model = translator.model
    device = model.embedding.weight.device
    source, target = torch.tensor(source, device=device), torch.tensor(target, device=device)
    mask = None if mask is None else torch.tensor(mask, device=device).bool()
    kept = []
    hook = model.decoder.register_forward_hook(lambda *call: kept.append(call[2][0]))
    output = model(source, target, mask)
    hook.remove()
    return output.memory.float().cpu(), kept[0].float().cpu(), output.logits.float().cpu()


def test_m2m100_418m_decoder_states_and_logits(translator, only):
    only("m2m100_418m")
    decoder_input = [[2, *FRENCH[:-1]]]
    _, hidden, logits = states(translator, [FRENCH], decoder_input)
    assert hidden.shape == (1, 11, 1024)
    expected = [[-0.7780, -0.1676, 0.1038], [-6.7556, -1.3992, 0.0567], [-7.5383, -0.5920, -0.2779]]
    torch.testing.assert_close(hidden[0, :3, :3], torch.tensor(expected), atol=1e-4, rtol=0)
    expected = [[-1.0448, -1.0411, 3.7992], [-3.2191, -3.2386, -1.3451], [-3.6210, -3.5993, 0.4925]]
    torch.testing.assert_close(logits[0, :3, :3], torch.tensor(expected), atol=1e-4, rtol=0)


def test_m2m100_418m_translates_the_news(translator, only):
    only("m2m100_418m")
    sources = [
        "L'affaire NSA souligne l'absence totale de débat sur le renseignement",
        "Selon moi, il y a deux niveaux de réponse de la part du gouvernement français.",
        "Lorsque François Hollande téléphone à Barack Obama ou quand le ministre des affaires "
        "étrangères Laurent Fabius convoque l'ambassadeur des Etats-Unis, ils réagissent à une "
        "vraie découverte, qui est celle de l'ampleur de la surveillance américaine sur l'ensemble "
        "des communications en France.",
    ]
    assert translator.translate(sources, "fr", "en", num_beams=5, split="off") == [
        "The NSA case highlights the total absence of intelligence debate",
        "I think there are two levels of response from the French government.",
        "When François Hollande calls Barack Obama or when Foreign Minister Laurent Fabius calls "
        "the U.S. Ambassador, they respond to a real discovery, which is that of the scale of U.S. "
        "surveillance on all communications in France.",
    ]


def test_m2m100_418m_translates_the_documentation_examples(translator, only):
    only("m2m100_418m")
    hindi, chinese = "जीवन एक चॉकलेट बॉक्स की तरह है।", "生活就像一盒巧克力。"
    french = "La vie est comme une boîte de chocolat."
    assert translator.translate(hindi, "hi", "fr", split="off") == french
    assert (
        translator.translate(chinese, "zh", "en", split="off") == "Life is like a box of chocolate."
    )


def test_m2m100_reference_encodings(translator, only):
    only("m2m100_418m", "m2m100_1.2b")
    encode = translator.tokenizer.encode_source
    assert encode("A test", "en", "fr") == [128022, 58, 4183, 2]
    opinion = "In my opinion, there are two levels of response from the French government."
    assert encode(opinion, "en", "fr") == [
        *(128022, 593, 1949, 115781, 4, 71586, 4234, 60633, 126233, 432, 123808, 15592, 1197),
        *(117132, 120618, 5, 2),
    ]


def test_nllb_reference_encodings(translator, only):
    only("nllb")
    tokenizer = translator.tokenizer
    day = tokenizer.encode_source("How was your day?", "eng_Latn", "fra_Latn")
    assert day == [256047, 13374, 1398, 4260, 4039, 248130, 2]
    assert tokenizer.encode_text(CHIEF) == [
        *(16297, 134408, 8165, 248066, 14734, 950, 1135, 105721, 3573, 83, 27352, 108, 49486),
    ]
    assert tokenizer.language_id("fra_Latn") == 256057
    assert tokenizer.vocab_size == 256204


LEGACY_SOURCE = [
    [28768, 248, 6399, 9, 65972, 452, 1925, 629, 123543, 248075, 2, 256047],
    [117, 7027, 7195, 202, 44778, 248075, 2, 256047, 1, 1, 1, 1],
]
LEGACY_MASK = [[1] * 12, [1] * 8 + [0] * 4]
LEGACY_TARGET = [[2, 256057], [2, 256057]]


def test_nllb_moe_54b_states_and_logits(translator, only):
    only("nllb-moe-54b")
    found = states(translator, LEGACY_SOURCE, LEGACY_TARGET, LEGACY_MASK)
    expected = (
        [0.1696, -0.0059, 0.0489, 0.0479, -0.4222, -0.2178, -0.1372, -0.0860],
        [0.0374, -0.1055, -0.1060, -0.1711, -0.0540, -0.1183],
        [0.3834, 0.2057, 4.5399, 0.8301, 0.4810, 0.9325, 0.9928, 0.9574],
    )
    for tensor, values in zip(found, expected, strict=True):
        start = tensor[1, 0, : len(values)]
        torch.testing.assert_close(start, torch.tensor(values), rtol=6e-3, atol=9e-3)


def test_random_nllb_moe_with_two_experts(translator, only):
    only("random-nllb-moe-2-experts")
    found = states(translator, LEGACY_SOURCE, LEGACY_TARGET, LEGACY_MASK)
    expected = (
        [0.3920, -0.1974, -0.0279, 0.3463, -0.8306],
        [-0.0604, -0.2002, 0.0606, -0.8637, -1.1310],
        [-0.3059, 0.0000, 9.3029, 0.6456, -0.9148, 1.7836],
    )
    for tensor, values in zip(found, expected, strict=True):
        start = tensor[1, 0, : len(values)]
        torch.testing.assert_close(start, torch.tensor(values), rtol=6e-3, atol=9e-3)


def test_nllb_moe_54b_translates_the_documentation_example(translator, only):
    only("nllb-moe-54b")
    source = (
        "Previously, Ring's CEO, Jamie Siminoff, remarked the company started when his doorbell "
        "wasn't audible from his shop in his garage."
    )
    assert translator.translate(source, "eng_Latn", "fra_Latn", split="off") == (
        "Auparavant, le PDG de Ring, Jamie Siminoff, a fait remarquer que la société avait "
        "commencé lorsque sa sonnette n'était pas audible depuis son magasin dans son garage."
    )


def test_wmt21_language_ids(translator, only):
    only("wmt21")
    assert translator.tokenizer.language_id("en") == 128001
    assert translator.tokenizer.language_id("de") == 128008


def test_every_model_translates_a_sentence(translator):
    code = {lang: translator.tokenizer.resolve_language(lang) for lang in ("en", "de")}
    result = next(translator.translate_iter(["Good morning."], code["en"], code["de"]))
    assert result.finish_reason == "stop"
    assert result.text.strip()
