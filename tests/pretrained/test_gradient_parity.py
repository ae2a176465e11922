"""Loss and gradients: against transformers 4.57.1, and against a model written token by token."""

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from moe_mt import M2M100ForConditionalGeneration, NllbMoeConfig, NllbMoeForConditionalGeneration

GOLDENS = Path(__file__).parents[1] / "golden" / "pretrained"
CLASSES = {"dense": M2M100ForConditionalGeneration, "moe": NllbMoeForConditionalGeneration}
TOLERANCE = 1e-5  # of the norm of what is compared
QUIET = {"dropout": 0.0, "attention_dropout": 0.0, "moe_token_dropout": 0.0}


@cache
def golden(name, file):
    return load_file(GOLDENS / name / f"{file}.safetensors")


def training_model(name, **changes):
    config = json.loads((GOLDENS / name / "config.json").read_text())
    model_class = CLASSES[name]
    model = model_class(model_class.config_class(**config | QUIET | changes))
    model.load_state_dict(golden(name, "model"), strict=False)
    model.tie_weights()
    return model.train()


def batch_of(name):
    """Return a padded batch of two, the last of whose labels are ignored."""
    stored = golden(name, "forward")
    return {
        "input_ids": stored["input.source"],
        "attention_mask": stored["input.source_mask"],
        "labels": stored["input.labels"],
    }


def relative_error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_gradients_agree(found, expected):
    """Hold the gradient of every parameter against the expected one of the same name."""
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert found[name].shape == gradient.shape, name
        if name.endswith("k_proj.bias"):
            # Softmax does not see what is added to all of its arguments: these are zero, and what
            # is found is rounding.
            scale = expected[name.replace("bias", "weight")].norm()
            assert found[name].norm() <= TOLERANCE * scale, name
        elif not gradient.any():
            assert not found[name].any(), f"{name} should have no gradient"
        else:
            error = relative_error(found[name], gradient)
            assert error <= TOLERANCE, f"{name} differs by {error:.1e} of its norm"


