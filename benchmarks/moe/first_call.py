"""Time a layer's first call in a fresh process: ``python -m benchmarks.moe.first_call``.

Arguments: forward or backward, tokens, device, dtype, experts, d_model, ffn_dim.
"""

import json
import sys

import torch

from benchmarks.timing import synchronized
from moe_mt.moe import Experts, MoELayer, Top2Router


def main(arguments: list[str]) -> int:
    """Print the seconds as JSON."""
    direction, tokens, device, dtype, *sizes = arguments
    num_experts, d_model, ffn_dim = map(int, sizes)
    with torch.device(device):
        # A context with no allocation yet would be started, and counted, by the first call.
        x = torch.randn(int(tokens), d_model).to(getattr(torch, dtype)).requires_grad_()
        router = Top2Router(d_model, num_experts)
    with torch.device("meta"):
        experts = Experts(num_experts, d_model, ffn_dim).to(x.dtype)
    experts.to_empty(device=device)
    for weight in experts.parameters():
        torch.nn.init.uniform_(weight, -(d_model**-0.5), d_model**-0.5)
    layer = MoELayer(router, experts).eval()
    start = synchronized()
    with torch.set_grad_enabled(direction == "backward"):
        out = layer(x)[0]
        if direction == "backward":
            out.backward(torch.ones_like(out))
    seconds = synchronized() - start
    sys.stdout.write(json.dumps({"seconds": seconds}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
