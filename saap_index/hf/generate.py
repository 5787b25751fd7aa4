"""`saap generate`: a local model reads a long prompt and answers through its index, token by token; and without it, if asked.

saap generate --model ./checkpoint --routers routers --prompt book.txt --question "Who did it?"
saap generate --model ./checkpoint --routers routers --prompt book.txt --new 64 --compare
saap generate --model ./checkpoint --routers routers --prompt book.txt --save read --new 0        and later, at once
saap generate --model ./checkpoint --routers routers --load read --question "And why?"
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.streamers import TextStreamer

from .. import checks, files
from ..backends import STORAGE_CODES
from ..errors import FormatError, ParameterError
from ..routers import load_routers
from . import models, support
from .attach import attach, detached
from .cache import SaapCache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("--model", required=True, help="checkpoint folder of transformers, or GGUF file")
    parser.add_argument("--routers", required=True, help="folder of routers that saap train made for it")
    parser.add_argument("--prompt", type=Path, help="text file to read; - is the standard input")
    parser.add_argument("--question", default="", help="asked behind the prompt, in the chat template of the model")
    parser.add_argument("--load", type=Path, metavar="FOLDER", help="a prompt that was saved, in place of --prompt")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="save what was read, to --load it later")
    parser.add_argument("--new", type=int, default=200, metavar="TOKENS", help="most tokens to generate; default 200")
    parser.add_argument("--selectivity", type=float, help="share of the indexed tokens that a step reads; default 0.05")
    parser.add_argument("--storage", choices=sorted(STORAGE_CODES), help="of indexed keys and values; numbers if nothing is said")
    parser.add_argument("--dense-layers", help="layers to leave dense, as 0,1; none if nothing is said")
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0, the default, takes the likeliest token")
    parser.add_argument("--chunk", type=int, metavar="TOKENS", help="read the prompt so many tokens at a time")
    parser.add_argument("--dtype", choices=("auto", *models.DTYPES), default="auto", help="of the model (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="default %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the CPU (default %(default)s)")
    parser.add_argument("--compare", action="store_true", help="generate without the index too: speed, tokens read, agreement")


def run(args: argparse.Namespace) -> int:
    """The command. Raises what `attach`, `SaapCache.load` and transformers raise; ParameterError for flags in conflict."""
    if (args.prompt is None) == (args.load is None):
        raise ParameterError("--prompt, --load: expected one of them")
    if args.compare and (args.load or args.save or args.temperature):
        raise ParameterError("--compare: expected neither --load, --save nor --temperature beside it")
    checks.integer(args.new, "--new", 1 if args.compare else 0)
    if args.chunk is not None:
        checks.integer(args.chunk, "--chunk", 1)
    if not 0 <= args.temperature < math.inf:
        raise ParameterError(f"--temperature: expected a finite number, 0 or more, got {args.temperature}")
    if args.load and args.new and not args.question:
        raise ParameterError("--load: expected a --question to answer behind what was read, or --new 0, got neither")
    checks.device(args.device)
    torch.set_num_threads(max(1, args.threads))
    loaded = models.load_model(args.model, args.device, args.dtype)
    routers = load_routers(args.routers)
    dense = _layers(args.dense_layers)
    advised = ",".join(str(layer) for layer in routers.dense_layers if layer not in dense)
    if advised and args.dense_layers is None:
        note(f"the routers advise to leave layers {advised} dense: --dense-layers {advised}")
    tokenizer, model = loaded.tokenizer, attach(loaded.model, routers, args.selectivity, dense_layers=dense, storage=args.storage)
    cache = SaapCache.load(args.load, model) if args.load else SaapCache(model)
    if args.load and cache.tokens is None:
        raise ParameterError(f"--load: expected a prompt that was saved with its tokens, got {args.load} without")
    text = "" if args.load else read_prompt(args.prompt)
    document, question = encode(tokenizer, text, args.question, chat=not (args.load or args.save))
    document = document if cache.tokens is None else cache.tokens
    ids = torch.cat([document, question], 1).to(model.device)
    if not ids.shape[1]:
        raise ParameterError("--prompt, --question: expected text, got none")
    new = _new_tokens(model.config, ids.shape[1], args.new)
    note(f"{model.config.model_type}, {ids.shape[1]} tokens, {len(cache.indexed)} of {len(cache.layers)} layers indexed")
    if args.save:
        seconds = read(model, document.to(model.device), cache, args.chunk)
        cache.save(args.save, tokens=document)
        note(f"read in {seconds:.1f} s, saved to {args.save}")
    if args.compare:
        compare(model, tokenizer, ids, new, args.chunk)
    elif new and ids.shape[1] > cache.get_seq_length():
        answer(model, tokenizer, ids, cache, new, args)
    elif new:
        note("nothing is generated: no --question behind what was read")
    return 0


def read_prompt(path: Path) -> str:
    """The text of a file, or of the standard input for -."""
    if str(path) != "-":
        return files.read_text(path, "--prompt")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise FormatError(f"--prompt: expected text on the standard input, got {error}") from error


def _layers(text: str | None) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ParameterError(f"--dense-layers: expected numbers as in 0,1, got {text!r}") from None


def _new_tokens(config: Any, tokens: int, new: int) -> int:
    """As many of ``new`` tokens as the model has positions for; LengthError for a prompt that has none left behind it."""
    limit = models.position_limit(config)
    if limit is None or tokens + new <= limit:
        return new
    models.check_positions("--prompt, --question", config, tokens + (new > 0))
    note(f"--new: {limit - tokens} tokens instead of {new}, for the model has {limit} positions")
    return limit - tokens


def encode(tokenizer: Any, text: str, question: str, chat: bool) -> tuple[Tensor, Tensor]:
    """Token ids of the document and of the question behind it, (1, n) each; with ``chat`` in the model's chat template."""
    if question and chat and getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": f"{text}\n\n{question}"}]
        text, question = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True), ""
    elif question:
        question = f"\n\n{question}\n"

    def tokens(part: str) -> Tensor:
        tokens = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] if part else []
        return torch.tensor([tokens], dtype=torch.int64, device="cpu")

    return tokens(text), tokens(question)


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@torch.inference_mode()
def read(model: Any, ids: Tensor, cache: Any, chunk: int | None) -> float:
    """Prefill, in chunks if asked; returns seconds."""
    kept = {support.cache_argument(model): cache}
    began = time.perf_counter()
    for part in ids.split(chunk or ids.shape[1], 1):
        model(part, **kept, logits_to_keep=1)
    return time.perf_counter() - began


