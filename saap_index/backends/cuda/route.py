"""Packs query routers for cuda/route.cu and launches it. Knows the kernel's configurations, its parameters and the order in
which it reads weights; tensors come checked: of the dtype and shape said here, contiguous, on the device of the runtime.

Axes as in backends/base.py: b sequences, h KV heads, j = g * q query vectors of a KV head, d key dim, u hidden units, l lists,
m knots, r rotated dims.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..codes import DTYPE_CODES
from ..types import Frequencies, Rotation
from ..weights import RouterWeights
from .launch import Launch, Runtime

_POINTERS = "queries hidden bias_hidden out bias_out inv_freq cosine sine meta z a"
_INTS = "b h j q d pairs interleaved l outputs out_tiles"
PARAMS = np.dtype(
    [(name, np.uint64) for name in _POINTERS.split()] + [("scale", np.float32)] + [(name, np.int32) for name in _INTS.split()],
    align=True,
)

H200_SHARED_BYTES = 227 * 1024
UNIT_BYTES, MOST_RING, LEAST_RING = 1024, 16, 4
MOST_F16 = 65504.0


@dataclass(frozen=True)
class PackedRouter:
    """A router's weights as fragments of the matrix instruction, rows in tiles of 16 and columns in units of 32.

    hidden : float16 (h, 2U, D, 2, 32, 8), bias_hidden : float32 (h, 32U); out : float16 (h, tiles, D + U, 2, 32, 8), in which
    the first D units are the skip weights; bias_out : float32 (h, 16 tiles). D, U: d and u in units of 32, rounded up.
    """

    hidden: Tensor
    bias_hidden: Tensor
    out: Tensor
    bias_out: Tensor
    d: int
    units: int
    outputs: int
    nlist: int


def packed_bytes(weights: RouterWeights) -> int:
    """Of the `PackedRouter` of these weights."""
    h, u, d = weights.hidden.shape
    outputs = weights.bias_out.shape[1] - weights.leading + weights.nlist
    units, dims, rows = (-(-x // unit) * unit for x, unit in ((u, 32), (d, 32), (outputs, 16)))
    return int(h * (2 * (units * dims + rows * (dims + units)) + 4 * (units + rows)))


def pack_router(weights: RouterWeights) -> PackedRouter:
    """Weights rounded to float16 (clamped to its range) in the kernel's order, on the device that they are on.

    Lists that the outputs are compared with become outputs themselves: the kernel has one product after the hidden units.
    """
    weights = weights.composed()
    _, u, d = weights.hidden.shape
    outputs = weights.bias_out.shape[1]
    hidden_rows, out_rows = -(-u // 32) * 32, -(-outputs // 16) * 16
    out = torch.cat([_pad(weights.skip, 32, 2), _pad(weights.out, 32, 2)], 2)
    return PackedRouter(
        fragments(_pad(_pad(weights.hidden, 32, 2), 32, 1)),
        functional.pad(weights.bias_hidden, (0, hidden_rows - u)).contiguous(),
        fragments(_pad(out, 16, 1)),
        functional.pad(weights.bias_out, (0, out_rows - outputs)).contiguous(),
        d,
        u,
        outputs,
        weights.nlist,
    )


def fragments(x: Tensor) -> Tensor:
    """float (h, 16 T, 32 K) -> float16 (h, T, K, 2, 32, 8): 8 values of each lane, the registers of two 16 x 16 matrices a."""
    h, rows, columns = x.shape
    x = x.clamp(-MOST_F16, MOST_F16).half()
    # row = 8 i + lane / 4, column = 16 k + 8 c + 2 (lane % 4) + pair
    x = x.reshape(h, rows // 16, 2, 8, columns // 32, 2, 2, 4, 2)
    x = x.permute(0, 1, 4, 5, 3, 7, 6, 2, 8).contiguous()
    return x.reshape(h, rows // 16, columns // 32, 2, 32, 8)


def _pad(x: Tensor, unit: int, dim: int) -> Tensor:
    """Zeros up to a multiple of ``unit`` of dim 1 or 2."""
    more = -x.shape[dim] % unit
    return functional.pad(x, (0, more) if dim == 2 else (0, 0, 0, more))


def configuration(d: int, units: int, vectors: int, query: torch.dtype, max_shared_bytes: int) -> dict[str, int]:
    """The macros for b * j = ``vectors``, in a block of at most ``max_shared_bytes``.

    Few vectors: the ring holds all that a warp needs. Many: as many columns as fit, for each pass over the weights reads them.
    """
    d32, u32 = -(-d // 32), -(-units // 32)
    warps = 4 if 2 * u32 <= 4 else 8
    needed = -(-2 * u32 // warps) * d32 + d32 + u32
    macros = {"SAAP_DTYPE": DTYPE_CODES[query], "SAAP_D32": d32, "SAAP_U32": u32, "SAAP_WARPS": warps}
    for tiles in (1,) if vectors <= 8 else (4, 1) if vectors <= 32 else (16, 4, 1):
        for ring in range(max(LEAST_RING, min(needed, MOST_RING)), LEAST_RING - 1, -1):
            macros |= {"SAAP_TILES": tiles, "SAAP_RING": ring}
            if shared_bytes(macros) <= max_shared_bytes:
                return macros
    return macros


def shared_bytes(macros: dict[str, int]) -> int:
    """Dynamic shared memory of a block: see route.cu."""
    row = 64 * (macros["SAAP_D32"] + macros["SAAP_U32"]) + 16
    return macros["SAAP_WARPS"] * macros["SAAP_RING"] * UNIT_BYTES + 8 * macros["SAAP_TILES"] * (row + 4)


class Route:
    """The router for b sequences of j = g * q query vectors a KV head: the kernel, compiled, and its grid."""

    def __init__(
        self,
        runtime: Runtime,
        router: PackedRouter,
        b: int,
        j: int,
        q: int,
        query: torch.dtype,
        knobs: dict[str, int] | None = None,
    ) -> None:
        """knobs : macros other than those of `configuration`, to try; and "blocks", of the grid in x."""
        self.router = router
        h, out_tiles = router.out.shape[:2]
        macros = configuration(router.d, router.units, b * j, query, runtime.max_shared_bytes) | (knobs or {})
        slices = -(-out_tiles // macros["SAAP_WARPS"])
        # Two blocks per multiprocessor hide each other's waits; more would only compute hidden units more often.
        most = max(1, 2 * runtime.multiprocessors // h)
        blocks = macros.pop("blocks", -(-slices // -(-slices // most)))
        self.macros, self.grid, self.block = macros, (blocks, h, 1), 32 * macros["SAAP_WARPS"]
        self.shared_bytes = shared_bytes(macros)
        self._kernel = runtime.kernel("route.cu", "saap_route", macros)
        p = self._params = np.zeros((), PARAMS)
        for name in ("hidden", "bias_hidden", "out", "bias_out"):
            p[name] = getattr(router, name).data_ptr()
        p["b"], p["h"], p["j"], p["q"], p["d"] = b, h, j, q, router.d
        p["l"], p["outputs"], p["out_tiles"] = router.nlist, router.outputs, out_tiles

    def bind(self, rotation: Rotation | Frequencies | None, meta: Tensor | None, z: Tensor, a: Tensor) -> Launch:
        """Scores of every query vector.

        rotation : angles of the b * q positions, sequence-major; or frequencies, and then query i of q is at position
        next_position - q + i of meta : int32 (b, 8). z : float32 (b, h, j, l), a : float32 (b, h, j, m + 1), or (b, h, j, 0) of
        a router without c; both written. A start takes queries : query dtype (b, h, j, d).
        """
        p = self._params.copy()
        p["z"], p["a"], p["scale"] = z.data_ptr(), a.data_ptr(), 1.0
        if rotation is not None:
            p["interleaved"], p["scale"] = rotation.interleaved, rotation.scale
        if isinstance(rotation, Rotation):
            p["cosine"], p["sine"], p["pairs"] = rotation.cos.data_ptr(), rotation.sin.data_ptr(), rotation.cos.shape[1]
        elif rotation is not None:
            if meta is None:
                raise ValueError("meta: expected int32 (b, 8), for the positions, got None")
            p["inv_freq"], p["pairs"], p["meta"] = rotation.inv_freq.data_ptr(), rotation.inv_freq.shape[0], meta.data_ptr()
        return Launch(self._kernel, self.grid, self.block, self.shared_bytes, p, self.router, rotation, meta, z, a)


_SHAPES = ((64, 64, 4), (64, 64, 32), (96, 64, 4), (128, 64, 4), (128, 64, 32), (128, 64, 128), (128, 0, 4), (128, 0, 128))
_WIDE = ((128, 256, 4), (128, 256, 128), (192, 64, 4), (256, 64, 4), (256, 256, 4), (256, 256, 32))

CONFIGURATIONS = tuple(
    ("route.cu", "saap_route", configuration(d, u, vectors, query, H200_SHARED_BYTES))
    for d, u, vectors in _SHAPES + _WIDE
    for query in DTYPE_CODES
    if query is torch.bfloat16 or (d, u) == (128, 64)
)
"""What is shipped, a sample of it: (file, kernel, macros)."""
