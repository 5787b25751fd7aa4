"""Keys, values and queries of a transformers model over text, as an index receives them.

A pass runs one token sequence through the decoder layers and stops after the last wanted one; no logits are computed, and what is
not wanted is not kept. Works with decoder models whose attention goes through ``AttentionInterface``. Knows no indexes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LengthError, ParameterError

TRAINING_QUERIES = 256
TRAINING_FIRST = 1024

Keep = Callable[[int, Tensor, Tensor, Tensor, float], None]
"""(layer, query (1, hq, n, d), key (1, h, n, d), value (1, h, n, e), factor of the logits)"""

_NAME = "saap_capture"


class Finished(Exception):
    """Raised by a `Keep` that wants nothing more of this pass; `run` catches it."""


@dataclass(frozen=True)
class LayerCapture:
    """What one attention layer saw of one sequence.

    keys : float32 (1, h, n, d), after RoPE; values : float32 (1, h, n, dv); queries : float32 (1, hq, q, d), after RoPE, at the
    capture's positions
    """

    keys: Tensor
    values: Tensor
    queries: Tensor


@dataclass(frozen=True)
class Capture:
    """One sequence. name : the kind of text and the documents; tokens : int64 (n,); positions : int64 (q,), of the queries;
    layers : by number of the decoder layer."""

    name: str
    tokens: Tensor
    positions: Tensor
    layers: dict[int, LayerCapture]


def training_positions(length: int, seed: int, count: int = TRAINING_QUERIES) -> Tensor:
    """Positions of the training queries: up to ``count`` different random ones of [1024, length), int64 (q,), ascending.

    Of a sequence shorter than 8192 tokens, the first eighth is left out.
    """
    first = min(TRAINING_FIRST, length // 8)
    shuffled = torch.randperm(length - first, generator=torch.Generator().manual_seed(seed), dtype=torch.int64, device="cpu")
    return shuffled[:count].sort().values + first


def run(model: Any, tokens: Sequence[int], keep: Keep) -> None:
    """One pass over a sequence, every layer's attention given to ``keep``. The model is left as it was, also after an error.

    Where its angles depend on the length they are those of this text, whatever it has read before.
    """
    from ..hf.rotation import fresh_rotation, rotary_of

    ids = torch.tensor([list(tokens)], dtype=torch.int64, device="cpu")
    rotary = rotary_of(model.base_model)
    with torch.inference_mode(), fresh_rotation(rotary), recording(model, keep), suppress(Finished):
        model.base_model(ids.to(model.device), use_cache=False)


def capture(model: Any, tokens: Sequence[int], layers: Iterable[int], positions: Tensor, name: str = "") -> Capture:
    """Run a model over one sequence and keep keys, values and queries of the wanted layers, in float32 on the CPU.

    model : a decoder with full causal attention, as ``AutoModelForCausalLM`` returns it. layers : numbers of decoder layers, from
    0. positions : int64 (q,), at which queries are kept, in [0, n). Raises ParameterError, LengthError.
    """
    wanted = sorted(set(layers))
    depth = model.config.num_hidden_layers
    if not wanted or wanted[0] < 0 or wanted[-1] >= depth:
        raise ParameterError(f"layers: expected at least one number of [0, {depth}), got {wanted}")
    if positions.numel() and (int(positions.min()) < 0 or int(positions.max()) >= len(tokens)):
        raise LengthError(f"positions: expected positions in [0, {len(tokens)}), got {positions.tolist()}")
    captured: dict[int, LayerCapture] = {}

    def keep(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        if layer in wanted:
            arrays = (key, value, query[:, :, positions.to(query.device)])
            captured[layer] = LayerCapture(*(array.to("cpu", torch.float32, copy=True).contiguous() for array in arrays))
        if layer == wanted[-1]:
            raise Finished

    run(model, tokens, keep)
    # Tensors made in inference mode could not be trained on.
    kept = {layer: LayerCapture(row.keys.clone(), row.values.clone(), row.queries.clone()) for layer, row in captured.items()}
    return Capture(name, torch.tensor(list(tokens), dtype=torch.int64, device="cpu"), positions.clone(), kept)


@contextmanager
def recording(model: Any, keep: Keep) -> Iterator[None]:
    """For as long as the context lasts, every attention layer gives its query, key and value to ``keep``, and computes what
    ``sdpa`` computes. The model is not attached to, and is afterwards what it was."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
        scale = options.get("scaling")
        keep(module.layer_idx, query, key, value, query.shape[-1] ** -0.5 if scale is None else float(scale))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    before = model.config._attn_implementation
    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    try:
        model.set_attn_implementation(_NAME)
        yield
    finally:
        model.set_attn_implementation(before)
        # transformers has no call that takes a registration back.
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(_NAME, None)