class Stopwatch(TextStreamer):
    """Prints text as it comes, and knows when the first token came and how many there were."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.began, self.first, self.count = time.perf_counter(), 0.0, -1

    def put(self, value: Tensor) -> None:
        if self.count == 0:
            self.first = time.perf_counter()
        self.count += 1 if self.count < 0 else value.numel()
        super().put(value)

    def report(self) -> str:
        seconds = time.perf_counter() - self.first
        speed = (self.count - 1) / seconds if self.count > 1 else 0.0
        return f"first token {self.first - self.began:.2f} s, then {speed:.1f} tokens/s"


def answer(model: Any, tokenizer: Any, ids: Tensor, cache: SaapCache, new: int, args: argparse.Namespace) -> None:
    """Generate behind what the cache holds of ``ids``, streaming."""
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    watch = Stopwatch(tokenizer)
    kept = {support.cache_argument(model): cache}
    model.generate(
        ids, attention_mask=torch.ones_like(ids), **kept, max_new_tokens=new, streamer=watch,
        prefill_chunk_size=args.chunk, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id, **sampling,
    )
    note(f"{watch.report()}, {cache.tokens_read():.1%} of {cache.get_seq_length()} tokens read")


@dataclass
class Decoded:
    """One side of a comparison: seconds to the first token and for the others, and the tokens."""

    first_s: float
    rest_s: float
    tokens: list[int]

    @property
    def speed(self) -> float:
        return (len(self.tokens) - 1) / self.rest_s if len(self.tokens) > 1 else 0.0


@torch.inference_mode()
def decode(
    model: Any, ids: Tensor, cache: Any, new: int, chunk: int | None, stop: set[int], show: Callable[[int], None],
    mark: Callable[[], None],
) -> Decoded:
    """Greedy decoding by hand, with a word after the prompt is read: ``mark``, and after each token: ``show``."""
    kept = {support.cache_argument(model): cache}
    began = time.perf_counter()
    step = ids
    if chunk and ids.shape[1] > chunk:
        read(model, ids[:, :-chunk], cache, chunk)
        step = ids[:, -chunk:]
    tokens: list[int] = []
    first = began
    for number in range(new):
        logits = model(step, **kept, logits_to_keep=1).logits
        step = logits[:, -1:].argmax(-1)
        tokens.append(int(step))
        show(tokens[-1])
        if not number:
            first = time.perf_counter()
            mark()
            paused = time.perf_counter() - first
        if tokens[-1] in stop:
            break
    return Decoded(first - began, time.perf_counter() - first - paused, tokens)


@torch.inference_mode()
def agreement(model: Any, cache: Any, tokens: list[int], device: Any) -> int:
    """In how many places the model, shown the tokens before, would take the next of ``tokens`` too; the first is given."""
    kept = {support.cache_argument(model): cache}
    same = 0
    for token, following in itertools.pairwise(tokens):
        logits = model(torch.tensor([[token]], dtype=torch.int64, device=device), **kept).logits
        same += int(logits[0, -1].argmax()) == following
    return same


@dataclass
class Compared:
    """Decoding with the index and without. read : share of the tokens that the index read; forced : in how many places, behind
    dense's own text, it takes the token that dense took, of one less than dense took."""

    sparse: Decoded
    dense: Decoded
    read: float
    forced: int

    def lines(self) -> list[str]:
        """A table."""
        table = [f"{'':8}{'first token':>13}{'tokens/s':>10}{'read':>9}"]
        for name, side, share in (("dense", self.dense, 1.0), ("sparse", self.sparse, self.read)):
            table.append(f"{name:8}{side.first_s:>11.2f} s{side.speed:>10.1f}{share:>9.1%}")
        pairs = list(zip(self.sparse.tokens, self.dense.tokens, strict=False))
        alike = next((number for number, (a, b) in enumerate(pairs) if a != b), len(pairs))
        of = f"sparse takes {self.forced} of {len(self.dense.tokens) - 1} as dense does."
        return [*table, f"The first {alike} tokens are the same. Behind dense's own text, {of}"]


