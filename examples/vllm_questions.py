"""A long document and several questions to it, asked of an OpenAI server of vLLM: the document is read once, by prefix caching.

    python -m vllm.entrypoints.openai.api_server --model MODEL --attention-backend CUSTOM \\
        --additional-config '{"saap": {"routers": "routers", "selectivity": 0.05}}'
    python examples/vllm_questions.py --document README.md "What is it?" "How is it installed?"

Needs nothing but Python: the protocol is HTTP and JSON. Works with any backend, so that the two may be compared.
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def call(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


def ask(server: str, model: str, document: str, question: str, tokens: int) -> tuple[str, dict[str, Any], float]:
    """Answer, usage as the server counts it, and seconds. The document comes first, so that questions share its pages."""
    messages = [{"role": "user", "content": f"{document}\n\n{question}"}]
    start = time.perf_counter()
    body = {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0}
    reply = call(f"{server}/v1/chat/completions", body)
    return reply["choices"][0]["message"]["content"], reply["usage"], time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--document", type=Path, required=True)
    parser.add_argument("--server", default="http://localhost:8000")
    parser.add_argument("--tokens", type=int, default=100, help="of an answer (default %(default)s)")
    options = parser.parse_args()
    model = call(f"{options.server}/v1/models")["data"][0]["id"]
    document = options.document.read_text(encoding="utf-8")

    def one(question: str) -> tuple[str, dict[str, Any], float]:
        return ask(options.server, model, document, question, options.tokens)

    first = one(options.questions[0])  # reads the document
    with ThreadPoolExecutor() as pool:  # the others at once
        answers = [first, *pool.map(one, options.questions[1:])]
    for question, (answer, usage, seconds) in zip(options.questions, answers, strict=True):
        read, made = usage["prompt_tokens"], usage["completion_tokens"]
        print(f"\n{question}\n  {answer.strip()}\n  [{read} + {made} tokens, {seconds:.1f} s]")


if __name__ == "__main__":
    main()
