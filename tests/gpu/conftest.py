import pytest
import torch


@pytest.fixture(autouse=True)
def memory_is_given_back():
    """Let the next test have the memory of this one."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
