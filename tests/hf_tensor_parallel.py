"""What each process of the tensor-parallel test runs; started by torchrun, see test_hf_tensor_parallel.py.

hf_tensor_parallel.py FOLDER    a folder with a saved model, and the tokens that one process gave for its prompts
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from hf_models import CACHE, SMALL, greedy, left_padded, make_routers, prompt, sealed_tokens
from transformers import AutoModelForCausalLM

import saap_index as saap


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    try:
        from transformers.distributed import DistributedConfig

        split = {"distributed_config": DistributedConfig(tp_size=2)}
    except (ImportError, TypeError):  # as it was said before
        split = {"tp_plan": "auto"}
    model = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="sdpa", **split).eval()
    model.generation_config.eos_token_id = None
    saap.attach(model, make_routers(model), 1.0, **SMALL)
    rank = dist.get_rank()
    want = torch.load(folder / "want.pt")
    inputs = left_padded(prompt(2, 110), [0, 37])
    cache = saap.SaapCache(model)
    assert torch.equal(greedy(model, inputs, **{CACHE: cache}), want), f"rank {rank}"
    assert torch.equal(greedy(model, inputs, num_beams=2), torch.load(folder / "beams.pt")), f"rank {rank}"
    index = cache.layers[1].index
    assert (index.num_heads, index.num_kv_heads) == (2, 1) and min(sealed_tokens(cache)) > 100
    assert torch.equal(index.key_quantizer.centroids, make_routers(model).layers[1].key_quantizer.centroids[rank : rank + 1])

    cache.save(folder / "prompt")
    loaded = saap.SaapCache.load(folder / "prompt", model, verify=True)
    assert torch.equal(loaded.layers[1].index.invlists.row_ids(1), index.invlists.row_ids(1))
    dist.barrier()
    assert {x.name for x in (folder / "prompt").iterdir()} == {"rank_0_of_2", "rank_1_of_2"}
    (folder / f"passed_{rank}").touch()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
