"""What documented classes return: by attribute, key, place and as a mapping (spec 3.10, 7.3)."""

import copy
import dataclasses
import pickle
from collections.abc import Mapping

import pytest
import torch

from moe_mt.moe import Routing
from moe_mt.pretrained import outputs
from moe_mt.pretrained.outputs import RouterOutput, Seq2SeqModelOutput
from tests.pretrained.tiny_models import BATCH, build

PAST = "past_key_values"
SEEN_BY_ENCODER = ["encoder_last_hidden_state", "encoder_hidden_states", "encoder_attentions"]
# Written down from spec 3.10: names, and their order.
FIELDS = {
    "BaseModelOutput": ["last_hidden_state", "hidden_states", "attentions"],
    "BaseModelOutputWithPastAndCrossAttentions": [
        "last_hidden_state",
        PAST,
        "hidden_states",
        "attentions",
        "cross_attentions",
    ],
    "Seq2SeqModelOutput": [
        "last_hidden_state",
        PAST,
        "decoder_hidden_states",
        "decoder_attentions",
        "cross_attentions",
        *SEEN_BY_ENCODER,
    ],
    "Seq2SeqLMOutput": [
        "loss",
        "logits",
        PAST,
        "decoder_hidden_states",
        "decoder_attentions",
        "cross_attentions",
        *SEEN_BY_ENCODER,
    ],
    "MoEModelOutput": ["last_hidden_state", "hidden_states", "attentions", "router_probs"],
    "MoEModelOutputWithPastAndCrossAttentions": [
        "last_hidden_state",
        PAST,
        "hidden_states",
        "attentions",
        "cross_attentions",
        "router_probs",
    ],
    "Seq2SeqMoEModelOutput": [
        "last_hidden_state",
        PAST,
        "decoder_hidden_states",
        "decoder_attentions",
        "decoder_router_logits",
        "cross_attentions",
        *SEEN_BY_ENCODER,
        "encoder_router_logits",
    ],
    "Seq2SeqMoEOutput": [
        "loss",
        "logits",
        "encoder_z_loss",
        "decoder_z_loss",
        "encoder_aux_loss",
        "decoder_aux_loss",
        PAST,
        "decoder_hidden_states",
        "decoder_attentions",
        "decoder_router_logits",
        "cross_attentions",
        *SEEN_BY_ENCODER,
        "encoder_router_logits",
    ],
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_have_the_documented_names_and_order(name):
    output_class = getattr(outputs, name)
    assert [field.name for field in dataclasses.fields(output_class)] == FIELDS[name]
    output = output_class(*range(len(FIELDS[name])))
    assert output.to_tuple() == tuple(range(len(FIELDS[name])))


@pytest.fixture
def output():
    """Return an output whose second field is None."""
    return Seq2SeqModelOutput(
        last_hidden_state=torch.zeros(2), decoder_hidden_states=("a", "b"), cross_attentions="c"
    )


def test_a_field_is_found_by_attribute_key_index_and_slice(output):
    assert output.decoder_hidden_states == ("a", "b")
    assert output["decoder_hidden_states"] == ("a", "b")
    # Fields that are None have no place.
    assert output[1] == ("a", "b")
    assert output[-1] == "c"
    assert output[1:] == (("a", "b"), "c")
    assert output[:1] == (output.last_hidden_state,)
    assert output.to_tuple() == (output.last_hidden_state, ("a", "b"), "c")


def test_a_field_that_is_none_is_an_attribute_and_no_key(output):
    assert output.past_key_values is None
    assert "past_key_values" not in output
    assert output.get("past_key_values") is None
    with pytest.raises(KeyError, match="past_key_values"):
        output["past_key_values"]
    with pytest.raises(IndexError):
        output[3]


def test_an_output_is_a_mapping(output):
    names = ["last_hidden_state", "decoder_hidden_states", "cross_attentions"]
    assert isinstance(output, Mapping)
    assert list(output) == list(output.keys()) == names
    assert len(output) == 3
    assert dict(**output).keys() == dict(output.items()).keys() == set(names)
    assert bool(output)


def test_assignment_by_attribute_and_key_are_one(output):
    output["past_key_values"] = ((),)
    assert output.past_key_values == ((),)
    output.past_key_values = None
    assert "past_key_values" not in output
    with pytest.raises(KeyError, match="nonsense"):
        output["nonsense"] = 1


def test_an_output_can_be_rebuilt_from_a_mapping(output):
    # As code does that moves every tensor of a nest to another device.
    found = type(output)({name: value for name, value in output.items()})
    assert found.to_tuple() == output.to_tuple()
    assert found.past_key_values is None
    with pytest.raises(TypeError, match="nonsense"):
        type(output)({"nonsense": 1})


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_an_output_can_be_copied_and_pickled(way):
    model = build("moe")
    with torch.no_grad():
        output = model(**BATCH, output_router_logits=True, output_attentions=True)
    found = way(output)
    assert type(found) is type(output)
    assert list(found) == list(output)
    assert torch.equal(found.logits, output.logits)
    router, expected = found.encoder_router_logits[1], output.encoder_router_logits[1]
    assert type(router) is RouterOutput
    assert torch.equal(router[0], expected[0])
    assert torch.equal(router[1], expected[1])
    assert torch.equal(router.routing.router_logits, expected.routing.router_logits)


def routing():
    """Return the routing of three tokens over four experts: the last token's first was dropped."""
    return Routing(
        expert_ids=torch.tensor([[2, 0], [1, 4], [4, 3]], dtype=torch.int32),
        gates=torch.tensor([[0.75, 0.25], [1.0, 0.0], [0.0, 0.5]]),
        router_logits=torch.zeros(3, 4),
        padding=None,
    )


def test_a_router_output_spreads_gates_over_experts_and_names_first_choices():
    probs, first = RouterOutput(routing(), torch.float32)
    expected = [[0.25, 0, 0.75, 0], [0, 1, 0, 0], [0, 0, 0, 0.5]]
    assert probs.tolist() == expected
    # 0 also where the first choice was dropped, as published.
    assert first.tolist() == [2, 1, 0]
    assert first.dtype == torch.int64
    assert RouterOutput(routing(), torch.bfloat16)[0].dtype == torch.bfloat16


def test_code_that_rebuilds_tuples_gets_a_plain_one_of_a_router_output():
    # Libraries of mixed precision do this with everything a model returns.
    given = RouterOutput(routing(), torch.float32)
    rebuilt = type(given)(value.double() if value.is_floating_point() else value for value in given)
    assert type(rebuilt) is tuple
    assert rebuilt[0].dtype == torch.float64
    assert rebuilt[1].tolist() == [2, 1, 0]
