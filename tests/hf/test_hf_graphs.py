"""Attached models that decode through graphs of their whole step: on the emulated device, and with `-m gpu` on a real one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_places import PLACES, RUNTIME, Place
from hf_models import CACHE, SMALL, attached, greedy, left_padded, make_routers, prompt, sealed_tokens, tiny
from torch import Tensor

import saap_index as saap
from saap_index.hf import GraphWarning, break_even, capture, crossover, graphs
from saap_index.hf.crossover import Crossover
from saap_index.hf.graphs import GraphedDecoder


def emulated_capture(device: torch.device, step: Callable[[], None]) -> Callable[[], None]:
    with RUNTIME.capture(whole=True) as graph:
        step()
    return graph.replay


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    found = Place(request.param)
    if not found.real:
        monkeypatch.setattr(capture, "capture_on", lambda device: emulated_capture)
    return found


def model_at(place: Place, layers: int = 1, selectivity: float = 0.3, **options: Any) -> Any:
    """A model attached to at ``place``, whose steps have to be in graphs."""
    model = tiny("llama", head_dim=32, num_hidden_layers=layers, **options.pop("config", {})).to(place.device)
    extra = {} if place.real else {"backend": "cuda-emu"}
    return attached(model, selectivity, **{"cuda_graphs": True, **extra, **options})


def eager_twin(place: Place, *args: Any, **options: Any) -> Any:
    return model_at(place, *args, **{**options, "cuda_graphs": False})


def graphed(model: Any) -> GraphedDecoder:
    found: GraphedDecoder = model.model.forward
    return found


def replays(model: Any, cache: Any) -> int:
    graph = graphed(model).graph_of(cache)
    return 0 if graph is None else graph.replays


def both(place: Place, inputs: Any, new: int, *args: Any, how: dict[str, Any] | None = None, **options: Any) -> tuple[Any, Any]:
    """Tokens of the eager and of the graphed model are the same, and so is what their caches hold. Returns the second."""
    found = []
    for make in (eager_twin, model_at):
        model = make(place, *args, **options)
        cache = saap.SaapCache(model)
        given = inputs if isinstance(inputs, dict) else {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
        given = {name: x.to(place.device) for name, x in given.items()}
        found.append((greedy(model, given, new, **{CACHE: cache}, **(how or {})), cache, model))
    (want, eager, _), (got, cache, model) = found
    assert torch.equal(want, got)
    for number, layer in eager.indexed.items():
        mine = cache.indexed[number]
        assert mine.slots == layer.slots and mine.index.lengths == layer.index.lengths
        assert mine.index.invlists.segments == layer.index.invlists.segments
        assert mine.index.stats().last_search == layer.index.stats().last_search
    return model, cache


def test_generate_is_the_same(place: Place) -> None:
    """Seals between the replays: tokens, segments and what was read are those of eager steps."""
    model, cache = both(place, prompt(1, 70), 30, 2)
    assert replays(model, cache) == 28
    assert min(sealed_tokens(cache)) > 80 and cache.tokens_read() < 1


def test_below_the_break_even_and_past_it(place: Place) -> None:
    model, cache = both(place, prompt(1, 40), 28, selectivity=1.0)
    assert replays(model, cache) == 26 and min(sealed_tokens(cache)) > 40


def test_batches_with_padding(place: Place) -> None:
    """Eager while the mask hides padding, in a graph once it is taken out; sequences seal at steps of their own."""
    model, cache = both(place, left_padded(prompt(3, 70), [0, 3, 21]), 16)
    assert replays(model, cache) > 8 and cache.layers[0].ragged
    assert cache.layers[0].visible.shape == (3, cache.get_seq_length())
    more = torch.cat([left_padded(prompt(3, 70), [0, 3, 21])["attention_mask"], torch.ones((3, 16), dtype=torch.int64)], 1)
    more[1, 5] = 0
    with pytest.raises(saap.CompatibilityError, match="mask of before"), torch.no_grad():
        position = torch.tensor([[85], [82], [64]], device=place.device)
        token = torch.full((3, 1), 7, device=place.device)
        model(token, attention_mask=more.to(place.device), position_ids=position, **{CACHE: cache})


def test_beams(place: Place) -> None:
    """Sequences change places between replays, in memory that stays."""
    model, cache = both(place, prompt(1, 70), 10, how={"num_beams": 2})
    assert replays(model, cache) == 8


def test_dense_layers(place: Place) -> None:
    """Layers of transformers move to memory with room; what they hold is what they would hold."""
    model, cache = both(place, prompt(2, 70), 10, 2, dense_layers=[1])
    assert replays(model, cache) == 8
    eager = eager_twin(place, 2, dense_layers=[1])
    other = saap.SaapCache(eager)
    ids = prompt(2, 70).to(place.device)
    greedy(eager, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 10, **{CACHE: other})
    for mine, want in zip(cache.layers[1:], other.layers[1:], strict=True):
        assert mine.get_seq_length() == want.get_seq_length() == 79
        assert torch.allclose(mine.keys, want.keys, atol=1e-4) and torch.allclose(mine.values, want.values, atol=1e-4)


def step(model: Any, cache: Any, token: int = 5, **options: Any) -> Tensor:
    """Logits of one more token, without a mask or positions."""
    with torch.no_grad():
        out = model(torch.tensor([[token]], device=model.device), **{CACHE: cache}, **options)
    logits: Tensor = out.logits[:, -1]
    return logits


def read(model: Any, cache: Any, ids: Tensor) -> None:
    with torch.no_grad():
        model(ids.to(model.device), **{CACHE: cache})


def test_what_changes_between_replays(place: Place) -> None:
    """Crops, chunks of a prompt, other search parameters, growth, copies: a graph that no longer holds is made anew."""
    model, twin = model_at(place), eager_twin(place)
    cache, other = saap.SaapCache(model), saap.SaapCache(twin)

    def same(count: int) -> None:
        for token in range(3, 3 + count):
            assert torch.allclose(step(model, cache, token), step(twin, other, token), atol=1e-4)
        assert cache.get_seq_length() == other.get_seq_length()
        assert cache.layers[0].index.invlists.segments == other.layers[0].index.invlists.segments

    def both_caches(change: Callable[[Any], Any]) -> None:
        change(cache), change(other)

    read(model, cache, prompt(1, 70)), read(twin, other, prompt(1, 70))
    same(4)
    first = graphed(model).graph_of(cache)
    assert first is not None and first.replays == 3
    both_caches(lambda x: x.crop(-6))
    same(3)
    assert graphed(model).graph_of(cache) is first and first.replays == 6, "a crop moves nothing"
    read(model, cache, prompt(1, 20, seed=8)), read(twin, other, prompt(1, 20, seed=8))
    same(2)
    assert graphed(model).graph_of(cache) is first and first.replays == 8
    both_caches(lambda x: x.set_search(saap.SearchParametersIVF(selectivity=0.6)))
    same(3)
    second = graphed(model).graph_of(cache)
    assert second is not first and second is not None and second.replays == 2
    room = cache.layers[0].index.invlists.capacity
    read(model, cache, prompt(1, room, seed=9)), read(twin, other, prompt(1, room, seed=9))
    same(3)
    third = graphed(model).graph_of(cache)
    assert third is not second and third is not None and third.replays == 2
    again, plain = copy.deepcopy(cache), copy.deepcopy(other)
    assert graphed(model).graph_of(again) is None
    cache, other = again, plain
    same(3)
    both_caches(lambda x: x.reset())
    read(model, cache, prompt(1, 64)), read(twin, other, prompt(1, 64))
    same(3)


def test_a_full_arena_is_left_before_it_overflows(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "ROOM_TOKENS", 4)
    monkeypatch.setattr("saap_index.hf.slots.ROOM_TOKENS", 1)
    model, cache = both(place, prompt(1, 70), 24)
    assert graphed(model).graph_of(cache) is not None and cache.get_seq_length() == 93


def test_lists_of_a_prompt_come_first(place: Place) -> None:
    """A two-tower router makes them when tokens are first sealed; a graph begins behind that, and ends where they go."""
    model, twin = model_at(place, own_lists=True), eager_twin(place, own_lists=True)
    cache, other = saap.SaapCache(model), saap.SaapCache(twin)
    read(model, cache, prompt(1, 57)), read(twin, other, prompt(1, 57))
    for token in range(6):
        assert torch.allclose(step(model, cache, token), step(twin, other, token), atol=1e-4)
    assert replays(model, cache) == 2
    cache.crop(-20), other.crop(-20)
    read(model, cache, prompt(1, 30)), read(twin, other, prompt(1, 30))
    for token in range(3):
        assert torch.allclose(step(model, cache, token), step(twin, other, token), atol=1e-4)
    assert replays(model, cache) == 2


def test_inference_mode_and_sampling(place: Place) -> None:
    model, cache = both(place, prompt(1, 70), 6)
    with torch.inference_mode():
        for token in range(3):
            step(model, cache, token)
    with torch.no_grad():
        first = model.model(input_ids=torch.tensor([[5]], device=place.device), **{CACHE: cache}).last_hidden_state
        kept = first.clone()
        model.model(input_ids=torch.tensor([[6]], device=place.device), **{CACHE: cache})
    assert torch.equal(first, kept), "an output is the caller's"
    tokens = []
    for each in (eager_twin(place), model):
        torch.manual_seed(0)
        tokens.append(greedy(each, prompt(1, 70).to(place.device), 6, do_sample=True, top_k=20))
    assert torch.equal(*tokens)


def test_calls_that_no_graph_holds(place: Place) -> None:
    """Several tokens, hidden states, gradients, autocast: the eager way, on the same cache."""
    model = model_at(place)
    cache = saap.SaapCache(model)
    read(model, cache, prompt(1, 70))
    for token in range(3):
        step(model, cache, token)
    assert replays(model, cache) == 2
    with torch.no_grad():
        out = model(torch.tensor([[5]], device=place.device), output_hidden_states=True, **{CACHE: cache})
    assert len(out.hidden_states) == 2
    with torch.no_grad():
        model(torch.tensor([[5, 6]], device=place.device), **{CACHE: cache})
    assert replays(model, cache) == 2 and cache.get_seq_length() == 76
    with pytest.raises(saap.StateError, match="no gradients"):
        model(torch.tensor([[5]], device=place.device), **{CACHE: cache})
    step(model, cache), step(model, cache)
    assert replays(model, cache) == 4


def breaks(model: Any) -> None:
    """From now on the model asks the device for a number."""
    norm = model.model.norm
    plain = type(norm).forward
    norm.forward = lambda x: plain(norm, x) * (1.0 if float(x.sum()) > -1e30 else 2.0)


def test_a_model_that_cannot_be_recorded(place: Place) -> None:
    """A warning, once, and eager steps that are right; or an error, where graphs were asked for."""
    want = greedy(eager_twin(place), prompt(1, 70).to(place.device), 6)
    model = model_at(place, cuda_graphs="auto")
    breaks(model)
    cache = saap.SaapCache(model)
    with pytest.warns(GraphWarning, match=r"recorded, got .*; decoding stays eager") as caught:
        assert torch.equal(greedy(model, prompt(1, 70).to(place.device), 6, **{CACHE: cache}), want)
    assert len([x for x in caught if x.category is GraphWarning]) == 1
    assert torch.equal(greedy(model, prompt(1, 70).to(place.device), 6), want), "and never again"
    strict = model_at(place)
    breaks(strict)
    with pytest.raises(saap.StateError, match="cuda_graphs: expected a model whose decode steps can be recorded"):
        greedy(strict, prompt(1, 70).to(place.device), 6)


def test_detach_and_copies(place: Place) -> None:
    model = model_at(place)
    cache = saap.SaapCache(model)
    read(model, cache, prompt(1, 70))
    want = [step(model, cache, token) for token in range(3)]
    twin = copy.deepcopy(model)
    assert graphed(twin) is not graphed(model) and graphed(twin).decoder is twin.model
    fresh = saap.SaapCache(twin)
    read(twin, fresh, prompt(1, 70))
    for token in range(3):
        assert torch.allclose(step(twin, fresh, token), want[token], atol=1e-4)
    assert replays(twin, fresh) == 2 and replays(model, cache) == 2
    thawed = pickle.loads(pickle.dumps(graphed(model)))
    assert thawed.graph_of(cache) is None and thawed.decoder.forward is thawed
    with saap.hf.detached(model):
        assert "forward" not in vars(model.model)
    assert isinstance(model.model.forward, GraphedDecoder)
    saap.detach(model)
    assert "forward" not in vars(model.model)


def test_a_cache_that_goes_takes_its_graph_along(place: Place) -> None:
    import weakref

    model = model_at(place)
    cache = saap.SaapCache(model)
    read(model, cache, prompt(1, 70))
    for token in range(3):
        step(model, cache, token)
    gone = weakref.ref(cache.layers[0].index), weakref.ref(graphed(model).graph_of(cache))
    del cache
    assert [x() for x in gone] == [None, None]


# -- break-even -----------------------------------------------------------------------------------------------------------


def test_break_even_of_recorded_steps(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides are timed as replays; and a batch has what was measured for the largest that is no larger."""
    keys: list[Any] = []

    def answer(key: Any, times: Any) -> Crossover:
        keys.append(key)
        dense, sparse = times(200)
        assert 0 < dense < 60 and 0 < sparse < 60
        return Crossover(90 if key.get("batch", 1) == 1 else 70, ())

    monkeypatch.setattr(crossover, "measured", answer)
    monkeypatch.setattr(break_even, "BATCHES", {"cpu": (1, 4), "cuda": (1, 4)})
    monkeypatch.setattr(break_even, "ROUNDS", 2)
    model = tiny("llama", head_dim=32).to(place.device)
    extra = {} if place.real else {"backend": "cuda-emu"}
    options = {name: x for name, x in SMALL.items() if name != "break_even"}
    saap.attach(model, make_routers(model), 0.3, cuda_graphs=True, **options, **extra)
    assert [(key.get("batch", 1), key["graphs"]) for key in keys] == [(1, True), (4, True)]
    assert [model._saap_attached.plan.layers[0].break_even(b) for b in (1, 3, 4, 9)] == [90, 90, 70, 70]
    for batch, sealed in ((1, False), (4, True)):
        cache = saap.SaapCache(model)
        read(model, cache, prompt(batch, 86))
        assert all((n > 0) is sealed for n in sealed_tokens(cache)) and cache.layers[0].index.break_even == (70 if sealed else 90)
    saap.detach(model)
    saap.attach(model, make_routers(model), 0.3, cuda_graphs=False, **options, **extra)
    assert "graphs" not in keys[-1]


# -- attach ---------------------------------------------------------------------------------------------------------------


def test_on_a_cpu_nothing_is_replaced() -> None:
    model = attached(tiny("llama", num_hidden_layers=1))
    assert "forward" not in vars(model.model)
    with pytest.raises(saap.CompatibilityError, match=r"cuda_graphs: expected a model .*, got one on cpu"):
        attached(tiny("llama", num_hidden_layers=1), cuda_graphs=True)
    with pytest.raises(saap.ParameterError, match="cuda_graphs: expected True, False or 'auto', got 'always'"):
        attached(tiny("llama", num_hidden_layers=1), cuda_graphs="always")


@pytest.mark.parametrize(
    ("case", "options", "what"),
    [
        ("llama", {"audit_every": 2}, "audits"),
        ("llama_dynamic", {}, "a rope whose angles"),
        ("gemma3", {}, r"layers with a window, \[0, 2\]"),
    ],
)
def test_models_that_are_refused_at_once(case: str, options: dict[str, Any], what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "capture_on", lambda device: emulated_capture)
    model = tiny(case)
    with pytest.raises(saap.CompatibilityError, match=f"cuda_graphs: expected .* can hold, got {what}"):
        saap.attach(model, make_routers(model), 0.3, cuda_graphs=True, backend="cuda-emu", **SMALL, **options)
    saap.attach(model, make_routers(model), 0.3, **SMALL, **options, backend="cuda-emu")
    assert "forward" not in vars(saap.hf.support.decoder_of(model))
