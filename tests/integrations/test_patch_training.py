"""Training through a patched model: losses, gradients, and the tools that people train with."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moe_mt import NllbMoeConfig, NllbMoeForConditionalGeneration
from moe_mt.integrations import patch
from tests.closeness import assert_near
from tests.integrations.families import (
    ENCODER_DECODERS,
    MODELS,
    VERSION,
    VOCABULARY,
    inputs_for,
    make,
)

pytestmark = [
    pytest.mark.transformers,
    # transformers renames it, and PEFT asks for the old name.
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing.*deprecated:FutureWarning"),
]

MAJOR = VERSION[0]
NEAR = 1e-5
WITHOUT_RANDOMNESS = {
    "nllb_moe": {
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "moe_token_dropout": 0.0,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
    },
    "switch": {"dropout_rate": 0.0, "router_jitter_noise": 0.0},
}
NLLB_MOE_IS_WRONG_THERE = pytest.mark.skipif(
    MAJOR >= 5, reason="transformers 5 runs experts 0 and 1 of NLLB-MoE only"
)
# transformers 5.0 to 5.17 raises when Switch, as it is, is asked for its routers' losses.
SWITCH_CANNOT_ADD_ITS_LOSS = (5, 0) <= VERSION < (5, 18)
WITH_A_LOSS_FOR_ROUTERS = (
    pytest.param("nllb_moe", marks=NLLB_MOE_IS_WRONG_THERE),
    *(() if SWITCH_CANNOT_ADD_ITS_LOSS else ("switch",)),
    "mixtral",
    "qwen2_moe",
    "olmoe",
)
WITHOUT_SUCH_A_LOSS = (
    "deepseek_v2",
    "deepseek_v3",
    *(("switch",) if SWITCH_CANNOT_ADD_ITS_LOSS else ()),
)


def pair(family, **settings):
    """Return a model as transformers has it and a patched copy, both in training mode."""
    plain = make(family, **WITHOUT_RANDOMNESS.get(family, {}), **settings).train()
    patched = copy.deepcopy(plain)
    patch(patched)
    return plain, patched


def batch(family, *, routers=True):
    """Return inputs, labels without padding, and the request for the routers' loss."""
    inputs = inputs_for(family)
    source = "decoder_input_ids" if family in ENCODER_DECODERS else "input_ids"
    inputs["labels"] = inputs[source].masked_fill(inputs[source] == 1, -100)
    if routers and family not in WITHOUT_SUCH_A_LOSS:
        inputs["output_router_logits"] = True
    return inputs


def loss_of(model, family, *, routers=True):
    return model(**batch(family, routers=routers)).loss


def gradients(model, family, *, autocast=False, routers=True):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_of(model, family, routers=routers)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_equal_gradients(found, expected):
    assert found.keys() == expected.keys()
    whole = torch.stack([g.norm() for g in expected.values() if g is not None]).norm()
    for name, theirs in expected.items():
        ours = found[name]
        if theirs is None:
            # An expert without tokens is not called there; here it takes part, with a zero.
            assert ours is None or not ours.any(), name
        elif name.endswith("k_proj.bias") and theirs.norm() < 1e-5 * whole:
            # Softmax does not see what is added to all scores: the gradient is rounding only.
            assert ours.norm() < 1e-5 * whole, name
        else:
            assert_near(ours, theirs, torch.float32, name)


def train(model, optimizer, family, steps=3):
    losses = []
    for _ in range(steps):
        loss = loss_of(model, family)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def adam(model):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-2)


@pytest.mark.parametrize("family", WITH_A_LOSS_FOR_ROUTERS)
def test_the_models_own_losses_are_those_of_the_unpatched_model(family):
    plain, patched = (model(**batch(family)) for model in pair(family))
    losses = [name for name in plain if name.endswith("loss")]
    assert any("aux_loss" in name for name in losses)
    for name in losses:
        assert float(patched[name].detach()) == pytest.approx(float(plain[name].detach()), rel=NEAR)


@pytest.mark.parametrize("family", [*WITH_A_LOSS_FOR_ROUTERS, *WITHOUT_SUCH_A_LOSS])
def test_every_parameter_has_the_gradient_of_the_unpatched_model(family):
    plain, patched = pair(family)
    assert_equal_gradients(gradients(patched, family), gradients(plain, family))


