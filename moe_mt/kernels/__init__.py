"""Triton and nothing else: jit functions and their launchers.

A kernel file holds tensors in, tensors out: no checks, no autograd, no choice of implementation.
Those belong to the operation of the same name in ``moe_mt.ops``, which is the only caller. Files
that begin with an underscore are no operations: they serve them all, or the tuner. This door
imports nothing, so that the package works where Triton does not exist.
"""
