"""What the plugin for vLLM is made of, without vLLM: the engine itself is tested by `make test-vllm`."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import saap_index.vllm
from saap_index import LayerRouters, Routers, TwoTower
from saap_index.backends import get_backend, get_paged
from saap_index.errors import CompatibilityError, LayoutError, ParameterError, SaapError
from saap_index.routers import load_routers, save_routers
from saap_index.routing.quantizer import KeyQuantizer
from saap_index.routing.rope import Rope
from saap_index.routing.sampling import Sampling
from saap_index.vllm.counters import COUNTERS, Counters
from saap_index.vllm.dense import continue_prompt
from saap_index.vllm.layers import ServedModel, heads_of_rank, serve
from saap_index.vllm.options import Options
from saap_index.vllm.pages import pages_of
from saap_index.vllm.refusals import check_engine, check_layer, layer_number, untested
from saap_index.vllm.step import Step, plan_step
from saap_lab.smollm2.routers import SHIPPED

CPU = get_backend(torch.device("cpu"))
H, D, L = 3, 16, 8


def routers(layers: int = 3, shared: bool = True, rope: Rope | None = None) -> Routers:
    """Symmetric ones, with shares of the budget that differ."""
    found = {}
    for n in range(layers):
        tower, lists = TwoTower.symmetric(H, D), KeyQuantizer(torch.randn(H, L, D).bfloat16().float())
        shares = np.linspace(0.5, 1.5, H, dtype=np.float32)
        own = rope or Rope(head_dim=D)
        none = lists.centroids.new_zeros((H, L, D))
        found[n] = LayerRouters(
            KeyQuantizer(none), tower.for_lists(none), own, own, D**-0.5, tower, None, shares, None, lists if shared else None
        )
    model = {"num_key_value_heads": H, "head_dim": D, "num_hidden_layers": layers, "num_attention_heads": 2 * H}
    return Routers({"model": model, "layout": {"sinks": 2, "window": 32}, "budget": {"dense_layers": [0]}}, found)


def served(**options: Any) -> ServedModel:
    return serve(routers(), Options(routers="r", break_even=100, **options), CPU, range(3))


# -- options --------------------------------------------------------------------------------------------------------------


def test_options_say_what_is_wrong() -> None:
    assert Options.of({"saap": {"routers": "r"}}).params.selectivity == 0.05
    found = Options.of({"saap": {"routers": "r", "target_mass": 0.9, "layers": [1, 2], "break_even": 10}})
    assert found.params.selectivity == 0.25 and found.layers == (1, 2) and not found.reads_all
    assert Options.of({"saap": {"routers": "r", "selectivity": 1.0}}).reads_all
    for said, names in (
        ({}, "additional-config"), (None, "additional-config"), ({"saap": 3}, "additional-config"), ({"saap": {}}, "routers"),
        ({"saap": {"routers": "r", "share": 1}}, "share"), ({"saap": {"routers": "r", "selectivity": 2}}, "selectivity"),
        ({"saap": {"routers": "r", "layers": 3}}, "layers"), ({"saap": {"routers": "r", "layers": [-1]}}, "layers"),
        ({"saap": {"routers": "r", "break_even": "x"}}, "break_even"), ({"saap": {"routers": ""}}, "routers"),
    ):
        with pytest.raises(ParameterError, match=names):
            Options.of(said)


# -- routers --------------------------------------------------------------------------------------------------------------


def test_lists_of_training_texts_are_written_and_read(tmp_path: Path) -> None:
    made = routers()
    save_routers(made, tmp_path / "r")
    found = load_routers(tmp_path / "r")
    for n, layer in found.layers.items():
        a, b = layer.shared_lists, made.layers[n].shared_lists
        assert a is not None and b is not None and torch.equal(a.centroids, b.centroids)
        parts = layer.shared()
        assert parts is not None and parts[1].nlist == L
        assert torch.equal(layer.key_quantizer.centroids, torch.zeros(H, L, D))  # a prompt still makes its own
    assert found.layers[0].to("cpu").shared_lists is not None
    save_routers(routers(shared=False), tmp_path / "without")
    assert load_routers(tmp_path / "without").layers[0].shared() is None
    wrong = replace(made.layers[0], shared_lists=KeyQuantizer(torch.zeros(H, L, D + 8)))
    save_routers(Routers(made.config, {0: wrong}), tmp_path / "wrong")
    with pytest.raises(SaapError, match="shared_lists"):
        load_routers(tmp_path / "wrong")


def test_what_is_served() -> None:
    found = served(selectivity=0.1)
    assert sorted(found.layers) == [1, 2] and found.sinks == 2 and found.window == 32 and len(found.ropes) == 1
    assert found.layers[1].rope is found.layers[2].rope  # so that their angles are computed once
    assert sorted(served(layers=(0, 2)).layers) == [0, 2]
    with pytest.raises(ParameterError, match=r"\[7\]"):
        served(layers=(1, 7))
    with pytest.raises(CompatibilityError, match="share"):
        serve(routers(shared=False), Options(routers="r"), CPU, range(3))
    with pytest.raises(CompatibilityError, match="depends on positions alone"):
        dynamic = Rope(head_dim=D, scaling="dynamic", factor=2.0, original_max_position=64)
        serve(routers(rope=dynamic), Options(routers="r"), CPU, range(3))
    with pytest.raises(CompatibilityError, match="outside"):
        one = routers().layers[1]
        published = replace(one, tower=None, shared_lists=None)
        published = replace(published, query_router=replace(published.query_router, size_weighted=False))
        serve(Routers(routers().config, {1: published}), Options(routers="r", target_mass=0.9), CPU, range(3))


@pytest.mark.parametrize("total, ranks", [(8, 1), (8, 2), (8, 8), (3, 3), (2, 4), (1, 4)])
def test_heads_are_dealt_out(total: int, ranks: int) -> None:
    """As in vLLM: equal parts, or every head to as many processes as there are for it."""
    held = [list(range(total))[heads_of_rank(total, rank, ranks)] for rank in range(ranks)]
    assert {len(x) for x in held} == {max(1, total // ranks)}
    assert sorted(head for x in held for head in x) == sorted(list(range(total)) * max(1, ranks // total))
    assert held == sorted(held)
    with pytest.raises(CompatibilityError, match="divide"):
        heads_of_rank(3, 0, 2)


def test_a_rank_has_its_own_heads() -> None:
    every, own = served(), serve(routers(), Options(routers="r", break_even=100), CPU, range(3), 2, 3)
    assert own.layers[1].quantizer.shape[0] == 1 and np.array_equal(own.shares, every.shares[:, 2:])


@given(st.lists(st.integers(0, 200_000), min_size=1, max_size=4), st.floats(0.001, 1), st.booleans())
def test_budgets_are_those_of_an_index(sealed: list[int], selectivity: float, target: bool) -> None:
    model = served(selectivity=selectivity, target_mass=0.9 if target else None)
    found = model.budgets(sealed)
    for place in range(len(model.layers)):
        want = model.options.params.budgets(sealed, H, model.shares[place])
        assert np.array_equal(found[place].numpy(), want)


def test_what_is_sampled_is_as_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The share of each head's budget, but nothing where all is read; on a backend that reads no samples that is said."""
    made, way = routers(), Sampling(*(np.array(x, np.float32) for x in ([0, 0.5, 1], [2, 1, 0.25], [1, 2, 3])))
    made = Routers(made.config, {**made.layers, 1: replace(made.layers[1], sampling=way)})
    model = serve(made, Options(routers="r", selectivity=0.1), CPU, range(3))
    budgets = model.budgets([1000, 0])
    one, none = model.samples(budgets, [1000, 0])
    assert none is None and one is not None and budgets[0, 0].tolist() == [50, 100, 150]
    assert one.rows.tolist() == [[0, 50, 150], [0, 0, 0]]
    assert one.exponents.tolist() == [8, 4, 1] and one.caps.tolist() == [1, 2, 3]
    assert model.sampled == 0.25 and not model.unread_samples
    assert serve(made, Options(routers="r", sampled_share=0.0), CPU, range(3)).samples(budgets, [1000, 0]) == (None, None)
    assert not serve(made, Options(routers="r", target_mass=0.9), CPU, range(3)).sampled
    monkeypatch.setattr(type(CPU), "reads_samples", False)
    blind = serve(made, Options(routers="r"), CPU, range(3))
    assert blind.unread_samples and not blind.sampled


