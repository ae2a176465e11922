"""Benchmarks of layers of transformers that compute with this package."""
