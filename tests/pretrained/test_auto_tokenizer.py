"""From a checkpoint's files to its tokenizer: the class, its settings, and errors that help."""

import json
import shutil

import pytest

from moe_mt.errors import CheckpointError
from moe_mt.pretrained.tokenization.auto import AutoTokenizer
from moe_mt.pretrained.tokenization.m2m100 import M2M100Tokenizer, SMALL100Tokenizer
from moe_mt.pretrained.tokenization.nllb import FAIRSEQ_LANGUAGE_CODES, NllbTokenizer
from moe_mt.tokenizers import load_tokenizer
from tests.pretrained.tokenizer_families import PIECE_COUNT, PIECES, WORD_COUNT, WORDS, m2m100, nllb

TINY = "moe_mt/tiny"
WMT21 = [f"__{code}__" for code in ("en", "ha", "is", "ja", "cs", "ru", "zh", "de")]
SMALL100_SHAPE = {"d_model": 1024, "encoder_layers": 12, "decoder_layers": 3}


@pytest.fixture
def checkpoint(tmp_path):
    def write(**files):
        for path in (PIECES, WORDS):
            shutil.copy(path, tmp_path)
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # As first published: M2M100 has no tokenizer_class.
        ({"config": {"model_type": "m2m_100"}}, M2M100Tokenizer),
        ({"config": {"model_type": "nllb-moe"}}, NllbTokenizer),
        # A dense NLLB is an M2M100 model.
        (
            {
                "config": {"model_type": "m2m_100"},
                "tokenizer_config": {"tokenizer_class": "NllbTokenizer"},
            },
            NllbTokenizer,
        ),
        ({"tokenizer_config": {"tokenizer_class": "NllbTokenizerFast"}}, NllbTokenizer),
        ({"config": {"model_type": "m2m_100", **SMALL100_SHAPE}}, SMALL100Tokenizer),
        ({"tokenizer_config": {"tokenizer_class": "SMALL100Tokenizer"}}, SMALL100Tokenizer),
    ],
)
def test_the_class_is_that_of_the_checkpoint(checkpoint, files, expected):
    assert type(AutoTokenizer.from_pretrained(checkpoint(**files))) is expected


def test_wmt21_is_known_by_its_languages(checkpoint):
    folder = checkpoint(
        config={"model_type": "m2m_100", "vocab_size": WORD_COUNT + 8},
        tokenizer_config={"additional_special_tokens": WMT21, "tgt_lang": "en"},
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.language_codes == "wmt21"
    assert tokenizer.lang_token_to_id == {token: WORD_COUNT + i for i, token in enumerate(WMT21)}
    assert tokenizer.tgt_lang == "en"


def test_a_checkpoint_that_does_not_say_is_an_error(checkpoint):
    with pytest.raises(CheckpointError, match="Cannot tell which tokenizer"):
        AutoTokenizer.from_pretrained(checkpoint())
    with pytest.raises(OSError, match="from_pretrained"):
        AutoTokenizer()


def test_arguments_take_the_place_of_the_files(checkpoint):
    folder = checkpoint(
        tokenizer_config={
            "tokenizer_class": "NllbTokenizer",
            "src_lang": "eng_Latn",
            "model_max_length": 1024,
            "legacy_behaviour": True,
            "special_tokens_map_file": "/home/someone/file.json",
            "keep_accents": True,
        }
    )
    tokenizer = AutoTokenizer.from_pretrained(
        str(folder), src_lang="deu_Latn", tgt_lang="fra_Latn", use_fast=True, trust_remote_code=True
    )
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == ("deu_Latn", "fra_Latn")
    assert tokenizer.model_max_length == 1024
    assert tokenizer.legacy_behaviour is True
    assert tokenizer.name_or_path == str(folder)
    # What is unknown is kept and saved; what only concerns transformers is not.
    assert tokenizer.init_kwargs["keep_accents"] is True
    assert "use_fast" not in tokenizer.init_kwargs
    tokenizer.save_pretrained(folder / "saved")
    written = json.loads((folder / "saved" / "tokenizer_config.json").read_text())
    assert written["keep_accents"] is True
    assert written["src_lang"] == "deu_Latn"
    assert str(folder) not in json.dumps(written)
    assert AutoTokenizer.from_pretrained(folder, subfolder="saved").src_lang == "deu_Latn"


def test_published_nllb_files_load(checkpoint):
    mask = {"__type": "AddedToken", "content": "<mask>", "lstrip": True, "normalized": True}
    folder = checkpoint(
        tokenizer_config={
            "tokenizer_class": "NllbTokenizer",
            "additional_special_tokens": None,
            "mask_token": mask,
            "src_lang": None,
        },
        special_tokens_map={
            "additional_special_tokens": FAIRSEQ_LANGUAGE_CODES,
            "mask_token": {k: v for k, v in mask.items() if k != "__type"},
        },
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.additional_special_tokens == FAIRSEQ_LANGUAGE_CODES
    assert tokenizer.get_vocab() == nllb().get_vocab()
    assert tokenizer.added_tokens_decoder[PIECE_COUNT + 203].lstrip is True


@pytest.mark.parametrize("name", ["added_tokens", "tokenizer"])
def test_added_tokens_of_older_checkpoints_keep_their_ids(checkpoint, name):
    token, token_id = "myv_Cyrl", PIECE_COUNT + 210
    older = {
        "added_tokens": {token: token_id},
        "tokenizer": {"added_tokens": [{"id": token_id, "content": token, "special": True}]},
    }
    folder = checkpoint(
        tokenizer_config={"tokenizer_class": "NllbTokenizer"},
        special_tokens_map={"additional_special_tokens": [token]},
        **{name: older[name]},
    )
    tokenizer = NllbTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(token) == token_id
    assert tokenizer.added_tokens_decoder[token_id].special is True
    tokenizer.src_lang = token
    assert tokenizer.add_tokens(["next"]) == 1
    assert tokenizer.convert_tokens_to_ids("next") == token_id + 1


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        # transformers' slow tokenizer, made without tokenizer.json.
        ({str(PIECE_COUNT + 2): {"content": "ace_Arab"}}, f"ace_Arab has {PIECE_COUNT + 1}"),
        ({str(PIECE_COUNT + 1): {"content": "<mask>"}}, f"{PIECE_COUNT + 1} is ace_Arab"),
    ],
)
def test_files_that_move_the_languages_are_refused(checkpoint, declared, message):
    settings = {"tokenizer_class": "NllbTokenizer", "added_tokens_decoder": declared}
    with pytest.raises(CheckpointError, match=message):
        AutoTokenizer.from_pretrained(checkpoint(tokenizer_config=settings))


