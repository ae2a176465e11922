"""Make the goldens of the documented classes' ``forward`` with transformers 4.57.1.

    .venv-peers/bin/python tests/golden/make_pretrained_goldens.py

Each folder of ``pretrained/`` is a tiny random checkpoint in the published layout, with:

- ``cases.json``: calls of ``forward``, the arguments by name, and the shape of what came back: a
  string names a tensor, a list is a tuple, null is ``None``;
- ``forward.safetensors``: those tensors, a legacy cache being a tuple of four tensors per layer;
- ``gradients.safetensors``: loss and gradient of every parameter, with nothing random.

Everything was computed in float64, and is stored so for dense models; float32 is held against it
too. Mixtures of experts needed float64 routers and a default dtype of float64 (transformers cannot
build their causal mask in float64 without it) and are stored in float32.

Left out, because the published class is not a valid oracle there (spec sections 3.9 and 4.4):

- the router's losses: the published ones mix layers, and read the encoder's in place of the
  decoder's. ``encoder_aux_loss`` and ``decoder_aux_loss`` are what the published function makes
  of each side's own routers, for the option that reproduces it;
- ``output_router_logits`` together with labels and either ``use_cache=False`` or hidden states,
  which raises;
- a cache of a mixture of experts together with a decoder mask that holds zeros: the published
  router then takes the mask of other positions.
"""

import copy
import logging
import sys

import torch
import transformers
from make_model_goldens import (
    EOS,
    HERE,
    PAD,
    VERSION,
    draw_weights,
    published_tensors,
    write_json,
)
from safetensors.torch import save_file
from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
)
from transformers.cache_utils import EncoderDecoderCache
from transformers.models.nllb_moe.modeling_nllb_moe import (
    NllbMoeTop2Router,
    load_balancing_loss_func,
)

SIZES = {
    "vocab_size": 40,
    "d_model": 12,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 10,
    "decoder_ffn_dim": 8,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "max_position_embeddings": 20,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}
