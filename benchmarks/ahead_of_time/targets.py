"""The GPUs that kernels are compiled for."""

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

from moe_mt.kernels._launch import Accelerator

__all__ = ["ALWAYS", "TARGETS", "Target"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """One kind of GPU, and what a program on it may use."""

    name: str
    gpu: GPUTarget
    multiprocessors: int
    shared_limit: int
    """Bytes of shared memory that one program may take."""

    matrix: str
    """How the mnemonics of its matrix unit begin."""

    @property
    def accelerator(self) -> Accelerator:
        """What a launcher is told of it."""
        return Accelerator(arch=self.name, multiprocessors=self.multiprocessors)


TARGETS = {
    target.name: target
    for target in (
        Target(  # A100
            name="sm_80",
            gpu=GPUTarget("cuda", 80, 32),
            multiprocessors=108,
            shared_limit=166_912,
            matrix="HMMA",
        ),
        Target(  # H100, H200
            name="sm_90",
            gpu=GPUTarget("cuda", 90, 32),
            multiprocessors=132,
            shared_limit=232_448,
            matrix="HGMMA",
        ),
        Target(  # B200
            name="sm_100",
            gpu=GPUTarget("cuda", 100, 32),
            multiprocessors=148,
            shared_limit=232_448,
            matrix="UTCHMMA",
        ),
        Target(  # MI300X
            name="gfx942",
            gpu=GPUTarget("hip", "gfx942", 64),
            multiprocessors=304,
            shared_limit=65_536,
            matrix="v_mfma",
        ),
    )
}

ALWAYS = "sm_90"
"""The target that is compiled even where only what changed is asked for: the one tuned for."""
