# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Every wrapper around vLLM, and why vLLM's own hooks do not suffice.

- ``VllmConfig.__post_init__``: sets the page size before vLLM resolves it, and
  refuses what the backend does not support before any worker starts. No hook runs
  for a whole configuration.
- ``CpuPlatform.get_attn_backend_cls``: the CPU platform ignores every selected
  backend but its own.

Both do nothing unless the backend is selected.
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
        attention = self.attention_config
        if member in (attention.backend, *attention.backend_per_kind.values()):
            requirements.set_page_size(self.cache_config)
            requirements.check_config(self)
        original(self, *args, **kwargs)

    VllmConfig.__post_init__ = post_init  # type: ignore[method-assign]


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
