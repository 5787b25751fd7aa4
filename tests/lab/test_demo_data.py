"""The demo's data: texts, captures' files, selections to compare with, and measures. No model is needed."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saap_index.errors import FormatError, LengthError, ParameterError, ShapeError
from saap_lab import measures, selections
from saap_lab.smollm2 import capture, texts
from saap_lab.smollm2.progress import Progress

CHARS_PER_TOKEN = 4.5
"""More than the standard library's texts have on average, so enough characters are surely enough tokens."""


@pytest.fixture(scope="module")
def training() -> list[tuple[str, str]]:
    return list(texts.training_texts())


@pytest.fixture(scope="module")
def unseen() -> list[tuple[str, str]]:
    return list(texts.unseen_texts())


def _sequences(documents: list[tuple[str, str]]) -> int:
    kinds: dict[str, int] = {}
    for name, text in documents:
        kind = name.partition(":")[0]
        kinds[kind] = kinds.get(kind, 0) + len(text)
    assert set(kinds) == {"topics", "prose", "source"}
    return sum(int(chars / CHARS_PER_TOKEN) // 8192 for chars in kinds.values())


def test_texts_are_long_enough(training: list[tuple[str, str]], unseen: list[tuple[str, str]]) -> None:
    assert _sequences(training) >= 24
    assert _sequences(unseen) >= 12


def test_texts_are_the_same_on_every_call(unseen: list[tuple[str, str]]) -> None:
    assert list(texts.unseen_texts()) == unseen


def test_training_and_unseen_texts_share_no_source(training: list[tuple[str, str]], unseen: list[tuple[str, str]]) -> None:
    def sources(documents: list[tuple[str, str]]) -> set[str]:
        pairs = (name.split(":") for name, _ in documents)
        return {source if kind == "topics" else f"module {source.split('.')[0]}" for kind, source in pairs}

    assert not sources(training) & sources(unseen)


def test_no_paragraph_of_prose_occurs_twice(training: list[tuple[str, str]], unseen: list[tuple[str, str]]) -> None:
    seen: set[str] = set()
    for name, text in training + unseen:
        # The last paragraph may be cut short.
        for paragraph in text.split("\n\n")[:-1] if not name.startswith("source") else []:
            words = " ".join(paragraph.split())
            assert len(words) < 40 or words not in seen
            seen.add(words)


def test_texts_from_files(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_bytes(b"caf\xc3\xa9 \xff")
    assert list(texts.texts_from_files([tmp_path / "one.txt"])) == [("file:one.txt", "caf\u00e9 \ufffd")]


def test_pack_fills_sequences_from_one_kind() -> None:
    documents = [("a:1", "x" * 30), ("a:2", "x" * 30), ("b:1", "y" * 50), ("a:3", "x" * 90)]
    packed = list(texts.pack(documents, lambda text: [ord(letter) for letter in text.strip()], 40))
    assert [name for name, _ in packed] == ["a:1,2", "b:1", "a:2,3", "a:3"]
    assert all(len(tokens) == 40 and len(set(tokens)) == 1 for _, tokens in packed)


def test_take_says_when_the_text_is_too_short() -> None:
    assert len(texts.pack_sequences([("a:1", "x" * 80)], lambda text: list(text.strip().encode()), 2, 40)) == 2
    with pytest.raises(LengthError, match="expected 3 sequences of 40 tokens, got enough text for 2"):
        texts.pack_sequences([("a:1", "x" * 80)], lambda text: list(text.strip().encode()), 3, 40)


def test_positions_of_queries() -> None:
    training = capture.training_positions(8192, 3)
    assert training.shape == (256,) and len(set(training.tolist())) == 256
    assert training.min() >= 1024 and training.max() < 8192
    assert torch.equal(training, capture.training_positions(8192, 3))
    assert not torch.equal(training, capture.training_positions(8192, 4))
    assert capture.unseen_positions(8192).tolist() == list(range(7680, 8192, 16))
    assert capture.training_positions(64, 0).tolist() == list(range(8, 64))


def test_captures_are_read_as_written(tmp_path: Path) -> None:
    rows = {layer: capture.LayerCapture(*torch.randn(3, 1, 2, 5, 4)) for layer in (3, 8)}
    written = capture.Capture("prose:os", torch.arange(5), torch.tensor([2, 4]), rows)
    path = tmp_path / "unseen_000.safetensors"
    capture.save(path, written)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    read = capture.load(path, [8])
    assert (read.name, list(read.layers)) == ("prose:os", [8])
    assert torch.equal(read.tokens, written.tokens) and torch.equal(read.positions, written.positions)
    for part in ("keys", "values", "queries"):
        assert torch.equal(getattr(read.layers[8], part), getattr(rows[8], part))
    assert list(capture.load(path).layers) == [3, 8]
    with pytest.raises(FormatError, match=r"keys\.14"):
        capture.load(path, [14])


def test_progress_tells_how_much_is_left() -> None:
    stream = io.StringIO()
    progress = Progress(2, stream=stream)
    progress.step(is_skipped=True)
    progress.step()
    assert stream.getvalue() == "sequences 1/2\nsequences 2/2, 0.0 s each, 0 s left\n"


HEADS, GROUP, TOKENS, DIMS, POSITION = 2, 3, 600, 16, 550


@pytest.fixture(scope="module")
def keys() -> Tensor:
    return torch.randn(HEADS, TOKENS, DIMS, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def queries() -> Tensor:
    return 2 * torch.randn(HEADS * GROUP, DIMS, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", selections.SELECTIONS)
@pytest.mark.parametrize("budget", [0, 1, 37, 418, 419, 10_000])
def test_selections_take_exactly_the_budget(name: str, budget: int, keys: Tensor, queries: Tensor) -> None:
    chosen = selections.selector(name, keys)(queries, POSITION, budget)
    first, last = selections.candidates(POSITION)
    assert (first, last) == (4, 423)
    assert chosen.shape == (HEADS, TOKENS) and chosen.dtype == torch.bool
    assert chosen.sum(1).tolist() == [min(budget, last - first)] * HEADS
    assert not chosen[:, :first].any() and not chosen[:, last:].any()


@pytest.mark.parametrize("name", selections.SELECTIONS)
@pytest.mark.parametrize("position", [0, 3, 127, 131, 132])
def test_selections_of_short_contexts(name: str, position: int, keys: Tensor, queries: Tensor) -> None:
    chosen = selections.selector(name, keys)(queries, position, 50)
    assert chosen.sum(1).tolist() == [max(position + 1 - 128 - 4, 0)] * HEADS


@pytest.mark.parametrize("name", selections.SELECTIONS)
def test_selections_repeat_and_see_nothing_of_later_tokens(name: str, keys: Tensor, queries: Tensor) -> None:
    chosen = selections.SELECTIONS[name](keys, queries, POSITION, 37)
    assert torch.equal(chosen, selections.SELECTIONS[name](keys, queries, POSITION, 37))
    if name != "ivf":  # whose lists are made from the whole sequence
        changed = keys.clone()
        changed[:, POSITION + 1 :] = 100
        assert torch.equal(chosen, selections.SELECTIONS[name](changed, queries, POSITION, 37))


def test_recent_is_a_longer_window(keys: Tensor, queries: Tensor) -> None:
    chosen = selections.recent(keys, queries, POSITION, 37)
    assert chosen[0].nonzero().flatten().tolist() == list(range(423 - 37, 423))


def test_random_differs_between_heads_and_positions(keys: Tensor, queries: Tensor) -> None:
    chosen = selections.uniform(keys, queries, POSITION, 37)
    assert not torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen, selections.uniform(keys, queries, POSITION, 37, seed=1))


def test_topk_group_takes_the_largest_mean_probabilities(keys: Tensor, queries: Tensor) -> None:
    chosen = selections.topk_group(keys, queries, POSITION, 37)
    for head in range(HEADS):
        logits = queries[head * GROUP : (head + 1) * GROUP] @ keys[head, : POSITION + 1].T / DIMS**0.5
        mean = logits.softmax(-1).mean(0)
        mean[:4] = mean[423:] = -1
        assert set(chosen[head].nonzero().flatten().tolist()) == set(mean.topk(37).indices.tolist())


def test_quest_takes_pages_by_their_bound_and_cuts_the_last(keys: Tensor, queries: Tensor) -> None:
    chosen = selections.quest(keys, queries, POSITION, 16 * 2 + 5)
    for head in range(HEADS):
        bounds = []
        for start in range(4, 423, 16):
            page = keys[head, start : min(start + 16, 423)]
            low, high = page.min(0).values, page.max(0).values
            heads = queries[head * GROUP : (head + 1) * GROUP]
            bounds.append(float(torch.maximum(heads * low, heads * high).sum(1).max()))
        best = sorted(range(len(bounds)), key=lambda page: -bounds[page])
        wanted: list[int] = []
        for number in best:
            start, stop = 4 + 16 * number, min(20 + 16 * number, 423)
            wanted += list(range(start, stop))[::-1][: 37 - len(wanted)]
        assert chosen[head].nonzero().flatten().tolist() == sorted(wanted)


def test_ivf_takes_lists_by_their_centroid_and_cuts_the_last(keys: Tensor, queries: Tensor) -> None:
    lists = selections.cluster(keys, lists=8)
    centroids, assignment = lists
    assert centroids.shape == (HEADS, 8, DIMS) and assignment.shape == (HEADS, TOKENS)
    assert torch.equal(assignment, torch.cdist(keys, centroids).argmin(-1))
    chosen = selections.ivf(keys, queries, POSITION, 100, lists=lists)
    for head in range(HEADS):
        scores = queries[head * GROUP : (head + 1) * GROUP].mean(0) @ centroids[head].T
        wanted: list[int] = []
        for number in scores.argsort(descending=True).tolist():
            members = [token for token in range(4, 423) if assignment[head, token] == number]
            wanted += members[::-1][: 100 - len(wanted)]
        assert chosen[head].nonzero().flatten().tolist() == sorted(wanted)


def test_selections_refuse_wrong_arguments(keys: Tensor, queries: Tensor) -> None:
    with pytest.raises(ShapeError, match="keys"):
        selections.recent(keys[0], queries, POSITION, 1)
    with pytest.raises(ShapeError, match="queries"):
        selections.recent(keys, queries[:5], POSITION, 1)
    with pytest.raises(LengthError, match="position"):
        selections.recent(keys, queries, TOKENS, 1)
    with pytest.raises(ParameterError, match="budget"):
        selections.recent(keys, queries, POSITION, -1)
    with pytest.raises(ParameterError, match="page_tokens"):
        selections.quest(keys, queries, POSITION, 1, page_tokens=0)
    with pytest.raises(ParameterError, match="name"):
        selections.selector("best", keys)


def test_measures_against_a_direct_computation(keys: Tensor) -> None:
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(HEADS, TOKENS, 8, generator=generator)
    positions = torch.tensor([100, 550])
    queries = 2 * torch.randn(HEADS * GROUP, 2, DIMS, generator=generator)
    chosen = torch.rand(HEADS, 2, TOKENS, generator=generator) < 0.2
    measured = measures.measure(measures.exact_attention(keys, values, queries, positions), chosen)
    assert measured.captured.shape == measured.outside.shape == measured.error.shape == (HEADS * GROUP, 2)
    for head in range(HEADS * GROUP):
        for number, position in enumerate(positions.tolist()):
            seen = keys[head // GROUP, : position + 1].double()
            weights = (seen @ queries[head, number].double() / DIMS**0.5).exp()
            free = torch.tensor([4 <= token <= position - 128 for token in range(position + 1)])
            read = chosen[head // GROUP, number, : position + 1] & free
            total = weights.sum()
            torch.testing.assert_close(measured.captured[head, number], weights[read].sum() / total)
            torch.testing.assert_close(measured.outside[head, number], weights[free].sum() / total)
            rows = values[head // GROUP, : position + 1].double()
            exact = weights @ rows / total
            used = weights * (read | ~free)
            error = (used @ rows / used.sum() - exact).norm() / exact.norm()
            torch.testing.assert_close(measured.error[head, number], error)
    assert measured.captured_percent == pytest.approx(100 * float(measured.captured.sum() / measured.outside.sum()))


def test_reading_everything_captures_everything(keys: Tensor) -> None:
    queries, positions = torch.randn(HEADS * GROUP, 1, DIMS), torch.tensor([POSITION])
    exact = measures.exact_attention(keys, keys, queries, positions)
    measured = measures.measure(exact, torch.ones(HEADS, 1, TOKENS, dtype=torch.bool))
    assert measured.captured_percent == pytest.approx(100)
    assert float(measured.error.max()) < 1e-12
    assert measures.output_error(exact, 2 * exact.output.flatten(0, 1)).tolist() == [[1.0]] * (HEADS * GROUP)
    with pytest.raises(ShapeError, match="chosen"):
        measures.measure(exact, torch.ones(HEADS, TOKENS, dtype=torch.bool))
    with pytest.raises(ShapeError, match="output"):
        measures.output_error(exact, exact.output)
