"""The examples of the two documentation pages, with the import changed and small models.

M2M100: the page of transformers 4.34; NLLB-MoE: that of 4.36. The names E1 to E10 are the order in
which they stand there. What published weights would answer needs published weights
(``tests/real_weights``); here the tiny model answers what it knows, and a random one whatever it
may, in the form that it must have.
"""

import logging
from pathlib import Path

import pytest
import torch

from moe_mt import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    M2M100Config,
    M2M100ForConditionalGeneration,
    M2M100Model,
    M2M100Tokenizer,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    NllbMoeModel,
    NllbTokenizer,
    shift_tokens_right,
)

FILES = Path(__file__).parents[1] / "golden" / "tokenizer"
LIFE = "Life is like a box of chocolates."
VIE = "La vie est comme une boîte de chocolat."
HINDI = "जीवन एक चॉकलेट बॉक्स की तरह है।"
CHINESE = "生活就像一盒巧克力。"
CHIEF = " UN Chief Says There Is No Military Solution in Syria"
SEF = "Şeful ONU declară că nu există o soluţie militară în Siria"


@pytest.fixture(scope="module")
def m2m100(tmp_path_factory):
    """A folder that stands for facebook/m2m100_418M."""
    folder = tmp_path_factory.mktemp("m2m100")
    tokenizer = M2M100Tokenizer(FILES / "vocab.json", FILES / "sentencepiece.bpe.model")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = M2M100Config(
        vocab_size=len(tokenizer) + 8,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_length=24,
        num_beams=5,
        early_stopping=True,
    )
    M2M100ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_both_pages_configure_a_model():
    config = M2M100Config(vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1)
    assert M2M100Model(config).config is config
    with torch.device("meta"):
        model = NllbMoeModel(NllbMoeConfig())
    # Not the 54B's shape, as the page has it: 12 layers a side, 6 of them sparse in all.
    assert round(model.num_parameters() / 1e9, 2) == 6.88
    assert model.config.num_experts == 128


def test_e1_supervised_training(m2m100):
    model = M2M100ForConditionalGeneration.from_pretrained(m2m100)
    tokenizer = M2M100Tokenizer.from_pretrained(m2m100, src_lang="en", tgt_lang="fr")
    model_inputs = tokenizer(LIFE, text_target=VIE, return_tensors="pt")
    loss = model(**model_inputs).loss
    assert loss.shape == ()
    assert model_inputs["labels"][0, 0] == tokenizer.get_lang_id("fr")
    loss.backward()
    assert model.get_input_embeddings().weight.grad.norm() > 0


@pytest.mark.parametrize(
    ("src_lang", "text", "tgt_lang"),
    [
        pytest.param("hi", HINDI, "fr", id="e2"),
        pytest.param("zh", CHINESE, "en", id="e3"),
    ],
)
def test_e2_and_e3_generation(m2m100, src_lang, text, tgt_lang):
    model = M2M100ForConditionalGeneration.from_pretrained(m2m100)
    tokenizer = M2M100Tokenizer.from_pretrained(m2m100)
    tokenizer.src_lang = src_lang
    encoded = tokenizer(text, return_tensors="pt")
    assert encoded["input_ids"][0, 0] == tokenizer.get_lang_id(src_lang)
    generated_tokens = model.generate(
        **encoded, forced_bos_token_id=tokenizer.get_lang_id(tgt_lang)
    )
    assert generated_tokens[0, :2].tolist() == [2, tokenizer.get_lang_id(tgt_lang)]
    assert generated_tokens.shape[1] <= 24
    (decoded,) = tokenizer.batch_decode(generated_tokens, skip_special_tokens=True)
    assert not any(token in decoded for token in tokenizer.all_special_tokens)


def test_e4_the_loss_of_a_pair(m2m100):
    tokenizer = M2M100Tokenizer.from_pretrained(m2m100, src_lang="en", tgt_lang="ro")
    model = M2M100ForConditionalGeneration.from_pretrained(m2m100)
    model_inputs = tokenizer(CHIEF, text_target=SEF, return_tensors="pt")
    outputs = model(**model_inputs)
    # The labels are no further shifted: what the decoder reads is.
    log_probs = outputs.logits.log_softmax(-1)[0]
    expected = -log_probs[torch.arange(len(log_probs)), model_inputs["labels"][0]].mean()
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_e5_a_model_without_decoder_ids_raises_as_it_did(m2m100):
    tokenizer = AutoTokenizer.from_pretrained(m2m100)
    model = M2M100Model.from_pretrained(m2m100)
    inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")
    with pytest.raises(ValueError, match="decoder_input_ids"):
        model(**inputs)
    outputs = model(**inputs, decoder_input_ids=torch.tensor([[2]]))
    assert outputs.last_hidden_state.shape == (1, 1, 16)


