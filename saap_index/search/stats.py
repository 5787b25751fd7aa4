"""What an index holds and what a search read, in tokens and bytes. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..invlists.arena import nbytes
from ..invlists.segmented import SegmentedInvertedLists
from ..routing.quantizer import KeyQuantizer
from ..routing.router import QueryRouter
from .selection import Selection


@dataclass(frozen=True)
class SearchStats:
    """Of the last search, averages per (sequence, KV head) in tokens; bytes over all of them.

    sealed_tokens were there to choose from, read_sealed of them were read, dense_tokens are sinks and recent tokens;
    sampled_tokens are those of read_sealed that were sampled, and count for more than themselves; tail_entries are runs read
    through their means. kv_bytes : K and V rows read; mean_bytes : rows of means read; metadata_bytes : offset
    tables and row lists; router_bytes : weights, read once per call whatever the batch is.
    """

    sealed_tokens: float = 0.0
    read_sealed: float = 0.0
    dense_tokens: float = 0.0
    kv_bytes: int = 0
    metadata_bytes: int = 0
    router_bytes: int = 0
    tail_entries: float = 0.0
    mean_bytes: int = 0
    sampled_tokens: float = 0.0

    @property
    def selectivity(self) -> float:
        """Share of the sealed tokens that was read."""
        return self.read_sealed / self.sealed_tokens if self.sealed_tokens else 1.0

    @property
    def total_bytes(self) -> int:
        return self.kv_bytes + self.mean_bytes + self.metadata_bytes + self.router_bytes


@dataclass(frozen=True)
class IndexStats:
    """What an index holds. Token counts are summed over the sequences; a token counts once, whatever the heads.

    kv_bytes : K and V of the stored tokens, as numbers or codes; metadata_bytes : ids, offset tables, pending list numbers of the
    stored tokens and means of runs; mean_bytes : those means alone;
    slack_bytes : allocated but unused; shared_bytes : quantizer and router, shared by every cache of this layer.
    imbalance_factor : l * sum of squared list sizes / (their sum)^2, averaged over sequences and heads; 1 is balanced
    (FAISS's definition).
    """

    ntotal: int
    sink_tokens: int
    sealed_tokens: int
    recent_tokens: int
    num_segments: int
    kv_bytes: int
    metadata_bytes: int
    slack_bytes: int
    shared_bytes: int
    imbalance_factor: float
    last_search: SearchStats = field(default_factory=SearchStats)
    mean_bytes: int = 0

    @property
    def overhead(self) -> float:
        """Metadata as a share of K and V."""
        return self.metadata_bytes / self.kv_bytes if self.kv_bytes else 0.0


def gather(
    lists: SegmentedInvertedLists | None, last: Selection | None, quantizer: KeyQuantizer | None, router: QueryRouter | None
) -> IndexStats:
    """The statistics of an index with these parts; ``last`` is what its last search read."""
    shared = (0 if quantizer is None else quantizer.centroids.nbytes) + (0 if router is None else router.nbytes())
    if lists is None:
        return IndexStats(0, 0, 0, 0, 0, 0, 0, 0, shared, 0.0)
    spans = [(lists.sinks(i), lists.sealed(i), n) for i, n in enumerate(lists.lengths)]
    sinks = [low if high else min(lists.layout.sinks, n) for low, high, n in spans]
    sealed = sum(high - low for low, high, _ in spans)
    tokens, row_bytes = sum(lists.lengths) * lists.heads, (lists.d + lists.d_v) * lists.dtype.itemsize
    saved = row_bytes - _code_bytes(lists)
    num_segments, num_means = sum(map(len, lists.segments)), sum(map(lists.num_means, range(lists.batch)))
    codes = sum(last - first for first, last in lists.coded_spans) * lists.heads
    kv_bytes, mean_bytes = tokens * row_bytes - codes * saved, num_means * lists.heads * lists.nlist * row_bytes
    table_bytes = num_segments * lists.heads * (lists.nlist + 1) * 4
    metadata_bytes = tokens * (4 if lists.pending is None else 8) + table_bytes + mean_bytes
    return IndexStats(
        ntotal=sum(lists.lengths),
        sink_tokens=sum(sinks),
        sealed_tokens=sealed,
        recent_tokens=sum(lists.lengths) - sum(sinks) - sealed,
        num_segments=num_segments,
        kv_bytes=kv_bytes,
        metadata_bytes=metadata_bytes,
        slack_bytes=nbytes(lists.arena) - kv_bytes - metadata_bytes,
        shared_bytes=shared,
        imbalance_factor=lists.imbalance_factor(),
        last_search=SearchStats() if last is None else search_stats(lists, last, router),
        mean_bytes=mean_bytes,
    )


def _code_bytes(lists: SegmentedInvertedLists) -> int:
    """Bytes of K and V of a row that is a code, or would be one where there are none."""
    return (lists.d + lists.d_v) * lists.dtype.itemsize if lists.code is None else sum(lists.code.sizes(lists.d, lists.d_v))


def _codes_beside(lists: SegmentedInvertedLists, last: Selection, i: int) -> int:
    """Rows of codes that are read besides the selected ones: all, where attention is dense, and what was truncated to."""
    sequence, n = i * lists.batch // len(last.lengths), last.lengths[i]
    first, end = lists.coded_spans[sequence]
    if n != lists.lengths[sequence]:  # tokens came or went since
        sealed = lists.layout.segments(n)
        first, end = (sealed[0][0], sealed[-1][1]) if sealed else (0, 0)
    always = (0, last.sinks[i]), (last.sealed[i], n)
    return sum(max(0, min(stop, end) - max(start, first)) for start, stop in always)


def _sampled(last: Selection) -> int:
    """Rows that were sampled, over all sequences and KV heads."""
    biases = last.biases if last.in_runs is None else last.in_runs.biases()
    if biases is None or last.counts is None:
        return 0
    places = torch.arange(biases.shape[2], dtype=torch.int32, device=biases.device)
    return int(((biases > 0) & (places < last.counts[..., None])).sum())


def search_stats(lists: SegmentedInvertedLists, last: Selection, router: QueryRouter | None) -> SearchStats:
    """What a search that made this selection read."""
    b, h = len(last.lengths), lists.heads  # of `search`, every query for itself
    sealed = [high - low for high, low in zip(last.sealed, last.sinks, strict=True)]
    read = [0.0] * b if last.counts is None else last.counts.float().mean(1).tolist()
    dense = [n - s for n, s in zip(last.lengths, sealed, strict=True)]
    entries = 0 if last.tail_counts is None else int(last.tail_counts.sum())
    row_bytes = (lists.d + lists.d_v) * lists.dtype.itemsize
    codes = 0.0 if lists.code is None else sum(read) + sum(_codes_beside(lists, last, i) for i in range(b))
    saved = round(codes * h) * (row_bytes - _code_bytes(lists))
    routed = last.rows is not None and router is not None
    tables = sum(map(len, lists.segments)) * b // lists.batch * h * (lists.nlist + 1) * 4 if routed else 0
    return SearchStats(
        sealed_tokens=sum(sealed) / b,
        read_sealed=sum(read) / b,
        dense_tokens=sum(dense) / b,
        kv_bytes=round((sum(read) + sum(dense)) * h) * row_bytes - saved,
        metadata_bytes=tables + (round(sum(read) * h) * (1 if last.biases is None else 2) + entries) * 4,
        router_bytes=lists.backend.router_bytes(router.weights) if routed and router is not None else 0,
        tail_entries=entries / (b * h),
        mean_bytes=entries * row_bytes,
        sampled_tokens=_sampled(last) / (b * h),
    )