# As transformers' own tester has it: the second encoder layer and every decoder layer is sparse.
EXPERTS = {"num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 1}
NOTHING_RANDOM = {"dropout": 0.0, "attention_dropout": 0.0, "moe_token_dropout": 0.0}

MODELS = [
    ("dense", 41, M2M100ForConditionalGeneration, M2M100Config(**SIZES)),
    (
        "moe",
        42,
        NllbMoeForConditionalGeneration,
        NllbMoeConfig(**SIZES | EXPERTS, router_bias=True, expert_capacity=3),
    ),
]

EVERYTHING = {"output_attentions": True, "output_hidden_states": True}
BATCH = {
    "input_ids": "source",
    "attention_mask": "source_mask",
    "decoder_input_ids": "target",
}
# Name, which module is called, its arguments (a string names an input), and for whom.
CASES = [
    ("ids alone, padding not masked", "lm", {"input_ids": "source", "decoder_input_ids": "target"}),
    (
        "masks, everything returned",
        "lm",
        BATCH | EVERYTHING | {"decoder_attention_mask": "target_mask", "use_cache": False},
    ),
    (
        "masks, everything returned, a cache",
        "base",
        BATCH | EVERYTHING | {"decoder_attention_mask": "target_mask", "use_cache": True},
    ),
    (
        "head masks",
        "lm",
        BATCH
        | {
            "head_mask": "encoder_heads",
            "decoder_head_mask": "decoder_heads",
            "cross_attn_head_mask": "cross_heads",
            "output_attentions": True,
            "use_cache": False,
        },
    ),
    (
        "encoder outputs as a tuple",
        "lm",
        {
            "encoder_outputs": ["memory", ["memory_state"], ["memory_attention"]],
            "attention_mask": "source_mask",
            "decoder_input_ids": "target",
            "use_cache": False,
        },
    ),
    (
        "encoder output alone, in a tuple",
        "base",
        {"encoder_outputs": ["memory"], "decoder_input_ids": "target", "use_cache": False},
    ),
    (
        "embeddings for ids",
        "base",
        {
            "inputs_embeds": "source_embeds",
            "attention_mask": "source_mask",
            "decoder_inputs_embeds": "target_embeds",
            "use_cache": False,
        },
    ),
    (
        "labels alone, with -100",
        "lm",
        {
            "input_ids": "source",
            "attention_mask": "source_mask",
            "labels": "labels",
            "use_cache": False,
        },
    ),
    (
        "labels beside decoder ids",
        "lm",
        BATCH | {"labels": "labels", "use_cache": False},
    ),
    (
        "one token behind a cache",
        "lm",
        {
            "attention_mask": "source_mask",
            "encoder_outputs": ["memory"],
            "decoder_input_ids": "next_one",
            "past_key_values": "past",
            "use_cache": True,
        }
        | EVERYTHING,
    ),
    (
        "three tokens behind a cache",
        "base",
        {
            "attention_mask": "source_mask",
            "encoder_outputs": ["memory"],
            "decoder_input_ids": "next_three",
            "past_key_values": "past",
            "use_cache": True,
        },
    ),
    (
        "encoder alone",
        "encoder",
        {"input_ids": "source", "attention_mask": "source_mask", "head_mask": "encoder_heads"}
        | EVERYTHING,
    ),
    (
        "decoder alone",
        "decoder",
        {
            "input_ids": "target",
            "attention_mask": "target_mask",
            "encoder_hidden_states": "memory",
            "encoder_attention_mask": "source_mask",
            "head_mask": "decoder_heads",
            "cross_attn_head_mask": "cross_heads",
            "use_cache": False,
        }
        | EVERYTHING,
    ),
    (
        "decoder without a memory",
        "decoder",
        {"input_ids": "target", "use_cache": True, "output_hidden_states": True},
    ),
]
DENSE_CASES = [
    (
        "a mask with holes over a cache",
        "lm",
        {
            "attention_mask": "source_mask",
            "encoder_outputs": ["memory"],
            "decoder_input_ids": "next_three",
            "decoder_attention_mask": "past_mask",
            "past_key_values": "past",
            "use_cache": True,
        },
    ),
]
MOE_CASES = [
    (
        "router outputs, everything returned",
        "lm",
        BATCH
        | EVERYTHING
        | {"decoder_attention_mask": "target_mask", "output_router_logits": True},
    ),
    (
        "router outputs of the encoder alone",
        "encoder",
        {"input_ids": "source", "attention_mask": "source_mask", "output_router_logits": True},
    ),
    ("router outputs, padding not masked", "base", BATCH | {"output_router_logits": True}),
]

logger = logging.getLogger("goldens")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.logging.set_verbosity_error()
    if transformers.__version__ != VERSION:
        sys.exit(f"these goldens need transformers {VERSION}, found {transformers.__version__}")
    torch.set_num_threads(1)
    seeds = {}
    for name, seed, model_class, config in MODELS:
        config._attn_implementation = "eager"
        model = model_class(config)
        draw_mild_weights(model, seed)
        # The mask of a mixture of experts is made in the default dtype.
        torch.set_default_dtype(torch.float64)
        write_model(name, model.eval(), seed)
        torch.set_default_dtype(torch.float32)
        seeds[name] = seed
    write_json(
        HERE / "pretrained" / "versions.json",
        {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "script": "make_pretrained_goldens.py",
            "seeds": seeds,
        },
    )


@torch.no_grad()
def draw_mild_weights(model, seed) -> None:
    """Draw weights that saturate no softmax, behind which gradients would be lost in rounding."""
    draw_weights(model, seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "shared" not in name:
            parameter.mul_(0.35)


def write_model(name, model, seed) -> None:
    folder = HERE / "pretrained" / name
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    (folder / "config.json").write_text(model.config.to_json_string())
    save_file(published_tensors(model), folder / "model.safetensors", {"format": "pt"})
    dense = model.config.model_type == "m2m_100"
    widen(model)
    inputs = draw_inputs(model, seed)
    tensors = flattened("input", inputs)
    cases = []
    for title, module, arguments in CASES + (DENSE_CASES if dense else MOE_CASES):
        prefix = f"case_{len(cases)}"
        found = call(model, module, arguments, inputs)
        tensors |= flattened(prefix, found)
        cases.append(
            {
                "name": title,
                "module": module,
                "arguments": arguments,
                "outputs": outline(prefix, found),
                "order": returned_order(model, module, arguments, inputs, found),
            }
        )
        logger.info("%s, %s: %s", name, title, ", ".join(found))
    write_json(folder / "cases.json", cases)
    if not dense:
        tensors |= router_losses(model, inputs)
        tensors |= flattened("layer", sparse_layer(model, inputs))
    for file, content in ("forward", tensors), ("gradients", gradients(model, inputs)):
        if not dense:
            content = {name: narrowed(tensor) for name, tensor in content.items()}
        save_file(content, folder / f"{file}.safetensors")


def widen(model) -> None:
    """Compute in float64, routers too."""
    model.double()
    for module in model.modules():
        if isinstance(module, NllbMoeTop2Router):
            module.dtype = torch.float64


def narrowed(tensor):
    return tensor.float() if tensor.is_floating_point() else tensor


@torch.no_grad()
def draw_inputs(model, seed) -> dict:
    generator = torch.Generator().manual_seed(seed + 100)
    config = model.config

    def tokens(rows, length):
        return torch.randint(4, config.vocab_size, (rows, length), generator=generator)

    def values(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float32).double()

    def heads(layers, count):
        shares = torch.randint(1, 9, (layers, count), generator=generator)
        return shares / 8

    source = tokens(2, 5)
    source[0, 4], source[1, 2], source[1, 3:] = EOS, EOS, PAD
    target = tokens(2, 4)
    target[:, 0], target[1, 3] = EOS, PAD
    labels = tokens(2, 4)
    labels[0, 3], labels[1, 2:] = EOS, -100
    memory = values(2, 5, config.d_model)
    source_mask = (source != PAD).long()
    # A hole before the end: attention is causal, so that zeros at the end hide nothing.
    target_mask = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0]])
    encoder_heads = heads(config.encoder_layers, config.encoder_attention_heads)
    decoder_heads = heads(config.decoder_layers, config.decoder_attention_heads)
    cross_heads = heads(config.decoder_layers, config.decoder_attention_heads)
    encoder_heads[0, 1] = decoder_heads[1, 0] = cross_heads[0, 0] = 0
    past = model(
        encoder_outputs=(memory,),
        attention_mask=source_mask,
        decoder_input_ids=target[:, :3],
        use_cache=True,
    ).past_key_values.to_legacy_cache()
    return {
        "source": source,
        "source_mask": source_mask,
        "target": target,
        "target_mask": target_mask,
        "labels": labels,
        "memory": memory,
        "memory_state": values(2, 5, config.d_model),
        "memory_attention": values(2, config.encoder_attention_heads, 5, 5),
        "source_embeds": values(2, 5, config.d_model),
        "target_embeds": values(2, 4, config.d_model),
        "encoder_heads": encoder_heads,
        "decoder_heads": decoder_heads,
        "cross_heads": cross_heads,
        # As they are stored.
        "past": tuple(tuple(part.float().double() for part in layer) for layer in past),
        "past_mask": torch.tensor([[1, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 1]]),
        "next_one": tokens(2, 1),
        "next_three": tokens(2, 3),
    }