def test_e6_translation_of_the_page_s_class(m2m100):
    tokenizer = AutoTokenizer.from_pretrained(m2m100)
    model = M2M100ForConditionalGeneration.from_pretrained(m2m100)
    model_inputs = tokenizer(LIFE, return_tensors="pt")
    gen_tokens = model.generate(**model_inputs, forced_bos_token_id=tokenizer.get_lang_id("fr"))
    assert gen_tokens[0, 1] == tokenizer.get_lang_id("fr")
    assert len(tokenizer.batch_decode(gen_tokens, skip_special_tokens=True)) == 1


def test_e7_generation_with_experts():
    tokenizer = AutoTokenizer.from_pretrained("tiny")
    model = AutoModelForSeq2SeqLM.from_pretrained("tiny")
    assert isinstance(tokenizer, NllbTokenizer)
    assert isinstance(model, NllbMoeForConditionalGeneration)
    inputs = tokenizer("August 12, 1981", return_tensors="pt")
    translated_tokens = model.generate(
        **inputs, forced_bos_token_id=tokenizer.lang_code_to_id["fra_Latn"], max_length=50
    )
    decoded = tokenizer.batch_decode(translated_tokens, skip_special_tokens=True)[0]
    assert decoded == "12 août 1981"


def test_e7_the_limit_is_that_of_the_published_file_and_the_log_says_so(caplog):
    model = AutoModelForSeq2SeqLM.from_pretrained("tiny")
    # The published 54B has this in its generation_config.json.
    model.generation_config.max_new_tokens = 12
    with caplog.at_level(logging.WARNING):
        generated = model.generate(torch.tensor([[7, 8, 2]]), max_length=4, min_new_tokens=12)
    assert generated.shape[1] == 13
    assert "max_length=4" in caplog.text
    assert "max_new_tokens=12" in caplog.text


def test_e8_generating_from_any_other_language():
    tokenizer = AutoTokenizer.from_pretrained("tiny", src_lang="ron_Latn")
    model = AutoModelForSeq2SeqLM.from_pretrained("tiny")
    inputs = tokenizer(SEF, return_tensors="pt")
    assert inputs["input_ids"][0, 0] == tokenizer.get_lang_id("ron_Latn")
    translated_tokens = model.generate(
        **inputs, forced_bos_token_id=tokenizer.lang_code_to_id["deu_Latn"], max_new_tokens=29
    )
    assert translated_tokens[0, :2].tolist() == [2, tokenizer.get_lang_id("deu_Latn")]
    assert translated_tokens.shape[1] <= 30


def test_e9_the_model_without_a_head():
    """As written it uses SwitchTransformersModel and its _shift_right; as meant, this."""
    tokenizer = AutoTokenizer.from_pretrained("tiny")
    model = NllbMoeModel.from_pretrained("tiny")
    text = "Studies have been shown that owning a dog is good for you"
    input_ids = tokenizer(text, return_tensors="pt").input_ids
    decoder_input_ids = tokenizer("Studies show that", return_tensors="pt").input_ids
    decoder_input_ids = shift_tokens_right(
        decoder_input_ids, model.config.pad_token_id, model.config.decoder_start_token_id
    )
    outputs = model(input_ids=input_ids, decoder_input_ids=decoder_input_ids)
    assert outputs.last_hidden_state.shape == (*decoder_input_ids.shape, model.config.d_model)


def test_e10_the_nllb_tokenizer_has_get_lang_id_here():
    """As written it raises AttributeError; and the page says French where it asks for English."""
    tokenizer = AutoTokenizer.from_pretrained("tiny")
    model = NllbMoeForConditionalGeneration.from_pretrained("tiny")
    model_inputs = tokenizer("August 12, 1981", return_tensors="pt")
    gen_tokens = model.generate(
        **model_inputs, forced_bos_token_id=tokenizer.get_lang_id("fra_Latn")
    )
    assert tokenizer.batch_decode(gen_tokens, skip_special_tokens=True) == ["12 août 1981"]
    english = model.generate(**model_inputs, forced_bos_token_id=tokenizer.get_lang_id("eng_Latn"))
    assert english[0, 1] == tokenizer.convert_tokens_to_ids("eng_Latn")
