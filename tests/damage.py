"""Files that are not as they were written: plain data and arrays with one thing changed, drawn by hypothesis."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from hypothesis import strategies as st

NASTY = (
    None, True, False, -1, 0, 1, 3, 1.5, -0.5, 2**31, 2**63, 5 * 10**7, 10**400, "", "x", "0", "1e999", [], {}, [None], [-1],
    [[]], {"a": {}}, ["x", "y"], [2**40], [1.5, 2],
)
RAW = ("1e999", "-1e999", "NaN", "Infinity", "[" * 50_000 + "]" * 50_000, "1" * 6000, '"\ud800"', "\x00", "")
"""What a value is replaced by in the text: numbers beyond a float, nesting beyond a stack, bytes that are no UTF-8."""


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything inside plain data; of a long list, the ends."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    if isinstance(value, list) and len(value) > 4:
        keys = (0, len(value) - 1)
    return [where for key in keys for where in ((*path, key), *places(value[key], (*path, key)))]


@st.composite
def damaged_json(draw: st.DrawFn, value: Any) -> bytes:
    """The text of plain data in which one value is another, is missing, or is there twice under other names."""
    changed = copy.deepcopy(value)
    *path, key = draw(st.sampled_from(places(changed)))
    inside = changed
    for step in path:
        inside = inside[step]
    how = draw(st.sampled_from(["replace", "raw", "delete", "rename", "nudge"]))
    if how == "delete":
        del inside[key]
    elif how == "rename" and isinstance(inside, dict):
        inside[draw(st.sampled_from(["x", "-1", "7", "01", "99999999999", key + " "]))] = inside.pop(key)
    elif how == "nudge" and isinstance(inside[key], int | float):
        inside[key] = inside[key] + draw(st.sampled_from([-1, 1, 0.5, 1000]))
    elif how == "raw":
        inside[key] = "@here@"
        return json.dumps(changed).replace('"@here@"', draw(st.sampled_from(RAW))).encode("utf-8", "surrogatepass")
    else:
        inside[key] = draw(st.sampled_from(NASTY))
    return json.dumps(changed).encode()


@st.composite
def damaged_tensors(draw: st.DrawFn, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Arrays of which one is of another shape or dtype, holds something else, is missing or has another name."""
    name = draw(st.sampled_from(sorted(tensors)))
    changed = {key: x.clone() for key, x in tensors.items()}
    x = changed[name]
    how = draw(st.sampled_from(["cut", "grow", "flat", "turn", "cast", "fill", "one", "empty", "delete", "rename"]))
    if how == "cut" and x.ndim:
        axis = draw(st.integers(0, x.ndim - 1))
        x = x.narrow(axis, 0, max(0, x.shape[axis] - 1))
    elif how == "grow" and x.ndim:
        axis = draw(st.integers(0, x.ndim - 1))
        x = torch.cat([x, x.narrow(axis, 0, min(1, x.shape[axis]))], axis)
    elif how == "flat":
        x = x.flatten()
    elif how == "turn" and x.ndim > 1:
        x = x.transpose(-1, -2)
    elif how == "cast":
        x = x.to(draw(st.sampled_from([torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool])))
    elif how == "fill":
        numbers = [torch.nan, torch.inf, -1.0, 0.0, 1e30, 7.0] if x.is_floating_point() else [-7, -1, 0, 7, 10**6]
        x = torch.full_like(x, draw(st.sampled_from(numbers)))
    elif how == "one" and x.numel():
        number = draw(st.sampled_from([-1, 0, 1, 2**30, -(2**31)]))
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = number
    elif how == "empty":
        x = x.new_empty(draw(st.sampled_from([(), (0,), (0, 2, 2**40, 8), (2**31, 0), (1, 2, 0, 8)])))
    elif how == "rename":
        changed[draw(st.sampled_from(["x", "keys", "layers.1.x", "router.lists", "centroids"]))] = x
    changed[name] = x.contiguous()
    if how in ("delete", "rename"):
        changed.pop(name)
    return changed


@st.composite
def damaged_bytes(draw: st.DrawFn, whole: bytes, header: int) -> bytes:
    """A file cut off, or with some bytes overwritten, taken out or put in: of the first ``header`` as often as of all."""
    at = draw(st.one_of(st.integers(0, min(header, len(whole)) - 1), st.integers(0, len(whole) - 1)))
    noise = draw(st.binary(min_size=1, max_size=12))
    how = draw(st.sampled_from(["over", "out", "in", "cut", "flip"]))
    if how == "flip":
        return whole[:at] + bytes([whole[at] ^ (1 << draw(st.integers(0, 7)))]) + whole[at + 1 :]
    return {
        "over": whole[:at] + noise + whole[at + len(noise) :], "out": whole[:at] + whole[at + len(noise) :],
        "in": whole[:at] + noise + whole[at:], "cut": whole[:at],
    }[how]
