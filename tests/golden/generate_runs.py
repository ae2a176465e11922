"""The calls of ``generate`` whose goldens are in ``generate/``; shared by their maker and tests.

Each run is its name, the keywords of the call, and what cannot be written as JSON by its name in
``CALLABLES``. Every run but those that say otherwise reads ``SOURCES`` and generates 13 tokens.
"""

import torch

PAD, EOS, LANGUAGE, LIMIT = 1, 2, 7, 13

SOURCES = [
    [34, 28, 39, 45, 33, 21, 34, 22, EOS],
    [34, 49, 49, 34, 21, EOS],
    [34, 32, 32, EOS],
]

DENSE, SPARSE = "dense_3_1", "moe_4_experts_bias"


def even_tokens_or_end(sentence, ids):
    """Allow even tokens; for the last sentence those alone that are below 20."""
    assert ids.dim() == 1
    return [EOS, *range(4, 20 if sentence == 2 else 64, 2)]


def prefer_high_tokens(ids, scores):
    return scores + torch.linspace(0, 1.5, scores.shape[-1])


def end_at_nine(ids, scores):
    """Say for all rows at once whether they are long enough, as a bool."""
    return ids.shape[1] >= 9


def end_at_tokens_above_40(ids, scores):
    """Say it row by row."""
    return (ids[:, -1] > 40) & (ids.shape[1] > 3)


CALLABLES = {
    "prefix_allowed_tokens_fn": {"even_tokens_or_end": even_tokens_or_end},
    "logits_processor": {"prefer_high_tokens": [prefer_high_tokens]},
    "stopping_criteria": {
        "end_at_nine": [end_at_nine],
        "end_at_tokens_above_40": [end_at_tokens_above_40],
    },
}

BEAMS = {"num_beams": 4}
TO_FRENCH = {"forced_bos_token_id": LANGUAGE}

SEARCHES = [
    ("greedy, plain", {}),
    ("greedy, to a language", TO_FRENCH),
    ("greedy, max_length", {"max_length": 9, "max_new_tokens": None}),
    ("greedy, nobody said how long", {"max_new_tokens": None}),
    ("greedy, max_length 2 and a language", TO_FRENCH | {"max_length": 2, "max_new_tokens": None}),
    ("beam 2", {"num_beams": 2}),
    ("beam 3, plain", {"num_beams": 3}),
    ("beam 4, to a language", BEAMS | TO_FRENCH),
    ("beam 4, 3 best", BEAMS | {"num_return_sequences": 3}),
    ("beam 4, early stopping", BEAMS | {"early_stopping": True}),
    ("beam 4, early stopping, 4 best", BEAMS | {"early_stopping": True, "num_return_sequences": 4}),
    ("beam 4, never", BEAMS | {"early_stopping": "never"}),
    ("beam 4, length penalty 0.5", BEAMS | {"length_penalty": 0.5}),
    ("beam 4, length penalty 2, never", BEAMS | {"length_penalty": 2.0, "early_stopping": "never"}),
    ("beam 4, length penalty -1", BEAMS | {"length_penalty": -1.0}),
    ("beam 5, 1 token", {"num_beams": 5, "max_new_tokens": 1, "num_return_sequences": 5}),
]

RULES = [
    ("sequence bias", {"sequence_bias": [[[11], 2.0], [[53, 53], -5.0], [[32, 21, 34], 1.5]]}),
    ("source repetition", {"encoder_repetition_penalty": 1.5}),
    ("repetition", {"repetition_penalty": 1.4}),
    ("no repeated bigram", {"no_repeat_ngram_size": 2}),
    ("no unigram of the source", {"encoder_no_repeat_ngram_size": 1}),
    ("no bigram of the source", {"encoder_no_repeat_ngram_size": 2}),
    ("bad words", {"bad_words_ids": [[45], [EOS], [53, 32, 53], [34, 34], [49, 40]]}),
    ("min_length", {"min_length": 11}),
    ("min_new_tokens", {"min_new_tokens": 6, "min_length": 12}),
    ("prefix function", {"prefix_allowed_tokens_fn": "even_tokens_or_end"}),
    ("forced end", {"forced_eos_token_id": EOS}),
    ("forced end, one of two", {"forced_eos_token_id": [40, EOS], "bad_words_ids": [[26]]}),
    ("invalid values", {"remove_invalid_values": True, "bad_words_ids": [[34]]}),
    ("decay", {"exponential_decay_length_penalty": [3, 1.3]}),
    ("suppressed", {"suppress_tokens": [53, 21, 49]}),
    ("suppressed at begin", {"begin_suppress_tokens": [32, 53, 13, 21, 49]}),
    (
        "suppressed at begin behind a language",
        TO_FRENCH | {"begin_suppress_tokens": [53, 49, 21]},
    ),
    ("renormalized", {"renormalize_logits": True, "suppress_tokens": [21, 34]}),
    ("own rule", {"logits_processor": "prefer_high_tokens"}),
    ("own criterion for all", {"stopping_criteria": "end_at_nine"}),
    ("own criterion by row", {"stopping_criteria": "end_at_tokens_above_40"}),
    ("two end marks", {"eos_token_id": [EOS, 34]}),
    ("no end mark", {"eos_token_id": None}),
    (
        "many rules",
        TO_FRENCH
        | {
            "repetition_penalty": 1.2,
            "no_repeat_ngram_size": 3,
            "bad_words_ids": [[53], [34, 11]],
            "min_length": 7,
            "logits_processor": "prefer_high_tokens",
            "renormalize_logits": True,
        },
    ),
]
"""Each both greedily and with beams."""