def call(model, module, arguments, inputs, **more) -> dict:
    modules = {
        "lm": model,
        "base": model.model,
        "encoder": model.get_encoder(),
        "decoder": model.get_decoder(),
    }
    given = {name: lookup(value, inputs) for name, value in arguments.items()}
    if "past_key_values" in given:
        given["past_key_values"] = EncoderDecoderCache.from_legacy_cache(given["past_key_values"])
    with torch.no_grad():
        found = modules[module](**given, **more)
    if isinstance(found, tuple):
        return tuple(legacy(value) for value in found)
    return {name: legacy(value) for name, value in found.items()}


def lookup(value, inputs):
    if isinstance(value, list):
        return tuple(lookup(item, inputs) for item in value)
    return inputs[value] if isinstance(value, str) else value


def legacy(value):
    if not isinstance(value, EncoderDecoderCache):
        return value
    # Without a memory there are two tensors per layer, and places for two more.
    return tuple(
        tuple(part for part in layer if part is not None) for layer in value.to_legacy_cache()
    )


def returned_order(model, module, arguments, inputs, found) -> list[str | None]:
    """Return the field that stands at each place of what ``return_dict=False`` gives."""
    plain = call(model, module, arguments, inputs, return_dict=False)
    names, order = list(found), []
    for value in plain:
        matches = [name for name in names if name not in order and equal(found[name], value)]
        # Router losses that were not computed stand there as None.
        order.append(None if value is None else matches[0] if matches else "?")
    if "?" in order or len(order) - order.count(None) != len(names):
        sys.exit(f"return_dict=False gives {order} where there are {names}")
    return order


