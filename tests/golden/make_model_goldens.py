"""Make the goldens of models, router and generation with transformers 4.57.1.

    python -m venv .venv-peers && .venv-peers/bin/pip install transformers==4.57.1 torch
    .venv-peers/bin/python tests/golden/make_model_goldens.py

Version 4.57 is the last one whose NLLB-MoE is right: in 5.x only experts 0 and 1 ever run.

Each folder of ``models/`` is a tiny random checkpoint in the published layout, with:

- ``forward.safetensors``: a padded batch of three and what the published class makes of it;
- ``generation.json``: sources, and what ``generate`` returns for each set of options.

``router/`` holds what ``NllbMoeTop2Router.route_tokens`` returns for every combination of options.

Left out, because the published class is not a valid oracle there:

- padded decoder input together with ``router_ignore_padding_tokens`` and a capacity below 1: what a
  padded position holds depends on whether its attention mask hides it from itself (here it does
  not), and there it competes with real tokens for experts;
- second expert policy "random" with normalisation before dropping: the published router weights
  the second expert by its unnormalised probability, fairseq by the normalised one; the tests
  compare with the definition written as a loop;
- NLLB-MoE in float64: the published class cannot build its causal mask there;
- ``router_dtype`` other than float32: no checkpoint has it.
"""

import itertools
import json
import logging
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
)
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router

HERE = Path(__file__).parent
VERSION = "4.57.1"
PAD, EOS = 1, 2
VOCAB_SIZE = 64
FORCED = 7
LIMIT = 14

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 20,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "max_position_embeddings": 32,
}

# Name, seed, and how it differs from SIZES; the reason stands beside each.
DENSE = [
    # Both stacks differ in heads and ffn width, as no published model does but the format allows.
    ("dense_2_2", 19, {}),
    # SMaLL-100's shape: a deep encoder and a shallow decoder.
    ("dense_3_1", 36, {"encoder_layers": 3, "decoder_layers": 1}),
    # An odd width (the sinusoid table gets a zero column), unscaled embeddings, another activation.
    (
        "dense_odd_unscaled_gelu",
        35,
        {
            "d_model": 15,
            "encoder_attention_heads": 5,
            "decoder_attention_heads": 3,
            "scale_embedding": False,
            "activation_function": "gelu",
        },
    ),
]

MOE = [
    # Fewest experts: every token reaches both. Every encoder layer sparse, every second decoder's.
    ("moe_2_experts", 112, {"num_experts": 2, "encoder_sparse_step": 1, "decoder_sparse_step": 2}),
    # The router has a bias; padding in the batch with nothing dropped.
    (
        "moe_4_experts_bias",
        124,
        {
            "num_experts": 4,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 1,
            "router_bias": True,
        },
    ),
    # More experts than some batches have tokens; a third step; no masking of expert outputs.
    (
        "moe_8_experts",
        134,
        {
            "num_experts": 8,
            "encoder_layers": 3,
            "encoder_sparse_step": 3,
            "decoder_sparse_step": 1,
            "moe_token_dropout": 0.0,
        },
    ),
    # A step of zero: no sparse encoder layer.
    (
        "moe_decoder_only",
        143,
        {
            "num_experts": 4,
            "decoder_layers": 3,
            "encoder_sparse_step": 0,
            "decoder_sparse_step": 3,
        },
    ),
    # Tokens are dropped, and confident ones claim first.
    (
        "moe_priority_capacity",
        151,
        {
            "num_experts": 4,
            "encoder_sparse_step": 1,
            "decoder_sparse_step": 1,
            "router_bias": True,
            "batch_prioritized_routing": True,
            "moe_eval_capacity_token_fraction": 0.4,
        },
    ),
    # A dropped choice's gate is lost instead of handed to the other one.
    (
        "moe_normalize_before",
        165,
        {
            "num_experts": 4,
            "encoder_sparse_step": 1,
            "decoder_sparse_step": 2,
            "normalize_router_prob_before_dropping": True,
            "moe_eval_capacity_token_fraction": 0.35,
        },
    ),
    # Padding takes room in experts.
    (
        "moe_route_padding",
        171,
        {
            "num_experts": 4,
            "encoder_sparse_step": 1,
            "decoder_sparse_step": 2,
            "router_ignore_padding_tokens": True,
            "moe_eval_capacity_token_fraction": 0.4,
        },
    ),
    # A fraction that is not positive means the training capacity, in tokens.
    (
        "moe_fixed_capacity",
        188,
        {
            "num_experts": 4,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
            "moe_eval_capacity_token_fraction": -1.0,
            "expert_capacity": 3,
        },
    ),
]