def gradients_of(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_gradients_agree_with_the_published_class(name):
    expected = dict(golden(name, "gradients"))
    model = training_model(name)
    loss = model(**batch_of(name)).loss
    loss.backward()
    torch.testing.assert_close(loss.double(), expected.pop("loss").double(), rtol=TOLERANCE, atol=0)
    assert_gradients_agree(gradients_of(model), expected)


def test_gradient_checkpointing_changes_no_gradient():
    expected = dict(golden("moe", "gradients"))
    del expected["loss"]
    model = training_model("moe")
    model.gradient_checkpointing_enable()
    model(**batch_of("moe"), output_hidden_states=True).loss.backward()
    assert_gradients_agree(gradients_of(model), expected)


def test_the_number_of_transformers_4_is_an_option():
    stored = golden("moe", "forward")
    model = training_model("moe", router_aux_loss="transformers-4", moe_token_dropout=0.2).eval()
    with torch.no_grad():
        plain = model(**batch_of("moe"))
        found = model(**batch_of("moe"), output_router_logits=True)
    coefficient = model.config.router_aux_loss_coef
    for side in ("encoder", "decoder"):
        torch.testing.assert_close(
            found[f"{side}_aux_loss"], stored[f"{side}_aux_loss"], rtol=TOLERANCE, atol=0
        )
        assert found.get(f"{side}_z_loss") is None
    both = found.encoder_aux_loss + found.decoder_aux_loss
    torch.testing.assert_close(found.loss, plain.loss + coefficient * both, rtol=TOLERANCE, atol=0)


class TokenByToken:
    """NLLB-MoE in float64 as a loop over tokens: spec 3.1 to 3.9 and 4.2 to 4.7, policy "all".

    Attention weights and activations have no dropout here. What is random comes from ``draws``,
    in the order in which a forward pass needs it: true where something is kept.
    """

    def __init__(self, config, weights, draws=()):
        self.config = config
        self.weights = weights
        self.draws = iter(draws)
        self.routers = {"encoder": [], "decoder": []}
        if config.ffn_output_dropout == "dropout":
            self.ffn_dropout = config.dropout
        else:
            self.ffn_dropout = config.activation_dropout

    def losses(self, batch):
        """Return the loss and its five parts."""
        config, labels = self.config, batch["labels"]
        start = torch.full((len(labels), 1), config.decoder_start_token_id)
        target = torch.cat([start, labels[:, :-1]], dim=1)
        target = target.masked_fill(target == -100, config.pad_token_id)
        source_real = batch["attention_mask"].bool()
        target_real = batch.get("decoder_attention_mask", torch.ones_like(target)).bool()
        memory = self.encode(batch["input_ids"], source_real)
        hidden = self.decode(
            target, target_real, "decoder_attention_mask" in batch, memory, source_real
        )
        logits = hidden @ self.weights["model.shared.weight"].T
        terms = [
            -logits[b, t].log_softmax(0)[labels[b, t]]
            for b, t in (labels != -100).nonzero().tolist()
        ]
        parts = {"lm": sum(terms) / len(terms)}
        for side, routers in self.routers.items():
            parts[f"{side}_aux_loss"] = sum(balance(*router) for router in routers)
            parts[f"{side}_z_loss"] = sum(z_loss(*router) for router in routers)
        total = parts["lm"]
        for side in self.routers:
            total = total + config.router_aux_loss_coef * parts[f"{side}_aux_loss"]
            total = total + config.router_z_loss_coef * parts[f"{side}_z_loss"]
        return total, parts

    def encode(self, tokens, real):
        x = self.embed(tokens)
        allowed = real[:, None, :].expand(-1, tokens.shape[1], -1)
        for index in range(self.config.encoder_layers):
            name = f"model.encoder.layers.{index}"
            normed = self.norm(f"{name}.self_attn_layer_norm", x)
            x = x + self.dropped(self.attention(f"{name}.self_attn", normed, normed, allowed))
            x = x + self.feed_forward(name, x, real, "encoder")
        return self.norm("model.encoder.layer_norm", x)

    def decode(self, tokens, real, masked, memory, memory_real):
        x = self.embed(tokens)
        length = tokens.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        allowed = causal & real[:, None, :]
        across = memory_real[:, None, :].expand(-1, length, -1)
        routed = real if masked else torch.ones_like(real)
        for index in range(self.config.decoder_layers):
            name = f"model.decoder.layers.{index}"
            normed = self.norm(f"{name}.self_attn_layer_norm", x)
            x = x + self.dropped(self.attention(f"{name}.self_attn", normed, normed, allowed))
            normed = self.norm(f"{name}.cross_attention_layer_norm", x)
            x = x + self.dropped(self.attention(f"{name}.cross_attention", normed, memory, across))
            x = x + self.feed_forward(name, x, routed, "decoder")
        return self.norm("model.decoder.layer_norm", x)

    def embed(self, tokens):
        config, rows = self.config, self.weights["model.shared.weight"]
        half = config.d_model // 2
        sentences = []
        for sentence in tokens.tolist():
            vectors, seen = [], 0
            for token in sentence:
                if token == config.pad_token_id:
                    vectors.append(rows[token].detach() * math.sqrt(config.d_model))
                    continue
                seen += 1
                angles = [
                    (config.pad_token_id + seen) * math.exp(-k * math.log(10000) / (half - 1))
                    for k in range(half)
                ]
                position = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
                position = torch.tensor(position, dtype=torch.float64)
                vectors.append(rows[token] * math.sqrt(config.d_model) + position)
            sentences.append(torch.stack(vectors))
        return self.dropped(torch.stack(sentences))

    def attention(self, name, x, context, allowed):
        sides = zip(("q", "k", "v"), (x, context, context), strict=True)
        queries, keys, values = (self.linear(f"{name}.{k}_proj", side) for k, side in sides)
        side = "encoder" if ".encoder." in name else "decoder"
        width = self.config.d_model // getattr(self.config, f"{side}_attention_heads")
        heads = []
        for first in range(0, self.config.d_model, width):
            head = slice(first, first + width)
            scores = queries[..., head] @ keys[..., head].transpose(1, 2) / math.sqrt(width)
            weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
            heads.append(weights @ values[..., head])
        return self.linear(f"{name}.out_proj", torch.cat(heads, dim=-1))

    def feed_forward(self, name, x, real, side):
        normed = self.norm(f"{name}.ff_layer_norm", x)
        if f"{name}.ffn.fc1.weight" in self.weights:
            update = self.expert(f"{name}.ffn", normed)
        else:
            update = self.mixture(f"{name}.ffn", normed.flatten(0, 1), real.flatten(), side)
        return self.dropped(update.view(x.shape), self.ffn_dropout)

    def expert(self, name, x):
        return self.linear(f"{name}.fc2", self.linear(f"{name}.fc1", x).relu())

    def mixture(self, name, tokens, real, side):
        config = self.config
        logits = tokens @ self.weights[f"{name}.router.classifier.weight"].T
        if config.router_bias:
            logits = logits + self.weights[f"{name}.router.classifier.bias"]
        self.routers[side].append((logits, real))
        probs = logits.softmax(-1)
        choices = [row.argsort(descending=True)[:2].tolist() for row in probs]
        kept = self.claims(probs, choices, real)
        masks = None
        if config.moe_token_dropout > 0:
            masks = next(self.draws)
            assert masks.shape == (len(tokens), 2)
        outputs = []
        for t, token in enumerate(tokens):
            chosen = [probs[t, expert] for expert in choices[t]]
            if config.normalize_router_prob_before_dropping:
                gates = [p / sum(chosen) for p in chosen]
            else:
                left = sum(p for p, keep in zip(chosen, kept[t], strict=True) if keep)
                gates = [p / left for p in chosen] if any(kept[t]) else chosen
            output = torch.zeros_like(token)
            for place, expert in enumerate(choices[t]):
                if kept[t][place] and (masks is None or masks[t, place]):
                    vector = self.expert(f"{name}.experts.expert_{expert}", token)
                    output = output + gates[place] * vector
            outputs.append(output)
        return torch.stack(outputs)

    def claims(self, probs, choices, real):
        """Return which choices find room: first choices of all tokens before any second one."""
        config, count = self.config, len(choices)
        capacity = config.expert_capacity
        if capacity is None:
            capacity = 2 * math.ceil(count / config.num_experts)
        order = range(count)
        if config.batch_prioritized_routing:
            order = sorted(order, key=lambda t: -probs[t].max().item())
        taken = [0] * config.num_experts
        kept = [[False, False] for _ in range(count)]
        for place in (0, 1):
            for t in order:
                if real[t]:
                    expert = choices[t][place]
                    kept[t][place] = taken[expert] < capacity
                    taken[expert] += 1
        return kept

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name, x):
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    def dropped(self, x, share=None):
        share = self.config.dropout if share is None else share
        if share == 0:
            return x
        kept = next(self.draws)
        assert kept.numel() == x.numel()
        return x * kept.view(x.shape) / (1 - share)


