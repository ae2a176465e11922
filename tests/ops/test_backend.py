"""Where the implementation is chosen, and what every operator promises."""

import os
import subprocess
import sys

import pytest
import torch

from moe_mt.ops import backend_for, combine, grouped_mm, use_backend
from moe_mt.ops.backend import use_triton


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "0", **environment},
    )


def test_a_cpu_takes_the_definition():
    assert not use_triton(torch.ones(1)) or os.environ.get("TRITON_INTERPRET") == "1"


def test_the_environment_chooses_for_a_process():
    code = "import torch, moe_mt.ops as o; print(o.backend_for(torch.device('cpu')))"
    assert run_python(code).stdout == "eager PyTorch\n"
    assert (
        "none: backend 'triton' was asked for" in run_python(code, MOE_MT_BACKEND="triton").stdout
    )
    both = {"MOE_MT_BACKEND": "triton", "TRITON_INTERPRET": "1"}
    assert run_python(code, **both).stdout == "Triton kernels, interpreted\n"


def test_an_unknown_backend_in_the_environment_is_named():
    code = "import torch, moe_mt.ops as o; o.router_logits(torch.ones(1, 2), torch.ones(3, 2))"
    failed = run_python(code, MOE_MT_BACKEND="cuda")
    assert failed.returncode == 1
    assert "MOE_MT_BACKEND 'cuda' is unknown; choose from ('auto', 'eager'" in failed.stderr


@pytest.mark.triton
def test_blocks_may_be_nested(kernel_device):
    outside = backend_for(kernel_device)
    with use_backend("eager"):
        with use_backend("auto"):
            assert backend_for(kernel_device) == outside != "eager PyTorch"
        assert backend_for(kernel_device) == "eager PyTorch"


@pytest.mark.triton
def test_a_second_derivative_is_refused_and_not_zero(kernel_device):
    rows = torch.arange(8, device=kernel_device).view(4, 2)
    gates = torch.rand(4, 2, device=kernel_device).requires_grad_()
    expert_rows = torch.randn(8, 4, device=kernel_device).requires_grad_()
    loss = combine(expert_rows, rows, gates).square().sum()
    (grad,) = torch.autograd.grad(loss, gates, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"combine_backward has no gradient.*'eager'"):
        torch.autograd.grad(grad.sum(), expert_rows)


@pytest.mark.triton
def test_layouts_of_inputs_and_of_their_gradients_do_not_matter(kernel_device):
    # Dense but not row by row: such a tensor's like has its strides too.
    x, weight, bias = (
        torch.randn(*s, device=kernel_device) for s in ((7, 32), (2, 24, 32), (2, 24))
    )
    offsets = torch.tensor([0, 3, 7], device=kernel_device)
    turned = [t.mT.contiguous().mT for t in (x, weight, bias)]
    assert not any(t.is_contiguous() for t in turned)
    results = []
    for tensors in ((x, weight, bias), turned):
        one, two, three = (t.detach().requires_grad_() for t in tensors)
        out = grouped_mm(one, two, offsets, bias=three)
        seed = torch.arange(out.numel(), device=kernel_device).view(out.shape) * 1e-2
        results.append((out, *torch.autograd.grad(out, (one, two, three), seed.mT.contiguous().mT)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
