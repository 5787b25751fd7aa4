"""The index inside Hugging Face transformers: one line, and `generate` decodes sparsely.

    model = saap_index.attach(model, routers, selectivity=0.05)
    model.generate(**inputs, max_new_tokens=200)

Importing this package makes the attention function "saap" known to transformers. `docs/transformers.md` walks through it.
"""

from .support import check_version

check_version()

from .attach import attach, audit_stats, detach, detached  # noqa: E402 - after the version is known to be one that has what these import
from .attention import register  # noqa: E402
from .audit import AuditStats, AuditWarning, LayerAudit  # noqa: E402
from .cache import SaapCache  # noqa: E402
from .graphs import GraphWarning  # noqa: E402

register()

__all__ = ["AuditStats", "AuditWarning", "GraphWarning", "LayerAudit", "SaapCache", "attach", "audit_stats", "detach", "detached"]
