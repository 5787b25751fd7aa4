"""A device that is not there, with numbers on it: tensors that say they are on ``DEVICE`` and compute on the CPU.

Within `Elsewhere()` torch refuses what it refuses on a real accelerator, products and sums of tensors here and there, so that
code can be tested for the device of everything it makes. As there, a single number of the CPU may take part, and a tensor may be
indexed by one of the CPU. The device is torch's "meta", the one besides the CPU that every build of torch has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")


class There(Tensor):
    """A tensor on `DEVICE`; ``here`` has its numbers."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        made: There = Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, device=DEVICE
        )
        made.here = here
        return made

    def tolist(self) -> Any:
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """`torch.tensor` makes a tensor of its device below what a dispatch mode sees; here it is moved there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") == DEVICE:
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        return func(*args, **kwargs)


class Elsewhere(TorchDispatchMode):
    """Tensors made on `DEVICE` have numbers while it is on."""

    def __enter__(self) -> Any:
        self.literals = _Literals()
        self.literals.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.literals.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, There)]
    moves = func._overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
    indexes = func._overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_, torch.ops.aten.index_put)
    here = [x for x in tensors if not isinstance(x, There) and x.ndim]
    if there and not moves and not (indexes and isinstance(args[0], There)) and here:
        raise RuntimeError(f"{func}: expected all tensors on one device, got some on {DEVICE} and some on the CPU")
    device = kwargs.get("device")
    result_there = bool(there) if device is None else torch.device(device) == DEVICE
    if moves and device is None:
        result_there = isinstance(args[0], There)
    if device is not None:
        kwargs = {**kwargs, "device": "cpu"}
    args, kwargs = tree_map(lambda x: x.here if isinstance(x, There) else x, (args, kwargs))
    results = func(*args, **kwargs)
    if func._schema.is_mutable and there:  # in place: what was given is what comes back
        return next((x for x in there if x.here is results), results)
    return tree_map(lambda x: There(x) if isinstance(x, Tensor) and result_there else x, results)
