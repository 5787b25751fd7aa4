"""What an index holds and what a search read, in tokens and bytes. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SearchStats:
    """Of the last search, averages per (sequence, KV head) in tokens; bytes over all of them.

    sealed_tokens were there to choose from, read_sealed of them were read, dense_tokens are sinks and recent tokens.
    kv_bytes : K and V rows read; metadata_bytes : offset tables and row lists; router_bytes : weights, read once per call
    whatever the batch is.
    """

    sealed_tokens: float = 0.0
    read_sealed: float = 0.0
    dense_tokens: float = 0.0
    kv_bytes: int = 0
    metadata_bytes: int = 0
    router_bytes: int = 0

    @property
    def selectivity(self) -> float:
        """Share of the sealed tokens that was read."""
        return self.read_sealed / self.sealed_tokens if self.sealed_tokens else 1.0

    @property
    def total_bytes(self) -> int:
        return self.kv_bytes + self.metadata_bytes + self.router_bytes


@dataclass(frozen=True)
class IndexStats:
    """What an index holds. Token counts are summed over the sequences; a token counts once, whatever the heads.

    kv_bytes : K and V of the stored tokens; metadata_bytes : ids, offset tables, pending list numbers of the stored tokens;
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

    @property
    def overhead(self) -> float:
        """Metadata as a share of K and V."""
        return self.metadata_bytes / self.kv_bytes if self.kv_bytes else 0.0