# Options of one run; "forced" and "limit" are ours, the rest are generate's own names.
RUNS = [
    ("greedy", {"forced": None}),
    ("greedy, forced language", {}),
    ("greedy, repetition penalty", {"repetition_penalty": 1.4}),
    ("greedy, no repeated trigram", {"no_repeat_ngram_size": 3}),
    ("greedy, at least 6 tokens", {"min_new_tokens": 6}),
    ("greedy, 1 token", {"limit": 1}),
    ("greedy, 2 tokens", {"limit": 2}),
    ("beam 4, not forced", {"num_beams": 4, "forced": None}),
    ("beam 4", {"num_beams": 4}),
    ("beam 4, 3 best", {"num_beams": 4, "num_return_sequences": 3}),
    ("beam 4, never", {"num_beams": 4, "early_stopping": "never"}),
    (
        "beam 4, never, long preferred",
        {"num_beams": 4, "early_stopping": "never", "length_penalty": 2.0},
    ),
    (
        "beam 4, never, short preferred",
        {"num_beams": 4, "early_stopping": "never", "length_penalty": -1.0},
    ),
    ("beam 5, early stopping", {"num_beams": 5, "early_stopping": True}),
    (
        "beam 5, early stopping, 5 best",
        {"num_beams": 5, "early_stopping": True, "num_return_sequences": 5},
    ),
    ("beam 4, length penalty 0.5", {"num_beams": 4, "length_penalty": 0.5}),
    ("beam 4, length penalty 2", {"num_beams": 4, "length_penalty": 2.0}),
    ("beam 4, length penalty -1", {"num_beams": 4, "length_penalty": -1.0}),
    ("beam 4, no repeated bigram", {"num_beams": 4, "no_repeat_ngram_size": 2}),
    ("beam 4, no repeated trigram", {"num_beams": 4, "no_repeat_ngram_size": 3}),
    ("beam 4, at least 6 tokens", {"num_beams": 4, "min_new_tokens": 6}),
    ("beam 3, repetition penalty", {"num_beams": 3, "repetition_penalty": 1.4}),
    ("beam 4, 1 token", {"num_beams": 4, "limit": 1}),
    ("beam 4, 2 tokens", {"num_beams": 4, "limit": 2, "num_return_sequences": 4}),
]

logger = logging.getLogger("goldens")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.logging.set_verbosity_error()
    if transformers.__version__ != VERSION:
        sys.exit(f"these goldens need transformers {VERSION}, found {transformers.__version__}")
    torch.set_num_threads(1)
    for name, seed, changes in DENSE:
        config = M2M100Config(**SIZES | changes)
        write_model(name, seed, M2M100ForConditionalGeneration(config))
    for name, seed, changes in MOE:
        config = NllbMoeConfig(**SIZES | changes)
        write_model(name, seed, NllbMoeForConditionalGeneration(config))
    write_router()
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    write_json(HERE / "models" / "versions.json", versions | {"script": Path(__file__).name})


