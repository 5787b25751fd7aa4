"""Registration: `AttentionBackendEnum.CUSTOM` becomes ours, and vLLM's CPU platform learns to take it.

A name of one's own would do in one process only: the front end pickles its configuration into workers, where the enum is looked
up before any plugin is loaded. An exception here would be logged by vLLM and nothing more, so nothing here is relied upon later:
an engine in which this did not happen does not know CUSTOM and stops.
"""

from __future__ import annotations

from typing import Any

from .refusals import untested

BACKEND = "saap_index.vllm.backend.SaapBackend"
_MARK = "_saap_index"


def register() -> None:
    """See `saap_index.vllm.register`."""
    from vllm.logger import init_logger
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    logger = init_logger("vllm.saap_index")
    custom = AttentionBackendEnum.CUSTOM
    if custom.is_overridden() and custom.get_path() != BACKEND:
        logger.warning("saap_index: expected CUSTOM to be free, got %s: not registered", custom.get_path())
        return
    if not current_platform.is_cpu():
        logger.info("saap_index: serves vLLM on the CPU only, and does not register CUSTOM for %s", current_platform.device_name)
        return
    register_backend(custom, BACKEND)
    _teach(type(current_platform), custom)


def _teach(platform: Any, custom: Any) -> None:
    """vLLM's CPU platform takes its own backend whatever is asked for: let it take ours where CUSTOM is, or say why not."""
    if getattr(platform, _MARK, False):
        return
    plain = platform.get_attn_backend_cls.__func__

    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> Any:
        if selected_backend is not custom:
            return plain(cls, selected_backend, attn_selector_config, num_heads)
        if attn_selector_config.has_sliding_window:  # there is nothing to select among
            return plain(cls, None, attn_selector_config, num_heads)
        backend = custom.get_class()
        reasons = backend.validate_configuration(**attn_selector_config._asdict(), device_capability=None)
        if reasons:
            raise ValueError(
                f"Selected backend CUSTOM (saap_index) is not valid for this configuration. Reason: {reasons}; "
                f"{attn_selector_config}"
            )
        return custom.get_path()

    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
    setattr(platform, _MARK, True)


def warn_if_untested(logger: Any) -> None:
    """A line for a release of vLLM that no test has seen."""
    import vllm

    if line := untested(vllm.__version__):
        logger.warning(line)
