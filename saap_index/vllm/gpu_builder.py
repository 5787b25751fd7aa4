"""The metadata of a step on a GPU: FlashAttention's of the whole batch, what the index answers of it, and FlashAttention's of the
rest. Nothing here waits for the device."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport, max_decode_query_len
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata, FlashAttentionMetadataBuilder

from ..invlists.layout import MAX_QUERY_TOKENS
from .builder import line
from .counters import Ticker
from .gpu_impl import engine_of
from .gpu_step import Cut, Group, Members, cut_step, plan_groups, uniform

logger = init_logger("vllm.saap_index")


@dataclass
class SaapGpuMetadata(FlashAttentionMetadata):
    """Of the whole batch, for layers without routers; for others groups that the index answers, and, of the requests behind them,
    rest, whose tokens begin at rest_token; None if there are none. positions : int32 (n,), of the tokens. for_replay : the
    groups are there for a graph that may be replayed; whoever runs without one reads the whole batch densely."""

    positions: Tensor | None = None
    for_replay: bool = False
    groups: tuple[Group, ...] = ()
    rest: FlashAttentionMetadata | None = None
    rest_token: int = 0


class SaapGpuBuilder(FlashAttentionMetadataBuilder):
    """Steps that only decode, with as many tokens of each request, may be captured whole; what such a graph reads of a step is
    put on the device by `build`, with the same addresses and grids for as many requests. In others attention runs between
    captured pieces. `build` is not told whether a graph will be replayed, so it plans for it wherever one may be."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    supports_update_block_table: bool = False  # groups hold block tables too

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.supports_draft_decode_metadata_update = False
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self.engine = engine_of(vllm_config, device)
        self._served = any(name in self.engine.layers for name in layer_names)
        self._ticker = Ticker() if self._served and self.engine.rank == 0 else None
        most = int(vllm_config.compilation_config.max_cudagraph_capture_size or 0)
        self._replayed_tokens = most if self.use_full_cuda_graph else 0
        tokens = max(vllm_config.scheduler_config.max_num_batched_tokens, most)
        self._positions = torch.zeros(tokens, dtype=torch.int32, device=device)  # where graphs read them
        if self._ticker is not None:
            own = {name: self.engine.numbers.get(name) for name in layer_names}
            logger.info(line(self.engine.model, own, self.engine.backend.name))

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """None with more drafts than a step of the index verifies."""
        fits = max_decode_query_len(vllm_config) <= MAX_QUERY_TOKENS
        return cls._cudagraph_support if fits else AttentionCGSupport.NEVER

    @classmethod
    def get_varlen_cudagraph_max_query_len(cls, vllm_config: Any, kv_cache_spec: Any) -> int | None:
        return None

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> SaapGpuMetadata:
        """Also short sequences are the index's, for a graph serves all lengths."""
        made = self.build(0, common_attn_metadata)
        made.for_replay = False
        return made

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> SaapGpuMetadata:
        m = common_attn_metadata
        whole = super().build(common_prefix_len, m, fast_build)
        made = SaapGpuMetadata(**{field.name: getattr(whole, field.name) for field in fields(FlashAttentionMetadata)})
        if not self._served:
            return made
        if m.positions is not None:
            made.positions = self._kept_positions(m.positions[: m.num_actual_tokens])
        self._count()
        session, options = self.engine.session, self.engine.model.options
        if session is None or options.reads_all or fast_build or m.seq_lens_cpu_upper_bound is None:
            self.engine.dense_queries += m.num_actual_tokens * len(self.engine.layers)
            return made
        r = m.num_reqs
        starts, longest = m.query_start_loc_cpu[: r + 1].tolist(), m.seq_lens_cpu_upper_bound[:r].tolist()
        prefilling = [False] * r if m.is_prefilling is None else m.is_prefilling[:r].tolist()
        prefilling += [False] * (r - len(prefilling))  # padding
        tokens = m.num_actual_tokens
        if tokens <= self._replayed_tokens and (q := uniform(starts, tokens, self.engine.queries)):
            every = Members(q, slice(0, r), slice(0, r * q))
            made.groups = plan_groups(session, Cut((every,), r, tokens), m.seq_lens[:r], m.block_table_tensor[:r])
            made.for_replay = any(prefilling) or max(longest) < options.break_even
            return made
        cut = cut_step(starts, longest, prefilling, self.engine.queries, options.break_even)
        made.groups = plan_groups(session, cut, m.seq_lens[:r], m.block_table_tensor[:r])
        rest = tokens - cut.tokens
        self.engine.dense_queries += rest * len(self.engine.layers)
        if cut.groups and rest > 0 and cut.requests < r:
            made.rest = super().build(common_prefix_len, _behind(m, cut.requests, cut.tokens, starts), fast_build=True)
            made.rest_token = cut.tokens
        return made

    def _kept_positions(self, positions: Tensor) -> Tensor:
        """int32, at the same address in every step, if there are not more than the engine said there would be."""
        if len(positions) > len(self._positions):
            return positions.to(torch.int32)
        return self._positions[: len(positions)].copy_(positions, non_blocking=True)

    def _count(self) -> None:
        if self._ticker is None or not self._ticker.due():
            return
        self.engine.seen()
        if said := self._ticker.line():
            logger.info(said)
        self.engine.note()


def _behind(m: Any, requests: int, tokens: int, starts: list[int]) -> Any:
    """The batch without its first requests and their tokens."""
    r = m.num_reqs
    return m.replace(
        query_start_loc=m.query_start_loc[requests : r + 1] - tokens,
        query_start_loc_cpu=m.query_start_loc_cpu[requests : r + 1] - tokens,
        seq_lens=m.seq_lens[requests:r],
        num_reqs=r - requests,
        num_actual_tokens=m.num_actual_tokens - tokens,
        max_query_len=max(b - a for a, b in zip(starts[requests:-1], starts[requests + 1 :], strict=True)),
        block_table_tensor=m.block_table_tensor[requests:r],
        slot_mapping=m.slot_mapping[tokens:],
        positions=None,
        is_prefilling=None if m.is_prefilling is None else m.is_prefilling[requests:r],
        seq_lens_cpu_upper_bound=m.seq_lens_cpu_upper_bound[requests:r],
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