def equal(first, second) -> bool:
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if first is None or second is None:
        return first is second
    return (
        isinstance(second, tuple) and len(first) == len(second) and all(map(equal, first, second))
    )


def flattened(prefix, value) -> dict[str, torch.Tensor]:
    if value is None:
        return {}
    if isinstance(value, torch.Tensor):
        return {prefix: value.detach().contiguous().clone()}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    parts = {}
    for key, item in items:
        parts |= flattened(f"{prefix}.{key}", item)
    return parts


def outline(prefix, value):
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return prefix
    if isinstance(value, dict):
        return {key: outline(f"{prefix}.{key}", item) for key, item in value.items()}
    return [outline(f"{prefix}.{key}", item) for key, item in enumerate(value)]


@torch.no_grad()
def sparse_layer(model, inputs) -> dict:
    """Return what a sparse layer and its router return on their own, for each kind of mask."""
    layer = copy.deepcopy(model.get_encoder().layers[1].ffn)
    hidden, padding = inputs["memory"], inputs["source_mask"] == 0
    added = torch.zeros(2, 1, 5, 5).masked_fill(padding[:, None, None, :], -1e30)
    found = {
        "mlp.none": layer(hidden, None),
        "mlp.flat": layer(hidden, padding.flatten()),
        "mlp.added": layer(hidden, added),
        "router.none": layer.router(hidden, None),
        "router.flat": layer.router(hidden, padding.flatten()),
    }
    # An evaluation leaves its capacity behind in the published router.
    layer.router.expert_capacity = model.config.expert_capacity
    return found | {"router.training": layer.router.train()(hidden, padding.flatten())}


@torch.no_grad()
def router_losses(model, inputs) -> dict[str, torch.Tensor]:
    """Return the published balancing loss of each side's own router outputs, in evaluation."""
    found = model(
        input_ids=inputs["source"],
        attention_mask=inputs["source_mask"],
        labels=inputs["labels"],
        output_router_logits=True,
        use_cache=True,
    )
    losses = {}
    for side in ("encoder", "decoder"):
        unpacked = model._unpack_router_logits(found[f"{side}_router_logits"])
        losses[f"{side}_aux_loss"] = load_balancing_loss_func(*unpacked)
    if losses["encoder_aux_loss"] != found.encoder_aux_loss:
        sys.exit("the encoder's router loss is not what the model returns")
    return losses


def gradients(model, inputs) -> dict[str, torch.Tensor]:
    """Return loss and gradients in training mode, with everything random off."""
    config = model.config
    quiet = type(model)(type(config)(**config.to_dict() | NOTHING_RANDOM))
    quiet.load_state_dict(model.state_dict())
    widen(quiet.train())
    loss = quiet(
        input_ids=inputs["source"], attention_mask=inputs["source_mask"], labels=inputs["labels"]
    ).loss
    loss.backward()
    found = {name: parameter.grad for name, parameter in quiet.named_parameters()}
    missing = [name for name, gradient in found.items() if gradient is None]
    logger.info("no gradient: %s", missing)
    return {"loss": loss.detach()} | {
        name: gradient.contiguous() for name, gradient in found.items() if gradient is not None
    }


if __name__ == "__main__":
    main()
