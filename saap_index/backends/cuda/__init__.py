"""Kernels of `cuda/` on a GPU: a module per kernel, the runtime that compiles and launches, the session of a batch."""
