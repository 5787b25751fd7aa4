"""saap_index: a KV cache that is a vector-search index, so that decoding reads a few percent of it.

index = saap_index.AsymmetricIndex(d=128, nlist=256, num_heads=32, num_kv_heads=8, rope=rope)
index.train(keys, queries)
index.add(keys, values)
out = index.search_attend(queries)

Inside Hugging Face transformers: model = saap_index.attach(model), and `generate` decodes sparsely.
"""

from typing import Any

from .backends import register_backend
from .errors import (
    CompatibilityError,
    DeviceError,
    DTypeError,
    FormatError,
    LayoutError,
    LengthError,
    MissingDependencyError,
    NotFiniteError,
    NotTrainedError,
    ParameterError,
    SaapError,
    ShapeError,
    StateError,
)
from .factory import ParameterSpace, clone_index, index_factory
from .index import AsymmetricIndex
from .invlists.layout import Layout
from .io import read_index, write_index
from .routers import LayerRouters, Routers, load_routers, save_routers
from .routing.calibration import Calibration
from .routing.quantizer import KeyQuantizer
from .routing.rope import Rope
from .routing.router import QueryRouter
from .routing.sampling import Sampling
from .routing.two_tower import TwoTower
from .search.params import SearchParametersIVF
from .search.selection import Selection
from .search.states import merge_states
from .search.stats import IndexStats, SearchStats
from .shipped import from_pretrained
from .training.config import TrainingConfig
from .training.prompt import PromptTraining
from .version import __version__

_TRANSFORMERS = ("SaapCache", "attach", "detach")
"""What needs transformers, and is imported when it is asked for."""


def __getattr__(name: str) -> Any:
    if name not in _TRANSFORMERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import hf

    return getattr(hf, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_TRANSFORMERS})


__all__ = [
    "AsymmetricIndex",
    "Calibration",
    "CompatibilityError",
    "DTypeError",
    "DeviceError",
    "FormatError",
    "IndexStats",
    "KeyQuantizer",
    "LayerRouters",
    "Layout",
    "LayoutError",
    "LengthError",
    "MissingDependencyError",
    "NotFiniteError",
    "NotTrainedError",
    "ParameterError",
    "ParameterSpace",
    "PromptTraining",
    "QueryRouter",
    "Rope",
    "Routers",
    "SaapCache",
    "SaapError",
    "Sampling",
    "SearchParametersIVF",
    "SearchStats",
    "Selection",
    "ShapeError",
    "StateError",
    "TrainingConfig",
    "TwoTower",
    "__version__",
    "attach",
    "clone_index",
    "detach",
    "from_pretrained",
    "index_factory",
    "load_routers",
    "merge_states",
    "read_index",
    "register_backend",
    "save_routers",
    "write_index",
]