def balance(logits, real):
    """Return E * sum_e f_e * p_e of one layer's real tokens, f_e the share of first choices."""
    probs = [row.softmax(0) for row, is_real in zip(logits, real, strict=True) if is_real]
    experts = logits.shape[1]
    total = logits.new_zeros(())
    for expert in range(experts):
        chosen = sum(int(row.argmax() == expert) for row in probs) / len(probs)
        total = total + chosen * sum(row[expert] for row in probs) / len(probs)
    return experts * total


def z_loss(logits, real):
    rows = [row for row, is_real in zip(logits, real, strict=True) if is_real]
    return sum(row.exp().sum().log() ** 2 for row in rows) / len(rows)


@pytest.fixture
def draws(monkeypatch):
    """Return a list to which everything random that a forward pass draws is appended."""
    drawn, generator = [], torch.Generator().manual_seed(7)

    def dropout(x, p=0.5, training=True, inplace=False):
        if not training or p == 0:
            return x
        kept = torch.rand(x.shape, generator=generator) >= p
        drawn.append(kept)
        return x * kept / (1 - p)

    def rand_like(x, **_):
        values = torch.rand(x.shape, generator=generator)
        drawn.append(values >= TOKEN_DROPOUT)
        return values

    monkeypatch.setattr(functional, "dropout", dropout)
    monkeypatch.setattr(torch, "rand_like", rand_like)
    return drawn


