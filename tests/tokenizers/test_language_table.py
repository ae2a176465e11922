"""What people call a language and the code it stands for."""

import pytest

from moe_mt.errors import InputError, UnsupportedLanguageError
from moe_mt.tokenizers import list_languages, resolve_language, sentence_rules_code
from moe_mt.tokenizers.language_table import TABLES
from moe_mt.tokenizers.languages import (
    LANGUAGE_NAME_ALIASES,
    LANGUAGE_SUBTAGS,
    M2M100_LANGUAGES,
    NLLB_LANGUAGES,
    TAG_ALIASES,
)

NLLB = TABLES["nllb"]
M2M100 = TABLES["m2m100"]
WMT21 = TABLES["wmt21"]


def test_every_list_is_complete_and_in_id_order():
    lists = {family: [code for code, _ in list_languages(family)] for family in TABLES}
    assert {family: len(codes) for family, codes in lists.items()} == {
        "nllb": 202,
        "m2m100": 100,
        "wmt21": 8,
    }
    # The ids the specification states, counted from the first language.
    nllb_ids = {"ace_Arab": 0, "ace_Latn": 1, "deu_Latn": 41, "eng_Latn": 46, "fra_Latn": 56}
    nllb_ids |= {"ron_Latn": 144, "sat_Beng": 149, "zul_Latn": 201}
    assert {code: lists["nllb"].index(code) for code in nllb_ids} == nllb_ids
    m2m100_ids = {"af": 0, "ar": 2, "en": 18, "fr": 24, "mr": 59, "ro": 72, "zu": 99}
    assert {code: lists["m2m100"].index(code) for code in m2m100_ids} == m2m100_ids
    assert lists["wmt21"] == ["en", "ha", "is", "ja", "cs", "ru", "zh", "de"]


def test_resolve_language_is_the_table_s_answer_by_the_family_s_name():
    assert resolve_language("sat_Olck") == "sat_Beng"
    assert resolve_language("fra_Latn", "m2m100") == "fr"
    with pytest.raises(UnsupportedLanguageError, match="WMT21"):
        resolve_language("French", "wmt21")
    with pytest.raises(InputError, match="opus"):
        resolve_language("French", "opus")


def test_list_languages_refuses_a_family_it_does_not_know():
    with pytest.raises(InputError, match="nllb, m2m100, wmt21"):
        list_languages("opus")


@pytest.mark.parametrize("family", TABLES)
def test_every_code_and_name_stands_for_itself(family):
    table = TABLES[family]
    for code, name in list_languages(family):
        spellings = [code, code.upper(), code.lower(), code.replace("_", "-"), f"__{code}__"]
        spellings += [f" {code} ", name, name.upper(), name.replace(" ", "_")]
        assert {spelling: table.resolve(spelling) for spelling in spellings} == dict.fromkeys(
            spellings, code
        )


@pytest.mark.parametrize("table", [M2M100, WMT21], ids=["m2m100", "wmt21"])
def test_nllb_codes_name_the_languages_of_m2m100(table):
    for code in table.codes:
        tag, _ = M2M100_LANGUAGES[code]
        assert table.resolve(tag) == code
        assert table.resolve(tag.replace("_", "-").lower()) == code
        assert table.resolve(tag[:3]) == code


