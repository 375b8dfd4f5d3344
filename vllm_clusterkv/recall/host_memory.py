# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
"""The host pool: whether it fits this machine, or this container, and pinning."""

import contextlib
import math
import mmap
import os
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch
from vllm.logger import init_logger

from vllm_clusterkv import requirements

logger = init_logger("vllm.clusterkv")

SHARE = 0.95
"""Of what is there that the pool may take."""

_CHUNK_BYTES = 256 << 20

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


def allocate(shape: tuple[int, ...], dtype: torch.dtype, pinned: bool) -> torch.Tensor:
    """CPU memory full of zeros, which is there at once.

    Args:
        shape: Of the tensor.
        dtype: Likewise.
        pinned: Locked, and mapped for the current CUDA device at its own address.
            Give it back by ``release``.

    Raises:
        ValueError: It cannot be locked.
    """
    start = time.monotonic()
    memory = _touched(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
    if not pinned:
        return memory
    # torch's own pinned memory would be of the next power of two.
    error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if error.value != 0:
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        locked = "no limit" if limit == resource.RLIM_INFINITY else f"{limit >> 10} KiB"
        raise requirements.refusal(
            f"clusterkv.host_memory_gib: {memory.nbytes / 2**30:.1f} GiB a worker "
            f"could not be pinned (cudaHostRegister: {error}; ulimit -l: {locked})",
            "lower it, or raise the limit on locked memory (ulimit -l unlimited; "
            "docker run --ulimit memlock=-1)",
        )
    logger.info(
        "CLUSTERKV host tier: pinned %.1f GiB in %.1f s.",
        memory.nbytes / 2**30,
        time.monotonic() - start,
    )
    return memory


def _touched(num_bytes: int) -> torch.Tensor:
    """Zeros in pages of 2 MiB where there are such, each written to by some thread.

    The first write to a page is what takes time, 0.7 s a GiB in one thread.
    """
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    # Not shared, by default: such memory has no huge pages.
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A child would keep what the GPU reads from being written in place.
    for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTFORK):
        with contextlib.suppress(OSError):  # a kernel without it
            pages.madvise(advice)
    memory = torch.frombuffer(pages, dtype=torch.uint8)  # holds the pages
    # torch has one thread in vLLM's workers.
    num_threads = min(len(os.sched_getaffinity(0)), 32)
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(torch.Tensor.zero_, memory.split(_CHUNK_BYTES)))
    return memory


def release(memory: torch.Tensor, pinned: bool) -> None:
    """Unlocks what ``allocate`` made. Nothing must read it any more."""
    if pinned:
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