@torch.inference_mode()
def both(
    model: Any, ids: Tensor, new: int, chunk: int | None = None, stop: set[int] | None = None,
    show: Callable[[str, int], None] = lambda side, token: None,
) -> Compared:
    """Greedy decoding behind ``ids`` (1, n) by a model with routers attached, first with the index, then without.

    stop : tokens that end it, none by default; show : is told of every token, with "sparse" or "dense".
    """
    stop = stop or set()
    kept: list[SaapCache] = []
    cache = SaapCache(model)
    sparse = decode(model, ids, cache, new, chunk, stop, lambda x: show("sparse", x), lambda: kept.append(copy.deepcopy(cache)))
    share = cache.tokens_read()
    with detached(model):
        plain = DynamicCache(config=model.config.get_text_config(decoder=True))
        dense = decode(model, ids, plain, new, chunk, stop, lambda x: show("dense", x), lambda: None)
    return Compared(sparse, dense, share, agreement(model, kept[0], dense.tokens, model.device))


def compare(model: Any, tokenizer: Any, ids: Tensor, new: int, chunk: int | None) -> None:
    """Decode with the index and without, and say what it cost and what it changed."""
    stop = model.generation_config.eos_token_id
    stop = {stop} if isinstance(stop, int) else set(stop or ())
    texts: dict[str, TextStreamer] = {}

    def show(side: str, token: int) -> None:
        if side not in texts:
            end_of(texts)
            print(f"--- {side}", flush=True)
            texts[side] = TextStreamer(tokenizer, skip_special_tokens=True)
        texts[side].put(torch.tensor([token], dtype=torch.int64, device="cpu"))

    comparison = both(model, ids, new, chunk, stop, show)
    end_of(texts)
    print("---", *comparison.lines(), sep="\n")


def end_of(texts: dict[str, TextStreamer]) -> None:
    """Print what the newest of them holds back."""
    for text in list(texts.values())[-1:]:
        text.end()