# -- steps ----------------------------------------------------------------------------------------------------------------


REQUEST = st.tuples(st.integers(0, 12), st.integers(0, 600), st.booleans()).map(lambda x: (x[0], x[0] + x[1], x[2]))
REQUESTS = st.lists(REQUEST, min_size=1, max_size=7)


@given(REQUESTS, st.sampled_from([0.1, 1.0]))
@settings(max_examples=80)
def test_every_token_of_a_step_is_in_one_place(requests: list[tuple[int, int, bool]], selectivity: float) -> None:
    model = served(selectivity=selectivity)
    starts = np.cumsum([0, *(q for q, _, _ in requests)]).tolist()
    lengths = [n for _, n, _ in requests]
    blocks = torch.arange(len(requests) * 40, dtype=torch.int32).view(-1, 40)
    step = plan_step(model, get_paged(CPU), starts, lengths, [x for _, _, x in requests], blocks, torch.arange(starts[-1]))
    seen: list[int] = []
    for group in step.groups:
        tokens = torch.arange(starts[-1])[group.tokens].view(-1, group.q)
        for i, row in enumerate(tokens.tolist()):
            request = starts.index(row[0], next(k for k, s in enumerate(starts) if s == row[0] and requests[k][0]))
            q, n, prefilling = requests[request]
            assert row == list(range(starts[request], starts[request] + q)) and group.batch.lengths[i] == n
            assert torch.equal(group.batch.blocks[i], blocks[request])
            sparse = not prefilling and n >= 100 and selectivity < 1
            assert group.sealed[i] == (n - 2 - 32 if sparse else 0) and bool(group.batch.num_segments[i]) == sparse
        assert [x.rows.shape for x in group.budgets] == [(len(tokens), H)] * 2
        seen += tokens.flatten().tolist()
    for prefill in step.prefills:
        assert prefill.last - prefill.first > 8
        seen += range(prefill.first, prefill.last)
    assert sorted(seen) == list(range(starts[-1])) and step.num_tokens == starts[-1]


