"""The sentencepiece model: its settings, its bytes, and copies of it."""

import copy
import pickle

import pytest

from moe_mt.errors import ConfigError
from moe_mt.tokenizers import SentencePieceModel

SAMPLING = {"enable_sampling": True, "alpha": 0.5, "nbest_size": -1}
TEXT = "the old mill by the river"


@pytest.fixture
def path(golden_folder):
    return golden_folder / "sentencepiece.bpe.model"


def cuts(model):
    return {tuple(model.encode(TEXT)) for _ in range(20)}


def test_one_text_is_cut_one_way_without_sampling(path):
    assert len(cuts(SentencePieceModel.load(path))) == 1


def test_subword_sampling_cuts_a_text_in_several_ways_that_join_to_it(path):
    model = SentencePieceModel.load(path, SAMPLING)
    drawn = cuts(model)
    assert len(drawn) > 1
    assert {model.decode(pieces) for pieces in drawn} == {TEXT}


def test_pickling_keeps_the_sampling(path):
    copied = pickle.loads(pickle.dumps(SentencePieceModel.load(path, SAMPLING)))
    assert len(cuts(copied)) > 1


def test_a_deep_copy_is_the_model_itself_which_never_changes(path):
    model = SentencePieceModel.load(path)
    assert copy.deepcopy([model])[0] is model


def test_the_bytes_are_those_of_the_file(path):
    assert SentencePieceModel.load(path).serialized == path.read_bytes()


def test_an_unknown_setting_is_an_error_that_names_it(path):
    with pytest.raises(ConfigError, match="nbest"):
        SentencePieceModel.load(path, {"nbest": 3})
