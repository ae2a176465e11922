"""One system in a process of its own: ``python -m benchmarks.generation.worker``.

Arguments: the program, its dtype, the folder of the model, threads. Requests come as lines of JSON
and are answered in lines of JSON: first that everything is imported, then, when asked to load, the
seconds that this took, then for every batch the seconds and the tokens.

What only one program needs is imported only for it, so that its memory is its own.
"""

import json
import sys
from collections.abc import Callable
from time import perf_counter

from benchmarks.process import answering

Tokens = list[list[int]]

Generate = Callable[[Tokens, int, int], Tokens]
"""Sources, beams and new tokens → the best translation of every source."""


def moe_mt(dtype: str, folder: str, threads: int) -> Callable[[], Generate]:
    """Return what loads this package's model."""
    import torch

    from moe_mt.checkpoints import load
    from moe_mt.generation import GenerationConfig, generate

    torch.set_num_threads(threads)

    def start() -> Generate:
        model = load(folder, device="cpu", dtype=torch.float32, pack=dtype)

        @torch.inference_mode()
        def run(sources: Tokens, beams: int, new_tokens: int) -> Tokens:
            tokens = torch.tensor(sources)
            found = generate(
                model,
                tokens,
                torch.ones_like(tokens, dtype=torch.bool),
                GenerationConfig(num_beams=beams, min_new_tokens=new_tokens),
                forced_tokens=[[]] * len(sources),
                max_new_tokens=[new_tokens] * len(sources),
            )
            return [list(hypotheses[0].tokens) for hypotheses in found]

        return run

    return start


def transformers(dtype: str, folder: str, threads: int) -> Callable[[], Generate]:
    """Return what loads the model of transformers."""
    import torch
    from transformers import AutoModelForSeq2SeqLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)

    def start() -> Generate:
        model = AutoModelForSeq2SeqLM.from_pretrained(folder, torch_dtype=getattr(torch, dtype))
        model.eval()

        @torch.inference_mode()
        def run(sources: Tokens, beams: int, new_tokens: int) -> Tokens:
            tokens = torch.tensor(sources)
            found = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                num_beams=beams,
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
            )
            return found[:, 1:].tolist()  # without the decoder's start

        return run

    return start


def ctranslate2(dtype: str, folder: str, threads: int) -> Callable[[], Generate]:
    """Return what loads a model of CTranslate2, whose files say how it is quantized."""
    from ctranslate2 import Translator

    def start() -> Generate:
        model = Translator(folder, device="cpu", compute_type=dtype, intra_threads=threads)

        def run(sources: Tokens, beams: int, new_tokens: int) -> Tokens:
            found = model.translate_batch(
                [[str(token) for token in source] for source in sources],
                beam_size=beams,
                min_decoding_length=new_tokens,
                max_decoding_length=new_tokens,
            )
            return [[int(token) for token in result.hypotheses[0]] for result in found]

        return run

    return start


PROGRAMS = {"moe_mt": moe_mt, "transformers": transformers, "ctranslate2": ctranslate2}


def main(arguments: list[str]) -> int:
    """Answer requests until there are no more."""
    program, dtype, folder, threads = arguments
    answer = answering()
    start = PROGRAMS[program](dtype, folder, int(threads))
    answer({"imported": True})
    sys.stdin.readline()
    began = perf_counter()
    run = start()
    answer({"seconds": perf_counter() - began})
    for line in sys.stdin:
        request = json.loads(line)
        began = perf_counter()
        tokens = run(request["sources"], request["beams"], request["new_tokens"])
        answer({"seconds": perf_counter() - began, "tokens": tokens})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