def test_angles_are_computed_once() -> None:
    model = served()
    blocks, positions = torch.zeros((2, 20), dtype=torch.int32), torch.tensor([299, 199])
    step = plan_step(model, get_paged(CPU), [0, 1, 2], [300, 200], [False] * 2, blocks, positions)
    rope = model.ropes[0]
    assert step.rotation(rope) is step.rotation(rope) and step.rotation(None) is None
    found = step.rotation(rope, step.groups[0])
    assert found is not None and torch.equal(found.cos, rope.rotation([299, 199]).cos)
    assert isinstance(step, Step)


@given(st.integers(1, 40), st.integers(0, 700), st.sampled_from([1, 3]))
@settings(max_examples=20)
def test_a_prompt_goes_on(q: int, before: int, g: int) -> None:
    n = before + q
    queries, keys, values = torch.randn(q, 2 * g, 16), torch.randn(2, n, 16), torch.randn(2, n, 16)
    out = continue_prompt(queries, keys, values, 0.3)
    seen = torch.arange(n) <= torch.arange(before, n)[:, None]
    logits = torch.einsum("qhgd,hnd->hgqn", queries.view(q, 2, g, 16).double(), keys.double()) * 0.3
    want = torch.einsum("hgqn,hne->qhge", logits.masked_fill(~seen, -np.inf).softmax(-1), values.double())
    assert torch.allclose(out.double(), want.reshape(q, 2 * g, 16), atol=1e-5)


def test_a_long_prompt_goes_on_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x, k, v = torch.randn(50, 4, 16), torch.randn(2, 90, 16), torch.randn(2, 90, 16)
    whole = continue_prompt(x, k, v, 0.3)
    monkeypatch.setattr("saap_index.vllm.dense.QUERIES", 7)
    assert torch.allclose(continue_prompt(x, k, v, 0.3), whole, atol=1e-5)


