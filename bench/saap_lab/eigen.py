"""Eigen Attention (Saxena et al., 2024, arXiv 2408.05646): keys and values kept in a few directions each, all tokens read.

For models with RoPE: one basis per layer from the keys before RoPE, one per KV head for the values, both from training sequences.
A step maps every stored key back up and rotates it to its own position. Compression, not selection: bytes fall with the rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saap_index.errors import NotTrainedError, ParameterError

from .method import ITEM_BYTES, Attended, Layer, Method, State


class Eigen(Method):
    """rank_k, rank_v : directions kept of keys and values; at most d and e are used."""

    kind = "compression"

    def __init__(self, rank_k: int, rank_v: int, name: str = "eigen") -> None:
        for label, rank in (("rank_k", rank_k), ("rank_v", rank_v)):
            if rank < 1:
                raise ParameterError(f"{label}: expected at least 1, got {rank}")
        self.name, self.rank_k, self.rank_v = name, rank_k, rank_v
        self.bases: dict[int, tuple[Tensor, Tensor]] = {}

    def calibrate(self, layer: Layer, keys: Sequence[Tensor], values: Sequence[Tensor], queries: Sequence[Tensor]) -> None:
        """Bases from second moments: float32 (d, rank_k) for all heads together, and (h, e, rank_v)."""
        plain = [k if layer.rope is None else layer.rope.unrotate(k, range(k.shape[1]), k.shape[1]) for k in keys]
        moment = torch.stack([torch.einsum("hnd,hnc->dc", k.double(), k.double()) for k in plain]).sum(0)
        wide = torch.stack([v.double().mT @ v.double() for v in values]).sum(0)
        basis_k, basis_v = (torch.linalg.eigh(x).eigenvectors.flip(-1).float() for x in (moment, wide))
        self.bases[layer.number] = basis_k[:, : self.rank_k].contiguous(), basis_v[:, :, : self.rank_v].contiguous()

    def start(self, layer: Layer, tokens: int) -> State:
        if layer.number not in self.bases:
            raise NotTrainedError(f"eigen: expected bases of layer {layer.number}, got none; call calibrate first")
        return _EigenState(layer, *self.bases[layer.number])


class _EigenState(State):
    """keys float32 (h, n, rank_k) before RoPE, values (h, n, rank_v), in the bases."""

    def __init__(self, layer: Layer, basis_k: Tensor, basis_v: Tensor) -> None:
        self.layer, self.basis_k, self.basis_v = layer, basis_k, basis_v
        self.keys = torch.zeros((layer.heads, 0, basis_k.shape[1]), dtype=torch.float32, device=layer.device)
        self.values = torch.zeros((layer.heads, 0, basis_v.shape[2]), dtype=torch.float32, device=layer.device)

    def append(self, keys: Tensor, values: Tensor) -> None:
        rope, done = self.layer.rope, self.keys.shape[1]
        stop = done + keys.shape[1]
        keys, values = keys.float(), values.float()
        plain = keys if rope is None else rope.unrotate(keys, range(done, stop), stop)
        self.keys = torch.cat([self.keys, plain @ self.basis_k], 1)
        self.values = torch.cat([self.values, values @ self.basis_v], 1)

    def attend(self, queries: Tensor) -> Attended:
        layer, n = self.layer, self.keys.shape[1]
        keys = self.keys @ self.basis_k.T
        if layer.rope is not None:
            keys = layer.rope.rotate(keys, range(n), n)
        weights = (queries @ keys.mT * layer.scale).softmax(-1)
        out = weights @ self.values @ self.basis_v.mT
        ranks = self.keys.shape[2] + self.values.shape[2]
        shared = (self.basis_k.numel() + self.basis_v.numel()) * ITEM_BYTES
        return Attended(out, n, layer.heads * n * ranks * ITEM_BYTES, 0.0, shared)
