"""What every benchmark shares: device, dtype, and the facts that stand in each row."""

from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.signature import build_signature


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("moe_mt benchmarks")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where to measure")
    group.addoption("--dtype", help="float32 on the CPU and bfloat16 on a GPU where unset")
    group.addoption("--commit", help="the commit measured, for a copy without its history")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: PyTorch sees no GPU here; use --device cpu")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def dtype(request: pytest.FixtureRequest, device: torch.device) -> torch.dtype:
    name = request.config.getoption("--dtype")
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


@pytest.fixture
def sign(
    request: pytest.FixtureRequest, benchmark, device: torch.device, dtype: torch.dtype
) -> Callable[..., None]:
    """Return a function that writes a row's signature: ``sign(model, peer=None, **sizes)``."""

    def write(model: str, peer: str | None = None, **sizes: object) -> None:
        fields = {"model": model, "dtype": str(dtype).removeprefix("torch."), **sizes}
        commit = request.config.getoption("--commit")
        benchmark.extra_info["signature"] = build_signature(
            fields, device, commit=commit, peer=peer
        )

    return write


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield
