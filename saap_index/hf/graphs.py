"""Decoding by CUDA graphs: the step of one token through the whole decoder, recorded once for a cache, replayed for its tokens.

Eager, the host launches some ten kernels a layer, and takes longer over it than the device takes to run them. A graph holds them
all. What changes from step to step lies in memory that the graph reads: the token, its position, and the lengths that the
indexes keep on the device. Prompts, calls of several tokens and whatever else no graph can hold go the eager way, on the same
cache; sampling and the head of the model stay outside.

A graph is made by a `Capture` (capture.py), a function that records what a call launches.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from ..errors import CompatibilityError, SaapError, StateError
from ..index import AsymmetricIndex
from ..invlists.layout import NEVER
from ..routing.quantizer import KeyQuantizer
from ..routing.router import QueryRouter
from . import capture, support
from .cache import SaapCache
from .calls import Call
from .capture import Capture
from .layer import IndexedLayer
from .slots import LAYER

if TYPE_CHECKING:
    from .plan import Plan

EAGER_STEPS = 1
"""Steps of one token in a row that a cache takes before the next is recorded: a recording takes about as long as two of them."""

ROOM_TOKENS = 1024
"""A recorded cache has room for so many tokens more, or a quarter of its length: growing moves memory, and ends a graph."""

_PLACES = "position_ids", "cache_position"
"""Arguments that say where the token stands; a decoder that is not given them asks the cache, which a graph cannot."""

_INPUTS = "input_ids", "inputs_embeds", *_PLACES


class GraphWarning(UserWarning):
    """An attached model decodes without CUDA graphs, and so as slowly as Python launches kernels."""


class GraphedDecoder:
    """In place of a decoder's ``forward``: replays a step of one token where a graph of it is there, and else calls it.

    required : whether a step that cannot be recorded raises StateError; if not, there is a `GraphWarning`, once, and no graph.
    """

    def __init__(self, decoder: Any, plan: Plan, cache_name: str, required: bool) -> None:
        self.decoder, self.plan, self.required = decoder, plan, required
        self.off = False
        self._cache_name = cache_name
        parameters = self.__signature__.parameters.values()
        self._names = [x.name for x in parameters if x.kind is x.POSITIONAL_OR_KEYWORD]
        self._asks = [name for name in _PLACES if name in self._names]
        self._decoding: weakref.WeakKeyDictionary[Any, _Decoding] = weakref.WeakKeyDictionary()

    @property
    def __signature__(self) -> inspect.Signature:
        whole = inspect.signature(type(self.decoder).forward)
        return whole.replace(parameters=list(whole.parameters.values())[1:])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decoding": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _decoding=weakref.WeakKeyDictionary())  # graphs are of the first one's memory

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and not self.off and not torch.is_grad_enabled():
            arguments = {**dict(zip(self._names, args, strict=False)), **kwargs}
            cache = arguments.pop(self._cache_name, None)
            if isinstance(cache, SaapCache) and cache.plan is self.plan:
                output = self._replay(cache, arguments)
                if output is not None:
                    return output
        return type(self.decoder).forward(self.decoder, *args, **kwargs)

    def close(self) -> None:
        """Every graph is given up; the caches can be used on."""
        for decoding in self._decoding.values():
            decoding.drop()

    def graph_of(self, cache: SaapCache) -> RecordedStep | None:
        """The graph that decodes ``cache`` now."""
        decoding = self._decoding.get(_first(cache))
        return None if decoding is None else decoding.graph

    def _replay(self, cache: SaapCache, arguments: dict[str, Any]) -> Any:
        """The output of a step that is in a graph, or None: it has to go the eager way."""
        decoding = self._decoding.setdefault(_first(cache), _Decoding())
        level = _level(cache)
        tokens = arguments.get("input_ids") if arguments.get("input_ids") is not None else arguments.get("inputs_embeds")
        graph = decoding.graph
        if graph is not None and not (level and graph.stands(cache, 0 if tokens is None else tokens.shape[1])):
            decoding.drop()
        step = self._step(cache, arguments, tokens) if level else None
        if step is None:
            decoding.steps = 0
            return None
        if decoding.graph is None:
            if decoding.steps < EAGER_STEPS:
                decoding.steps += 1
                return None
            decoding.graph = self._record(cache, step)
        elif decoding.graph.kind != step.kind:
            decoding.drop()
            return None
        return None if decoding.graph is None else decoding.graph.run(cache, step)

    def _step(self, cache: SaapCache, arguments: dict[str, Any], tokens: Tensor | None) -> _Step | None:
        """What of a call a graph takes; None if it is not a step of one token behind others, as decoding brings it."""
        if tokens is None or tokens.shape[1] != 1:
            return None
        device = tokens.device
        mask = arguments.pop("attention_mask", None)
        if capture.capture_on(device) is None or torch.is_autocast_enabled(device.type):
            return None
        if mask is not None and not isinstance(mask, Tensor):
            return None
        slots = cache.get_seq_length()
        inputs: dict[str, Any] = {name: slots for name in self._asks}
        settings: dict[str, Any] = {}
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                if name not in _INPUTS or value.device != device:
                    return None
                inputs[name] = value
            elif value is not None:
                if not isinstance(value, bool | int | float | str) or (name.startswith("output_") and value):
                    return None
                settings[name] = value
        if settings.get("return_dict") is False:
            return None
        ragged = _first(cache).ragged
        if mask is None:
            return None if ragged else _Step(inputs, settings, device, slots, None)
        if mask.shape != (tokens.shape[0], slots + 1):
            return None
        if not ragged:
            return _Step(inputs, settings, device, slots, None) if bool(mask.all()) else None
        visible = mask.bool()
        before = _first(cache).visible
        assert before is not None
        as_before = torch.eq(visible[:, :-1], before).all() & visible[:, -1].all()
        return _Step(inputs, settings, device, slots, visible) if bool(as_before) else None

    def _record(self, cache: SaapCache, step: _Step) -> RecordedStep | None:
        record = capture.capture_on(step.device)
        assert record is not None
        try:
            return RecordedStep(self.decoder, self._cache_name, cache, step, record)
        except (SaapError, RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
            self.off = True
            self.close()
            reason = next(iter(str(error).splitlines()), "")  # CUDA adds paragraphs of advice
            what = f"cuda_graphs: expected a model whose decode steps can be recorded, got {type(error).__name__}: {reason}"
            if self.required:
                raise StateError(what) from error
            warnings.warn(f"{what}; decoding stays eager, which cuda_graphs=False asks for", GraphWarning, stacklevel=2)
            return None


@dataclass
class _Decoding:
    """What is known of one cache. steps : of one token in a row that went the eager way."""

    steps: int = 0
    graph: RecordedStep | None = None

    def drop(self) -> None:
        if self.graph is not None:
            self.graph.release()
        self.steps, self.graph = 0, None


@dataclass
class _Step:
    """A call. inputs : tensors, or numbers that fill one; settings : what else it was given; slots : of the cache before it;
    visible : bool (b, slots + 1), the slots that are tokens, where sequences differ in it."""

    inputs: dict[str, Any]
    settings: dict[str, Any]
    device: torch.device
    slots: int
    visible: Tensor | None
    kind: Any = field(init=False)

    def __post_init__(self) -> None:
        shapes = [(name, (x.shape, x.dtype) if isinstance(x, Tensor) else None) for name, x in self.inputs.items()]
        self.kind = sorted(shapes), sorted(self.settings.items()), self.device, self.visible is None


def _first(cache: SaapCache) -> IndexedLayer:
    return next(layer for layer in cache.layers if isinstance(layer, IndexedLayer))


def _level(cache: SaapCache) -> bool:
    """Whether every layer holds the same slots, some, and can be in a graph as it is now."""
    layers: list[Any] = cache.layers
    slots = layers[0].get_seq_length()
    ragged = _first(cache).ragged
    if not slots or len(layers) != cache.plan.num_layers:
        return False
    for layer in layers:
        if isinstance(layer, IndexedLayer):
            if layer.index is None or layer.slots != slots or layer.ragged is not ragged:
                return False
            if not ragged and layer.visible is not None:
                return False
            if layer.plan.trained.tower is not None and not any(layer.index.invlists.segments):
                return False  # it makes its lists when tokens are first sealed
        elif type(layer) is not DynamicLayer or layer.get_seq_length() != slots or ragged:
            return False
    return True


class _Part:
    """One layer in a recorded step: the index that it appends to and searches. Holds no layer: a cache goes when its users do."""

    def __init__(self, index: AsymmetricIndex, params: Any) -> None:
        self.index, self.params = index, params
        self.key: tuple[Any, ...] = ()

    def prepare(self) -> None:
        """Room, memory and kernels for the step, which a capture cannot make."""
        index = self.index
        lists = index.invlists
        length = max(lists.lengths)
        index.release_graphs()
        room = ROOM_TOKENS // 4 if lists.capacity > length + ROOM_TOKENS // 4 else max(ROOM_TOKENS, length // 4)
        index.reserve_memory(max(lists.capacity, length + room))
        shape = (lists.batch, index.num_heads, 1, index.d)
        index.search_attend(torch.zeros(shape, dtype=index.dtype, device=index.device), params=self.params)
        self.key = index.graph_key(self.params)

    def fits(self, layer: Any) -> bool:
        return self.index.same_graph(self.key, self.params)

    def seal(self) -> None:
        """What the token that comes next makes due; and what later ones do is begun beside the replays until then."""
        if self.index.invlists.due_with(1):
            self.index.seal_ahead(1)
        elif self.index.invlists.due():
            self.index.seal()

    def replayed(self, layer: Any, visible: Tensor | None) -> None:
        self.index.advance(1, seal=False)


class _IndexedPart(_Part):
    """A layer that is indexed."""

    def __init__(self, layer: IndexedLayer) -> None:
        assert layer.index is not None
        super().__init__(layer.index, layer.params)

    def fits(self, layer: Any) -> bool:
        return getattr(layer, "index", None) is self.index and layer.params is self.params and super().fits(layer)

    def replayed(self, layer: Any, visible: Tensor | None) -> None:
        super().replayed(layer, visible)
        layer.slots += 1
        if visible is not None:
            layer.visible = visible


class _DensePart(_Part):
    """A layer of transformers, whose keys and values move to an arena with room, and become views of it. All rows are read."""

    def __init__(self, layer: DynamicLayer, like: AsymmetricIndex, attention: Any) -> None:
        assert layer.keys is not None and layer.values is not None
        h, d, d_v = layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]
        heads = h * getattr(attention, "num_key_value_groups", like.num_heads // like.num_kv_heads)
        index = AsymmetricIndex(
            d, 1, heads, h, d_v=d_v, dtype=layer.keys.dtype, device=layer.keys.device, backend=like.backend_name,
            selectivity=1.0, break_even=NEVER, scale=getattr(attention, "scaling", None),
        )
        centroids = torch.zeros((h, 1, d), dtype=torch.float32, device=layer.keys.device)
        index.key_quantizer, index.query_router = KeyQuantizer(centroids), QueryRouter.symmetric(centroids)
        n = layer.keys.shape[2]
        index.reserve_memory(n + max(ROOM_TOKENS, n // 4), batch=layer.keys.shape[0])
        index.add(layer.keys, layer.values)
        super().__init__(index, None)
        self._show(layer)

    def _show(self, layer: Any) -> None:
        lists = self.index.invlists
        self.keys, self.values = (x.narrow(2, 0, lists.lengths[0]) for x in (lists.keys, lists.values))
        layer.keys, layer.values = self.keys, self.values

    def fits(self, layer: Any) -> bool:
        return layer.keys is self.keys and layer.values is self.values and super().fits(layer)

    def replayed(self, layer: Any, visible: Tensor | None) -> None:
        super().replayed(layer, visible)
        self._show(layer)


class _Recorder(CacheLayerMixin):
    """Stands for a layer of the cache while its step is recorded: appends and searches, and changes nothing on the host."""

    is_sliding = False

    def __init__(self, slots: int, part: _Part, plan: Any) -> None:
        super().__init__()
        self.is_initialized = True
        self._slots, self._part, self.plan, self.call = slots, part, plan, Call()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._part.index.add(key_states, value_states)
        setattr(key_states, LAYER, self)
        return key_states, value_states

    def attend(
        self, module: Any, query: Tensor, mask: Tensor | None, scaling: float | None, position_ids: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """See `IndexedLayer.attend`. The mask hides nothing: of a token's own step nothing is left to hide."""
        index = self._part.index
        if index.scale != (query.shape[3] ** -0.5 if scaling is None else scaling):
            raise StateError(f"layer {self.plan.number}: expected logits scaled by {index.scale} as before, got {scaling}")
        out: Tensor = index.search_attend(query, params=self._part.params)
        return out.transpose(1, 2).contiguous()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """It is there."""

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def get_seq_length(self) -> int:
        return self._slots

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self._slots + (query_length if isinstance(query_length, int) else int(query_length.shape[0])), 0


