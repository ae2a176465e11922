"""What a tokenizer returns: a mapping, attributes, tensors."""

import copy
import pickle

import numpy as np
import pytest
import torch

from moe_mt.errors import InputError
from moe_mt.pretrained.tokenization.batch_encoding import BatchEncoding

ROWS = {"input_ids": [[5, 6], [7, 8]], "attention_mask": [[1, 1], [1, 0]]}


@pytest.fixture
def encoding():
    return BatchEncoding(ROWS)


def test_it_is_a_mapping_whose_names_are_attributes(encoding):
    assert list(encoding) == list(encoding.keys()) == ["input_ids", "attention_mask"]
    assert encoding["input_ids"] is encoding.input_ids is encoding.data["input_ids"]
    assert encoding == ROWS
    assert dict(**encoding) == ROWS
    encoding["labels"] = [1]
    assert "labels" in encoding
    assert encoding.labels == [1]


def test_a_name_that_is_not_there_is_a_key_or_an_attribute_error(encoding):
    with pytest.raises(KeyError, match="labels"):
        encoding["labels"]
    with pytest.raises(AttributeError, match="labels"):
        _ = encoding.labels
    assert getattr(encoding, "labels", None) is None


def test_an_integer_is_no_index_and_the_message_says_what_is(encoding):
    with pytest.raises(KeyError, match=r"input_ids, attention_mask.*slice.*not by 0"):
        encoding[0]


def test_a_slice_cuts_every_value(encoding):
    assert encoding[:1] == {"input_ids": [[5, 6]], "attention_mask": [[1, 1]]}


def test_tensors_are_int64(encoding):
    encoding.convert_to_tensors("pt")
    assert torch.equal(encoding.input_ids, torch.tensor([[5, 6], [7, 8]]))
    assert encoding.input_ids.dtype == torch.int64
    arrays = BatchEncoding(ROWS, tensor_type="np")
    assert isinstance(arrays.input_ids, np.ndarray)
    assert arrays.input_ids.dtype == np.int64
    # Tensors made of arrays, as a data loader has them.
    assert torch.equal(BatchEncoding(arrays, "pt").input_ids, encoding.input_ids)


def test_empty_rows_are_int64_too():
    assert BatchEncoding({"input_ids": []}, "pt", prepend_batch_axis=True).input_ids.shape == (1, 0)
    assert BatchEncoding({"input_ids": [[], []]}, "pt").input_ids.dtype == torch.int64
    assert BatchEncoding({"input_ids": [[], []]}, "np").input_ids.dtype == np.int64


def test_rows_of_unlike_lengths_make_no_tensor_and_the_message_names_them():
    with pytest.raises(InputError, match=r"'labels'.*padding=True"):
        BatchEncoding({"labels": [[1, 2], [3]]}, "pt")
    # NumPy can hold them, one array per row.
    ragged = BatchEncoding({"labels": [[1, 2], [3]]}, "np").labels
    assert [row.tolist() for row in ragged] == [[1, 2], [3]]


@pytest.mark.parametrize("tensor_type", ["tf", "jax", "torch"])
def test_other_tensors_are_refused(tensor_type):
    with pytest.raises(InputError, match=f"{tensor_type}.*'pt'.*'np'"):
        BatchEncoding(ROWS, tensor_type)


def test_to_moves_tensors_in_place_and_leaves_the_rest():
    encoding = BatchEncoding({"input_ids": [[5]]}, "pt")
    encoding["forced_bos_token_id"] = 7
    assert encoding.to("meta") is encoding
    assert encoding.input_ids.device.type == "meta"
    assert encoding.forced_bos_token_id == 7


def test_it_can_be_copied_and_sent_to_another_process(encoding):
    for other in (copy.deepcopy(encoding), pickle.loads(pickle.dumps(encoding))):
        assert type(other) is BatchEncoding
        assert other == encoding
        assert other.data is not encoding.data


def test_what_only_tokenizers_in_rust_have_is_said_to_be_so(encoding):
    assert encoding.is_fast is False
    assert encoding.encodings is None
    with pytest.raises(ValueError, match="convert_ids_to_tokens"):
        encoding.tokens()
    with pytest.raises(ValueError, match="Rust"):
        encoding.word_ids()
