"""Compile every kernel for GPUs that are not here, and read what the compilers made of it."""
