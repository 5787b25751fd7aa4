"""One engine: ``python drive.py JSON``, see test_engine.drive. The last line of what it prints is JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

TEXTS = "argparse.py", "typing.py", "tarfile.py", "inspect.py"


def main(said: dict[str, Any]) -> None:
    from vllm import LLM, SamplingParams

    engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, **said["engine"]}
    if "saap" in said:
        extension = "saap_index.vllm.WorkerExtension"
        engine |= {"attention_backend": "CUSTOM", "additional_config": {"saap": said["saap"]}, "worker_extension_cls": extension}
    llm = LLM(said["model"], **engine)
    tokenizer = llm.get_tokenizer()
    prompts: list[Any] = []
    for name, length in zip(TEXTS, said["lengths"], strict=True):
        text = (Path(os.__file__).parent / name).read_text()
        prompts.append({"prompt_token_ids": tokenizer(text)["input_ids"][:length]})
    sampling = SamplingParams(temperature=0, max_tokens=said["new"], ignore_eos=True)
    rounds = []
    for kind in said["rounds"]:
        groups = [prompts] if kind == "all" else [[prompt] for prompt in prompts]
        outputs = [out for group in groups for out in llm.generate(group, sampling, use_tqdm=False)]
        rounds.append([list(out.outputs[0].token_ids) for out in outputs])
    found: dict[str, Any] = {"tokens": rounds}
    if "saap" in said:
        found["stats"] = llm.collective_rpc("saap_stats")[0]
    found["page_bytes"] = llm.collective_rpc(page_bytes)[0] if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" else None
    print(json.dumps(found))


def page_bytes(worker: Any) -> int:
    """Of one layer, as vLLM counts them."""
    return int(max(spec.page_size_bytes for spec in worker.get_kv_cache_spec().values()))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