def write_model(name, seed, model) -> None:
    folder = HERE / "models" / name
    folder.mkdir(parents=True, exist_ok=True)
    draw_weights(model, seed)
    model.eval()
    model.config.architectures = [type(model).__name__]
    (folder / "config.json").write_text(model.config.to_json_string())
    save_file(published_tensors(model), folder / "model.safetensors", {"format": "pt"})
    save_file(forward_goldens(model), folder / "forward.safetensors")
    write_json(folder / "generation.json", generation_goldens(name, model))


@torch.no_grad()
def draw_weights(model, seed) -> None:
    """Draw weights under which argmaxes vary and some outputs end early.

    With a tied head and a plain final norm every token predicts itself; a random sign per channel
    of that norm undoes it, and its bias leans a little towards the end mark.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.copy_(float(name.endswith("weight")) + 0.1 * noise)
        elif "shared" in name:
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_((0.1 if name.endswith("bias") else 0.8) * noise)
    embedding = model.model.shared.weight
    embedding[PAD] = 0
    norm = model.model.decoder.layer_norm
    norm.weight.copy_(torch.randn(norm.weight.shape, generator=generator))
    norm.bias.copy_(0.7 * embedding[EOS] / embedding[EOS].norm())


def published_tensors(model) -> dict[str, Tensor]:
    """Return the state dict as published files hold it: one of the four tied names."""
    tied = ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    return {k: v.contiguous() for k, v in model.state_dict().items() if not k.endswith(tied)}


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return tokens and mask (1 = real), padded on the right."""
    width = max(map(len, rows))
    tokens = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return tokens, mask


def random_rows(lengths: list[int], seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(4, VOCAB_SIZE, (length - 1,), generator=generator) for length in lengths]
    return [[*row.tolist(), EOS] for row in rows]


@torch.no_grad()
def forward_goldens(model) -> dict[str, Tensor]:
    source, source_mask = padded(random_rows([7, 4, 2], 101))
    competing = getattr(model.config, "router_ignore_padding_tokens", False)
    target, target_mask = padded(
        [[EOS, *row[:-1]] for row in random_rows([6, 6, 6] if competing else [6, 3, 5], 102)]
    )
    inputs = {
        "input_ids": source,
        "attention_mask": source_mask,
        "decoder_input_ids": target,
        "decoder_attention_mask": target_mask,
    }
    labels = torch.cat([target[:, 1:], torch.full((3, 1), EOS)], dim=1)
    labels = labels.masked_fill(target_mask == 0, -100)
    single = model(**inputs, labels=labels)
    goldens = {
        "source_tokens": source,
        "source_mask": source_mask.bool(),
        "target_tokens": target,
        "target_mask": target_mask.bool(),
        "labels": labels,
        "memory": single.encoder_last_hidden_state,
        "logits": single.logits,
        "loss": single.loss,
    }
    if model.config.model_type == "m2m_100":
        goldens["logits_float64"] = model.double()(**inputs).logits
        model.float()
    return {key: value.contiguous() for key, value in goldens.items()}


def generation_goldens(name, model) -> dict:
    sources = random_rows([9, 7, 4, 2, 8], 103)
    runs = []
    for title, options in RUNS:
        run = {"name": title, "forced": FORCED, "limit": LIMIT} | options
        tokens, scores = run_generate(model, sources, run)
        # A golden that sits on a near-tie would test rounding, not the algorithm.
        exact, _ = run_generate(model.double(), sources, run)
        model.float()
        if tokens != exact:
            sys.exit(f"{name}: {title!r} differs in float64; choose another seed")
        runs.append(run | {"tokens": tokens, "scores": scores})
    check_variety(name, runs)
    return {"sources": sources, "runs": runs}