# -- pages ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["HND", "NHD"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tails_lie_behind_the_rows_of_their_page(order: str, dtype: torch.dtype) -> None:
    blocks, size, item = 4, 16, dtype.itemsize
    page = H * size * 2 * D * item + 64
    raw = torch.zeros(blocks * page + 256, dtype=torch.uint8)
    steps = (size * 2 * D, 2 * D) if order == "HND" else (2 * D, H * 2 * D)
    cache = raw.view(dtype).as_strided((blocks, H, size, 2 * D), (page // item, *steps, 1), 256 // item)
    found = pages_of(cache, D)
    found.lists.fill_(7)
    assert not cache.view(dtype).any() and int((raw == 7).sum()) == blocks * H * size
    assert found.keys.shape == (blocks, H, size, D) and found.values.storage_offset() == cache.storage_offset() + D
    with pytest.raises(LayoutError, match="tail"):
        pages_of(torch.zeros((blocks, H, size, 2 * D), dtype=dtype), D)
    with pytest.raises(LayoutError, match="rows"):
        pages_of(cache.transpose(2, 3), D)


# -- refusals -------------------------------------------------------------------------------------------------------------


def engine(**changes: Any) -> Any:
    said: dict[str, Any] = {
        "uses_mrope": False, "kv_transfer_config": None, "dcp": 1, "pcp": 1, "block_size": 32, "hash_block_size": 32, **changes
    }
    return SimpleNamespace(
        model_config=SimpleNamespace(uses_mrope=said["uses_mrope"]), kv_transfer_config=said["kv_transfer_config"],
        cache_config=SimpleNamespace(block_size=said["block_size"], hash_block_size=said["hash_block_size"]),
        parallel_config=SimpleNamespace(decode_context_parallel_size=said["dcp"], prefill_context_parallel_size=said["pcp"]),
    )


@pytest.mark.parametrize("change, name", [
    ({"uses_mrope": True}, "M-RoPE"), ({"kv_transfer_config": object()}, "KV connector"), ({"dcp": 2}, "context parallelism"),
    ({"pcp": 2}, "context parallelism"), ({"hash_block_size": 16}, "hashed by 16"),
])
def test_engines_that_are_refused(change: dict[str, Any], name: str) -> None:
    check_engine(engine())
    with pytest.raises(CompatibilityError, match=name):
        check_engine(engine(**change))


@pytest.mark.parametrize("at, value, name", [
    (3, [1.0], "ALiBi"), (4, 50.0, "soft cap"), (5, "encoder", "encoder"), (6, "layers.3", "another layer"),
    (7, {"sinks": torch.zeros(6)}, "sinks"), (7, {"sliding window": 128}, "sliding window"), (2, 12, "12 dims"),
    (0, 7, "7 query"),
])
def test_layers_that_are_refused(at: int, value: Any, name: str) -> None:
    said: list[Any] = [6, 3, 16, None, None, "decoder", None, {"sinks": None}]
    check_layer(*said)
    said[at] = value
    with pytest.raises(CompatibilityError, match=name):
        check_layer(*said)


def test_names_of_layers() -> None:
    assert layer_number("model.layers.17.self_attn.attn") == 17
    assert layer_number("language_model.model.layers.3.self_attn.attn") == 3
    for other in ("draft_model.model.layers.0.self_attn", "encoder.layers.0.self_attn", "model.layers.0.cross_attn"):
        assert layer_number(f"{other}.attn") is None


def test_an_untested_release_is_named() -> None:
    assert untested("0.32.0") is None and untested("0.32.1+cpu") is None
    assert "this is 0.320.0" in str(untested("0.320.0")) and "0.32" in str(untested("0.31.2"))


def test_counters_say_what_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Counters(sparse_queries=2, dense_queries=1, rows_read=5, rows_stored=50)
    assert "10.0 % of the rows" in found.line() and "nothing selected" in Counters().line()
    assert saap_index.vllm.WorkerExtension().saap_stats() == COUNTERS.as_dict()
    clock = iter([0.0, 5.0, 11.0, 30.0, 60.0])
    monkeypatch.setattr("saap_index.vllm.counters.time.monotonic", lambda: next(clock))
    monkeypatch.setattr(COUNTERS, "sparse_queries", 0)
    from saap_index.vllm.counters import Ticker

    ticker = Ticker()
    assert ticker.line() is None  # too early
    monkeypatch.setattr(COUNTERS, "sparse_queries", 9)
    said = ticker.line()
    assert said is not None and "9 sparse" in said
    assert ticker.line() is None  # nothing new
    monkeypatch.setattr(COUNTERS, "sparse_queries", 10)
    assert ticker.line() is not None


def test_the_entry_point_imports_nothing_heavy() -> None:
    code = "import sys, saap_index.vllm; print('vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_seven_files_know_vllm() -> None:
    """The others are tested here."""
    folder = Path(saap_index.vllm.__file__).parent
    found = {path.name for path in folder.glob("*.py") if re.search(r"^ *(from|import) vllm", path.read_text(), re.MULTILINE)}
    parts = {f"{name}.py" for name in ("backend", "builder", "impl")}
    assert found == {"register.py"} | parts | {f"gpu_{name}" for name in parts}


def test_shipped_routers_have_shared_lists() -> None:
    found = load_routers(SHIPPED)
    assert all(layer.shared() is not None for layer in found.layers.values())
