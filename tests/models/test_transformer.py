"""The model against transformers 4.57.1, and against itself: cached, padded, batched."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe_mt.checkpoints import load
from moe_mt.losses import label_smoothed_cross_entropy
from moe_mt.models import FAMILIES, Seq2SeqTransformer

GOLDENS = Path(__file__).parents[1] / "golden" / "models"
DENSE = ["dense_2_2", "dense_3_1", "dense_odd_unscaled_gelu"]
# What is special about each is said in make_model_goldens.py.
FREE_OF_DROPPING = ["moe_2_experts", "moe_4_experts_bias", "moe_8_experts", "moe_decoder_only"]
DROPPING = [
    "moe_priority_capacity",
    "moe_normalize_before",
    "moe_route_padding",
    "moe_fixed_capacity",
]
BATCH_INDEPENDENT = DENSE + FREE_OF_DROPPING

# Relative to the norm of what is compared.
FLOAT32, FLOAT64 = 1e-5, 1e-10


@cache
def load_model(name: str, dtype: torch.dtype = torch.float32) -> Seq2SeqTransformer:
    return load(GOLDENS / name, device="cpu", dtype=dtype)


@cache
def golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / name / "forward.safetensors")


def run(model, tensors):
    with torch.no_grad():
        return model(
            tensors["source_tokens"],
            tensors["target_tokens"],
            tensors["source_mask"],
            tensors["target_mask"],
        )


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def test_every_golden_is_tested():
    folders = {path.parent.name for path in GOLDENS.glob("*/model.safetensors")}
    assert folders == {*DENSE, *FREE_OF_DROPPING, *DROPPING}


@pytest.mark.parametrize("name", DENSE + FREE_OF_DROPPING + DROPPING)
def test_agrees_with_the_published_class(name):
    tensors = golden(name)
    output = run(load_model(name), tensors)
    assert relative_error(output.memory, tensors["memory"]) <= FLOAT32
    # A padded target position sees itself here and not there; nothing else ever reads it.
    real = tensors["target_mask"]
    assert relative_error(output.logits[real], tensors["logits"][real]) <= FLOAT32


@pytest.mark.parametrize("name", DENSE + FREE_OF_DROPPING + DROPPING)
def test_loss_agrees_with_the_published_class(name):
    tensors = golden(name)
    loss = label_smoothed_cross_entropy(run(load_model(name), tensors).logits, tensors["labels"])
    torch.testing.assert_close(loss, tensors["loss"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", DENSE)
def test_dense_models_agree_in_float64(name):
    tensors = golden(name)
    logits = run(load_model(name, torch.float64), tensors).logits
    real = tensors["target_mask"]
    assert logits.dtype == torch.float64
    assert relative_error(logits[real], tensors["logits_float64"][real]) <= FLOAT64


@pytest.mark.parametrize("name", DROPPING)
def test_dropping_goldens_do_drop(name):
    output = run(load_model(name), golden(name))
    experts = load_model(name).config.moe.num_experts
    dropped = 0
    for routing in (*output.encoder_routings, *output.decoder_routings):
        real = slice(None) if routing.padding is None else ~routing.padding
        dropped += int((routing.expert_ids[real] == experts).sum())
    assert dropped > 0


@pytest.mark.parametrize("name", BATCH_INDEPENDENT)
@pytest.mark.parametrize("capacity", [1, 32], ids=["cache grows", "cache is wide enough"])
def test_cached_decoding_equals_the_whole_sequence(name, capacity):
    model, tensors = load_model(name), golden(name)
    source, mask = tensors["source_tokens"], tensors["source_mask"]
    target = tensors["target_tokens"][:1].expand(3, -1)
    with torch.no_grad():
        whole = model(source, target, mask).logits
        cache = model.new_cache(model.encode(source, mask)[0], mask, capacity=capacity)
        steps = [model.decode_step(target[:, i : i + 1], cache) for i in range(target.shape[1])]
    assert relative_error(torch.stack(steps, dim=1), whole) <= FLOAT32


@pytest.mark.parametrize("name", ["dense_2_2", "moe_4_experts_bias"])
def test_a_prefix_may_be_read_at_once(name):
    model, tensors = load_model(name), golden(name)
    source, mask = tensors["source_tokens"], tensors["source_mask"]
    target = tensors["target_tokens"][:1].expand(3, -1)
    with torch.no_grad():
        whole = model(source, target, mask).logits
        cache = model.new_cache(model.encode(source, mask)[0], mask)
        for start, stop in ((0, 3), (3, 5), (5, 6)):
            logits = model.decode_step(target[:, start:stop], cache)
            assert relative_error(logits, whole[:, stop - 1]) <= FLOAT32


@pytest.mark.parametrize("name", ["dense_2_2", "moe_4_experts_bias"])
def test_beams_are_query_rows_over_one_memory_and_can_be_reordered(name):
    model, tensors = load_model(name), golden(name)
    source, mask = tensors["source_tokens"], tensors["source_mask"]
    beams = 3
    first, second, third = torch.randint(
        4, 64, (3, 9, 1), generator=torch.Generator().manual_seed(6)
    )
    parents = torch.tensor([2, 0, 0, 3, 5, 4, 7, 7, 7])
    with torch.no_grad():
        memory = model.encode(source, mask)[0]
        cache = model.new_cache(memory, mask, beams)
        assert all(layer.cross_key.shape[0] == 3 for layer in cache.layers)
        model.decode_step(first, cache)
        model.decode_step(second, cache)
        cache.reorder(parents)
        logits = model.decode_step(third, cache)
        histories = torch.cat([torch.cat([first, second], 1)[parents], third], 1)
        expected = model(
            source.repeat_interleave(beams, 0), histories, mask.repeat_interleave(beams, 0)
        ).logits[:, -1]
    assert relative_error(logits, expected) <= FLOAT32


@pytest.mark.parametrize("name", BATCH_INDEPENDENT)
def test_more_padding_changes_nothing(name):
    model, tensors = load_model(name), golden(name)
    wider = dict(tensors)
    for side in ("source", "target"):
        wider[f"{side}_tokens"] = torch.nn.functional.pad(
            tensors[f"{side}_tokens"], (0, 4), value=1
        )
        wider[f"{side}_mask"] = torch.nn.functional.pad(tensors[f"{side}_mask"], (0, 4))
    expected, output = run(model, tensors), run(model, wider)
    real, length = tensors["target_mask"], tensors["target_tokens"].shape[1]
    assert relative_error(output.logits[:, :length][real], expected.logits[real]) <= FLOAT32


@pytest.mark.parametrize("name", BATCH_INDEPENDENT)
def test_what_stands_in_masked_positions_does_not_matter(name):
    model, tensors = load_model(name), golden(name)
    changed = dict(tensors)
    changed["source_tokens"] = tensors["source_tokens"].masked_fill(~tensors["source_mask"], 50)
    changed["target_tokens"] = tensors["target_tokens"].masked_fill(~tensors["target_mask"], 51)
    real = tensors["target_mask"]
    expected, output = run(model, tensors), run(model, changed)
    assert relative_error(output.logits[real], expected.logits[real]) <= FLOAT32


@pytest.mark.parametrize("name", BATCH_INDEPENDENT)
def test_a_sentence_alone_gives_the_same_logits(name):
    model, tensors = load_model(name), golden(name)
    together = run(model, tensors).logits
    for row in range(3):
        source = tensors["source_tokens"][row][tensors["source_mask"][row]][None]
        target = tensors["target_tokens"][row][tensors["target_mask"][row]][None]
        with torch.no_grad():
            alone = model(source, target).logits[0]
        assert relative_error(together[row, : len(alone)], alone) <= FLOAT32


def test_inputs_longer_than_the_position_table_extend_it():
    config = json.loads((GOLDENS / "dense_2_2" / "config.json").read_text())
    weights = load_model("dense_2_2").state_dict()
    source = torch.randint(4, 64, (1, 80), generator=torch.Generator().manual_seed(1))
    target = torch.randint(4, 64, (1, 70), generator=torch.Generator().manual_seed(2))
    logits = []
    for positions in (32, 128):
        published = config | {"max_position_embeddings": positions}
        model = Seq2SeqTransformer(FAMILIES["m2m_100"].config_from_published(published)).eval()
        model.load_state_dict(weights)
        logits.append(model(source, target).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", ["dense_2_2", "moe_2_experts"])
def test_every_parameter_gets_a_gradient(name):
    # Two experts, so that the few tokens here reach every expert.
    tensors = golden(name)
    model = load(GOLDENS / name, device="cpu", dtype=torch.float32)
    output = model(
        tensors["source_tokens"],
        tensors["target_tokens"],
        tensors["source_mask"],
        tensors["target_mask"],
    )
    label_smoothed_cross_entropy(output.logits, tensors["labels"]).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        # Attention does not change when all its keys are moved by one vector.
        if not parameter_name.endswith("k_proj.bias"):
            assert parameter.grad.abs().max() > 1e-7, parameter_name


@pytest.mark.parametrize("name", ["dense_2_2", "moe_2_experts"])
def test_float16_residuals_stay_finite(name):
    # A feed-forward output near float16's largest value overflows where it is added.
    model = load(GOLDENS / name, device="cpu", dtype=torch.float16)
    tensors = golden(name)
    with torch.no_grad():
        for layer in model.encoder.layers:
            block = layer.feed_forward
            bias = block.experts.down_bias if hasattr(block, "experts") else block.down_proj.bias
            bias.fill_(60000)
        assert run(model, tensors).logits.isfinite().all()


def test_dropout_and_layerdrop_act_in_training_only():
    model = load(GOLDENS / "moe_2_experts", device="cpu", dtype=torch.float32)
    tensors = golden("moe_2_experts")
    evaluated = run(model, tensors).logits
    assert torch.equal(evaluated, run(model, tensors).logits)
    torch.manual_seed(0)
    trained = [run(model.train(), tensors).logits for _ in range(2)]
    assert not torch.equal(*trained)
    model.encoder.layerdrop = model.decoder.layerdrop = 1.0
    assert run(model, tensors).encoder_routings == ()
    assert torch.equal(evaluated, run(model.eval(), tensors).logits)
