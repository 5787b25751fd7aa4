"""Launches cuda/selftest.cu: each primitive of the kernels on given words, to compare a device with the CPU bodies."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .launch import CLUSTERS, Launch, Runtime

FILE = "selftest.cu"
THREADS, SHARED_BYTES = 64, 4096
PARAMS = np.dtype([("in", np.uint64), ("out", np.uint64), ("flags", np.uint64), ("n", np.int32)], align=True)

CLUSTER, RELAYS = 4, 12
"""Blocks of a cluster, where the device has clusters; launches in a row."""

FAMILIES = ("convert", "math", "copy", "matrix", "mma", "warp", "order", "cluster", "relay")
CONFIGURATIONS = tuple((FILE, f"saap_selftest_{family}", dict[str, int]()) for family in FAMILIES)


def words_out(family: str, n: int) -> int:
    """Size of the result for n words of input, of `order` its workspace included."""
    blocks = -(-n // THREADS)
    sizes = {
        "convert": 9 * n, "math": 4 * n, "copy": 9 * n // 4, "matrix": 288, "mma": 256, "warp": 16 * n, "order": 3 + blocks,
        "cluster": 4 * n, "relay": RELAYS * n,
    }
    return sizes[family]


def run(runtime: Runtime, family: str, words: Tensor, out: Tensor, flags: Tensor) -> None:
    """words, out, flags : int32, on the device; out of `words_out` elements, flags of n / 64 + 2; out and flags zero.

    What a family makes of how many words: cuda/selftest.cu.
    """
    assert words.dtype == out.dtype == flags.dtype == torch.int32 and out.numel() == words_out(family, words.numel())
    params = np.zeros((), PARAMS)
    params["in"], params["out"], params["flags"] = words.data_ptr(), out.data_ptr(), flags.data_ptr()
    params["n"] = words.numel()
    blocks = -(-words.numel() // THREADS) if family in ("order", "cluster", "relay") else 1
    kernel, able = runtime.kernel(FILE, f"saap_selftest_{family}", {}), runtime.capability >= CLUSTERS
    if family != "relay":
        cluster = CLUSTER if family == "cluster" and able else 1
        kernel.launch((blocks, 1, 1), THREADS, SHARED_BYTES, params, cluster)
        return
    launch = Launch(kernel, (blocks, 1, 1), THREADS, SHARED_BYTES, params, dependent=able)
    for one in out.view(RELAYS, -1):
        launch(**{"in": words, "out": one})
        words = one