def test_a_missing_file_is_named(checkpoint):
    folder = checkpoint(config={"model_type": "m2m_100"})
    (folder / "vocab.json").unlink()
    with pytest.raises(OSError, match=r"vocab\.json"):
        M2M100Tokenizer.from_pretrained(folder)


def test_the_wrong_class_is_warned_of(checkpoint, caplog):
    folder = checkpoint(config={"model_type": "m2m_100"})
    NllbTokenizer.from_pretrained(folder)
    assert "NllbTokenizer was asked for" in caplog.text
    caplog.clear()
    M2M100Tokenizer.from_pretrained(folder)
    assert caplog.records == []


def test_save_pretrained_writes_what_it_says(tmp_path):
    tokenizer = m2m100()
    paths = tokenizer.save_pretrained(tmp_path / "new" / "folder")
    assert sorted(paths) == sorted(str(path) for path in (tmp_path / "new" / "folder").iterdir())
    prefixed = tokenizer.save_pretrained(tmp_path, filename_prefix="small")
    assert all(path.split("/")[-1].startswith("small-") for path in prefixed)
    with pytest.raises(OSError, match="is a file"):
        tokenizer.save_pretrained(paths[0])
    for refused in ({"push_to_hub": True}, {"legacy_format": False}):
        with pytest.raises(ValueError, match="hf upload"):
            tokenizer.save_pretrained(tmp_path, **refused)


def test_saving_needs_the_original_files_no_more(tmp_path):
    shutil.copy(PIECES, tmp_path / "original.model")
    tokenizer = NllbTokenizer(str(tmp_path / "original.model"))
    (tmp_path / "original.model").unlink()
    tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").get_vocab() == tokenizer.get_vocab()


def test_the_documented_tokenizer_reads_text_as_the_core_does(tmp_path):
    documented, core = AutoTokenizer.from_pretrained(TINY), load_tokenizer(TINY)
    documented.tgt_lang = "fra_Latn"
    for text in ("three hundred euros", "</s> 日本 eng_Latn", ""):
        encoding = documented(text, text_target=text)
        as_documented = {"special_tokens_in_text": True}
        source = core.encode_source(text, "eng_Latn", "fra_Latn", **as_documented)
        assert encoding.input_ids == source
        assert encoding.labels == core.encode_target(text, "fra_Latn", **as_documented)
        for skip in (True, False):
            assert documented.decode(source, skip_special_tokens=skip) == core.decode(
                source, skip_special_tokens=skip
            )


def test_a_model_of_the_hub_is_fetched_without_its_weights(monkeypatch, checkpoint):
    folder = checkpoint(config={"model_type": "m2m_100"})
    asked = []

    def fetch(name, **options):
        asked.append((name, options))
        return folder

    for module in ("tokenizer", "auto"):
        monkeypatch.setattr(f"moe_mt.pretrained.tokenization.{module}.fetch_small_files", fetch)
    tokenizer = AutoTokenizer.from_pretrained("owner/model", revision="main", token="secret")
    assert tokenizer.name_or_path == "owner/model"
    assert {name for name, _ in asked} == {"owner/model"}
    assert all(options["revision"] == "main" for _, options in asked)
    assert "secret" not in json.dumps(tokenizer.init_kwargs, default=str)
