"""A layer's KV cache as the operations on pages take it: see backend.py. Knows no vLLM."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.paged import Pages
from ..errors import LayoutError


def pages_of(kv_cache: Tensor, d: int) -> Pages:
    """Views of a layer's cache (B, h, N, d + e): keys, values, and list numbers in the tails of its pages.

    Raises LayoutError if pages have no tail, or their rows are not side by side in front of it.
    """
    blocks, h, size, width = kv_cache.shape
    item, (page, head, token, last) = kv_cache.element_size(), kv_cache.stride()
    inside = {(size * width, width), (width, h * width)}  # heads first, or tokens first
    if last != 1 or (head, token) not in inside or page * item < h * size * (width * item + 1):
        raise LayoutError(
            f"kv_cache: expected pages of rows (h, N, d + e) = {(h, size, width)} in either order and a tail of {h * size} "
            f"bytes, got strides {kv_cache.stride()} of {item} bytes"
        )
    tail = (kv_cache.storage_offset() + h * size * width) * item
    lists = torch.empty(0, dtype=torch.uint8, device=kv_cache.device)
    lists.set_(kv_cache.untyped_storage(), tail, (blocks, h, size), (page * item, size, 1))
    return Pages(kv_cache[..., :d], kv_cache[..., d:], lists)
