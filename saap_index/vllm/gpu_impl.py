"""One attention layer of the engine on a GPU: FlashAttention's, but for list numbers written and long sequences read in part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config, get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import max_decode_query_len
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

from ..backends import get_backend
from ..backends.cuda.backend import CudaBackend
from ..errors import StateError
from ..routers import load_routers
from .gpu_engine import Engine
from .gpu_step import answer
from .options import Options
from .refusals import check_engine
from .register import warn_if_untested

_ENGINES: dict[int, tuple[Any, Engine]] = {}


def engine_of(config: Any, device: torch.device) -> Engine:
    """What the layers of this process are served with, made at the first call.

    Raises CompatibilityError for routers of another model and for what `refusals` names, ParameterError for options, FormatError
    or OSError for a folder that holds no routers.
    """
    made = _ENGINES.get(id(config))
    if made is None:
        check_engine(config, on_gpu=True)
        routers = load_routers(Options.of(config.additional_config).routers)
        routers.check(config.model_config.hf_config)
        backend = get_backend(device)
        if not isinstance(backend, CudaBackend):
            raise StateError(f"saap_index: expected the CUDA backend for {device}, got {backend.name!r}")
        layers = get_layers_from_vllm_config(config, Attention)
        impls = {name: x.impl for name, x in layers.items() if isinstance(x.impl, SaapGpuImpl)}
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        engine = Engine(config, impls, routers, backend, max_decode_query_len(config), rank, ranks)
        made = _ENGINES[id(config)] = config, engine
        if rank == 0:
            warn_if_untested(init_logger("vllm.saap_index"))
    return made[1]


class SaapGpuImpl(FlashAttentionImpl):
    """State: none but what the pages hold."""

    supports_dcp: bool = False
    supports_pcp: bool = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._config = get_current_vllm_config()
        self._engine: Engine | None = None

    def engine(self, device: torch.device) -> Engine:
        if self._engine is None:
            self._engine = engine_of(self._config, device)
        return self._engine

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        """key, value : (n or more, h, d); slot_mapping : int64 (n,), below 0 for padding."""
        name, engine = layer.layer_name, self.engine(key.device)
        positions = _positions_of(name) if name in engine.layers else None
        if positions is None:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        n = min(len(slot_mapping), len(positions))
        engine.write(name, key[:n], value[:n], kv_cache, slot_mapping[:n], positions[:n])

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any, output: Tensor,
        output_scale: Tensor | None = None, output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query, output : (n or more, hq, d)."""
        engine, scales = self.engine(query.device), (output_scale, output_block_scale)
        groups = () if getattr(attn_metadata, "for_replay", True) else attn_metadata.groups
        if not groups or layer.layer_name not in engine.layers:
            dense: Tensor = super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
            return dense
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("saap_index: expected output that is not quantised")
        session, steps = engine.session, engine.layers[layer.layer_name].steps
        assert session is not None
        pool = engine.pool(layer.layer_name, kv_cache)
        for group in groups:
            answer(session, group, steps, pool, self.scale, query, output)
        if attn_metadata.rest is not None:
            first = attn_metadata.rest_token
            rest = query[first:], key[first:], value[first:]
            super().forward(layer, *rest, kv_cache, attn_metadata.rest, output[first:])
        return output


def _positions_of(layer_name: str) -> Tensor | None:
    metadata = get_forward_context().attn_metadata
    if isinstance(metadata, list):
        metadata = metadata[0]
    step = None if metadata is None else metadata.get(layer_name)
    positions: Tensor | None = getattr(step, "positions", None)
    return positions
