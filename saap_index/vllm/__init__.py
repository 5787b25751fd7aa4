"""The index inside vLLM: a plugin that decodes on the engine's own pages.

    vllm serve MODEL --attention-backend CUSTOM --additional-config '{"saap": {"routers": "FOLDER", "selectivity": 0.05}}'

Installed with the package, inert until it is asked for. `register` is the entry point (group ``vllm.general_plugins``),
`WorkerExtension` what ``--worker-extension-cls saap_index.vllm.WorkerExtension`` adds to a worker. Importing this imports neither
vLLM nor torch.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Make ``--attention-backend CUSTOM`` mean this. Called by vLLM once in every process, may be called again."""
    from .register import register

    register()


class WorkerExtension:
    """``LLM.collective_rpc("saap_stats")``: the counters of every worker, see `counters.Counters`."""

    def saap_stats(self) -> dict[str, Any]:
        from .counters import COUNTERS

        return COUNTERS.as_dict()