NOT_WITH_BEAMS = ("source repetition", "head masks", "a head mask across")
"""With beams transformers 4.57 mistakes rows for sentences, and repeats head masks by beam."""

PROMPT = [[EOS, LANGUAGE, 40], [EOS, LANGUAGE, 15], [EOS, LANGUAGE, 33]]

INPUTS = [
    ("prompts", {"decoder_input_ids": PROMPT}),
    ("prompts, one with another start", {"decoder_input_ids": [[9, 40], PROMPT[1][1:], [EOS, 33]]}),
    ("prompts without start", {"decoder_input_ids": [row[1:] for row in PROMPT]}),
    (
        "prompts, and suppressed at begin",
        TO_FRENCH | {"decoder_input_ids": PROMPT, "begin_suppress_tokens": [32, 53, 21, 49]},
    ),
    ("prompts, min_new_tokens", {"decoder_input_ids": PROMPT, "min_new_tokens": 8}),
    (
        "prompts with hidden positions",
        {"decoder_input_ids": PROMPT, "decoder_attention_mask": [[1, 1, 1], [1, 0, 1], [1, 1, 0]]},
    ),
    (
        "hidden positions, start put before",
        {
            "decoder_input_ids": [row[1:] for row in PROMPT],
            "decoder_attention_mask": [[1, 1], [0, 1], [1, 1]],
        },
    ),
    ("a start for each sentence", {"decoder_start_token_id": [EOS, 5, 9]}),
    ("no mask given", {"attention_mask": None}),
    ("nothing given", {"input_ids": None, "attention_mask": None}),
    ("no cache", {"use_cache": False}),
    ("head masks", {"head_mask": "encoder", "decoder_head_mask": "decoder"}),
    ("a head mask across", {"cross_attn_head_mask": "decoder"}),
]
"""Each both greedily and with beams."""

HEAD_MASKS = {
    "encoder": [[1.0, 0.0, 1.0, 0.5], [1.0, 1.0, 0.0, 1.0], [0.5, 1.0, 1.0, 1.0]],
    "decoder": [[0.0, 1.0], [1.0, 0.25]],
}
"""A factor for each head; a model takes as many rows as it has layers."""

SAMPLES = [
    ("sampling", {"top_k": 0}),
    ("sampling, 3 of each", {"num_return_sequences": 3}),
    ("top_k", {"top_k": 5}),
    ("top_p", {"top_k": 0, "top_p": 0.7}),
    ("min_p", {"top_k": 0, "min_p": 0.2}),
    ("typical_p", {"top_k": 0, "typical_p": 0.6}),
    ("epsilon_cutoff", {"top_k": 0, "epsilon_cutoff": 0.02}),
    ("eta_cutoff", {"top_k": 0, "eta_cutoff": 0.1}),
    ("temperature", {"temperature": 1.7}),
    (
        "all of them",
        {
            "temperature": 1.5,
            "top_k": 30,
            "top_p": 0.9,
            "min_p": 0.02,
            "typical_p": 0.9,
            "epsilon_cutoff": 0.01,
            "eta_cutoff": 0.02,
            "renormalize_logits": True,
        },
    ),
    ("two end marks", {"eos_token_id": [EOS, 34], "top_p": 0.5}),
]
"""Each both with one beam and, where it can be, with three."""


def all_runs(model):
    """Return every run of a model as (name, options).

    Rules do not know what model it is. With experts, transformers 4.57 lets hidden positions of
    the last sentence keep tokens of others from their experts.
    """
    runs = list(SEARCHES)
    for name, options in [*RULES, *INPUTS]:
        if model == SPARSE and (name in dict(RULES) or "decoder_attention_mask" in options):
            continue
        runs.append((f"{name}, greedy", options))
        if name not in NOT_WITH_BEAMS:
            runs.append((f"{name}, beam 3", {"num_beams": 3} | options))
    for seed, (name, options) in enumerate(SAMPLES):
        options = {"do_sample": True, "seed": seed} | options
        runs.append((f"{name}, sampled", options))
        runs.append((f"{name}, beam sampled", {"num_beams": 3} | options))
    return runs


SHOWN = [
    ("greedy", TO_FRENCH),
    ("greedy, no cache", {"use_cache": False}),
    ("greedy, prompts", {"decoder_input_ids": PROMPT}),
    ("beam 3, 2 best", TO_FRENCH | {"num_beams": 3, "num_return_sequences": 2}),
    ("beam 3, no cache", {"num_beams": 3, "use_cache": False}),
]
"""Runs of 5 tokens of which everything is returned."""


def shown_runs(model):
    """Return those of a model: with experts, those without a prompt and with a cache."""
    return SHOWN if model == DENSE else [SHOWN[0], SHOWN[3]]


def keywords(options, config):
    """Return the keywords of a run, with tensors and functions in their places."""
    layers = {"encoder": config.encoder_layers, "decoder": config.decoder_layers}
    width = max(map(len, SOURCES))
    rows = [row + [PAD] * (width - len(row)) for row in SOURCES]
    given = {"input_ids": torch.tensor(rows), "max_new_tokens": LIMIT}
    given["attention_mask"] = (given["input_ids"] != PAD).long()
    for name, value in options.items():
        if name in ("decoder_input_ids", "decoder_attention_mask"):
            value = torch.tensor(value)
        elif name.endswith("head_mask"):
            value = torch.tensor(HEAD_MASKS[value][: layers[value]])
        elif name in CALLABLES:
            value = CALLABLES[name][value]
        given[name] = value
    given.pop("seed", None)
    return given