def cross_entropy_gradients(model):
    inputs = inputs_for("nllb_moe")
    labels = inputs["decoder_input_ids"].flatten()
    model.zero_grad()
    nn.functional.cross_entropy(model(**inputs).logits.flatten(0, 1), labels).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_nllb_moe_has_the_gradients_of_this_packages_own_model():
    # The only right reference in transformers 5, and one more in 4.
    patched = pair("nllb_moe")[1]
    settings = {**MODELS["nllb_moe"][2], **WITHOUT_RANDOMNESS["nllb_moe"]}
    ours = NllbMoeForConditionalGeneration(NllbMoeConfig(**settings)).train()
    ours.load_state_dict(patched.state_dict())
    assert_equal_gradients(cross_entropy_gradients(patched), cross_entropy_gradients(ours))


@pytest.mark.skipif(MAJOR < 5, reason="transformers 4 computes NLLB-MoE right: see above")
def test_the_first_router_of_nllb_moe_records_what_it_does_unpatched():
    # Later layers read what transformers 5 computes wrong.
    plain, patched = (model(**batch("nllb_moe")) for model in pair("nllb_moe"))
    first, expected = patched.encoder_router_logits[0], plain.encoder_router_logits[0]
    assert_near(first, expected, torch.float32, "router logits of the first sparse layer")
    # The encoder has one sparse layer.
    found, expected = patched.encoder_aux_loss.item(), plain.encoder_aux_loss.item()
    assert found == pytest.approx(expected, rel=NEAR)


@pytest.mark.parametrize(
    ("family", "use_reentrant", "routers"),
    [
        ("nllb_moe", False, False),
        # With the routers' loss, NLLB-MoE of transformers 4 counts its outputs wrong.
        ("switch", False, True),
        ("mixtral", False, True),
        # The reentrant kind loses what reaches the loss beside the hidden states, and in Switch
        # of transformers 4 more than that.
        ("nllb_moe", True, False),
        ("mixtral", True, False),
    ],
)
def test_gradient_checkpointing_gives_the_same_gradients(family, use_reentrant, routers):
    patched = pair(family)[1]
    expected = gradients(patched, family, routers=routers)
    patched.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    patched.enable_input_require_grads()
    assert_equal_gradients(gradients(patched, family, routers=routers), expected)


@pytest.mark.parametrize("family", ["nllb_moe", "switch", "mixtral", "qwen2_moe", "deepseek_v3"])
def test_autocast_to_bfloat16_trains_float32_weights_with_nearly_the_same_loss(family):
    patched = pair(family)[1]
    exact = loss_of(patched, family).item()
    found = gradients(patched, family, autocast=True)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    with torch.autocast("cpu", torch.bfloat16):
        assert loss_of(patched, family).item() == pytest.approx(exact, rel=2e-2)


@pytest.mark.parametrize("family", ["switch", "mixtral", "olmoe"])
def test_an_optimizer_made_before_patching_trains_the_patched_model(family):
    plain, _ = pair(family)
    patched = copy.deepcopy(plain)
    optimizer = adam(patched)
    patch(patched)
    losses = train(patched, optimizer, family)
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(train(plain, adam(plain), family), rel=1e-4)


def adapted(model, **options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 32, "init_lora_weights": False, **options}
    return get_peft_model(model, LoraConfig(**settings))


ON_ATTENTION = {"target_modules": ["q_proj", "v_proj"]}


def losses_of_training(model, family):
    return train(model, adam(model), family)


@pytest.mark.parametrize("family", [*WITH_A_LOSS_FOR_ROUTERS[:1], "mixtral", "qwen2_moe"])
@pytest.mark.parametrize("when", ["before adapters", "after adapters"])
def test_lora_on_attention_learns_as_it_does_unpatched(family, when):
    plain, patched = pair(family)
    if when == "after adapters":
        patched = copy.deepcopy(plain)
    expected = losses_of_training(adapted(plain, **ON_ATTENTION), family)
    model = adapted(patched, **ON_ATTENTION)
    if when == "after adapters":
        patch(model)
    found = losses_of_training(model, family)
    assert found[-1] < found[0]
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.skipif(MAJOR >= 5, reason="the experts of Mixtral have no layers in transformers 5")
def test_lora_on_the_experts_layers_learns_as_it_does_unpatched():
    plain, patched = pair("mixtral")
    on_experts = {"target_modules": ["w1", "w2"]}
    found = losses_of_training(adapted(patched, **on_experts), "mixtral")
    expected = losses_of_training(adapted(plain, **on_experts), "mixtral")
    assert found[-1] < found[0]
    assert found == pytest.approx(expected, rel=1e-4)


