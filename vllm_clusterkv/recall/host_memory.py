# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""How much memory a process of this machine, or of this container, can still take."""

from pathlib import Path

import psutil

from vllm_clusterkv import requirements

SHARE = 0.95
"""Of what is there that the pool may take."""

_CGROUP = Path("/sys/fs/cgroup")


def check(pool_bytes: int, cgroup: Path = _CGROUP) -> None:
    """Refuses a pool that does not fit, which the kernel would kill the server for.

    Args:
        pool_bytes: That the workers of this machine are about to take.
        cgroup: Where the container's limits are.

    Raises:
        ValueError: There is less.
    """
    limits = {"the machine's available memory": psutil.virtual_memory().available}
    left = _left_in_cgroup(cgroup)
    if left is not None:
        limits["the container's memory limit (cgroup)"] = left
    what, available = min(limits.items(), key=lambda item: item[1])
    if pool_bytes > SHARE * available:
        raise requirements.refusal(
            f"clusterkv.host_memory_gib needs {pool_bytes / 2**30:.1f} GiB here, "
            f"and {what} is {available / 2**30:.1f} GiB, of which "
            f"{SHARE:.0%} may be taken",
            "lower it, or stop what else uses memory",
        )


def _left_in_cgroup(cgroup: Path) -> int | None:
    """Bytes until the limit of cgroup v2, or v1; None without one."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            return int((cgroup / limit).read_text()) - int((cgroup / used).read_text())
        except (OSError, ValueError):  # not there, or "max"
            continue
    return None
