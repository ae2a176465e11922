"""Run the benchmarks, record them, and compare: ``python -m benchmarks [PART ...]``."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmarks import record

HERE = Path(__file__).parent
DTYPES = ("float32", "bfloat16", "float16")
BUILD = HERE.parent / "build"
RAW = BUILD / "benchmarks.json"
REHEARSED = ("generation", "integrations", "moe", "ops")
ONLY_BY_NAME = ("generation", "integrations")
"""Parts that are measured where they are named: they take minutes, gigabytes of disk or memory."""


def main() -> int:
    """Run what was asked for; return pytest's exit code, or the recorder's."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parts = sorted({path.parent.name for path in HERE.glob("*/bench_*.py")})
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help=f"of {', '.join(parts)}; all but {', '.join(ONLY_BY_NAME)}",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--dtype", choices=DTYPES, help="float32 on the CPU and bfloat16 on a GPU where unset"
    )
    parser.add_argument("--commit", help="the commit measured, for a copy without its history")
    parser.add_argument("-k", dest="expression", help="measure only what matches, as in pytest")
    parser.add_argument(
        "--results", type=Path, help="folder to write to; benchmarks/results where unset"
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="run what a GPU would, on toy shapes in Triton's interpreter; records no figures",
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 if something was lost")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(parts):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; choose from {parts}")
    if options.rehearse and (options.device == "cuda" or set(options.parts) - set(REHEARSED)):
        parser.error(f"--rehearse is for the CPU, and for the parts {', '.join(REHEARSED)}")
    default = REHEARSED if options.rehearse else [p for p in parts if p not in ONLY_BY_NAME]
    results = options.results or (BUILD / "rehearsal" if options.rehearse else record.RESULTS)
    RAW.parent.mkdir(parents=True, exist_ok=True)
    RAW.unlink(missing_ok=True)
    arguments = _pytest_arguments(options, options.parts or [*default])
    command = [sys.executable, "-m", "pytest", *arguments]
    interpreted = {"TRITON_INTERPRET": "1"} if options.rehearse else {}
    environment = {**os.environ, **interpreted}
    failed = subprocess.run(command, cwd=HERE.parent, env=environment, check=False).returncode
    if not RAW.exists() or not RAW.stat().st_size:
        return failed or 1
    lost = record.main(
        [str(RAW), "--results", str(results), *(["--strict"] if options.strict else [])]
    )
    return failed or lost


def _pytest_arguments(options: argparse.Namespace, parts: list[str]) -> list[str]:
    given = {"--device": options.device, "--dtype": options.dtype, "--commit": options.commit}
    return [
        *(str(HERE / part) for part in parts),
        *("-o", "python_files=bench_*.py", "-o", "addopts=", "-p", "no:cacheprovider", "-rs", "-q"),
        *("-o", "filterwarnings=default"),  # a peer's deprecations are no reason not to measure
        "--benchmark-timer=benchmarks.timing.synchronized",
        "--benchmark-disable-gc",
        "--benchmark-columns=median,iqr,rounds",
        f"--benchmark-json={RAW}",
        *(part for name, value in given.items() if value for part in (name, value)),
        *(("--rehearse",) if options.rehearse else ()),
        *(("-k", options.expression) if options.expression else ()),
    ]


if __name__ == "__main__":
    sys.exit(main())
