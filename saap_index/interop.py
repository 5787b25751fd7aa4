"""To FAISS and back: one KV head of one sequence as an `IndexIVFFlat`, with the same lists. Doubles as an oracle in tests."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch

from . import checks
from .errors import CompatibilityError, NotTrainedError, ParameterError, ShapeError
from .routing.quantizer import KeyQuantizer, require_faiss
from .routing.router import QueryRouter

Index = TypeVar("Index")


def to_faiss(index: Any, sequence: int = 0, head: int = 0) -> tuple[Any, np.ndarray]:
    """A FAISS `IndexIVFFlat` (inner product, float32) with the keys of one KV head, and its values.

    Every token is in the list it has here, or would get when sealed; ids are positions. Returns (faiss index, values), values :
    float32 (next position, e) by id, zero where a token was removed. The coarse quantizer holds our centroids: where a RoPE is
    undone for routing, search it with `faiss.contrib.ivf_tools.search_preassigned`.
    """
    checks.integer(sequence, "sequence", 0, max(0, len(index.lengths) - 1))
    checks.integer(head, "head", 0, index.num_kv_heads - 1)
    faiss = require_faiss("to_faiss and from_faiss")
    if index.key_quantizer is None:
        raise NotTrainedError("to_faiss: expected an index with a key_quantizer, got one without")
    lists = index.invlists
    n, sealed = lists.lengths[sequence], lists.sealed(sequence)
    ids = lists.row_ids(sequence)[head].long().cpu().numpy()
    nos = np.empty(n, np.int64)
    for s, (start, stop) in enumerate(lists.segments[sequence]):
        sizes = lists.tables[sequence, head, s].diff().cpu().numpy()
        nos[start:stop] = np.repeat(np.arange(index.nlist), sizes)
    low = lists.sinks(sequence)
    for start, stop in ((0, low), (sealed, n)):
        if stop > start:
            fresh = index._assign_rows(sequence, start, stop)[head].cpu().numpy()
            if lists.pending is not None and start == sealed:
                pending = lists.pending[sequence, head, start:stop].cpu().numpy()
                fresh = np.where(pending < 0, fresh, pending)
            nos[start:stop] = fresh
    quantizer = faiss.IndexFlatIP(index.d)
    quantizer.add(index.key_quantizer.centroids[head].cpu().numpy())
    target = faiss.IndexIVFFlat(quantizer, index.d, index.nlist, faiss.METRIC_INNER_PRODUCT)
    quantizer.this.disown()  # the index owns it now
    target.own_fields = True
    target.is_trained = True
    from faiss.contrib.ivf_tools import add_preassigned

    rows = torch.arange(n, dtype=torch.int64, device=lists.keys.device).expand(lists.heads, n)
    keys, kept_values = (x[head].float().cpu().numpy() for x in lists.rows(sequence, rows))
    add_preassigned(target, np.ascontiguousarray(keys), nos, ids)
    values = np.zeros((lists.next_position(sequence), index.d_v), np.float32)
    values[ids] = kept_values
    return target, values


def from_faiss(cls: type[Index], faiss_index: Any, values: np.ndarray, options: dict[str, Any]) -> Index:
    """An index of one head with the lists of a FAISS `IndexIVFFlat`, routed symmetrically; see `AsymmetricIndex.from_faiss`."""
    faiss = require_faiss("to_faiss and from_faiss")
    source = faiss.downcast_index(faiss_index)
    if not isinstance(source, faiss.IndexIVFFlat):
        raise CompatibilityError(f"faiss_index: expected an IndexIVFFlat, got {type(source).__name__}")
    if source.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise CompatibilityError("faiss_index: expected METRIC_INNER_PRODUCT, as attention has it, got another metric")
    n = int(source.ntotal)
    if values.ndim != 2 or values.shape[0] != n:
        raise ShapeError(f"values: expected shape ({n}, e), got {values.shape}")
    nos, ids, keys = np.empty(n, np.int64), np.empty(n, np.int64), np.empty((n, source.d), np.float32)
    at = 0
    for no in range(source.nlist):
        size = source.invlists.list_size(no)
        part = slice(at, at + size)
        nos[part] = no
        if size:
            ids[part] = faiss.rev_swig_ptr(source.invlists.get_ids(no), size)
            codes = faiss.rev_swig_ptr(source.invlists.get_codes(no), size * source.code_size)
            keys[part] = codes.view(np.float32).reshape(size, source.d)
        at += size
    order = np.argsort(ids, kind="stable")
    if not np.array_equal(ids[order], np.arange(n)):
        raise ParameterError(f"faiss_index: expected ids 0 to {n - 1}, each once, got others")
    made: Any = cls
    index = made(d=source.d, nlist=source.nlist, d_v=values.shape[1], **options)
    centroids = np.ascontiguousarray(source.quantizer.reconstruct_n(0, source.nlist), np.float32)[None]
    index.key_quantizer = KeyQuantizer(torch.from_numpy(centroids))
    index.query_router = QueryRouter.symmetric(torch.from_numpy(centroids))
    k, v = (torch.from_numpy(x)[None, None].to(index.device, index.dtype) for x in (keys[order], values))
    index.add_preassigned(k, v, torch.from_numpy(nos[order])[None, None].to(index.device))
    return index
