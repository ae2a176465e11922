import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory comes back as NaN, so that a row nobody wrote fails the test."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
