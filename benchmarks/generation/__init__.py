"""Benchmarks of generation: token ids in, token ids out."""
