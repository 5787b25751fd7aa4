"""Sparse attention methods side by side on one model: what each reads, and what the output is worth. Needs transformers."""
