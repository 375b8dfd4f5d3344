# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""A vLLM attention backend that attends to the clusters of the KV cache a query
asks for.

Importing the package imports neither torch nor vLLM: vLLM loads the entry point
``register`` in every process, also in those that never use the backend.
"""

from typing import Any

__version__ = "0.1.0"


def register() -> None:
    """Makes ``--attention-backend clusterkv`` known to vLLM. Idempotent.

    The entry point of vLLM's plugin group ``vllm.general_plugins``.
    """
    from vllm_clusterkv.plugin import register as register_plugin

    register_plugin()


def _restore_member() -> Any:
    """Unpickles ``AttentionBackendEnum.CLUSTERKV`` (see ``plugin.register``)."""
    from vllm_clusterkv.plugin import register as register_plugin

    return register_plugin()