def test_m2m100_codes_name_the_languages_of_nllb():
    # Breton and Frisian are not in NLLB; Azerbaijani, Norwegian and Chinese are there twice.
    elsewhere = {"br", "fy"}
    ambiguous = {"az", "no", "zh"}
    for code in set(M2M100.codes) - elsewhere - ambiguous:
        assert NLLB.resolve(code) == M2M100_LANGUAGES[code][0]
    for code in elsewhere | ambiguous:
        with pytest.raises(UnsupportedLanguageError):
            NLLB.resolve(code)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("fr", "fra_Latn"),  # ISO 639-1
        ("fra", "fra_Latn"),  # ISO 639-3
        ("fre", "fra_Latn"),  # ISO 639-2, bibliographic
        ("French", "fra_Latn"),
        ("fra-Latn", "fra_Latn"),
        ("fr_CA", "fra_Latn"),  # a region that says nothing about the language
        ("pt-BR", "por_Latn"),
        ("es-419", "spa_Latn"),  # a region that is a number
        ("en-Latn-US", "eng_Latn"),
        ("zh-Hans", "zho_Hans"),
        ("zh-Hant", "zho_Hant"),
        ("zh_CN", "zho_Hans"),  # a region that stands for a script
        ("zh-TW", "zho_Hant"),
        ("zh-HK", "zho_Hant"),
        ("cmn-Hans", "zho_Hans"),
        ("Simplified Chinese", "zho_Hans"),
        ("Chinese Traditional", "zho_Hant"),
        ("Cantonese", "yue_Hant"),
        ("yue", "yue_Hant"),
        ("sat_Olck", "sat_Beng"),  # fairseq's spelling of the same id
        ("sat", "sat_Beng"),
        ("ar", "arb_Arab"),  # macro-languages with one written standard
        ("ara", "arb_Arab"),
        ("Arabic", "arb_Arab"),
        ("ar-EG", "arb_Arab"),  # the standard as used in Egypt; Egyptian Arabic is arz
        ("fa", "pes_Arab"),
        ("Farsi", "pes_Arab"),
        ("fa-AF", "prs_Arab"),
        ("Dari", "prs_Arab"),
        ("lv", "lvs_Latn"),
        ("sq", "als_Latn"),
        ("et", "est_Latn"),
        ("ekk", "est_Latn"),
        ("mn", "khk_Cyrl"),
        ("ms", "zsm_Latn"),
        ("ne", "npi_Deva"),
        ("or", "ory_Orya"),
        ("ps", "pbt_Arab"),
        ("qu", "quy_Latn"),
        ("sw", "swh_Latn"),
        ("swa", "swh_Latn"),
        ("uz", "uzn_Latn"),
        ("yi", "ydd_Hebr"),
        ("mg", "plt_Latn"),
        ("om", "gaz_Latn"),
        ("sr", "srp_Cyrl"),
        ("tl", "tgl_Latn"),
        ("fil", "tgl_Latn"),
        ("he", "heb_Hebr"),
        ("iw", "heb_Hebr"),  # retired codes
        ("in", "ind_Latn"),
        ("bo", "bod_Tibt"),
        ("km", "khm_Khmr"),
        ("min", "min_Latn"),  # the model has one of FLORES' two scripts
        ("Minangkabau", "min_Latn"),
        ("nb", "nob_Latn"),
        ("Norwegian Bokmal", "nob_Latn"),  # without the mark
        ("nn", "nno_Latn"),
        ("az-Latn", "azj_Latn"),
        ("az-IR", "azb_Arab"),
        ("ku-IQ", "ckb_Arab"),
        ("Kurmanji", "kmr_Latn"),
        ("ks-Deva", "kas_Deva"),
        ("acehnese latin script", "ace_Latn"),
    ],
)
def test_aliases_of_nllb(name, code):
    assert NLLB.resolve(name) == code


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("fra_Latn", "fr"),
        ("__fr__", "fr"),
        ("zho_Hans", "zh"),
        ("zh-CN", "zh"),
        ("az", "az"),  # ambiguous in NLLB, one language here
        ("Norwegian", "no"),
        ("nor", "no"),
        ("arb_Arab", "ar"),
        ("ns", "ns"),  # not the ISO code of Northern Sotho
        ("nso", "ns"),
        ("jw", "jv"),
        ("Farsi", "fa"),
        ("Frisian", "fy"),
    ],
)
def test_aliases_of_m2m100(name, code):
    assert M2M100.resolve(name) == code


