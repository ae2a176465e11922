"""Print the seconds that a layer's first calls take: with one token, then with many.

    python -m tests.gpu.first_call cuda FULL 1024

In a process of its own, where nothing has been compiled or loaded yet.
"""

import sys
import time

import torch

from tests.gpu import problem


def main(device, size, count):
    layer = problem.make_layer(size, device)
    x = problem.leading_tokens(layer, size, count)
    _wait(device)
    start = time.perf_counter()
    with torch.no_grad():
        layer(x[:1])
    _wait(device)
    between = time.perf_counter()
    with torch.no_grad():
        layer(x)
    _wait(device)
    end = time.perf_counter()
    sys.stdout.write(f"{between - start} {end - between}\n")


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(torch.device(sys.argv[1]), getattr(problem, sys.argv[2]), int(sys.argv[3]))