@dataclass(frozen=True)
class _Numbered:
    """What messages say of a dense layer."""

    number: int


class RecordedStep:
    """A step of one token through a decoder, for one cache.

    Raises what the decoder raises where it does something that a graph cannot hold; the cache is what it was then.
    """

    def __init__(self, decoder: Any, cache_name: str, cache: SaapCache, step: _Step, record: Capture) -> None:
        self.kind, self.replays = step.kind, 0
        self._parts: list[_Part] = []
        self._stream: Any = None
        like = _first(cache).index
        assert like is not None
        modules, layers = support.attention_layers(decoder), list[Any](cache.layers)
        try:
            for number, layer in enumerate(layers):
                if isinstance(layer, IndexedLayer):
                    part: _Part = _IndexedPart(layer)
                else:
                    part = _DensePart(layer, like, modules[number].self_attn)
                self._parts.append(part)
                part.prepare()
            self._capture(decoder, cache_name, cache, step, record)
        except BaseException:
            self.release()
            raise

    def _capture(self, decoder: Any, cache_name: str, cache: SaapCache, step: _Step, record: Capture) -> None:
        with torch.inference_mode(False), torch.no_grad():  # a later step may be in it or not
            self._inputs: dict[str, Tensor] = {name: _memory_of(name, x, step.device) for name, x in step.inputs.items()}
            layers, outputs = list(cache.layers), []
            plans = [getattr(layer, "plan", _Numbered(number)) for number, layer in enumerate(layers)]
            cache.layers[:] = [_Recorder(step.slots, *x) for x in zip(self._parts, plans, strict=True)]
            arguments = {**self._inputs, **step.settings, cache_name: cache}
            try:
                self._start = record(step.device, lambda: outputs.append(type(decoder).forward(decoder, **arguments)))
            finally:
                cache.layers[:] = layers
        output: Mapping[str, Any] = outputs[0]
        self._type = type(output)
        self._output = {name: x for name, x in output.items() if isinstance(x, Tensor)}
        self._caches = [name for name, x in output.items() if x is cache]
        others = sorted(set(output) - set(self._output) - set(self._caches))
        if others:
            raise CompatibilityError(f"model: expected a decoder that returns tensors and its cache, got {others} besides")

    def stands(self, cache: SaapCache, tokens: int) -> bool:
        """Whether the graph holds for ``cache`` as it is now, and for so many tokens more."""
        if len(cache.layers) != len(self._parts):
            return False
        for part, layer in zip(self._parts, cache.layers, strict=True):
            lists = part.index.invlists
            if not part.fits(layer) or max(lists.lengths) + tokens > lists.capacity:
                return False
        return True

    def run(self, cache: SaapCache, step: _Step) -> Any:
        """The step's output, in memory of its own; the cache has a token more."""
        for part in self._parts:
            part.seal()
        if step.device.type == "cuda":
            self._follow(torch.cuda.current_stream(step.device))
        for name, x in step.inputs.items():
            self._inputs[name].copy_(x) if isinstance(x, Tensor) else self._inputs[name].fill_(x)
        self._start()
        self.replays += 1
        for part, layer in zip(self._parts, cache.layers, strict=True):
            part.replayed(layer, step.visible)
        return self._type(**{name: x.clone() for name, x in self._output.items()}, **dict.fromkeys(self._caches, cache))

    def _follow(self, stream: Any) -> None:
        """Work of before, on whatever stream, comes first."""
        if stream != self._stream:
            for part in self._parts:
                part.index.advance([0] * part.index.invlists.batch, seal=False)
            if self._stream is not None:
                stream.wait_stream(self._stream)
        self._stream = stream

    def release(self) -> None:
        """It is not replayed any more."""
        for part in self._parts:
            part.index.release_graphs()


def _memory_of(name: str, x: Any, device: torch.device) -> Tensor:
    """Memory for an input of a graph, filled with the present one."""
    if isinstance(x, Tensor):
        return x.clone()
    shape = (1, 1) if name == "position_ids" else (1,)
    return torch.full(shape, x, dtype=torch.int64, device=device)
