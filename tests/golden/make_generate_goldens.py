"""Make the goldens of the documented ``generate`` with transformers 4.57.1.

    .venv-peers/bin/python tests/golden/make_generate_goldens.py

The models are those of ``models/``, the calls those of ``generate_runs.py``. For each model:

- ``generate/<model>.json``: sequences of every run, of beam search their scores and beam indices;
- ``generate/<model>.safetensors``: of some runs everything that can be returned.

In evaluation transformers 4.57 still draws a number per layer for layer drop, on the CPU. Here it
draws none, so that samples depend on what they are drawn from alone.
"""

import json
import logging
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from generate_runs import DENSE, RULES, SPARSE, all_runs, keywords, shown_runs
from safetensors.torch import save_file
from transformers import AutoModelForSeq2SeqLM

HERE = Path(__file__).parent
VERSION = "4.57.1"
SHOWN_LIMIT = 5

logger = logging.getLogger("goldens")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.logging.set_verbosity_error()
    if transformers.__version__ != VERSION:
        sys.exit(f"these goldens need transformers {VERSION}, found {transformers.__version__}")
    torch.set_num_threads(1)
    folder = HERE / "generate"
    folder.mkdir(exist_ok=True)
    for name in (DENSE, SPARSE):
        model = AutoModelForSeq2SeqLM.from_pretrained(
            HERE / "models" / name, attn_implementation="eager"
        ).eval()
        runs = [searched(name, model, title, options) for title, options in all_runs(name)]
        if name == DENSE:
            check_that_rules_matter(runs)
        lines = ",\n".join(json.dumps(run) for run in runs)
        (folder / f"{name}.json").write_text(f"[\n{lines}\n]\n")
        tensors = {}
        for title, options in shown_runs(name):
            tensors |= {f"{title}/{key}": value for key, value in shown(model, options).items()}
        save_file(tensors, folder / f"{name}.safetensors")
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    versions["script"] = Path(__file__).name
    (folder / "versions.json").write_text(json.dumps(versions) + "\n")


def generate(model, options, **more):
    torch.manual_seed(options.get("seed", 0))
    with patch("torch.rand", lambda *size, **_: torch.zeros(*size)):
        return model.generate(
            **keywords(options, model.config) | more,
            return_dict_in_generate=True,
            output_scores=True,
        )


def searched(name, model, title, options) -> dict:
    found = generate(model, options)
    # A golden that sits on a near-tie would test rounding, not the algorithm. The published
    # NLLB-MoE cannot read several tokens at once in float64.
    if model.config.model_type == "m2m_100" or not options.keys() & {
        "decoder_input_ids",
        "use_cache",
    }:
        exact = generate(model.double(), options)
        model.float()
        if found.sequences.tolist() != exact.sequences.tolist():
            sys.exit(f"{name}: {title!r} differs in float64; change the run")
    run = {"name": title, "sequences": found.sequences.tolist()}
    if "beam_indices" in found:
        run["beam_indices"] = found.beam_indices.tolist()
        run["sequences_scores"] = found.sequences_scores.tolist()
    logger.info("%s: %s: %s", name, title, run["sequences"][0])
    return run


def check_that_rules_matter(runs) -> None:
    """Refuse rules that change nothing."""
    found = {run["name"]: run["sequences"] for run in runs}
    for name, _ in RULES:
        for search in ("greedy", "beam 3"):
            changed = found.get(f"{name}, {search}")
            if changed == found[f"{search}, plain"]:
                sys.exit(f"{name!r} changes nothing in {search}; change the run")


def shown(model, options) -> dict:
    found = generate(
        model,
        options,
        max_new_tokens=SHOWN_LIMIT,
        output_logits=True,
        output_attentions=True,
        output_hidden_states=True,
    )
    tensors = {}
    for key, value in found.items():
        if key == "past_key_values":
            value = value.to_legacy_cache()
        tensors |= dict(flat(key, value))
    return {key: value.contiguous().clone() for key, value in tensors.items()}


def flat(key, value):
    """Yield every tensor of nested tuples with its place."""
    if isinstance(value, torch.Tensor):
        yield key, value
        return
    for index, item in enumerate(value):
        yield from flat(f"{key}.{index}", item)


if __name__ == "__main__":
    main()