def run_generate(model, sources, run) -> tuple[list, list | None]:
    source, mask = padded(sources)
    options = {k: v for k, v in run.items() if k not in ("name", "forced", "limit")}
    found = model.generate(
        input_ids=source,
        attention_mask=mask,
        forced_bos_token_id=run["forced"],
        max_new_tokens=run["limit"],
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    count = options.get("num_return_sequences", 1)
    rows = [without_padding(row, run["limit"]) for row in found.sequences.tolist()]
    tokens = [rows[first : first + count] for first in range(0, len(rows), count)]
    if "num_beams" not in options:
        return tokens, None
    scores = found.sequences_scores.tolist()
    return tokens, [scores[first : first + count] for first in range(0, len(scores), count)]


def without_padding(row: list[int], limit: int) -> list[int]:
    """Return what follows the decoder's start, up to the end mark or the limit."""
    row = row[1:] + [PAD] * (limit - len(row) + 1)
    return row[: row.index(EOS) + 1] if EOS in row else row[:limit]


def check_variety(name, runs) -> None:
    """Refuse goldens in which every sentence ends alike, or none does."""
    outputs = [
        tokens for run in runs if run["limit"] == LIMIT for rows in run["tokens"] for tokens in rows
    ]
    lengths = {len(tokens) for tokens in outputs}
    ended = sum(tokens[-1] == EOS for tokens in outputs) / len(outputs)
    distinct = len({tuple(tokens) for tokens in outputs}) / len(outputs)
    used = len(set(itertools.chain.from_iterable(outputs)))
    logger.info(
        "%s: lengths %s, %.0f %% ended, %.0f %% distinct, %d tokens used",
        name, sorted(lengths), 100 * ended, 100 * distinct, used,
    )  # fmt: skip
    if len(lengths) < 5 or not 0.2 <= ended <= 0.95 or distinct < 0.2 or used < 25:
        sys.exit(f"{name}: generation is degenerate; choose another seed")


def write_router() -> None:
    """Write every combination of router options and what the published router makes of it."""
    folder = HERE / "models" / "router"
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(5)
    tokens = 11
    inputs = {f"logits_{e}": torch.randn(tokens, e, generator=generator) * 2 for e in (2, 4, 7)}
    padding = torch.zeros(tokens, dtype=torch.bool)
    padding[[2, 3, 10]] = True
    tensors, cases = inputs | {"padding": padding}, []
    sweep = itertools.product(
        (2, 4, 7),
        ("all", "sampling", "random"),
        (False, True),
        (False, True),
        ({"fraction": 1.0}, {"fraction": 0.5}, {"fraction": 0.2}, {"fixed": 2}, {"fixed": None}),
        (False, True),
    )
    for number, (experts, policy, before, prioritized, capacity, pads) in enumerate(sweep):
        if policy == "random" and before:
            continue
        config = NllbMoeConfig(
            num_experts=experts,
            hidden_size=8,
            second_expert_policy=policy,
            normalize_router_prob_before_dropping=before,
            batch_prioritized_routing=prioritized,
            moe_eval_capacity_token_fraction=capacity.get("fraction", 1.0),
            expert_capacity=capacity.get("fixed"),
        )
        router = NllbMoeTop2Router(config).train("fixed" in capacity)
        logits = inputs[f"logits_{experts}"]
        torch.manual_seed(number)
        if policy == "sampling":
            tensors[f"noise_{number}"] = torch.distributions.Gumbel(0, 1).rsample(logits.shape)
        elif policy == "random":
            tensors[f"noise_{number}"] = torch.rand(tokens)
        torch.manual_seed(number)
        _, combine = router.route_tokens(logits.clone(), padding_mask=padding if pads else None)
        tensors[f"combine_{number}"] = combine
        case = {"number": number, "experts": experts, "policy": policy, "padding": pads}
        case |= {"normalize_before_dropping": before, "batch_prioritized": prioritized}
        cases.append(case | {"training": "fixed" in capacity} | capacity)
    save_file(tensors, folder / "router.safetensors")
    write_json(folder / "cases.json", cases)


def write_json(path: Path, value) -> None:
    if isinstance(value, list):
        lines = ",\n".join(json.dumps(item) for item in value)
        path.write_text(f"[\n{lines}\n]\n")
        return
    path.write_text(json.dumps(value) + "\n")


if __name__ == "__main__":
    main()
