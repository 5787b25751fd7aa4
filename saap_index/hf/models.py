"""A local model and its tokenizer: a checkpoint folder of transformers, or a GGUF file. Nothing is downloaded."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import FormatError, LengthError, MissingDependencyError, ParameterError
from . import support

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INSTALL = "pip install transformers accelerate gguf tqdm faiss-cpu"


@dataclass(frozen=True)
class LoadedModel:
    """name : of the checkpoint, without its folders; fingerprint : tells two checkpoints of one shape apart."""

    model: Any
    tokenizer: Any
    name: str
    fingerprint: str


def load_model(path: str | os.PathLike[str], device: str = "cpu", dtype: str = "auto") -> LoadedModel:
    """Load a decoder and its tokenizer, in evaluation mode.

    path : a folder with config.json, a GGUF file, or a folder with one GGUF file. dtype : one of `DTYPES`, or auto: bfloat16 on
    an accelerator or a CPU with instructions for it, else float32.

    Raises ParameterError for a path that is none of these, FormatError for a checkpoint that cannot be read, CompatibilityError
    for a model whose attention cannot be indexed, MissingDependencyError.
    """
    support.check_version()
    folder, gguf = _where(Path(path))
    chosen = chosen_dtype(device, dtype)
    require("accelerate", *(("gguf",) if gguf else ()))
    options = {"gguf_file": gguf} if gguf else {}
    try:
        with quiet():
            model, tokenizer = from_folder(folder, chosen, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise FormatError(f"model: expected a checkpoint that transformers reads in {folder.name}, got {error}") from error
    decoder = support.decoder_of(model)
    support.check_decoder(decoder)
    name = Path(gguf).stem if gguf else folder.resolve().name
    return LoadedModel(model.to(device), tokenizer, name, support.fingerprint(decoder))


def chosen_dtype(device: str, dtype: str) -> torch.dtype:
    """What `load_model` makes of its ``dtype``. ParameterError for another name."""
    if dtype not in ("auto", *DTYPES):
        raise ParameterError(f"dtype: expected auto or one of {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES.get(dtype) or (torch.bfloat16 if _computes_bfloat16(torch.device(device)) else torch.float32)


def from_folder(folder: Path, dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
    """Model, in evaluation mode with SDPA, and tokenizer of a checkpoint folder."""
    # transformers reads these on import: nothing here may wait for a network
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa", **options)
    return model.eval(), tokenizer


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token numbers of a text without special tokens; a text longer than the context is no warning."""
    tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokens


def position_limit(config: Any) -> int | None:
    """Tokens that a model of this transformers config has positions for; None if it stretches its angles to any length."""
    config = config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if "dynamic" in (parameters.get("rope_type"), parameters.get("type")):
        return None
    limit = getattr(config, "max_position_embeddings", None)
    return int(limit) if limit else None


def check_positions(name: str, config: Any, tokens: int) -> None:
    """LengthError, with the name of what asks for so many tokens, if a model has fewer positions."""
    limit = position_limit(config)
    if limit is not None and tokens > limit:
        raise LengthError(f"{name}: expected at most {limit} tokens, the positions that this model has, got {tokens}")


def require(*modules: str) -> None:
    """MissingDependencyError unless these can be imported."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingDependencyError(f"the model needs {', '.join(missing)}; install with: {INSTALL}")


def _where(path: Path) -> tuple[Path, str | None]:
    """The folder and, for a GGUF model, the name of the file in it."""
    if path.is_file() and path.suffix.lower() == ".gguf":
        return path.parent, path.name
    if (path / "config.json").is_file():
        return path, None
    files = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if len(files) != 1:
        what = f"a folder with {len(files)} GGUF files and no config.json" if path.is_dir() else "neither folder nor GGUF file"
        raise ParameterError(f"model: expected a folder with config.json, a GGUF file or a folder with one, got {path}: {what}")
    return path, files[0].name


def _computes_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 are in hardware there; elsewhere they take several times as long as float32."""
    if device.type != "cpu":
        return True
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
