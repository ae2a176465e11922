"""Experts one by one over stacked weights: none is copied, and no old ones are computed with."""

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from torch.nn.utils import parametrize, prune

from moe_mt.moe import experts as core_experts
from moe_mt.pretrained import NllbMoeDenseActDense, NllbMoeSparseMLP
from tests.pretrained.tiny_models import (
    QUIET,
    TRAINING_BATCH,
    adapt,
    build,
    config_of,
    gradients,
    logits,
    logits_of_decoding,
)

LEAVES = {"up_proj": "fc1.weight", "up_bias": "fc1.bias"} | {
    "down_proj": "fc2.weight",
    "down_bias": "fc2.bias",
}


def sparse_layer(**changes):
    torch.manual_seed(3)
    layer = NllbMoeSparseMLP(config_of("moe", **changes), 12).eval()
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return layer


def experts_of(model):
    return model.model.decoder.layers[0].ffn.experts


def lies_stacked(experts):
    """Whether every expert's weights are slices of the tensors that the fast path reads."""
    return all(
        expert.get_parameter(leaf).data_ptr() == getattr(experts.stacked, name)[index].data_ptr()
        for name, leaf in LEAVES.items()
        for index, expert in enumerate(experts.values())
    )


@pytest.fixture
def fast_calls(monkeypatch):
    """Return a list that grows by one whenever the stacked weights are read."""
    calls, compute = [], core_experts.expert_ffn

    def counted(*args, **kwargs):
        calls.append(1)
        return compute(*args, **kwargs)

    monkeypatch.setattr(core_experts, "expert_ffn", counted)
    return calls


def loop_over_experts(layer, x, weights):
    """Compute a sparse layer expert by expert in float64, from weights given by name."""
    routing = layer.core(x)[1]
    # Gates are float32, also when evaluation has multiplied them by one minus the probability of
    # masking.
    scaled = (routing.gates * 0.8).double()
    gates = torch.zeros(len(x), 5, dtype=torch.float64)
    gates = gates.scatter(1, routing.expert_ids.long(), scaled)
    mixture = torch.zeros_like(x)
    for index in range(4):
        w1, b1, w2, b2 = (weights[f"experts.expert_{index}.{leaf}"] for leaf in LEAVES.values())
        hidden = (x @ w1.T + b1).clamp(min=0)
        mixture = mixture + gates[:, index, None] * (hidden @ w2.T + b2)
    return mixture


@pytest.mark.parametrize("apart", [False, True], ids=["stacked", "one by one"])
def test_outputs_and_gradients_are_those_of_a_loop_over_experts(apart, fast_calls):
    layer = sparse_layer().double()
    if apart:
        hook = layer.experts.expert_1.register_forward_hook(lambda *_: None)
    x = torch.randn(30, 16, dtype=torch.float64, requires_grad=True)
    wanted = torch.randn(30, 16, dtype=torch.float64)
    parameters = dict(layer.named_parameters())
    weights = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    found = layer(x[None])[0][0]
    assert len(fast_calls) == (0 if apart else 1)
    found_gradients = torch.autograd.grad(
        (found * wanted).sum(), [x, *(p for n, p in parameters.items() if "experts" in n)]
    )
    if apart:
        hook.remove()
    expected = loop_over_experts(layer, x, weights)
    expected_gradients = torch.autograd.grad(
        (expected * wanted).sum(), [x, *(w for n, w in weights.items() if "experts" in n)]
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found_gradients, expected_gradients, rtol=1e-11, atol=1e-12)


def test_weights_lie_once_in_memory():
    model = build("moe")
    experts = experts_of(model)
    assert lies_stacked(experts)
    # Each slice has a storage of its own, so that nobody takes slices for copies of each other,
    # or writes all for one; the storages are pieces of the stack, one behind the other.
    for name, leaf in LEAVES.items():
        stack = getattr(experts.stacked, name)
        begin = stack.data_ptr()
        for expert in experts.values():
            storage = expert.get_parameter(leaf).untyped_storage()
            assert storage.data_ptr() == begin
            begin += storage.nbytes()
        assert begin == stack.data_ptr() + stack.nbytes
    assert not any(p.requires_grad for p in experts.stacked.parameters())


def test_training_and_evaluation_read_the_stack(fast_calls):
    model = build("moe")
    sparse_layers = 3
    logits(model)
    assert len(fast_calls) == sparse_layers
    logits_of_decoding(model)
    assert len(fast_calls) == 2 * sparse_layers
    model.train()(**TRAINING_BATCH).loss.backward()
    assert len(fast_calls) == 3 * sparse_layers


