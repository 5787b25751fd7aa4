"""Steps like the last one (search/steady.py), emulated: what the longer way gives, and that way where anything has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from emu.runtime import available
from emulated import register
from torch import Tensor

from saap_index import AsymmetricIndex, KeyQuantizer, QueryRouter, SearchParametersIVF
from saap_index.errors import DTypeError, SaapError, ShapeError
from saap_index.search.steady import SteadySteps

pytestmark = pytest.mark.skipif(not available(), reason="needs a C++ compiler")

HEADS, GROUP, D, LISTS = 2, 2, 32, 4
RUNTIME = register("cuda-steady")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def index(batch: int = 2, tokens: int = 200) -> AsymmetricIndex:
    made = AsymmetricIndex(
        D, LISTS, HEADS * GROUP, HEADS, dtype=torch.bfloat16, backend="cuda-steady", window=16, seal_tokens=32, break_even=0,
        selectivity=0.3,
    )
    made.key_quantizer = KeyQuantizer(randn(HEADS, LISTS, D).float())
    made.query_router = QueryRouter.symmetric(made.key_quantizer.centroids)
    made.reserve_memory(1000, batch)
    made.add(*(randn(batch, HEADS, tokens, D, seed=i) for i in (1, 2)))
    return made


def step(of: AsymmetricIndex, seed: int, **more: Any) -> Any:
    """A token and a search of its own."""
    batch = len(of.lengths)
    of.add(randn(batch, HEADS, 1, D, seed=seed), randn(batch, HEADS, 1, D, seed=seed + 1))
    return of.search_attend(randn(batch, HEADS * GROUP, 1, D, seed=seed + 2), **more)


def no_short_way(of: AsymmetricIndex) -> AsymmetricIndex:
    """Every step takes the longer way."""
    of._steady = SteadySteps()
    return of


def was_steady(of: AsymmetricIndex, take_step: Callable[[], Any]) -> tuple[bool, bool]:
    """Whether a step's `add` and `search_attend` left the short ways as they were, and so took them."""
    before = of._steady.add, of._steady.search
    take_step()
    return of._steady.add is before[0] is not None, of._steady.search is before[1] is not None


def test_the_same_as_the_longer_way() -> None:
    """Over seals too; lengths, what is held, and what stats say of the last search included."""
    short, long = index(), index()
    steady = 0
    for t in range(50):
        a = []
        steady += was_steady(short, lambda t=t, a=a: a.append(step(short, 10 * t))) == (True, True)  # type: ignore[misc]
        b = step(no_short_way(long), 10 * t)
        assert torch.equal(a[0].view(torch.int16), b.view(torch.int16)), t
        assert short.lengths == long.lengths
        assert short.stats().last_search == long.stats().last_search
    assert steady > 30, "most steps are like the last"
    for i in range(2):
        for x, y in zip(short.reconstruct(range(250), i), long.reconstruct(range(250), i), strict=True):
            assert torch.equal(x, y)


def warm() -> AsymmetricIndex:
    of = index()
    for t in range(4):
        step(of, 1000 + 10 * t)
    # not at a token at which a seal begins or is due
    taken = [was_steady(of, lambda t=t: step(of, 2000 + 10 * t)) for t in range(12)]  # type: ignore[misc]
    assert (True, True) in taken and of._steady.add is not None and of._steady.search is not None
    return of


CHANGES: dict[str, Callable[[AsymmetricIndex], Any]] = {
    "truncated": lambda x: x.truncate(150),
    "removed": lambda x: x.remove_ids([7, 9]),
    "another router": lambda x: setattr(x, "query_router", QueryRouter.symmetric(randn(HEADS, LISTS, D, seed=9).float())),
    "another budget": lambda x: setattr(x, "selectivity", 0.9),
    "another window": lambda x: setattr(x, "window", 40),
    "another scale": lambda x: setattr(x, "scale", 0.5),
    "memory that moves": lambda x: x.reserve_memory(4000),
    "a prompt": lambda x: x.add(randn(2, HEADS, 300, D, seed=5), randn(2, HEADS, 300, D, seed=6)),
    "tokens of one sequence": lambda x: x.add(randn(2, HEADS, 3, D), randn(2, HEADS, 3, D), lengths=[3, 0]),
    "beams in another order": lambda x: x.reorder([1, 0]),
    "another batch": lambda x: (x.reset(), x.add(randn(3, HEADS, 90, D, seed=5), randn(3, HEADS, 90, D, seed=6))),
    "a search with other parameters": lambda x: x.search_attend(
        randn(2, HEADS * GROUP, 1, D), params=SearchParametersIVF(selectivity=0.7)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_after_a_change(change: str) -> None:
    """The step after it, and those after that, are what they are without a short way."""
    short, long = warm(), warm()
    for of in (short, long):
        CHANGES[change](of)
    for t in range(4):
        a, b = step(short, 10 * t), step(no_short_way(long), 10 * t)
        assert torch.equal(a.view(torch.int16), b.view(torch.int16)), t


def test_another_form_takes_the_longer_way() -> None:
    of, queries, key = warm(), randn(2, HEADS * GROUP, 2, D), randn(2, HEADS, 1, D)
    assert not was_steady(of, lambda: of.search_attend(queries))[1]
    same = of._lists, of._session, of._trained, None, None, None, True
    assert of._steady.add is not None and not of._steady.add(randn(2, HEADS, 2, D)[:, :, :1], key, *same)
    for keys, error in ((key.float(), DTypeError), (key[:, :1], ShapeError), ("keys", SaapError)):
        with pytest.raises(error, match="keys"):
            of.add(keys, key)
    out, lse = of.search_attend(queries[:, :, :1].contiguous(), return_lse=True)
    assert torch.isfinite(lse).all() and out.shape == (2, HEADS * GROUP, 1, D)


def test_queries_at_an_odd_element_and_keys_at_other_addresses() -> None:
    short, long = warm(), warm()
    bytes_of = 2 * HEADS * GROUP * D
    x = randn(bytes_of + 1)
    for of in (short, no_short_way(long)):
        of.add(randn(2 * HEADS * D + 3)[3:].view(2, HEADS, 1, D), randn(2, HEADS, 1, D))
    a, b = (of.search_attend(x[1:].view(2, HEADS * GROUP, 1, D)) for of in (short, no_short_way(long)))
    assert torch.equal(a.view(torch.int16), b.view(torch.int16))
