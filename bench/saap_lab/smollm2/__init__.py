"""The demo's data: real text, a small model's keys and queries, selections to compare with, and what is measured on them.

Nothing here is needed to use an index; the modules import torch, and only on use transformers or FAISS.
"""