def test_an_adapter_takes_its_layer_off_the_stack_until_it_is_gone(fast_calls):
    model = build("moe")
    path = "model.decoder.layers.0.ffn.experts.expert_1.fc2"
    adapter = adapt(model, path)
    logits(model)
    assert len(fast_calls) == 2
    # Moved while it could not be gathered.
    model.double().float()
    experts_of(model).expert_1.fc2 = adapter.base_layer
    fast_calls.clear()
    torch.testing.assert_close(logits(model), logits(build("moe")))
    assert len(fast_calls) == 6
    assert lies_stacked(experts_of(model))


def test_a_step_of_an_optimizer_changes_what_is_computed(fast_calls):
    model = build("moe", **QUIET).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(**TRAINING_BATCH).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert lies_stacked(experts_of(model))
    fast = logits(model.eval())
    experts_of(model).expert_0.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(logits(model), fast)


def test_only_the_experts_change_if_only_they_are_trained():
    model = build("moe", **QUIET).train()
    model.requires_grad_(False)
    trained = experts_of(model).expert_2
    trained.requires_grad_(True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    # Enough tokens that some choose it.
    ids = torch.arange(2, 60)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    prefix = "model.decoder.layers.0.ffn.experts.expert_2."
    assert with_gradient == {prefix + leaf for leaf in LEAVES.values()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == with_gradient


def test_gradients_accumulate_over_passes_and_go_with_zero_grad():
    model = build("moe", **QUIET).train()
    halves = [
        {name: value[row : row + 1] for name, value in TRAINING_BATCH.items()} for row in (0, 1)
    ]
    apart = [gradients(model, **half)[1] for half in halves]
    model.zero_grad()
    for half in halves:
        model(**half).loss.backward()
    for name, parameter in model.named_parameters():
        expected = apart[0][name] + apart[1][name]
        torch.testing.assert_close(parameter.grad, expected, msg=name)
    model.zero_grad(set_to_none=False)
    assert not any(parameter.grad.any() for parameter in model.parameters())
    model.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_survive_a_cast():
    model = build("moe", **QUIET).train()
    _, expected = gradients(model)
    model.double()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert {gradient.dtype for gradient in found.values()} == {torch.float64}
    torch.testing.assert_close(found, {name: g.double() for name, g in expected.items()})


def test_experts_of_a_class_of_ones_own_are_called_one_by_one(fast_calls):
    class Scale(nn.Module):
        def __init__(self, config, ffn_dim):
            super().__init__()
            assert (config.d_model, ffn_dim) == (16, 12)
            self.factor = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.factor * x

    layer = NllbMoeSparseMLP(config_of("moe", moe_token_dropout=0.0), 12, Scale).eval()
    names = {f"experts.expert_{index}.factor" for index in range(4)}
    assert set(layer.state_dict()) == names | {"router.classifier.weight"}
    x = torch.randn(2, 6, 16)
    # Gates sum to one.
    torch.testing.assert_close(layer(x)[0], x)
    with torch.no_grad():
        for expert in layer.experts.values():
            expert.factor.fill_(3)
    torch.testing.assert_close(layer(x)[0], 3 * x)
    torch.testing.assert_close(layer.double()(x.double())[0], 3 * x.double())
    assert not fast_calls


def test_the_default_expert_is_a_module_of_its_own():
    expert = NllbMoeDenseActDense(config_of("moe", activation_dropout=0.5), 12)
    assert list(expert.state_dict()) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    x = torch.randn(3, 16)
    assert not torch.equal(expert(x), expert(x))
    expert.eval()
    expected = expert.fc2(expert.fc1(x).relu())
    assert torch.equal(expert(x), expected)


# What puts other weights in an expert's place. Each must be seen, and none may be lost by a move.


def by_data(expert):
    for parameter in expert.parameters():
        parameter.data = parameter.data * 0.5


def by_new_parameters(expert):
    for layer in (expert.fc1, expert.fc2):
        for name, parameter in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(parameter.detach() * 0.5))


def by_assigning_a_state_dict(expert):
    state_dict = {name: tensor * 0.5 for name, tensor in expert.state_dict().items()}
    expert.load_state_dict(state_dict, assign=True)


def by_a_vector(expert):
    vector = nn.utils.parameters_to_vector(expert.parameters()) * 0.5
    nn.utils.vector_to_parameters(vector, expert.parameters())


def by_storing_tensors(expert):
    # As accelerate fills a model.
    for layer in (expert.fc1, expert.fc2):
        for name, parameter in list(layer.named_parameters()):
            layer._parameters[name] = nn.Parameter(parameter.detach() * 0.5)


def in_place(expert):
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.mul_(0.5)


CHANGES = [
    by_data,
    by_new_parameters,
    by_assigning_a_state_dict,
    by_a_vector,
    by_storing_tensors,
    in_place,
]


def halved(**changes):
    """Return a model in which the first decoder layer's experts have half their weights."""
    model = build("moe", **changes)
    for expert in experts_of(model).values():
        in_place(expert)
    return model


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_are_put_in_place_are_those_that_compute(change):
    model, expected = build("moe"), halved()
    for expert in experts_of(model).values():
        change(expert)
    torch.testing.assert_close(logits(model), logits(expected))
    torch.testing.assert_close(logits_of_decoding(model), logits(expected)[:, -1])


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_are_put_in_place_get_the_gradients(change):
    model, expected = build("moe", **QUIET), halved(**QUIET)
    for expert in experts_of(model).values():
        change(expert)
    torch.testing.assert_close(gradients(model.train()), gradients(expected.train()))


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_are_put_in_place_are_kept_by_a_cast(change, fast_calls):
    model = build("moe")
    for expert in experts_of(model).values():
        change(expert)
    before = logits(model)
    model.double().float()
    assert lies_stacked(experts_of(model))
    fast_calls.clear()
    torch.testing.assert_close(logits(model), before)
    assert len(fast_calls) == 3


def test_a_functional_call_computes_with_the_weights_it_is_given():
    model, expected = build("moe"), halved()
    given = {name: p.detach().clone() for name, p in expected.named_parameters()}
    with torch.no_grad():
        found = torch.func.functional_call(model, given, (), TRAINING_BATCH).logits
        torch.testing.assert_close(found, expected(**TRAINING_BATCH).logits)
        # And leaves the model's own as they were.
        assert torch.equal(model(**TRAINING_BATCH).logits, build("moe")(**TRAINING_BATCH).logits)
    assert lies_stacked(experts_of(model))


def test_parametrised_and_pruned_experts_compute_what_their_layers_do():
    class Halved(nn.Module):
        def forward(self, weight):
            return 0.5 * weight

    model, expected = build("moe"), build("moe")
    for expert in experts_of(model).values():
        parametrize.register_parametrization(expert.fc1, "weight", Halved())
    with torch.no_grad():
        for expert in experts_of(expected).values():
            expert.fc1.weight.mul_(0.5)
    torch.testing.assert_close(logits(model), logits(expected))
    # It can be moved as it is.
    torch.testing.assert_close(logits(model.double().float()), logits(expected))
    for expert in experts_of(expected).values():
        prune.l1_unstructured(expert.fc2, "weight", 0.5)
    pruned = build("moe")
    with torch.no_grad():
        for one, other in zip(
            experts_of(pruned).values(), experts_of(expected).values(), strict=True
        ):
            one.fc1.weight.mul_(0.5)
            one.fc2.weight.copy_(other.fc2.weight)
    torch.testing.assert_close(logits(expected), logits(pruned))


def test_two_experts_can_be_swapped():
    model, expected = build("moe"), build("moe")
    experts = experts_of(model)
    experts["expert_0"], experts["expert_3"] = experts["expert_3"], experts["expert_0"]
    state_dict = expected.state_dict()
    prefix = "model.decoder.layers.0.ffn.experts.expert_"
    swapped = {
        name: state_dict[name.replace(prefix + old, prefix + new)]
        for old, new in (("0", "3"), ("3", "0"))
        for name in state_dict
        if name.startswith(prefix + old)
    }
    expected.load_state_dict({name: t.clone() for name, t in (state_dict | swapped).items()})
    torch.testing.assert_close(logits(model), logits(expected))


def test_libraries_that_look_for_shared_storages_keep_every_expert(tmp_path):
    model = build("moe", tie_word_embeddings=False)
    save_model(model, tmp_path / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    # Of the three names of the one embedding, one is written.
    lacking = model.state_dict().keys() - found.keys()
    assert len(lacking) == 2
    assert all("embed" in name or "shared" in name for name in lacking)
    expert = experts_of(model)["expert_1"]
    torch.save(expert.state_dict(), tmp_path / "expert.pt")
    alone = sum(parameter.nbytes for parameter in expert.parameters())
    assert (tmp_path / "expert.pt").stat().st_size < alone + 4000


def test_the_experts_slices_can_be_saved_by_others(tmp_path):
    # safetensors refuses tensors that overlap; slices do not.
    experts = experts_of(build("moe"))
    save_file(experts.state_dict(), tmp_path / "experts.safetensors")
    found = load_file(tmp_path / "experts.safetensors")
    for name, parameter in experts.named_parameters():
        assert torch.equal(found[name], parameter), name
