"""How many experts a layer needs on average: ``python -m benchmarks.generation.experts_hit``.

Arguments: a folder with a checkpoint, then batches and beams as ``8x4``. In a process of its own,
since the model is large; what it prints, as JSON, is kept beside the checkpoint, since the weights
alone decide it.
"""

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.generation.shapes import NEW_TOKENS, Decoding, draw_sources
from moe_mt.checkpoints import load
from moe_mt.generation import GenerationConfig, generate
from moe_mt.models import Seq2SeqTransformer
from moe_mt.moe import MoELayer

__all__ = ["Hit", "count_experts", "counted", "experts_hit"]

Hit = dict[str, float]
"""``"encoder"`` and ``"decoder"`` → experts that a sparse layer needs in a call, on average."""

ROOT = Path(__file__).parents[2]
KEPT = "experts_hit.json"


def experts_hit(folder: Path, decodings: Sequence[Decoding]) -> dict[str, Hit]:
    """Return the experts hit at each batch and beam, counted once per checkpoint."""
    path = folder / KEPT
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    missing = [str(decoding) for decoding in decodings if str(decoding) not in known]
    if missing:
        command = [sys.executable, "-m", "benchmarks.generation.experts_hit", str(folder), *missing]
        done = subprocess.run(
            command, cwd=ROOT, check=True, stdout=subprocess.PIPE, encoding="utf-8"
        )
        known |= json.loads(done.stdout.splitlines()[-1])
        path.write_text(json.dumps(known), encoding="utf-8")
    return known


@contextmanager
def counted(model: nn.Module) -> Iterator[Hit]:
    """Count, in every call of a sparse layer until the end of ``with``, experts that get a token.

    Yields:
        What is empty until that end.
    """
    counts: dict[str, list[int]] = defaultdict(list)
    found: Hit = {}

    def count(side: str, _module: nn.Module, _inputs: object, output: Any) -> None:
        counts[side].append(output[1].expert_ids.unique().numel())

    hooks = [
        module.register_forward_hook(partial(count, name.partition(".")[0]))
        for name, module in model.named_modules()
        if isinstance(module, MoELayer)
    ]
    yield found
    for hook in hooks:
        hook.remove()
    found |= {side: sum(numbers) / len(numbers) for side, numbers in counts.items()}


@torch.inference_mode()
def count_experts(model: Seq2SeqTransformer, decoding: Decoding) -> Hit:
    """Generate once and count the experts that got a token."""
    sources = torch.tensor(draw_sources(model.config, decoding.batch))
    with counted(model) as hit:
        generate(
            model,
            sources,
            torch.ones_like(sources, dtype=torch.bool),
            GenerationConfig(num_beams=decoding.beam, min_new_tokens=NEW_TOKENS),
            forced_tokens=[[]] * decoding.batch,
            max_new_tokens=[NEW_TOKENS] * decoding.batch,
        )
    return hit


def main(arguments: list[str]) -> int:
    """Print the experts hit at every batch and beam, as JSON."""
    folder, *decodings = arguments
    model = load(folder, device="cpu", dtype=torch.float32)
    found = {text: count_experts(model, Decoding(*map(int, text.split("x")))) for text in decodings}
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
