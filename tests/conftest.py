"""What every test shares: one thread, fresh memory that is poison, and the opt-in real weights."""

import os

import pytest
import torch


def pytest_addoption(parser):
    group = parser.getgroup("published weights")
    group.addoption("--model", help="hub id or folder for -m real_weights")
    group.addoption("--device", default="auto", help="as from_pretrained takes it")
    group.addoption("--dtype", default="auto", help="as from_pretrained takes it")


def pytest_configure(config):
    # The models here are so small that a second thread only makes runs differ in time.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded_and_poisoned():
    """Seed torch, and let ``torch.empty`` return NaN: a row nobody wrote fails its test."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def kernel_device():
    """Return where kernels run: the GPU, or the CPU under Triton's interpreter."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.fail("tests of kernels need TRITON_INTERPRET=1 or a GPU: make test, make test-gpu")