def test_lora_on_the_experts_of_switch_learns_as_it_does_unpatched():
    # Its experts are modules in every version.
    plain, patched = pair("switch")
    on_experts = {"target_modules": ["wi"]}
    found = losses_of_training(adapted(patched, **on_experts), "switch")
    expected = losses_of_training(adapted(plain, **on_experts), "switch")
    assert found[-1] < found[0]
    assert found == pytest.approx(expected, rel=1e-4)


def test_merged_adapters_of_experts_are_in_the_stack_again():
    patched = pair("switch")[1]
    model = adapted(patched, target_modules=["wi"]).eval()
    with torch.no_grad():
        expected = model(**inputs_for("switch")).logits
        merged = model.merge_and_unload()
        found = merged(**inputs_for("switch")).logits
    assert_near(found, expected, torch.float32)
    layer = merged.encoder.block[1].layer[1].mlp
    first = next(iter(layer.experts.children()))
    assert first.wi.weight.data_ptr() == layer.slices.stacked.up_proj.data_ptr()


@pytest.mark.skipif(MAJOR < 5, reason="the experts of Mixtral are modules in transformers 4")
@pytest.mark.parametrize("when", ["before adapters", "after adapters"])
def test_lora_on_stacked_weights_learns_as_it_does_unpatched(when):
    plain, patched = pair("mixtral")
    on_experts = {
        "target_modules": [],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "lora_dropout": 0.0,
    }
    if when == "before adapters":
        model = adapted(patched, **on_experts)
    else:
        model = adapted(copy.deepcopy(plain), **on_experts)
        patch(model)
    found = losses_of_training(model, "mixtral")
    expected = losses_of_training(adapted(plain, **on_experts), "mixtral")
    assert found[-1] < found[0]
    assert found == pytest.approx(expected, rel=1e-4)


def rows_for_two_processes():
    """Return ids of equal lengths: the mean of two processes' losses is the loss of all rows."""
    ids = torch.randint(3, VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(7))
    return {"input_ids": ids, "labels": ids.clone()}


def train_one_half(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    # An expert without tokens has a gradient here, so that no parameter stays unused.
    model = DistributedDataParallel(pair("mixtral")[1])
    half = {name: rows.chunk(2)[rank] for name, rows in rows_for_two_processes().items()}
    model(**half).loss.backward()
    if rank == 0:
        found = {name: p.grad for name, p in model.module.named_parameters()}
        torch.save(found, f"{folder}/gradients")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_data_parallel_processes_average_to_the_gradients_of_the_joined_batch(tmp_path):
    torch.multiprocessing.spawn(train_one_half, (str(tmp_path),), nprocs=2)
    plain = pair("mixtral")[0]
    plain(**rows_for_two_processes()).loss.backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    assert_equal_gradients(torch.load(tmp_path / "gradients"), expected)


def to_bfloat16_and_back(model):
    return model.to(torch.bfloat16).to(torch.float32)


def loaded(model):
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(values)
    return model


def loaded_by_assignment(model):
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(values, assign=True)
    model.tie_weights()
    return model


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved_whole(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("family", ["nllb_moe", "switch", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize(
    "changed",
    [to_bfloat16_and_back, loaded, loaded_by_assignment, copy.deepcopy, pickled, saved_whole],
)
def test_a_model_that_was_moved_loaded_or_copied_still_trains(family, changed):
    if family == "nllb_moe" and MAJOR >= 5:
        plain, patched = pair(family)[1], pair(family)[1]
    else:
        plain, patched = pair(family)
    plain, patched = changed(plain), changed(patched)
    assert_equal_gradients(gradients(patched, family), gradients(plain, family))
    losses = train(patched, adam(patched), family)
    assert losses[-1] < losses[0]
