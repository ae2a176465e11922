"""What only a GPU has (graphs, streams, a check for hidden synchronisation), around any call.

On a CPU each is the call itself, so that the interpreter runs the same tests.
"""

import contextlib

import torch

__all__ = ["behind_a_long_wait", "captured", "compiled", "no_synchronisation"]


def captured(function, *inputs):
    """Return ``function`` as the replay of one graph; where there are none, itself.

    The replay copies its arguments to where the graph reads, and its results from where it writes.
    """
    if not inputs[0].is_cuda:
        return function
    static = [x.clone() for x in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles, and loads what is loaded at the first launch
            function(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function(*static)

    def replay(*inputs):
        for place, x in zip(static, inputs, strict=True):
            place.copy_(x)
        graph.replay()
        return tuple(result.clone() for result in results)

    return replay


@contextlib.contextmanager
def no_synchronisation(device):
    """Make the host fail where it waits for the GPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def compiled(module, device, **options):
    """Return the module through PyTorch's compiler: its own code generator is for GPUs here."""
    torch._dynamo.reset()
    if device.type != "cuda":
        options = {"backend": "aot_eager"}
    return torch.compile(module, fullgraph=True, **options)


@contextlib.contextmanager
def behind_a_long_wait(device):
    """Work on another stream, which is busy for a while before it does anything."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # Some 100 ms: launches elsewhere would be long over.
        yield
    torch.cuda.current_stream().wait_stream(stream)
