"""The metadata of a step, built once for all layers of a group; and, when the engine starts, what its layers are served with."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder

from ..backends import get_backend, get_paged
from ..invlists.layout import MAX_QUERY_TOKENS
from ..routers import load_routers
from .counters import Ticker
from .layers import ServedModel, serve
from .options import Options
from .refusals import check_engine, layer_number
from .register import warn_if_untested
from .step import Step, plan_step

logger = init_logger("vllm.saap_index")


class SaapBuilder(AttentionMetadataBuilder[Step]):
    """Raises CompatibilityError for routers of another model and for what `refusals.check_engine` names, ParameterError for
    options, FormatError or OSError for a folder that holds no routers."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        check_engine(vllm_config)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        options = Options.of(vllm_config.additional_config)
        routers = load_routers(options.routers)
        routers.check(vllm_config.model_config.hf_config)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        numbers = {name: layer_number(name) for name in layers}
        backend = get_backend(torch.device("cpu"))
        self.paged = get_paged(backend)
        self.rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        wanted = [n for n in numbers.values() if n is not None]
        self.model = serve(routers, options, backend, wanted, self.rank, ranks)
        for name, layer in layers.items():
            number = numbers[name]
            layer.impl.bind(None if number is None else self.model.layers.get(number), self.paged)
        self._ticker = Ticker()
        if self.rank == 0:
            warn_if_untested(logger)
            logger.info(line(self.model, numbers, backend.name))

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Step:
        m = common_attn_metadata
        prefilling = [False] * m.num_reqs if m.is_prefilling is None else m.is_prefilling[: m.num_reqs].tolist()
        starts, lengths = m.query_start_loc_cpu[: m.num_reqs + 1].tolist(), m.seq_lens[: m.num_reqs].tolist()
        positions = m.positions[: m.num_actual_tokens]
        if self.rank == 0 and (said := self._ticker.line()):
            logger.info(said)
        return plan_step(self.model, self.paged, starts, lengths, prefilling, m.block_table_tensor, positions)


def line(model: ServedModel, numbers: dict[str, int | None], backend: str) -> str:
    """What is served, with what, from which length on."""
    served = sorted(model.layers)
    rest = sorted({n for n in numbers.values() if n is not None} - set(served))
    params = model.options.params
    most = f"at most {100 * (params.selectivity or 0):g} %"
    what = f"{most} of the tokens" if params.target_mass is None else f"{params.target_mass:g} of the attention, {most}"
    dense = f"; dense: layers {_ranges(rest)}" if rest else ""
    others = sum(n is None for n in numbers.values())
    dense += f"; dense: {others} of no number" if others else ""
    if model.unread_samples:
        dense += "; weighted samples, for which these routers are calibrated, are not read"
    elif model.sampled:
        dense += f"; {100 * model.sampled:.0f} % of what is chosen is a weighted sample"
    always = f"the first {model.sinks} and last {max(model.window, MAX_QUERY_TOKENS)}"
    return (
        f"saap_index: layers {_ranges(served)} read {what} from {model.options.break_even} tokens on, and {always}; prompts are "
        f"read whole; routers {model.options.routers}, backend {backend}{dense}"
    )


def _ranges(numbers: list[int]) -> str:
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1][1:] = [n]
        else:
            parts.append([n])
    return ", ".join("-".join(map(str, x)) for x in parts) or "none"
