"""Benchmarks of whole translations."""