@pytest.mark.parametrize(
    ("name", "candidates"),
    [
        ("zh", {"zho_Hans", "zho_Hant"}),
        ("zho", {"zho_Hans", "zho_Hant"}),
        ("Chinese", {"zho_Hans", "zho_Hant"}),
        ("Mandarin", {"zho_Hans", "zho_Hant"}),
        ("no", {"nob_Latn", "nno_Latn"}),
        ("Norwegian", {"nob_Latn", "nno_Latn"}),
        ("ku", {"kmr_Latn", "ckb_Arab"}),
        ("Kurdish", {"kmr_Latn", "ckb_Arab"}),
        ("az", {"azj_Latn", "azb_Arab"}),
        ("Azerbaijani", {"azj_Latn", "azb_Arab"}),
        ("sh", {"bos_Latn", "hrv_Latn", "srp_Cyrl"}),
        ("ks", {"kas_Arab", "kas_Deva"}),
        ("Kashmiri", {"kas_Arab", "kas_Deva"}),
        ("ace", {"ace_Arab", "ace_Latn"}),
        ("taq", {"taq_Latn", "taq_Tfng"}),
        ("kr", {"knc_Arab", "knc_Latn"}),
    ],
)
def test_ambiguous_names_suggest_every_language_they_may_mean(name, candidates):
    with pytest.raises(UnsupportedLanguageError, match="ambiguous for NLLB-200") as caught:
        NLLB.resolve(name)
    assert {code for code in NLLB.codes if repr(code) in str(caught.value)} == candidates
    assert "`moe-mt languages`" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("arb_Latn", "'arb_Arab' (Modern Standard Arabic)"),  # FLORES has it, the model not
        ("min_Arab", "'min_Latn' (Minangkabau (Latin script))"),
        ("sr-Latn", "'srp_Cyrl' (Serbian)"),
        ("pa-PK", "'pan_Guru' (Eastern Panjabi)"),  # written in Arabic script there
        ("fra_Latin", "'fra_Latn' (French)"),
        ("frnech", "'fra_Latn' (French)"),
        ("eng_Lat", "'eng_Latn' (English)"),
        ("Portugese", "'por_Latn' (Portuguese)"),
    ],
)
def test_names_not_in_the_model_suggest_what_comes_close(name, suggestion):
    with pytest.raises(UnsupportedLanguageError, match="not among the 202") as caught:
        NLLB.resolve(name)
    assert suggestion in str(caught.value)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    "name", ["", " ", "xx", "klingon", "__", "()", "\u0301", "fr\x00", "1" * 999]
)
def test_names_of_nothing_are_refused(name):
    for table in TABLES.values():
        with pytest.raises(UnsupportedLanguageError, match="`moe-mt languages`"):
            table.resolve(name)


def test_another_script_than_the_model_writes_is_refused_not_guessed():
    # M2M100 writes Simplified Chinese: a Traditional target would be the wrong text.
    with pytest.raises(UnsupportedLanguageError, match=r"'zh' \(Chinese\)"):
        M2M100.resolve("zho_Hant")


def test_a_language_of_m2m100_that_wmt21_lacks_is_refused():
    with pytest.raises(UnsupportedLanguageError, match="8 languages of WMT21"):
        WMT21.resolve("fr")


def test_aliases_hide_no_language():
    languages = {tag[:3] for tag in NLLB_LANGUAGES}
    assert not languages & set(LANGUAGE_SUBTAGS)
    assert set(M2M100_LANGUAGES) & set(LANGUAGE_SUBTAGS) == {"az", "no", "zh"}


def test_every_alias_of_one_language_is_found_in_some_model():
    # What no model has is there only to be refused with the right suggestion.
    refused = {"kaz_Arab", "khk_Mong", "pan_Arab", "srp_Latn", "uzn_Arab"}
    for aliases in (LANGUAGE_SUBTAGS, TAG_ALIASES, LANGUAGE_NAME_ALIASES):
        for alias, tags in aliases.items():
            several = " " in tags or tags in ("zho", "knc", "kas", "taq")
            if not several and tags not in refused:
                found = (M2M100 if tags == "fry" else NLLB).resolve(alias)
                assert found.startswith("fy" if tags == "fry" else tags), alias


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("fra_Latn", "fr"),
        ("fr", "fr"),
        ("zho_Hans", "zh"),
        ("nob_Latn", "no"),
        ("nno_Latn", "nn"),
        ("azj_Latn", "az"),
        ("azb_Arab", "azb"),  # South Azerbaijani is not what `az` commonly is
        ("kmr_Latn", "ku"),
        ("heb_Hebr", "he"),  # not the retired `iw`
        ("ron_Latn", "ro"),  # nor `mo`
        ("arb_Arab", "ar"),
        ("eus_Latn", "eu"),  # a language M2M100 lacks
        ("ace_Latn", "ace"),  # one without a short code
        ("ns", "nso"),
        ("nso_Latn", "nso"),
        ("ceb", "ceb"),
    ],
)
def test_the_code_of_a_language_s_sentence_rules(code, expected):
    assert sentence_rules_code(code) == expected
