"""What every benchmark shares: device, dtype, and the facts that stand in each row."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.floors import Ceilings, measure_ceilings
from benchmarks.graphs import Captured, measure
from benchmarks.signature import build_signature

ON_A_GPU = ("bench_generate_54b.py", "bench_layer_graph.py")
ON_A_CPU = ("bench_generate.py",)
NOT_REHEARSED = ("bench_layer.py", "bench_translate.py", *ON_A_CPU)
"""Files whose every line also runs on a CPU."""

CEILINGS = pytest.StashKey[Ceilings]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("moe_mt benchmarks")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where to measure")
    group.addoption("--dtype", help="float32 on the CPU and bfloat16 on a GPU where unset")
    group.addoption("--commit", help="the commit measured, for a copy without its history")
    group.addoption(
        "--rehearse", action="store_true", help="toy shapes, interpreted kernels: no figures"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.getoption("--rehearse"):
        return True if collection_path.name in NOT_REHEARSED else None
    elsewhere = ON_A_GPU if config.getoption("--device") == "cpu" else ON_A_CPU
    return True if collection_path.name in elsewhere else None


def pytest_report_header(config: pytest.Config) -> str:
    return f"clocks before: {_clocks()}"


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    terminalreporter.write_line(f"clocks after: {_clocks()}")
    if ceilings := config.stash.get(CEILINGS, None):
        terminalreporter.write_line(
            f"ceilings: copy {ceilings.bytes_per_s / 1e9:.4g} GB/s, "
            f"product {ceilings.flops_per_s / 1e12:.4g} TFLOP/s"
        )


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


@pytest.fixture(scope="session")
def rehearsal(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--rehearse")


@pytest.fixture(scope="session")
def ceilings(
    request: pytest.FixtureRequest, device: torch.device, dtype: torch.dtype, rehearsal: bool
) -> Ceilings | None:
    """Return what the device reaches at best; ``None`` on a CPU, whose caches exceed its memory."""
    if device.type == "cpu" and not rehearsal:
        return None
    sizes = {"copy_bytes": 2**16, "side": 64, "rounds": 1} if rehearsal else {}
    with torch.inference_mode():
        found = measure_ceilings(device, dtype, **sizes)
    request.config.stash[CEILINGS] = found
    return found


@pytest.fixture(scope="session")
def clock(rehearsal: bool) -> Callable[[Captured], dict]:
    """Return what times captured calls: once in a rehearsal, which is about no time."""
    return partial(measure, seconds=0.5, rounds=1 if rehearsal else None)


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


def _clocks() -> str:
    """Return what the GPU's clocks are at, in the words of its maker's tool."""
    if not torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return "unknown"
    fields = "--query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw"
    answer = subprocess.run(
        ["nvidia-smi", fields, "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or "unknown"