TOKEN_DROPOUT = 0.4
FAIRSEQ = {
    "expert_capacity": None,
    "ffn_output_dropout": "dropout",
    "dropout": 0.25,
    "moe_token_dropout": TOKEN_DROPOUT,
}
# Changes of the golden's configuration, whose capacity of 3 drops choices.
OPTIONS = [
    pytest.param({}, id="choices dropped, gates of what is left"),
    pytest.param({"normalize_router_prob_before_dropping": True}, id="gates before dropping"),
    pytest.param(
        {"batch_prioritized_routing": True, "expert_capacity": 2}, id="confident tokens first"
    ),
    pytest.param({"router_z_loss_coef": 0.0, "router_aux_loss_coef": 0.5}, id="no z-loss"),
    pytest.param({"router_z_loss_coef": 0.2}, id="a large z-loss"),
    pytest.param({"moe_token_dropout": TOKEN_DROPOUT}, id="expert outputs masked, not rescaled"),
    pytest.param(FAIRSEQ, id="all options of fairseq"),
    pytest.param(
        FAIRSEQ | {"encoder_sparse_step": 1, "router_bias": False}, id="more sparse layers"
    ),
]


@pytest.mark.parametrize("masked_target", [False, True], ids=["", "decoder mask"])
@pytest.mark.parametrize("changes", OPTIONS)
def test_losses_and_gradients_are_those_of_a_loop_over_tokens(changes, masked_target, draws):
    torch.manual_seed(3)
    model = NllbMoeForConditionalGeneration(
        NllbMoeConfig(**json.loads((GOLDENS / "moe" / "config.json").read_text()) | QUIET | changes)
    ).train()
    stored = golden("moe", "model")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fresh = 0.3 * torch.randn(parameter.shape)
            parameter.copy_(stored.get(name, fresh))
    batch = batch_of("moe")
    if masked_target:
        batch["decoder_attention_mask"] = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 0]])
    found = model(**batch, output_router_logits=True)
    found.loss.backward()

    weights = {
        name: parameter.detach().double().requires_grad_()
        for name, parameter in model.named_parameters()
    }
    definition = TokenByToken(model.config, weights, draws)
    loss, parts = definition.losses(batch)
    gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    assert next(definition.draws, None) is None

    torch.testing.assert_close(found.loss.double(), loss, rtol=TOLERANCE, atol=0)
    for side in ("encoder", "decoder"):
        for kind in ("aux", "z"):
            part = f"{side}_{kind}_loss"
            if kind == "z" and model.config.router_z_loss_coef == 0:
                assert found.get(part) is None
            else:
                torch.testing.assert_close(
                    found[part].double(), parts[part], rtol=TOLERANCE, atol=0
                )
    expected = {
        name: torch.zeros_like(weight) if gradient is None else gradient
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
    }
    assert_gradients_agree(gradients_of(model), expected)


def test_the_loop_over_tokens_is_the_published_class_where_that_is_right():
    """Check the definition itself: without randomness and the routers' losses they are one."""
    config = NllbMoeConfig(
        **json.loads((GOLDENS / "moe" / "config.json").read_text())
        | QUIET
        | {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
    )
    weights = {
        name: weight.double().requires_grad_() for name, weight in golden("moe", "model").items()
    }
    loss, _ = TokenByToken(config, weights).losses(batch_of("moe"))
    gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    expected = dict(golden("moe", "gradients"))
    torch.testing.assert_close(loss, expected.pop("loss").double(), rtol=TOLERANCE, atol=0)
    found = {
        name: torch.zeros_like(weight) if gradient is None else gradient
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
    }
    assert_gradients_agree(found, expected)
