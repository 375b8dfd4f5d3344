# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""Registration of the backend in a vLLM process."""

from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_clusterkv import _restore_member, patches

BACKEND_NAME = "CLUSTERKV"
_CPU_BACKEND = "vllm_clusterkv.cpu_backend.ClusterKVCPUBackend"
_CUDA_BACKEND = "vllm_clusterkv.cuda_backend.ClusterKVCUDABackend"


def register() -> AttentionBackendEnum:
    """Adds ``CLUSTERKV`` to vLLM's backends and installs the start-up checks.

    Returns:
        The enum member. Calling again returns the same one.
    """
    registered = AttentionBackendEnum.__members__.get(BACKEND_NAME)
    if registered is not None:
        return registered
    # Platforms that have neither are refused by the start-up checks.
    path = _CUDA_BACKEND if current_platform.is_cuda() else _CPU_BACKEND
    member = AttentionBackendEnum.register(BACKEND_NAME, path)
    # vLLM pickles its config to the processes it spawns, an enum member by value,
    # and unpickles it before it loads plugins there. So the member restores itself
    # by registering first.
    vars(member)["__reduce_ex__"] = lambda protocol: (_restore_member, ())
    patches.apply(member)
    return member
