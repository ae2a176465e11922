"""From a noted launch to exactly what Triton would compile for it at run time."""

import ast
import hashlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton.language as tl
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITCallable, create_function_from_signature

from benchmarks.ahead_of_time.targets import Target
from moe_mt.kernels._launch import Launch

__all__ = ["Compilation", "Identity", "functions_of", "source_hash", "specialise"]


Identity = tuple[str, str, str, str, int, int]
"""Kernel, target, tile, arguments, warps and stages."""


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """Everything that decides what the compiler is given, and so what comes out of it."""

    kernel: Any
    """A ``triton.JITFunction``."""

    target: Target
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    num_warps: int
    num_stages: int

    @property
    def kernel_name(self) -> str:
        """``file.function``, without what is the same for all kernels."""
        module = self.kernel.fn.__module__.removeprefix("moe_mt.kernels.")
        return f"{module}.{self.kernel.fn.__name__.strip('_').removesuffix('_kernel')}"

    @property
    def source(self) -> ASTSource:
        """What ``triton.compile`` takes."""
        return ASTSource(self.kernel, self.signature, self.constants, self.attributes)

    @property
    def options(self) -> dict[str, Any]:
        """How ``triton.compile`` is to compile it."""
        # Fused multiply-add is said in words because Triton 3.9 warns where it is left unsaid.
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }

    @property
    def tile(self) -> str:
        """The constants that the launcher chose: tile sizes and switches."""
        return " ".join(
            f"{parameter.name}={self.constants[(parameter.num,)]}"
            for parameter in self.kernel.params
            if parameter.is_constexpr
        )

    @property
    def arguments(self) -> str:
        """The type of every other argument, and what the compiler may assume of its value.

        ``/16`` is a multiple of 16 (an address in bytes), ``/2GB`` a tensor below 2 GB.
        """
        return " ".join(
            f"{parameter.name}:{self._assumed(parameter.num, parameter.name)}"
            for parameter in self.kernel.params
            if not parameter.is_constexpr
        )

    def _assumed(self, number: int, name: str) -> str:
        if (number,) in self.constants:
            return f"={self.constants[(number,)]}"
        known = {"tt.divisibility": "/16", "tt.pointer_range": "/2GB"}
        marks = [known[key] for key, _ in self.attributes.get((number,), ())]
        return self.signature[name] + "".join(marks)

    @property
    def identity(self) -> Identity:
        """What two rows must share to be the same compilation of, maybe, another source."""
        # An integer that is not named is what nearly all are: below 2^31, a multiple of 16.
        told = [told for told in self.arguments.split() if not told.endswith(":i32/16")]
        name, target = self.kernel_name, self.target.name
        return name, target, self.tile, " ".join(told), self.num_warps, self.num_stages


def specialise(launch: Launch, target: Target) -> Compilation:
    """Return what Triton compiles at run time for a launch on a GPU.

    Triton's own binder decides it: which integers become constants because they are 1, what is
    known to be a multiple of 16, what ``None`` stands for. A tensor on the meta device counts as
    aligned where its offset is, like one from an allocator that aligns.
    """
    kernel: Any = launch.kernel
    backend = make_backend(target.gpu)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    given = {**launch.arguments, **options, "enable_fp_fusion": True}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, others = bind(**given)
    _, signature, constants, attributes = kernel._pack_args(
        backend, dict(others), bound, specialisation, others
    )
    return Compilation(
        kernel=kernel,
        target=target,
        signature=signature,
        constants=constants,
        attributes=attributes,
        **options,
    )


def source_hash(kernel: Any) -> str:
    """Return a hash of a kernel and all that it calls, blind to comments and line numbers."""
    # Triton's own cache key would change with a line added anywhere above the kernel.
    text = "\n".join(_without_docstring(function) for function in functions_of(kernel))
    constants = sorted(
        f"{name}={value.value}"
        for function in functions_of(kernel)
        for name, value in _globals_of(function)
        if isinstance(value, tl.constexpr)
    )
    return hashlib.sha256("\n".join([text, *constants]).encode()).hexdigest()[:12]


def functions_of(kernel: Any) -> list[JITCallable]:
    """Return a kernel and the jit functions that it calls, directly or not."""
    found: dict[int, JITCallable] = {}
    waiting: list[JITCallable] = [kernel]
    while waiting:
        function = waiting.pop()
        if id(function) in found:
            continue
        found[id(function)] = function
        waiting += [v for _, v in _globals_of(function) if isinstance(v, JITCallable)]
    rest = [function for function in found.values() if function is not kernel]
    return [kernel, *sorted(rest, key=lambda function: function.fn.__qualname__)]


def _globals_of(function: JITCallable) -> Iterator[tuple[str, Any]]:
    """Yield what the names in a function stand for, where they are its module's or a module's."""
    closure = inspect.getclosurevars(function.fn)
    known = {**closure.globals, **closure.nonlocals}
    for node in ast.walk(function.parse()):
        if isinstance(node, ast.Name) and node.id in known:
            yield node.id, known[node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = known.get(node.value.id)
            if inspect.ismodule(owner) and not owner.__name__.startswith("triton."):
                yield node.attr, getattr(owner, node.attr, None)


def _without_docstring(function: JITCallable) -> str:
    [definition] = function.parse().body
    assert isinstance(definition, ast.FunctionDef)
    if ast.get_docstring(definition) is not None:
        definition.body = definition.body[1:] or [ast.Pass()]
    return ast.unparse(definition)
