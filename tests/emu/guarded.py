"""Tensors behind which memory ends: one byte too far is a fault, and the emulator names the line."""

from __future__ import annotations

import ctypes
import mmap
import weakref

import numpy as np
import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def guarded(tensor: Tensor, before: bool = False) -> Tensor:
    """A contiguous copy whose end lies at the end of a page that is followed by no memory; with ``before`` it starts after such
    a page. The alignment of its start is that of its size, so sizes are multiples of 16 bytes where kernels read vectors."""
    if tensor.numel() == 0:
        return tensor.clone()
    page = mmap.PAGESIZE
    size = tensor.numel() * tensor.element_size()
    inner = -(-size // page) * page
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    base = _libc.mmap(None, inner + 2 * page, 0, flags, -1, 0)
    if base == ctypes.c_void_p(-1).value or _libc.mprotect(base + page, inner, mmap.PROT_READ | mmap.PROT_WRITE):
        raise OSError(ctypes.get_errno(), "mmap")
    first = base + page + (0 if before else inner - size)
    chars = (ctypes.c_char * size).from_address(first)
    weakref.finalize(chars, _libc.munmap, base, inner + 2 * page)
    array = np.frombuffer(chars, np.uint8)
    result = torch.from_numpy(array).view(tensor.dtype).view(tensor.shape)
    return result.copy_(tensor)
