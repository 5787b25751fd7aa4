"""This library's index and SAAP as published in a comparison: within their bytes, weights and own lists charged."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from saap_index import Rope
from saap_index.errors import CompatibilityError, ParameterError
from saap_index.routers import LayerRouters, Routers, model_shape
from saap_lab import compare, quality
from saap_lab.evaluate import Settings
from saap_lab.indexes import CONFIGS, Indexes
from saap_lab.method import Cache, attend_over
from saap_lab.replace import read_prompt
from saap_lab.saap import Saap

N = 1024
SETTINGS = Settings(shares=(0.05, 0.2, 0.6), layers=(0,), span=128, step=8, decoded=0, window=64)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=2048, initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def sequences():
    g = torch.Generator().manual_seed(1)
    return [(f"t{i}", torch.randint(0, 99, (N,), generator=g).tolist()) for i in range(3)]


@pytest.fixture(scope="module")
def prompts(model, sequences):
    rope, places = Rope.from_config(model.config), torch.arange(200, N, 8)
    return [read_prompt(model, tokens, rope, places) for _, tokens in sequences[:2]]


@pytest.fixture(scope="module")
def indexes(prompts, tmp_path_factory):
    return Indexes(prompts, SETTINGS, (0,), tmp_path_factory.mktemp("indexes"))


def test_published_and_ours_stay_within_their_bytes(model, sequences, tmp_path) -> None:
    """Of K, V, tables and a sixteenth of the weights, on texts they were not fitted to."""
    task = compare.Task(model, None, "tiny", sequences, 2, ["recent", "saap", "saap-own", "published"], SETTINGS)
    rows = compare.compare(task, tmp_path).rows
    assert not any(key.startswith("missing/saap") and key.endswith("/0.6") for key in rows)
    for name in CONFIGS:
        found = {s: rows.get(f"layer/0/0/{name}/{s}") for s in SETTINGS.shares}
        for share, row in found.items():
            if row is None:
                assert "kB" in rows[f"missing/{name}/{share}"]["reason"]
                continue
            limit = rows[f"layer/0/0/recent/{share}"]["kv_bytes"]
            read = row["kv_bytes"] + row["other_bytes"] + row["shared_bytes"] / task.batch
            assert read <= 1.05 * limit and row["other_bytes"] > 0 < row["shared_bytes"]
            assert row["kv_bytes"] == pytest.approx(row["tokens"] * 2 * 32 * 2)
        assert found[0.2] is not None and found[0.2]["captured"] < found[0.6]["captured"]
    assert json.loads((tmp_path / "records.json").read_text()).keys() == rows.keys()


def test_a_batch_of_one_pays_for_all_weights(model, sequences, tmp_path) -> None:
    task = compare.Task(model, None, "tiny", sequences, 2, ["recent", "saap"], replace(SETTINGS, shares=(0.4,)), batch=1)
    rows = compare.compare(task, tmp_path).rows
    row, limit = rows["layer/0/0/saap/0.4"], rows["layer/0/0/recent/0.4"]["kv_bytes"]
    assert row["kv_bytes"] + row["other_bytes"] + row["shared_bytes"] <= 1.05 * limit
    assert row["kv_bytes"] < 0.7 * limit
    with pytest.raises(ParameterError, match="batch"):
        compare.compare(replace(task, batch=0), tmp_path / "new")


@pytest.mark.parametrize("name", CONFIGS)
def test_unlimited_is_dense(indexes, prompts, name) -> None:
    prompt = prompts[0]
    method, layer = Saap(name, indexes.at(name, 0.05), 1.0), prompt.layers[0]
    state, cache = method.start(layer, N), Cache(layer, N)
    for x in (state, cache):
        x.append(prompt.keys[0], prompt.values[0])
    step = state.attend(prompt.queries[0][:, :, -1])
    torch.testing.assert_close(step.out, attend_over(cache, prompt.queries[0][:, :, -1], None), rtol=1e-4, atol=1e-5)
    assert step.tokens == N and step.chosen.all()


def test_lists_of_a_prompts_own_are_charged_to_the_prompt(indexes, prompts) -> None:
    few, many = (indexes.at("saap-own", share)[0] for share in (0.02, 0.9))
    assert few.nlist < many.nlist and few.layout.block < many.layout.block
    steps = []
    for index in (few, many):
        state = Saap("own", {0: index}, 0.3).start(prompts[1].layers[0], N)
        state.append(prompts[1].keys[0], prompts[1].values[0])
        steps.append((index, state.attend(prompts[1].queries[0][:, :, -1]), state.index.stats().last_search))
    for index, step, last in steps:
        own = 2 * (index.nlist * index.d + 4 * index.d)  # heads; a byte per dim of a list, and a scale per dim
        assert step.other_bytes == last.metadata_bytes + own
        assert step.shared_bytes == last.router_bytes - own > 0
    assert steps[0][1].shared_bytes == steps[1][1].shared_bytes  # what does not depend on the lists


def test_trained_indexes_are_read_again(indexes, prompts, monkeypatch) -> None:
    first = indexes.at("saap", 0.2)[0]
    monkeypatch.setattr("saap_lab.indexes.AsymmetricIndex.train", None)
    again = Indexes(prompts, SETTINGS, (0,), indexes.folder).at("saap", 0.2)[0]
    assert torch.equal(first.key_quantizer.centroids, again.key_quantizer.centroids)


def test_routers_stand_for_the_kind_they_are(model, indexes, prompts, sequences, tmp_path) -> None:
    rope = Rope.from_config(model.config)
    trained = indexes.at("saap-own", 0.2)[0]
    layer = LayerRouters(trained.key_quantizer, trained.query_router, rope, rope, trained.scale, trained.tower)
    config = {"model": model_shape(model.config), "layout": {"sinks": 4, "window": 64}}
    given = Indexes(prompts, SETTINGS, (0,), routers=Routers(config, {0: layer}))
    found = given.at("saap-own", 0.2)[0]
    assert found.tower is not None and torch.equal(found.tower.weights.hidden, trained.tower.weights.hidden)
    assert quality.layer_quality(Saap("own", {0: found}, 1.0), prompts[1], 0, 4, 64).error < 1e-4
    other = {**config, "model": {**config["model"], "vocab_size": 3}}
    task = compare.Task(model, None, "tiny", sequences, 2, ["saap"], SETTINGS, routers=Routers(other, {}))
    with pytest.raises(CompatibilityError, match="vocab_size"):
        compare.compare(task, tmp_path)
