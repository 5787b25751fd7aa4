"""The library's own products are float32 under autocast: each stands in a function that turns it off."""

from __future__ import annotations

import ast
from pathlib import Path

import torch
from helpers import tokens
from hf_models import CACHE, attached, prompt, tiny

import saap_index as saap
from saap_index.hf.audit import _before_window
from saap_lab.doctor import machine
from saap_lab.doctor.machine import search_error

PACKAGE = Path(saap.__file__).parent
CAST = {
    "addbmm", "addmm", "addmv", "addr", "baddbmm", "bmm", "cdist", "chain_matmul", "conv1d", "einsum", "linear", "lstsq",
    "matmul", "mm", "multi_dot", "mv", "pinv", "scaled_dot_product_attention", "solve", "tensordot",
}
"""What `torch.autocast` may compute in 16 bits."""

ELSEWHERE = {"reference.py"}  # NumPy
DOCTOR = Path(machine.__file__).parent  # the rest of saap_lab measures in passes of its own


def products(text: str) -> list[str]:
    """Where a module multiplies without `full_precision` around it: function, and line."""
    found = []

    def walk(node: ast.AST, owner: str, safe: bool) -> None:
        if isinstance(node, ast.FunctionDef):
            owner = owner or node.name
            safe = safe or any(isinstance(x, ast.Name) and x.id == "full_precision" for x in node.decorator_list)
        is_product = isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.MatMult)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            is_product |= node.func.attr in CAST
        if is_product and not safe:
            found.append(f"{owner}:{getattr(node, 'lineno', 0)}")
        for child in ast.iter_child_nodes(node):
            walk(child, owner, safe)

    walk(ast.parse(text), "", False)
    return found


def test_every_product_is_protected() -> None:
    files = [x for folder in (PACKAGE, DOCTOR) for x in folder.rglob("*.py") if x.name not in ELSEWHERE]
    assert len(files) > 80
    assert {str(x): bare for x in files if (bare := products(x.read_text(encoding="utf-8")))} == {}


def test_the_rule_sees_a_new_one() -> None:
    text = "def f(x):\n    def g():\n        return x @ x\n    return torch.einsum('ij,jk', x, x)\n"
    assert products(text) == ["f:3", "f:4"] and products("@full_precision\n" + text) == []


def test_a_training_and_the_doctor_do_not_change() -> None:
    def figures() -> list[torch.Tensor]:
        index = saap.AsymmetricIndex(16, 4, 4, 2, rope=saap.Rope(16), sinks=2, window=8)
        index.train(tokens(1, 2, 300, 16, seed=1), tokens(1, 4, 300, 16, seed=2))
        router = index.query_router
        assert router is not None
        return [*router.weights.tensors().values(), torch.tensor(search_error(), dtype=torch.float64)]

    plain = figures()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, plain, figures()))


@torch.no_grad()
def test_audits_do_not_change() -> None:
    model = attached(tiny("llama"), selectivity=0.3)
    cache = saap.SaapCache(model)
    model(prompt(1, 120), **{CACHE: cache})
    given = cache.layers[1].index, tokens(1, 4, 1, 16, seed=4), torch.zeros((1, 4, 1))
    plain = _before_window(*given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(plain, _before_window(*given))
