# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Every wrapper around vLLM, and why vLLM's own hooks do not suffice.

- ``VllmConfig.__post_init__``: sets the page size before vLLM resolves it, and
  refuses what the backend does not support before any worker starts. No hook runs
  for a whole configuration. The views of it that multimodal models make for their
  parts are left alone, as vLLM leaves them: the whole is checked already.
- ``AsyncLLM._validate_resumable_request``, on CUDA: refuses streaming input under
  asynchronous scheduling. vLLM has no flag for it, and no hook for one request.
- ``CpuPlatform.get_attn_backend_cls``: the CPU platform ignores every selected
  backend but its own.

All do nothing unless the backend is selected.
"""

import functools

from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_clusterkv import requirements


def apply(member: AttentionBackendEnum) -> None:
    """Installs the wrappers; ``member`` is the registered backend."""
    _wrap_config(member)
    if current_platform.is_cpu():
        _wrap_cpu_platform(member)


def _wrap_config(member: AttentionBackendEnum) -> None:
    original = VllmConfig.__post_init__

    @functools.wraps(original)
    def post_init(self: VllmConfig, *args, **kwargs) -> None:
        if _is_selected(member, self) and not _is_submodel_view(self):
            requirements.set_page_size(self.cache_config)
            requirements.set_connector(self)
            requirements.check_config(self)
            if current_platform.is_cuda():
                _wrap_streaming_input(member)
        original(self, *args, **kwargs)

    VllmConfig.__post_init__ = post_init  # type: ignore[method-assign]


def _is_selected(member: AttentionBackendEnum, vllm_config: VllmConfig) -> bool:
    attention = vllm_config.attention_config
    return member in (attention.backend, *attention.backend_per_kind.values())


def _is_submodel_view(vllm_config: VllmConfig) -> bool:
    model_config = vllm_config.model_config
    return model_config is not None and model_config.is_submodel_config


@functools.cache
def _wrap_streaming_input(member: AttentionBackendEnum) -> None:
    # Imported here, since every process of vLLM loads the plugin.
    from vllm.v1.engine.async_llm import AsyncLLM

    original = AsyncLLM._validate_resumable_request  # type: ignore[attr-defined]

    @functools.wraps(original)
    def validate_resumable_request(self: AsyncLLM) -> None:
        if _is_selected(member, self.vllm_config):
            requirements.check_streaming_input(self.vllm_config)
        original(self)

    AsyncLLM._validate_resumable_request = (  # type: ignore[attr-defined]
        validate_resumable_request
    )


def _wrap_cpu_platform(member: AttentionBackendEnum) -> None:
    platform = type(current_platform)
    original = platform.get_attn_backend_cls.__func__  # type: ignore[attr-defined]

    @functools.wraps(original)
    def get_attn_backend_cls(
        cls, selected_backend, attn_selector_config, *args, **kwargs
    ) -> str:
        if selected_backend is not member:
            return original(
                cls, selected_backend, attn_selector_config, *args, **kwargs
            )
        requirements.check_layer(attn_selector_config)
        return member.get_path()

    platform.get_attn_backend_cls = classmethod(  # type: ignore[method-assign, assignment]
        get_attn_backend_cls
    )
