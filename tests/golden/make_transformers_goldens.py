"""Make the goldens of patched models with transformers 4.57.1, which computes them right.

    .venv-peers/bin/python tests/golden/make_transformers_goldens.py

``transformers/<case>.safetensors`` holds what the tiny models of ``tests/integrations/families.py``
make of its inputs: logits in evaluation, tokens by greedy and by beam search, and, with nothing
random, the loss with the gradients of the first sparse layer. Weights are drawn anew from a seed.
"""

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

HERE = Path(__file__).parent
VERSION = "4.57.1"
sys.path.insert(0, str(HERE.parents[1]))

from tests.integrations.families import GOLDEN_CASES, golden_tensors, make  # noqa: E402


def main() -> None:
    """Write one file for each case."""
    if transformers.__version__ != VERSION:
        raise SystemExit(f"goldens are made with transformers {VERSION}")
    folder = HERE / "transformers"
    folder.mkdir(exist_ok=True)
    metadata = {"transformers": transformers.__version__, "torch": torch.__version__}
    for name, (family, settings) in GOLDEN_CASES.items():
        tensors = golden_tensors(make(family, **settings), family)
        save_file(tensors, folder / f"{name}.safetensors", metadata=metadata)


if __name__ == "__main__":
    main()
